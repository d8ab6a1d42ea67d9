//! Failure injection: the N-th allocation of an operation fails, for every N.
//!
//! An operation that allocates five times can fail in five places, and each must leave things as they were. So a test
//! runs the operation with the first allocation failing, then with the second, and so on until a run in which nothing
//! was left to fail: [`every_failure`] is that loop.
//!
//! ```text
//!   plan ──┬── Failing<frames>      one count over all wrappers of a plan:
//!          ├── Failing<objects>     the N-th call fails, whoever it goes to
//!          └── Failing<large>
//! ```
//!
//! Invariants
//! - `I1`: a call that fails does not reach what is wrapped, so it changes nothing there.
//! - `I2`: giving back never fails and is not counted.

use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use kmem_hal::{
    AllocError, BlockDevice, Deferred, Frame, FrameRequest, FrameSink, FrameSource, Grace, IoError,
    IoState, IoTicket, LargeSource, ObjectAlloc, OwnedFrame, PageProvider,
};

/// Which calls fail. Shared by the wrappers of one test.
#[derive(Debug)]
pub struct FailPlan {
    calls: AtomicU64,
    failed: AtomicU64,
    /// The first call that fails, and the first after it that succeeds again; 0, 0 for none.
    from: AtomicU64,
    until: AtomicU64,
}

impl FailPlan {
    /// Nothing fails.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            calls: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            from: AtomicU64::new(0),
            until: AtomicU64::new(0),
        }
    }

    /// The `n`-th call from now fails, once; the first is 1. 0: none fails.
    pub fn fail_at(&self, n: u64) {
        self.set(n, n.saturating_add(1));
    }

    /// The `n`-th call from now and all after it fail; the first is 1. 0: none fails.
    pub fn fail_from(&self, n: u64) {
        self.set(n, u64::MAX);
    }

    /// Nothing fails from now on. Counts stay.
    pub fn stop(&self) {
        self.from.store(0, Ordering::SeqCst);
        self.until.store(0, Ordering::SeqCst);
    }

    /// Calls since the plan was last set.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Calls that were made to fail since the plan was last set.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::SeqCst)
    }

    fn set(&self, from: u64, until: u64) {
        self.calls.store(0, Ordering::SeqCst);
        self.failed.store(0, Ordering::SeqCst);
        self.from.store(from, Ordering::SeqCst);
        self.until
            .store(if from == 0 { 0 } else { until }, Ordering::SeqCst);
    }

    /// Counts a call; `true` where it must fail.
    pub fn next_fails(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let fails =
            call >= self.from.load(Ordering::SeqCst) && call < self.until.load(Ordering::SeqCst);
        if fails {
            self.failed.fetch_add(1, Ordering::SeqCst);
        }
        fails
    }
}

impl Default for FailPlan {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `operation` with its first allocation failing, then the second, ... until a run in which none failed.
///
/// `operation` gets the plan, already set, and starts from a fresh state each time. Gives the number of runs that had a
/// failure, which is the number of places where the operation allocates.
///
/// # Panics
///
/// After 100,000 runs: the operation then allocates more each time, or retries for ever.
///
/// # Examples
///
/// ```
/// use kmem_hal::{FrameRequest, FrameSink, FrameSource};
/// use kmem_testkit::{Arena, ArenaSource, FailingSource, every_failure};
///
/// let places = every_failure(|plan| {
///     let arena = Arena::new(8);
///     let frames = ArenaSource::new(&arena);
///     let source = FailingSource::new(&frames, plan);
///     // The operation under test: two frames or none.
///     if let Ok(a) = source.alloc(&FrameRequest::ONE) {
///         if let Ok(b) = source.alloc(&FrameRequest::ONE) {
///             source.free(b);
///         }
///         source.free(a);
///     }
///     frames.assert_all_free();
/// });
/// assert_eq!(places, 2);
/// ```
pub fn every_failure(mut operation: impl FnMut(&FailPlan)) -> u64 {
    for n in 1..=100_000 {
        let plan = FailPlan::new();
        plan.fail_at(n);
        operation(&plan);
        if plan.failed() == 0 {
            return n - 1;
        }
    }
    panic!("100000 runs, and still an allocation to fail");
}

/// Anything that gives memory or does I/O, failing as its plan says.
///
/// Implements each of hal's traits that what it wraps implements. Failed allocations say [`AllocError::OutOfMemory`],
/// failed I/O says [`IoError::Device`].
#[derive(Debug)]
pub struct Failing<'p, T> {
    inner: T,
    plan: &'p FailPlan,
}

/// A frame source that fails at the N-th call.
pub type FailingSource<'p, S> = Failing<'p, S>;

/// An object allocator that fails at the N-th call.
pub type FailingObjects<'p, A> = Failing<'p, A>;

impl<'p, T> Failing<'p, T> {
    /// Wraps `inner`, usually a reference.
    pub const fn new(inner: T, plan: &'p FailPlan) -> Self {
        Self { inner, plan }
    }

    /// What is wrapped.
    pub const fn inner(&self) -> &T {
        &self.inner
    }

    fn allocate(&self) -> Result<(), AllocError> {
        if self.plan.next_fails() {
            Err(AllocError::OutOfMemory)
        } else {
            Ok(())
        }
    }

    fn device(&self) -> Result<(), IoError> {
        if self.plan.next_fails() {
            Err(IoError::Device)
        } else {
            Ok(())
        }
    }
}

// SAFETY: F1, F2 are the wrapped source's; F3: a failed call does not reach it (`I1`). Batches use the default, which
// counts every block.
unsafe impl<S: FrameSource> FrameSource for Failing<'_, S> {
    fn alloc(&self, request: &FrameRequest) -> Result<OwnedFrame, AllocError> {
        self.allocate()?;
        self.inner.alloc(request)
    }
    kmem_hal::forward_nodes!(inner);
}

impl<S: FrameSink> FrameSink for Failing<'_, S> {
    fn free(&self, frame: OwnedFrame) {
        self.inner.free(frame);
    }
}

// SAFETY: B1, B3 are the wrapped allocator's; B2: a failed call does not reach it (`I1`). Bulk calls use the default,
// which counts every object.
unsafe impl<T, A: ObjectAlloc<T>> ObjectAlloc<T> for Failing<'_, A> {
    const TYPE_STABLE: bool = A::TYPE_STABLE;

    fn alloc(&self) -> Result<NonNull<T>, AllocError> {
        self.allocate()?;
        self.inner.alloc()
    }

    unsafe fn free(&self, object: NonNull<T>) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.free(object) }
    }

    fn alloc_bulk(&self, out: &mut [MaybeUninit<NonNull<T>>]) -> usize {
        for (given, place) in out.iter_mut().enumerate() {
            match self.alloc() {
                Ok(object) => place.write(object),
                Err(_) => return given,
            };
        }
        out.len()
    }

    unsafe fn free_deferred<G: Grace>(
        &self,
        object: NonNull<T>,
        grace: &G,
    ) -> Result<(), NonNull<T>> {
        // SAFETY: the caller's promise is passed on; the wrapped allocator outlives the grace period as this does.
        unsafe { self.inner.free_deferred(object, grace) }
    }
}

// SAFETY: V1 to V3 are the wrapped source's.
unsafe impl<L: LargeSource> LargeSource for Failing<'_, L> {
    fn in_any_context(&self) -> bool {
        self.inner.in_any_context()
    }
    fn alloc_large(&self, size: usize, align: usize) -> Result<NonNull<u8>, AllocError> {
        self.allocate()?;
        self.inner.alloc_large(size, align)
    }
    unsafe fn free_large(&self, memory: NonNull<u8>) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.free_large(memory) }
    }
    fn contains(&self, address: *const u8) -> bool {
        self.inner.contains(address)
    }
    fn size_of(&self, memory: NonNull<u8>) -> Option<usize> {
        self.inner.size_of(memory)
    }
}

// SAFETY: W1 to W4 are the wrapped provider's; failed submissions do not reach it.
unsafe impl<P: PageProvider> PageProvider for Failing<'_, P> {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }
    fn read(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.device()?;
        self.inner.read(index, frame)
    }
    fn write(&self, index: u64, frame: Frame) -> Result<IoState, IoError> {
        self.device()?;
        self.inner.write(index, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.inner.poll(ticket)
    }
}

// SAFETY: W1 to W3 are the wrapped device's; failed submissions do not reach it.
unsafe impl<B: BlockDevice> BlockDevice for Failing<'_, B> {
    fn blocks(&self) -> u64 {
        self.inner.blocks()
    }
    fn read(&self, block: u64, frame: Frame) -> Result<IoState, IoError> {
        self.device()?;
        self.inner.read(block, frame)
    }
    fn write(&self, block: u64, frame: Frame) -> Result<IoState, IoError> {
        self.device()?;
        self.inner.write(block, frame)
    }
    fn poll(&self, ticket: IoTicket) -> Result<IoState, IoError> {
        self.inner.poll(ticket)
    }
}

// SAFETY: G1 to G4 are the wrapped implementation's; a refused call is given back untouched.
unsafe impl<G: Grace> Grace for Failing<'_, G> {
    type Guard<'a>
        = G::Guard<'a>
    where
        Self: 'a;

    fn read(&self) -> Self::Guard<'_> {
        self.inner.read()
    }
    fn defer(&self, call: Deferred) -> Result<(), Deferred> {
        if self.plan.next_fails() {
            return Err(call);
        }
        self.inner.defer(call)
    }
    fn poll(&self) -> usize {
        self.inner.poll()
    }
    fn synchronize(&self) {
        self.inner.synchronize();
    }
    fn pending(&self) -> usize {
        self.inner.pending()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Arena, ArenaSource, HeapObjects};

    #[test]
    fn fails_at_exactly_the_nth_call_across_wrappers() {
        let arena = Arena::new(16);
        let frames = ArenaSource::new(&arena);
        let objects = HeapObjects::<u64>::new();
        let plan = FailPlan::new();
        let source = FailingSource::new(&frames, &plan);
        let nodes = FailingObjects::new(&objects, &plan);
        plan.fail_at(3);
        let a = source.alloc(&FrameRequest::ONE).unwrap();
        let b: NonNull<u64> = nodes.alloc().unwrap();
        let refused: Result<NonNull<u64>, _> = nodes.alloc();
        assert_eq!(refused, Err(AllocError::OutOfMemory));
        let c = source.alloc(&FrameRequest::ONE).unwrap();
        assert_eq!((plan.calls(), plan.failed()), (4, 1));
        source.free(a);
        source.free(c);
        // SAFETY: from `nodes`, freed once.
        unsafe { nodes.free(b) };
        frames.assert_all_free();
        objects.assert_all_free();
    }

    #[test]
    fn a_batch_is_as_many_calls_as_blocks() {
        let arena = Arena::new(16);
        let frames = ArenaSource::new(&arena);
        let plan = FailPlan::new();
        plan.fail_from(4);
        let source = FailingSource::new(&frames, &plan);
        let mut got = Vec::new();
        let given = source.alloc_batch(&FrameRequest::ONE, 9, &mut |frame| got.push(frame));
        assert_eq!((given, got.len()), (Ok(3), 3));
        source.free_batch(&mut || got.pop());
        frames.assert_all_free();
    }

    #[test]
    fn a_leak_on_a_failure_path_is_found() {
        let found = std::panic::catch_unwind(|| {
            every_failure(|plan| {
                let arena = Arena::new(8);
                let frames = ArenaSource::new(&arena);
                let source = FailingSource::new(&frames, plan);
                // The bug: the first frame is forgotten where the second is refused.
                if let Ok(a) = source.alloc(&FrameRequest::ONE) {
                    match source.alloc(&FrameRequest::ONE) {
                        Ok(b) => {
                            source.free(a);
                            source.free(b);
                        }
                        Err(_) => drop(a),
                    }
                }
                frames.assert_all_free();
            })
        });
        assert!(found.is_err());
    }
}
