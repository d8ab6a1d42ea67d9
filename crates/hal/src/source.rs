//! Where frames come from and where they go.
//!
//! Every crate that needs frames asks a [`FrameSource`] and gives them back to a [`FrameSink`]; buddy implements both,
//! and so does a failure injector in tests. A request says everything an allocator may need to know, with defaults
//! that are right for kernel data: one frame, anywhere, not movable, may not wait.

use core::fmt;

use crate::addr::PhysAddr;
use crate::cpu::CpuId;
use crate::frame::{Frame, Order};
use crate::owned::OwnedFrame;

/// What the caller can bear while it waits for memory: Linux's GFP context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Context {
    /// Interrupt, NMI, or a lock held: no waiting, no reclaim. `GFP_ATOMIC`, `GFP_NOWAIT`.
    #[default]
    Atomic,
    /// May wait, but must not start reclaim: the caller is part of it.
    NoReclaim,
    /// May reclaim clean pages, but must not start I/O. `GFP_NOIO`.
    NoIo,
    /// May wait for anything. `GFP_KERNEL`.
    MayWait,
}

/// What becomes of the frames: decides the page block they are taken from.
///
/// Source: Linux `enum migratetype`, Documentation/mm/physical_memory.rst.
#[doc(alias = "migratetype")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Mobility {
    /// Stays where it is: kernel data, page tables.
    #[default]
    Unmovable,
    /// Cannot move but can be dropped under pressure: caches.
    Reclaimable,
    /// Can be copied elsewhere and its mappings changed: user pages. May be lent from CMA.
    Movable,
}

/// Which memory node serves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NodePolicy {
    /// The node of the calling CPU, then the others by distance.
    #[default]
    Local,
    /// This node, then the others by distance from it.
    Preferred(NodeId),
    /// This node or nothing.
    Strict(NodeId),
    /// All nodes in turn.
    Interleave,
}

/// The number of a memory node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct NodeId(u16);

impl NodeId {
    /// Node 0.
    pub const ZERO: Self = Self(0);

    /// The node with this number.
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A request for a block of frames.
///
/// # Examples
///
/// ```
/// use kmem_hal::{Context, FrameRequest, Order, PhysAddr};
///
/// // Two frames below 16 MiB for a device with 24 address lines (GFP_DMA).
/// let dma = FrameRequest::new(Order::new(1).unwrap()).below(PhysAddr::new(1 << 24)).zeroed();
/// assert_eq!(dma.max_address, PhysAddr::new((1 << 24) - 1));
/// assert_eq!(dma.context, Context::Atomic);
/// ```
#[doc(alias = "gfp_t")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRequest {
    /// The size of the block.
    pub order: Order,
    /// The highest address that any byte of the block may have.
    pub max_address: PhysAddr,
    /// Alignment beyond the natural one, as an order; at most the natural one changes nothing.
    pub alignment: Order,
    /// What becomes of the frames.
    pub mobility: Mobility,
    /// Which node.
    pub node: NodePolicy,
    /// Whether every byte must be zero.
    pub zeroed: bool,
    /// What the caller can bear.
    pub context: Context,
    /// Whether the last reserves may be used: for code whose success frees memory.
    pub reserve: bool,
    /// Whether the block may lie in high memory, out of [`PhysMap::reach`](crate::PhysMap::reach), although it does not
    /// move: the caller maps what it gets. Movable frames may lie there anyway.
    pub high: bool,
    /// Whether the caller has another way where this is refused: not worth what others would have to give up for it ([`optional`](Self::optional())).
    pub optional: bool,
}

impl FrameRequest {
    /// One unmovable frame, anywhere, from any context.
    pub const ONE: Self = Self::new(Order::ZERO);

    /// A block of `order`, unmovable, anywhere, from any context.
    #[must_use]
    pub const fn new(order: Order) -> Self {
        Self {
            order,
            max_address: PhysAddr::new(u64::MAX),
            alignment: Order::ZERO,
            mobility: Mobility::Unmovable,
            node: NodePolicy::Local,
            zeroed: false,
            context: Context::Atomic,
            reserve: false,
            high: false,
            optional: false,
        }
    }

    /// With every byte zero.
    #[doc(alias = "__GFP_ZERO")]
    #[must_use]
    pub const fn zeroed(mut self) -> Self {
        self.zeroed = true;
        self
    }

    /// Wholly below `limit` (exclusive, bytes); a limit of 0 cannot be met.
    #[doc(alias = "GFP_DMA")]
    #[must_use]
    pub const fn below(mut self, limit: PhysAddr) -> Self {
        self.max_address = PhysAddr::new(limit.as_u64().saturating_sub(1));
        self
    }

    /// Aligned to at least this order.
    #[must_use]
    pub const fn aligned(mut self, alignment: Order) -> Self {
        self.alignment = alignment;
        self
    }

    /// For frames that can be moved.
    #[doc(alias = "GFP_HIGHUSER_MOVABLE")]
    #[must_use]
    pub const fn movable(mut self) -> Self {
        self.mobility = Mobility::Movable;
        self
    }

    /// For frames of this mobility.
    #[must_use]
    pub const fn mobility(mut self, mobility: Mobility) -> Self {
        self.mobility = mobility;
        self
    }

    /// From this node or nodes.
    #[must_use]
    pub const fn node(mut self, node: NodePolicy) -> Self {
        self.node = node;
        self
    }

    /// In this context.
    #[must_use]
    pub const fn context(mut self, context: Context) -> Self {
        self.context = context;
        self
    }

    /// From high memory first, where the machine has any: for a caller that maps the frames itself, as vmalloc does.
    #[doc(alias = "__GFP_HIGHMEM")]
    #[must_use]
    pub const fn high(mut self) -> Self {
        self.high = true;
        self
    }

    /// Where it can be had for nothing: the caller has another way.
    ///
    /// It may take frames down to the min watermark as any other, and [`Pressure`] is told of [`Low`](PressureLevel::Low) where they fall below the low one: that is so
    /// whoever takes them, and all who ask next are to find reclaim at work. Nobody is told where frames are there and only no block of the order is, of a block
    /// above the top order, and never of a higher level: nothing is reclaimed, emptied or let go for this request.
    ///
    /// Source: Linux `__GFP_NORETRY`, which wakes kswapd; mm/slub.c, `allocate_slab`, which does not for a slab larger than it must be.
    #[doc(alias = "__GFP_NORETRY")]
    #[must_use]
    pub const fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// From the last reserves, if need be.
    #[doc(alias = "__GFP_MEMALLOC")]
    #[must_use]
    pub const fn with_reserve(mut self) -> Self {
        self.reserve = true;
        self
    }
}

impl Default for FrameRequest {
    fn default() -> Self {
        Self::ONE
    }
}

/// Why no memory was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AllocError {
    /// The allocator has not been initialised.
    NotInitialised,
    /// No fitting run was free at some instant of the call, other CPUs' caches included.
    OutOfMemory,
    /// No fitting run was found, and yet one may have been free all along: other CPUs' caches could not be asked, a block that a nested
    /// call freed waits for the call that it interrupted, or frees overtook the search each time.
    OutOfMemoryHere,
    /// The request can never be met: order or alignment too large, or no memory below its address limit.
    Unsatisfiable,
    /// A nested call met a state that only the interrupted code can finish.
    Busy,
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotInitialised => "the allocator has not been initialised",
            Self::OutOfMemory => "out of memory",
            Self::OutOfMemoryHere => "out of memory; the caches of other CPUs were not asked",
            Self::Unsatisfiable => "no memory of this machine can ever satisfy the request",
            Self::Busy => "the allocator is busy in the code that was interrupted",
        })
    }
}

impl core::error::Error for AllocError {}

/// Gives frames.
///
/// # Safety
///
/// - `F1`: a returned block is owned by nobody else, is memory that works as such, and no TLB translates to it.
/// - `F2`: it meets the request: order, address limit, alignment, node if strict, zeroed if asked.
/// - `F3`: a failed call changes nothing that a later call could see, statistics aside.
pub unsafe trait FrameSource {
    /// Allocates one block.
    ///
    /// # Errors
    ///
    /// [`AllocError`]; out of memory is an ordinary answer.
    #[doc(alias = "alloc_pages")]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError>;

    /// Allocates up to `count` blocks, handing each to `give`; answers how many.
    ///
    /// Stops at the first refusal, whose error is lost where something was given before it.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where not even the first block could be given.
    #[doc(alias = "alloc_pages_bulk")]
    fn alloc_batch(
        &self,
        request: &FrameRequest,
        count: usize,
        give: &mut dyn FnMut(OwnedFrame),
    ) -> Result<usize, AllocError> {
        for given in 0..count {
            match self.alloc(request) {
                Ok(frame) => give(frame),
                Err(error) if given == 0 => return Err(error),
                Err(_) => return Ok(given),
            }
        }
        Ok(count)
    }

    /// How many memory nodes there are: their numbers are below that. A source that says nothing has one.
    ///
    /// What this and the next three say stays as it is once the source has given a frame.
    #[doc(alias = "num_possible_nodes")]
    #[inline]
    fn node_count(&self) -> u16 {
        1
    }

    /// The node whose memory is nearest to `cpu`: what [`NodePolicy::Local`] begins with.
    #[doc(alias = "cpu_to_mem")]
    #[inline]
    fn node_of_cpu(&self, cpu: CpuId) -> NodeId {
        let _ = cpu;
        NodeId::ZERO
    }

    /// The node that a frame of this source lies in.
    #[doc(alias = "page_to_nid")]
    #[inline]
    fn node_of_frame(&self, frame: Frame) -> NodeId {
        let _ = frame;
        NodeId::ZERO
    }

    /// How far `to` is from `from`: more is farther (SLIT: 10 is local).
    #[inline]
    fn node_distance(&self, from: NodeId, to: NodeId) -> u8 {
        if from == to { 10 } else { 20 }
    }
}

/// Takes frames back.
///
/// Not unsafe to implement, since a sink that loses frames is only wasteful:
/// - `F4`: what came back can be given again by the source that gave it.
pub trait FrameSink {
    /// Frees one block.
    #[doc(alias = "__free_pages")]
    fn free(&self, frame: OwnedFrame);

    /// Frees the blocks that `next` gives until it gives `None`.
    fn free_batch(&self, next: &mut dyn FnMut() -> Option<OwnedFrame>) {
        while let Some(frame) = next() {
            self.free(frame);
        }
    }
}

/// The four questions about memory nodes of [`FrameSource`], put to the source in a field: for a source that stands before another one. Whoever leaves
/// them out makes a machine with several nodes look like one.
///
/// # Examples
///
/// ```
/// use kmem_hal::{AllocError, FrameRequest, FrameSource, OwnedFrame};
///
/// /// Refuses to give more than a frame at a time.
/// struct OneByOne<S>(S);
///
/// // SAFETY: what it gives is the inner source's.
/// unsafe impl<S: FrameSource> FrameSource for OneByOne<S> {
///     fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
///         if request.order.frames() > 1 {
///             return Err(AllocError::Unsatisfiable);
///         }
///         self.0.alloc(request)
///     }
///
///     kmem_hal::forward_nodes!(0);
/// }
/// ```
#[macro_export]
macro_rules! forward_nodes {
    ($field:tt) => {
        fn node_count(&self) -> u16 {
            $crate::FrameSource::node_count(&self.$field)
        }
        fn node_of_cpu(&self, cpu: $crate::CpuId) -> $crate::NodeId {
            $crate::FrameSource::node_of_cpu(&self.$field, cpu)
        }
        fn node_of_frame(&self, frame: $crate::Frame) -> $crate::NodeId {
            $crate::FrameSource::node_of_frame(&self.$field, frame)
        }
        fn node_distance(&self, from: $crate::NodeId, to: $crate::NodeId) -> u8 {
            $crate::FrameSource::node_distance(&self.$field, from, to)
        }
    };
}

// SAFETY: a reference forwards to a source that keeps the contract.
unsafe impl<S: FrameSource + ?Sized> FrameSource for &S {
    #[inline]
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        (**self).alloc(request)
    }
    #[inline]
    fn alloc_batch(
        &self,
        request: &FrameRequest,
        count: usize,
        give: &mut dyn FnMut(OwnedFrame),
    ) -> Result<usize, AllocError> {
        (**self).alloc_batch(request, count, give)
    }
    #[inline]
    fn node_count(&self) -> u16 {
        (**self).node_count()
    }
    #[inline]
    fn node_of_cpu(&self, cpu: CpuId) -> NodeId {
        (**self).node_of_cpu(cpu)
    }
    #[inline]
    fn node_of_frame(&self, frame: Frame) -> NodeId {
        (**self).node_of_frame(frame)
    }
    #[inline]
    fn node_distance(&self, from: NodeId, to: NodeId) -> u8 {
        (**self).node_distance(from, to)
    }
}

impl<S: FrameSink + ?Sized> FrameSink for &S {
    #[inline]
    fn free(&self, frame: OwnedFrame) {
        (**self).free(frame);
    }
    #[inline]
    fn free_batch(&self, next: &mut dyn FnMut() -> Option<OwnedFrame>) {
        (**self).free_batch(next);
    }
}

/// Asks the owner of pages to move them away: cow-mm answers, buddy asks (CMA, compaction, offline).
pub trait Migrate {
    /// Moves what frame `from` holds to `to` and changes every mapping of it, flushed.
    ///
    /// # Errors
    ///
    /// Gives `to` back with the reason; `from` is as it was.
    #[doc(alias = "migrate_pages")]
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)>;
}

/// Why a page was not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MigrateError {
    /// Nobody here knows the frame: it belongs to the kernel, not to a movable owner.
    NotMovable,
    /// A pin or an extra reference holds it: try later.
    Pinned,
    /// It was freed meanwhile: nothing needs to move.
    Gone,
    /// Memory for the move itself ran out.
    OutOfMemory,
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotMovable => "the frame belongs to no movable owner",
            Self::Pinned => "the page is pinned",
            Self::Gone => "the page was freed meanwhile",
            Self::OutOfMemory => "out of memory during the move",
        })
    }
}

impl core::error::Error for MigrateError {}

/// A cache that can give memory back.
#[doc(alias = "struct shrinker")]
pub trait Shrink {
    /// About how many objects could be freed; 0 where nothing can be.
    #[doc(alias = "count_objects")]
    fn count(&self) -> usize;

    /// Frees up to `objects` objects; gives how many were.
    #[doc(alias = "scan_objects")]
    fn scan(&self, objects: usize) -> usize;
}

/// How short memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PressureLevel {
    /// Below the low watermark: reclaim in the background (wake kswapd).
    Low,
    /// Below the min watermark: only reserves are left.
    Min,
    /// A request is about to be refused: free something now or say that nothing can be.
    Refusing,
}

/// Told by the page-frame allocator when memory runs short, on slow paths only.
pub trait Pressure {
    /// Memory is short on `node`; returns whether something was freed, so that a retry makes sense. For an [`optional`](FrameRequest::optional) request
    /// it is enough to take note.
    fn pressure(&self, node: NodeId, level: PressureLevel, request: &FrameRequest) -> bool;
}

/// Nobody frees anything under pressure.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPressure;

impl Pressure for NoPressure {
    fn pressure(&self, _node: NodeId, _level: PressureLevel, _request: &FrameRequest) -> bool {
        false
    }
}
