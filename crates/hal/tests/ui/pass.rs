//! The twin of the failing programs: the same values, used rightly.
use kmem_hal::sync::LocalU64;
use kmem_hal::{
    CachePadded, Cpu, FrameHandle, FrameRequest, FrameSink, FrameSource, PerCpu, SingleCpu,
};

fn map_and_free(memory: &(impl FrameSource + FrameSink)) {
    if let Ok(frame) = memory.alloc(&FrameRequest::ONE) {
        let (first, order) = frame.into_entry();
        // The entry is cleared and flushed here.
        // SAFETY: the numbers are from `into_entry`, and nothing translates to them any more.
        memory.free(unsafe { FrameHandle::from_entry(first, order) });
    }
}

fn count(areas: &[CachePadded<LocalU64>], cpu: &SingleCpu) {
    let pin = cpu.pin();
    if let Some(own) = PerCpu::new(areas).get_own(&pin) {
        own.set(own.get() + 1);
    }
}

fn main() {
    map_and_free(&Never);
    let _ = count;
}

struct Never;
// SAFETY: gives nothing.
unsafe impl FrameSource for Never {
    fn alloc(&self, _: &FrameRequest) -> Result<kmem_hal::OwnedFrame, kmem_hal::AllocError> {
        Err(kmem_hal::AllocError::OutOfMemory)
    }
}
impl FrameSink for Never {
    fn free(&self, _: kmem_hal::OwnedFrame) {}
}
