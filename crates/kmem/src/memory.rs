//! The memory of a machine, put together: frame table, page-frame allocator, slab system.
//!
//! ```text
//!   BootMap ── EarlyAllocator ──> FrameTable sections ──> Buddy (zones) ──> SlabSystem (kmalloc)
//! ```
//!
//! The page-frame allocator's hook for short memory goes to the slab system first ([`Shrinkers`]).
//!
//! [`Memory`] is what a kernel with several CPUs, nodes or own traits keeps in its `static`; [`Heap`](crate::Heap) is
//! the same for those who want a global allocator and nothing else.

use core::fmt;

use kmem_buddy::{BootMap, Buddy, Config, EarlyError};
use kmem_hal::{
    AllocError, Cpu, CpuCall, CpuId, FrameTable, IrqSafe, LargeSource, NoCpuCall, NoLarge,
    NoPressure, PhysMap, Pressure, RawLock,
};
use kmem_slab::{Parts, SlabSystem};

use crate::shrinkers::Shrinkers;
use crate::table;

/// The page-frame allocator of a [`Memory`]: `P` is told of short memory after the slab system.
pub type Frames<M, C, L = IrqSafe, K = NoCpuCall, P = NoPressure> = Buddy<M, C, L, K, Shrinkers<P>>;

/// The parts that the slab system of a [`Memory`] stands on.
pub type SlabParts<M, C, L = IrqSafe, K = NoCpuCall, P = NoPressure, V = NoLarge> =
    Parts<&'static Frames<M, C, L, K, P>, &'static M, &'static C, L, V, &'static FrameTable>;

/// Why the memory of a machine could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitError {
    /// An entry of the memory map cannot be.
    Map(kmem_buddy::BootMapError),
    /// No room for the frame table.
    FrameTable(EarlyError),
    /// The page-frame allocator did not start.
    Frames(kmem_buddy::InitError),
    /// The slab system did not start; the page-frame allocator works.
    Slab(kmem_slab::InitError),
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(error) => write!(f, "memory map: {error}"),
            Self::FrameTable(error) => write!(f, "frame table: {error}"),
            Self::Frames(error) => write!(f, "page-frame allocator: {error}"),
            Self::Slab(error) => write!(f, "slab: {error}"),
        }
    }
}

impl core::error::Error for InitError {}

/// Frame table, page-frame allocator and slab system of one machine.
///
/// # Examples
///
/// ```
/// use kmem::{BootMap, Config, FrameRequest, FrameSink, FrameSource, Memory, OffsetMap, RegionKind};
/// use kmem::{PhysAddr, SingleCpu};
///
/// // SAFETY: one CPU, in this example one thread, uses it.
/// static MEMORY: Memory<OffsetMap, SingleCpu> =
///     unsafe { Memory::new(OffsetMap::unset(), SingleCpu::new()) };
///
/// # let arena = Box::leak(vec![0u8; 33 << 20].into_boxed_slice());
/// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
/// # let offset = base.wrapping_sub(1 << 20);
/// let mut map: BootMap = BootMap::new();
/// map.push(PhysAddr::new(1 << 20), 32 << 20, RegionKind::Usable)?;
/// // SAFETY: 33 MiB are mapped at `offset`.
/// unsafe { MEMORY.frames().memory().set(offset, 33 << 8) };
/// // SAFETY: X1: nobody else uses the memory of the map.
/// unsafe { MEMORY.init(&mut map, &Config::new())? };
///
/// let frame = MEMORY.frames().alloc(&FrameRequest::ONE)?;
/// MEMORY.frames().free(frame);
/// let object = MEMORY.slab().kmalloc(100, kmem::Flags::ZERO)?;
/// // SAFETY: just allocated.
/// unsafe { MEMORY.slab().kfree(object.as_ptr()) };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Memory<M, C, L = IrqSafe, K = NoCpuCall, P = NoPressure, V = NoLarge>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
    K: CpuCall + 'static,
    P: Pressure + 'static,
    V: LargeSource,
{
    table: FrameTable,
    frames: Frames<M, C, L, K, P>,
    slab: SlabSystem<SlabParts<M, C, L, K, P, V>>,
}

impl<M, C, L> Memory<M, C, L>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
{
    kmem_hal::const_new! {
        /// A machine whose other CPUs, if any, cannot be called, and where nobody reclaims.
        pub fn new(memory: M, cpu: C) -> Self {
            Memory::with(memory, cpu, NoCpuCall, NoPressure)
        }
    }

    /// Sets everything up from the boot map: called once, on the boot CPU.
    ///
    /// # Errors
    ///
    /// [`InitError`]. A frame table that was carved before stays carved, and the next call uses it.
    ///
    /// # Safety
    ///
    /// `X1` of [`EarlyAllocator::new`](kmem_buddy::EarlyAllocator::new): the memory that `map` calls usable is in use by nobody
    /// where it is not reserved in `map`, and no other allocator is started on it.
    pub unsafe fn init<const N: usize>(
        &'static self,
        map: &mut BootMap<N>,
        config: &Config,
    ) -> Result<(), InitError> {
        // SAFETY: X1, by contract.
        unsafe { self.init_with(map, config, NoLarge) }
    }
}

impl<M, C, L, K, P, V> Memory<M, C, L, K, P, V>
where
    M: PhysMap + 'static,
    C: Cpu + 'static,
    L: RawLock + 'static,
    K: CpuCall + 'static,
    P: Pressure + 'static,
    V: LargeSource,
{
    kmem_hal::const_new! {
        /// A machine with everything that a kernel may bring.
        pub fn with(memory: M, cpu: C, call: K, pressure: P) -> Self {
            let pressure = Shrinkers::of::<SlabParts<M, C, L, K, P, V>>(pressure);
            Self {
                table: FrameTable::new(),
                frames: Buddy::with(memory, cpu, call, pressure),
                slab: SlabSystem::new(),
            }
        }
    }

    /// Sets everything up, with a source of large sizes (vmalloc): called once, on the boot CPU.
    ///
    /// # Errors
    ///
    /// [`InitError`]. A frame table that was carved before stays carved, and the next call uses it.
    ///
    /// # Safety
    ///
    /// `X1` of [`EarlyAllocator::new`](kmem_buddy::EarlyAllocator::new): the memory that `map` calls usable is in use by nobody
    /// where it is not reserved in `map`, and no other allocator is started on it.
    pub unsafe fn init_with<const N: usize>(
        &'static self,
        map: &mut BootMap<N>,
        config: &Config,
        large: V,
    ) -> Result<(), InitError> {
        if self.frames.is_initialised() {
            return Err(InitError::Frames(kmem_buddy::InitError::Twice));
        }
        // SAFETY: X1, by contract.
        unsafe { self.carve_table(map) }.map_err(InitError::FrameTable)?;
        // SAFETY: X1, by contract; the frame table is reserved in `map`.
        unsafe { self.frames.init(map, config) }.map_err(InitError::Frames)?;
        // SAFETY: S2: the frames come from this machine's allocator, whose holders alone write their slots; S3: `PhysMap`
        // gives page-aligned pointers for frames.
        let parts = unsafe {
            Parts::with_large(
                &self.frames,
                self.frames.memory(),
                self.frames.cpu(),
                &self.table,
                large,
            )
        };
        self.slab.init(parts).map_err(InitError::Slab)?;
        // SAFETY: `with` made the hook for this slab system's platform.
        unsafe { self.frames.pressure().connect(&self.slab) };
        Ok(())
    }

    /// Carves the frame table alone: the first stage of `init`, for a kernel that shows its stages.
    ///
    /// # Errors
    ///
    /// [`EarlyError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// `X1` of [`EarlyAllocator::new`](kmem_buddy::EarlyAllocator::new): the memory that `map` calls usable is in use by nobody
    /// where it is not reserved in `map`, and no other allocator is started on it.
    pub unsafe fn carve_table<const N: usize>(
        &self,
        map: &mut BootMap<N>,
    ) -> Result<(), EarlyError> {
        if !self.table.directory().is_empty() {
            return Ok(());
        }
        // SAFETY: X1, by contract.
        unsafe { table::carve(&self.table, map, self.frames.memory()) }
    }

    /// Gives a CPU that comes online its caches.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where there is no memory for them.
    pub fn cpu_online(&self, cpu: CpuId) -> Result<(), AllocError> {
        self.frames.cpu_online(cpu)?;
        self.slab.cpu_online(cpu)
    }

    /// The slots of all frames.
    pub const fn table(&self) -> &FrameTable {
        &self.table
    }

    /// The page-frame allocator.
    pub const fn frames(&self) -> &Frames<M, C, L, K, P> {
        &self.frames
    }

    /// The slab system: kmalloc and caches.
    pub const fn slab(&self) -> &SlabSystem<SlabParts<M, C, L, K, P, V>> {
        &self.slab
    }
}

impl<M, C, L, K, P, V> fmt::Debug for Memory<M, C, L, K, P, V>
where
    M: PhysMap,
    C: Cpu,
    L: RawLock,
    K: CpuCall,
    P: Pressure,
    V: LargeSource,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("frames", &self.frames)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}
