//! The calls of `kmem-hal` that are more than arithmetic.

use core::ptr::NonNull;

use kmem_hal::{
    AllocError, Cpu, CpuId, CpuSet, Deferred, FixedPool, Frame, FrameRange, FrameSlot, FrameTable,
    Grace, IrqSafe, Lock, ObjectAlloc, OffsetMap, PhysAddr, PhysMap, Reserve, Root, SingleCpu,
    SingleGrace,
};

use crate::calls;

calls! {
    call_hal_pin(cpu: &SingleCpu) -> CpuId { cpu.pin().id() }
    call_hal_cpu_set_insert(set: &mut CpuSet, cpu: CpuId) -> bool { set.insert(cpu) }
    call_hal_cpu_set_union(set: &mut CpuSet, other: &CpuSet) { set.union_with(other) }
    call_hal_lock(lock: &Lock<u64, IrqSafe>) -> u64 { *lock.lock() }
    call_hal_offset_map(map: &OffsetMap, address: PhysAddr) -> (FrameRange, *mut u8) {
        (map.reach(), map.to_ptr(address))
    }
    call_hal_frame_slot(table: &FrameTable, frame: Frame) -> Option<&FrameSlot> { table.slot(frame) }
    call_hal_frame_table_covers(table: &FrameTable, range: FrameRange) -> bool { table.covers(range) }
    call_hal_grace_read(grace: &SingleGrace) { drop(grace.read()) }
    call_hal_grace_defer(grace: &SingleGrace, call: Deferred) -> Result<(), Deferred> { grace.defer(call) }
    call_hal_grace_synchronize(grace: &SingleGrace) { grace.synchronize() }
    call_hal_pool_alloc(pool: &FixedPool<u64, 256>) -> Result<NonNull<u64>, AllocError> { pool.alloc() }
    call_hal_reserve(pool: &FixedPool<u64, 256>) -> bool { Reserve::<u64, _, 8>::new(pool, 8).is_ok() }
    call_hal_root_eq(a: &Root, b: &Root) -> bool { a == b }
}
