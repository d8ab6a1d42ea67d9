//! Whole operations of address spaces: fork, exec, faults and calls.

use kmem_cow_mm::{AddressSpace, Layout, MapRequest, Mm, Outcome, Prot};
use kmem_hal::{FaultCode, PageFault, VirtAddr};

use super::host::{Child, HostMemory, HostPage, children_time};
use super::limits::{cold_frames, copy_table_and_frame, copy_tables};
use super::world::{Process, World};
use super::{GIB, PAGE, workload};
use crate::area::host_program::{FORKS, Program};
use crate::clock::Watch;
use crate::harness::{Runner, Slice};
use crate::platform::Region;

pub(super) fn whole(runner: &mut Runner) {
    let mm = World::leak(Region::new(GIB + (1 << 14)));
    let process = Process::touched(mm, GIB);
    let memory = HostMemory::touched(GIB);
    let of_kmem = |_: u64, watch: &mut Watch| {
        let child = watch.time(|| process.fork());
        child.check();
        Slice::ops(1, GIB)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let child = Child::asleep(Some(watch));
        drop(child);
        Slice::ops(1, memory.pages)
    };
    let eagerly = |_: u64, watch: &mut Watch| {
        let child = watch.time(|| process.space.fork_copying());
        drop(child.expect("memory for a child"));
        Slice::limit(1)
    };
    runner.run(
        workload("fork_1g")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host)
            .with("limit:eager-copy", eagerly)
            .with("limit:memcpy", copy_tables()),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| drop(process.fork()));
        process.check();
        Slice::ops(1, GIB)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let before = children_time();
        watch.time(|| Child::working(|| ()).wait());
        watch.add(children_time() - before);
        Slice::ops(1, memory.pages)
    };
    runner.run(
        workload("fork_exit")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
}

pub(super) fn writes(runner: &mut Runner, mm: &'static Mm<'static, World>, count: u64) {
    let process = Process::touched(mm, count);
    let memory = HostMemory::touched(count);
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            let child = process.fork();
            child.write(0..count, FaultCode::PRESENT);
            drop(child);
        });
        process.check();
        Slice::ops(count, count)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let before = children_time();
        watch.time(|| Child::working(|| memory.write(0..count)).wait());
        watch.add(children_time() - before);
        Slice::ops(count, count)
    };
    runner.run(
        workload("fork_write_all")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        let mut sum = 0;
        watch.time(|| {
            let child = process.fork();
            sum = (0..count).filter_map(|page| child.frame(page)).count() as u64;
            drop(child);
        });
        assert_eq!(sum, count, "a page is missing");
        Slice::ops(count, count)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let before = children_time();
        watch.time(|| Child::working(|| memory.read(0..count)).wait());
        watch.add(children_time() - before);
        Slice::ops(count, count)
    };
    runner.run(
        workload("fork_read_all")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
    let firsts = || (0..count).step_by(512);
    let others = || (0..count).filter(|page| page % 512 != 0);
    for (name, is_first) in [("first_write", true), ("later_write", false)] {
        let of_kmem = |_: u64, watch: &mut Watch| {
            let child = process.fork();
            let ops = if is_first {
                watch.time(|| process.write(firsts(), FaultCode::PRESENT));
                firsts().count()
            } else {
                process.write(firsts(), FaultCode::PRESENT);
                watch.time(|| process.write(others(), FaultCode::PRESENT));
                others().count()
            };
            for page in [0, count - 1] {
                let copied = process.frame(page) != child.frame(page);
                assert_eq!(copied, page == 0 || !is_first, "page {page}");
            }
            drop(child);
            // All writable again, as the other program's pages are.
            process.write(0..count, FaultCode::PRESENT);
            Slice::ops(ops as u64, ops as u64)
        };
        let of_host = |_: u64, watch: &mut Watch| {
            let child = Child::asleep(None);
            let ops = if is_first {
                watch.time(|| memory.write(firsts()));
                firsts().count()
            } else {
                memory.write(firsts());
                watch.time(|| memory.write(others()));
                others().count()
            };
            drop(child);
            memory.write(0..count);
            Slice::ops(ops as u64, ops as u64)
        };
        let row = workload(name)
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host)
            .with("limit:copy-frame", cold_frames(count, true, false))
            .with("limit:locks+copy-frame", cold_frames(count, true, true));
        runner.run(if is_first {
            row.with("limit:copy-table+frame", copy_table_and_frame(count))
        } else {
            row
        });
    }
    let of_kmem = |_: u64, watch: &mut Watch| {
        let before = process.frame(1);
        let child = process.fork();
        // Both sides have tables of their own from now on, and all their leaves are read-only.
        child.write(firsts(), FaultCode::PRESENT);
        drop(child);
        process.write(firsts(), FaultCode::PRESENT);
        watch.time(|| process.write(others(), FaultCode::PRESENT));
        assert_eq!(process.frame(1), before, "a page was copied for nobody");
        let ops = others().count() as u64;
        Slice::ops(ops, ops)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        Child::working(|| ()).wait();
        memory.write(firsts());
        watch.time(|| memory.write(others()));
        let ops = others().count() as u64;
        Slice::ops(ops, ops)
    };
    runner.run(
        workload("reuse_fault")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
    let of_kmem = |_: u64, watch: &mut Watch| {
        let before = process.frame(1);
        drop(process.fork());
        watch.time(|| process.write(firsts(), FaultCode::PRESENT));
        assert_eq!(process.frame(1), before, "a page was copied for nobody");
        let ops = firsts().count() as u64;
        Slice::ops(ops, ops)
    };
    runner.run(workload("retake_table").n(count).with("kmem", of_kmem));
}

/// A program of 40 mappings, with pages in each.
fn program(mm: &'static Mm<'static, World>) -> Process {
    let space = AddressSpace::new(mm, Layout::x86_64()).expect("memory for a root");
    let mut start = 0;
    for number in 0..40 {
        // Other rights than the neighbours', so that they do not merge.
        let prot = match number % 2 {
            0 => Prot::READ | Prot::WRITE,
            _ => Prot::READ,
        };
        let request = MapRequest::anonymous(16 * PAGE, prot);
        start = space.mmap(&request).expect("room for a mapping").as_u64();
        let code = match number % 2 {
            0 => FaultCode::WRITE | FaultCode::USER,
            _ => FaultCode::USER,
        };
        for page in 0..4 {
            let outcome = space.fault(&PageFault {
                address: VirtAddr::new(start + page * PAGE),
                code,
            });
            assert_eq!(outcome, Outcome::Handled);
        }
    }
    assert_eq!(space.map_count(), 40);
    Process {
        space,
        start,
        pages: 4,
    }
}

pub(super) fn programs(runner: &mut Runner, mm: &'static Mm<'static, World>) {
    let parent = program(mm);
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..FORKS {
                let child = parent.fork();
                let image = program(mm);
                drop(child);
                drop(image);
            }
        });
        parent.check();
        Slice::ops(FORKS, FORKS * 40)
    };
    let made = Program::new();
    let of_host = |_: u64, watch: &mut Watch| {
        // The measuring process only waits.
        let before = children_time();
        made.run();
        watch.add(children_time() - before);
        Slice::ops(FORKS, FORKS * 40)
    };
    runner.run(
        workload("fork_exec")
            .n(40)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
}

pub(super) fn faults(runner: &mut Runner, mm: &'static Mm<'static, World>, count: u64) {
    let of_kmem = |_: u64, watch: &mut Watch| {
        let used = mm.env().machine.used_frames();
        let process = Process::new(mm, count);
        watch.time(|| process.write(0..count, FaultCode::empty()));
        process.check();
        let taken = mm.env().machine.used_frames() - used;
        assert!(taken >= count, "{count} pages in {taken} frames");
        Slice::ops(count, count)
    };
    let memory = HostMemory::new(count);
    let of_host = |_: u64, watch: &mut Watch| {
        memory.forget();
        watch.time(|| memory.write(0..count));
        Slice::ops(count, count)
    };
    runner.run(
        workload("anon_fault")
            .n(count)
            .with("kmem", of_kmem)
            .with("host-kernel", of_host)
            .with("limit:zero-frame", cold_frames(count, false, false))
            .with("limit:locks+zero-frame", cold_frames(count, false, true)),
    );
}

const CALLS: u64 = 500;

pub(super) fn calls(runner: &mut Runner, mm: &'static Mm<'static, World>) {
    let process = Process::new(mm, 64);
    let space = &process.space;
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..CALLS {
                let request = MapRequest::anonymous(PAGE, Prot::READ);
                let page = space.mmap(&request).expect("room for a page");
                space.munmap(page.as_u64(), PAGE).expect("it is mapped");
            }
        });
        assert_eq!(space.map_count(), 1);
        Slice::ops(CALLS, CALLS)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        watch.time(|| (0..CALLS).for_each(|_| drop(HostPage::new())));
        Slice::ops(CALLS, CALLS)
    };
    runner.run(
        workload("mmap_munmap")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );

    let memory = HostMemory::new(64);
    let middle = process.start + 32 * PAGE;
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..CALLS {
                space
                    .mprotect(middle, PAGE, Prot::READ)
                    .expect("it is mapped");
                let both = Prot::READ | Prot::WRITE;
                space.mprotect(middle, PAGE, both).expect("it is mapped");
            }
        });
        assert_eq!(space.map_count(), 1, "the parts did not merge");
        Slice::ops(2 * CALLS, CALLS)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        let middle = memory.base.wrapping_add(32 * PAGE as usize).cast();
        watch.time(|| {
            for _ in 0..CALLS {
                for rights in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
                    // SAFETY: a page of the value's own mapping.
                    let result = unsafe { libc::mprotect(middle, PAGE as usize, rights) };
                    assert_eq!(result, 0);
                }
            }
        });
        Slice::ops(2 * CALLS, CALLS)
    };
    runner.run(
        workload("mprotect_split_merge")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );

    let bottom = 0x1000_0000;
    space.set_heap(bottom);
    let of_kmem = |_: u64, watch: &mut Watch| {
        watch.time(|| {
            for _ in 0..CALLS {
                assert_eq!(space.brk(bottom + PAGE), bottom + PAGE);
                assert_eq!(space.brk(bottom), bottom);
            }
        });
        Slice::ops(2 * CALLS, CALLS)
    };
    let of_host = |_: u64, watch: &mut Watch| {
        // SAFETY: asks for the break; nothing else in this loop allocates, and it ends where it began.
        let brk = |end: i64| unsafe { libc::syscall(libc::SYS_brk, end) };
        let bottom = brk(0);
        let mut moved = true;
        watch.time(|| {
            for _ in 0..CALLS {
                moved &= brk(bottom + PAGE as i64) == bottom + PAGE as i64;
                moved &= brk(bottom) == bottom;
            }
        });
        assert!(moved, "the host did not move the break");
        Slice::ops(2 * CALLS, CALLS)
    };
    runner.run(
        workload("brk_grow")
            .with("kmem", of_kmem)
            .with("host-kernel", of_host),
    );
}
