//! What a slab system stands on: frames, a map, CPUs, a lock, large sizes.
//!
//! One type parameter instead of six: a kernel names its parts once. [`Parts`] puts ready ones together.

use core::fmt;
use core::marker::PhantomData;

use kmem_hal::{
    AllocError, Cpu, FrameSink, FrameSource, FrameTable, IrqSafe, LargeSource, NoLarge, PhysMap,
    RawLock, TraceEvent,
};

use crate::misuse::Misuse;
use crate::policy::{Plain, Policy};

/// The parts that a slab system is built from.
///
/// # Safety
///
/// - `S1`: each accessor gives the same part at every call, for the life of the value, wherever it is moved.
/// - `S2`: the frames of the source that lie in the map's reach and in the table belong to whoever allocated them: nobody else
///   writes their slots while they are allocated.
/// - `S3`: the map gives page-aligned pointers for frames.
pub unsafe trait Platform {
    /// Where slabs come from and go to.
    type Frames: FrameSource + FrameSink;
    /// Where frames can be read and written.
    type Map: PhysMap;
    /// The CPUs.
    type Cpu: Cpu;
    /// The lock of depots.
    type Lock: RawLock;
    /// Where large sizes come from.
    type Large: LargeSource;
    /// How much kmalloc checks, and typed caches that do not say otherwise.
    type Policy: Policy;

    /// The page source.
    fn frames(&self) -> &Self::Frames;
    /// The map of physical memory.
    fn map(&self) -> &Self::Map;
    /// The table of frame slots, which must cover the frames that the source gives.
    fn table(&self) -> &FrameTable;
    /// The CPUs.
    fn cpu(&self) -> &Self::Cpu;
    /// The source of large sizes.
    fn large(&self) -> &Self::Large;

    /// Told of slabs that are taken and given back; must not allocate from the same system.
    #[inline]
    fn trace(&self, event: TraceEvent) {
        let _ = event;
    }

    /// Told of an allocation of `bytes` bytes that was refused, unless its flags said [`NO_WARN`](crate::Flags::NO_WARN). A kernel prints;
    /// the default only lets it be counted. Must not allocate from the same system.
    #[doc(alias = "warn_alloc")]
    fn refused(&self, bytes: usize, error: AllocError) {
        let _ = (bytes, error);
    }

    /// Told of a misuse that was found. A kernel prints or panics; the default only lets it be counted.
    ///
    /// May be called with a CPU pinned, and with interrupts off. After a panic that is caught every object still has one owner at most; those that
    /// the call was about to give back to their slabs may be lost, and so is, for the rest of its cache's life, a free one that an allocation found
    /// written to: it counts as active.
    fn misuse(&self, misuse: &Misuse) {
        let _ = misuse;
    }
}

/// Ready-made parts put together: by value or by reference, both work. `H` is the policy, [`Plain`] or more.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameTable, OffsetMap, SingleCpu};
/// use kmem_hal::{AllocError, FrameRequest, FrameSink, FrameSource, OwnedFrame};
/// use kmem_slab::{Parts, SlabSystem};
///
/// struct Nothing;
/// // SAFETY: never gives a frame.
/// unsafe impl FrameSource for Nothing {
///     fn alloc(&self, _: &FrameRequest) -> Result<OwnedFrame, AllocError> { Err(AllocError::OutOfMemory) }
/// }
/// impl FrameSink for Nothing { fn free(&self, _: OwnedFrame) {} }
///
/// static TABLE: FrameTable = FrameTable::new();
/// // SAFETY: one thread runs this example.
/// let cpu = unsafe { SingleCpu::new() };
/// // SAFETY: the map reaches nothing and the source gives nothing.
/// let parts = unsafe { Parts::<_, _, _>::new(Nothing, OffsetMap::unset(), cpu, &TABLE) };
/// let system = SlabSystem::new();
/// assert!(system.init(parts).is_err(), "no frame for the first page of heads");
/// ```
pub struct Parts<F, M, C, L = IrqSafe, V = NoLarge, T = &'static FrameTable, H = Plain> {
    frames: F,
    map: M,
    cpu: C,
    table: T,
    large: V,
    lock: PhantomData<fn() -> (L, H)>,
}

impl<F, M, C, L, T, H> Parts<F, M, C, L, NoLarge, T, H> {
    /// Parts without a source of large sizes.
    ///
    /// # Safety
    ///
    /// `S2` and `S3` of [`Platform`] hold for `frames`, `map` and `table`.
    pub const unsafe fn new(frames: F, map: M, cpu: C, table: T) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::with_large(frames, map, cpu, table, NoLarge) }
    }
}

impl<F, M, C, L, V, T, H> Parts<F, M, C, L, V, T, H> {
    /// Parts with a source of large sizes.
    ///
    /// # Safety
    ///
    /// As [`new`](Parts::new).
    pub const unsafe fn with_large(frames: F, map: M, cpu: C, table: T, large: V) -> Self {
        Self {
            frames,
            map,
            cpu,
            table,
            large,
            lock: PhantomData,
        }
    }
}

// SAFETY: S1: the fields are private and never change; S2, S3: promised to the constructors.
unsafe impl<F, M, C, L, V, T, H> Platform for Parts<F, M, C, L, V, T, H>
where
    F: FrameSource + FrameSink,
    M: PhysMap,
    C: Cpu,
    L: RawLock,
    V: LargeSource,
    T: core::ops::Deref<Target = FrameTable>,
    H: Policy,
{
    type Frames = F;
    type Map = M;
    type Cpu = C;
    type Lock = L;
    type Large = V;
    type Policy = H;

    fn frames(&self) -> &F {
        &self.frames
    }
    #[inline(always)]
    fn map(&self) -> &M {
        &self.map
    }
    #[inline(always)]
    fn table(&self) -> &FrameTable {
        &self.table
    }
    #[inline(always)]
    fn cpu(&self) -> &C {
        &self.cpu
    }
    fn large(&self) -> &V {
        &self.large
    }
}

impl<F, M, C, L, V, T, H> fmt::Debug for Parts<F, M, C, L, V, T, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Parts(..)")
    }
}
