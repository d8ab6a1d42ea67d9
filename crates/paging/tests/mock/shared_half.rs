//! The kernel's part of the space: one set of tables under many roots and tags.

use kmem_hal::{Asid, FrameRequest, FrameSource, Mmu, Page, PageRange};
use kmem_mock_x86::{AccessKind, Registers};
use kmem_paging::format::X86_64;
use kmem_paging::{RangeError, Rights, TableCache, TableError};

use super::world::{Table, env};

/// The kernel's part of the space is one set of tables under many roots.
#[test]
fn what_the_kernel_maps_is_seen_in_every_space_and_flushed_in_all() {
    let upper = Page::new(0xf_ffff_8000_0000).unwrap();
    for seed in 0..4 {
        let env = env(Registers::LONG_PCID, 3, seed, 64);
        let kernel = Table::<X86_64>::new(env).unwrap();
        assert!(
            matches!(
                Table::<X86_64>::sharing(env, &kernel, upper),
                Err(TableError::CannotShare)
            ),
            "nothing was lent yet"
        );
        let half = Page::new(0xf_fff8_0000_0000).unwrap();
        kernel.lend_from(half).unwrap();
        assert_eq!(kernel.table_count(), 257);
        let mut spaces: Vec<_> = (0..3)
            .map(|_| Table::<X86_64>::sharing(env, &kernel, half).unwrap())
            .collect();
        for (cpu, space) in spaces.iter_mut().enumerate() {
            space.set_asid(Asid::new(cpu as u16 + 1)).unwrap();
            let root = space.root();
            // SAFETY: as in `World::new`.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(root, false) });
        }
        let range = PageRange::with_count(upper, 4).unwrap();
        assert_eq!(
            spaces[0].cursor(range).unwrap_err(),
            RangeError::Borrowed,
            "the kernel's part is changed through the kernel's table"
        );
        for rights in [Rights::KERNEL_DATA, Rights::KERNEL_DATA | Rights::GLOBAL] {
            let frame = env.pool.alloc(&FrameRequest::ONE).unwrap();
            let number = frame.first().number();
            let mut cursor = kernel.cursor(range).unwrap();
            cursor.map(upper, frame, rights).unwrap();
            drop(cursor);
            let linear = upper.start().as_u64();
            for (cpu, space) in spaces.iter().enumerate() {
                let at = (0..20).find_map(|_| {
                    env.machine
                        .cpu(cpu)
                        .translate(linear, AccessKind::Write)
                        .ok()
                });
                assert_eq!(at, Some(number << 12), "CPU {cpu}");
                assert!(space.query(upper).leaf().is_some());
            }
            // Each CPU goes to another space and keeps what it has under the old tag.
            for cpu in 0..3 {
                let root = spaces[(cpu + 1) % 3].root();
                // SAFETY: as above.
                env.machine
                    .on_cpu(cpu, || unsafe { env.mmu.load_root(root, true) });
            }
            let mut gather = kernel.gather::<2>();
            let mut cursor = kernel.cursor(range).unwrap();
            assert_eq!(cursor.unmap(range, &mut gather), Ok(1));
            drop(cursor);
            gather.commit_to(&env.pool);
            drop(gather);
            for turn in 0..3 {
                for cpu in 0..3 {
                    let root = spaces[(cpu + turn) % 3].root();
                    // SAFETY: as above.
                    env.machine
                        .on_cpu(cpu, || unsafe { env.mmu.load_root(root, true) });
                    assert!(env.machine.cpu(cpu).read_u64(linear).is_err());
                }
                assert!(env.machine.audit(0, u64::MAX).is_empty());
            }
        }
        let idle = Table::<X86_64>::new(env).unwrap();
        for cpu in 0..3 {
            // SAFETY: as above.
            env.machine
                .on_cpu(cpu, || unsafe { env.mmu.load_root(idle.root(), false) });
        }
        for space in spaces {
            assert_eq!(space.table_count(), 1);
            space.destroy(|_, _| unreachable!(), |_, _| unreachable!());
        }
        assert_eq!(
            kernel.table_count(),
            257,
            "a lender's tables outlive its borrowers"
        );
        idle.destroy(|_, _| {}, |_, _| {});
        TableCache::shrink(&env, usize::MAX);
        assert_eq!(env.pool.in_use(), 257);
    }
}
