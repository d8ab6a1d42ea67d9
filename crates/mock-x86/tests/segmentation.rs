//! Segmentation, by the manual's rules: tables in memory, checks of limit, type and privilege, the hidden part, and Linux's
//! flat segments.

mod common;

use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ss};
use common::*;
use kmem_mock_x86::{
    AccessKind, Descriptor, Fault, LINUX_GDT_32, LINUX_GDT_32_FIRST, LINUX_GDT_64, Machine,
    Registers, SegmentRegister, SegmentedCpu, Selector, manual::pf,
};

const GDT: u64 = 0x5000;
const LDT: u64 = 0x6000;

const KERNEL_CODE: Selector = Selector::gdt(12, 0);
const KERNEL_DATA: Selector = Selector::gdt(13, 0);
const USER_CODE: Selector = Selector::gdt(14, 3);
const USER_DATA: Selector = Selector::gdt(15, 3);

fn gp(selector: Selector) -> Fault {
    Fault::Selector {
        vector: 13,
        code: selector.0 & !3,
    }
}

const GP0: Fault = Fault::Selector {
    vector: 13,
    code: 0,
};

/// A machine without paging, Linux's GDT with `extra` behind it, running in the kernel's segments.
fn machine(extra: &[Descriptor]) -> Machine {
    let machine = builder().registers(Registers::PROTECTED).build().unwrap();
    let store = |index: u64, word: u64| assert!(machine.memory().store(GDT + index * 8, 8, word));
    for (index, &word) in LINUX_GDT_32.iter().enumerate() {
        store(u64::from(LINUX_GDT_32_FIRST) + index as u64, word);
    }
    for (index, descriptor) in extra.iter().enumerate() {
        store(16 + index as u64, descriptor.0);
    }
    let cpu = machine.cpu(0).segments();
    cpu.start(
        (KERNEL_CODE, Descriptor(LINUX_GDT_32[0])),
        (KERNEL_DATA, Descriptor(LINUX_GDT_32[1])),
    );
    cpu.lgdt(GDT, 32 * 8 - 1).unwrap();
    machine
}

fn extra(index: u16, rpl: u8) -> Selector {
    Selector::gdt(16 + index, rpl)
}

#[test]
fn descriptors_are_the_manuals() {
    let flat = Descriptor(LINUX_GDT_32[0]);
    assert_eq!((flat.base(), flat.limit(), flat.dpl()), (0, u32::MAX, 0));
    assert!(flat.is_code() && flat.is_readable() && !flat.is_writable() && flat.is_present());
    let user = Descriptor(LINUX_GDT_32[3]);
    assert!(user.is_writable() && !user.is_code() && user.dpl() == 3);
    assert_eq!(Descriptor::segment(0, u32::MAX, 0xa, 0).0, LINUX_GDT_32[0]);
    assert_eq!(Descriptor::segment(0, u32::MAX, 0x2, 3).0, LINUX_GDT_32[3]);
    // Every field in its place: base 31..24, 23..16 and 15..0, limit 19..16 and 15..0.
    let odd = Descriptor::segment(0x1234_5678, 0xa_bcde, 0x6, 2);
    assert_eq!(odd.0, 0x124a_d634_5678_bcde);
    assert_eq!((odd.base(), odd.limit()), (0x1234_5678, 0xa_bcde));
    assert!(odd.expands_down() && !odd.absent().is_present());
    assert!(Descriptor(LINUX_GDT_64[1]).is_long() && !Descriptor(LINUX_GDT_64[0]).is_long());
    assert_eq!((USER_DATA.0, Selector::ldt(1, 3).0), (0x7b, 0xf));
}

#[test]
fn in_linux_offset_and_linear_address_are_the_same() {
    let machine = machine(&[]);
    let cpu = machine.cpu(0).segments();
    for register in [Ds, Es, Fs, Gs] {
        cpu.load(register, KERNEL_DATA).unwrap();
    }
    for offset in [0, 0x1234, 0xc000_0000, 0xffff_fffc] {
        for register in [Ds, Es, Ss] {
            assert_eq!(
                cpu.linear(register, offset, 4, AccessKind::Write),
                Ok(offset)
            );
        }
        assert_eq!(cpu.linear(Cs, offset, 1, AccessKind::Fetch), Ok(offset));
    }
    assert_eq!(cpu.linear(Ds, 0xffff_fffd, 4, AccessKind::Read), Err(GP0));
    cpu.write_u32(Ds, 0x8000, 77).unwrap();
    assert_eq!(cpu.read_u32(Cs, 0x8000), Ok(77));
    assert_eq!(
        cpu.write_u32(Cs, 0x8000, 1),
        Err(GP0),
        "code is not written"
    );
    assert_eq!(cpu.fetch_at(0x8000), Ok(77));
    // The user's segments cover the same: protection is paging's business.
    cpu.iret(USER_CODE, USER_DATA).unwrap();
    assert_eq!(cpu.cpl(), 3);
    assert_eq!(
        cpu.register(Ds).hidden,
        None,
        "the kernel's data segments are taken away"
    );
    cpu.load(Ds, USER_DATA).unwrap();
    assert_eq!(
        cpu.linear(Ds, 0xc000_0000, 4, AccessKind::Write),
        Ok(0xc000_0000)
    );
}

#[test]
fn limits_up_and_down() {
    let machine = machine(&[
        Descriptor::segment(0x10_0000, 0xff, 0x2, 0),
        Descriptor::segment(0x10_0000, 0xfff, 0x6, 0),
    ]);
    let cpu = machine.cpu(0).segments();
    cpu.load(Es, extra(0, 0)).unwrap();
    assert_eq!(cpu.linear(Es, 0xfc, 4, AccessKind::Read), Ok(0x10_00fc));
    assert_eq!(cpu.linear(Es, 0xfd, 4, AccessKind::Read), Err(GP0));
    assert_eq!(cpu.linear(Es, 0xff, 1, AccessKind::Read), Ok(0x10_00ff));
    // Expand-down: everything above the limit.
    cpu.load(Fs, extra(1, 0)).unwrap();
    assert_eq!(cpu.linear(Fs, 0xfff, 1, AccessKind::Write), Err(GP0));
    assert_eq!(cpu.linear(Fs, 0x1000, 4, AccessKind::Write), Ok(0x10_1000));
    assert_eq!(
        cpu.linear(Fs, 0xffff_fffc, 4, AccessKind::Write),
        Ok(0x000f_fffc),
        "base and offset wrap at 4 GiB"
    );
    // The stack's limit is #SS.
    cpu.load(Ss, extra(0, 0)).unwrap();
    let stack = Fault::Selector {
        vector: 12,
        code: 0,
    };
    assert_eq!(cpu.linear(Ss, 0x100, 4, AccessKind::Write), Err(stack));
}

#[test]
fn loads_are_checked() {
    let machine = machine(&[
        Descriptor::segment(0, 0xfff, 0x8, 3),
        Descriptor::segment(0, 0xfff, 0x2, 3).absent(),
        Descriptor::local_table(LDT as u32, 15),
        Descriptor::segment(0, 0xfff, 0x0, 0),
        Descriptor::segment(0, 0xfff, 0xe, 0),
    ]);
    let cpu = machine.cpu(0).segments();
    let absent = |vector| {
        Err(Fault::Selector {
            vector,
            code: extra(1, 0).0,
        })
    };
    assert_eq!(
        cpu.load(Ds, Selector::gdt(32, 0)),
        Err(gp(Selector::gdt(32, 0)))
    );
    assert_eq!(
        cpu.load(Ds, extra(0, 0)),
        Err(gp(extra(0, 0))),
        "execute-only"
    );
    assert_eq!(
        cpu.load(Ds, extra(2, 0)),
        Err(gp(extra(2, 0))),
        "a system segment"
    );
    assert_eq!(cpu.load(Ds, extra(1, 0)), absent(11));
    assert_eq!(cpu.load(Cs, KERNEL_CODE), Err(Fault::InvalidOpcode));
    assert_eq!(cpu.load(Ss, Selector::NULL), Err(GP0));
    assert_eq!(cpu.load(Ss, extra(3, 0)), Err(gp(extra(3, 0))), "read-only");
    assert_eq!(
        cpu.load(Ss, USER_DATA),
        Err(gp(USER_DATA)),
        "another privilege"
    );
    assert_eq!(
        cpu.load(Ds, Selector::gdt(13, 3)),
        Err(gp(KERNEL_DATA)),
        "RPL 3 for DPL 0"
    );
    cpu.load(Ds, KERNEL_CODE).unwrap();
    cpu.load(Ds, Selector(3)).unwrap();
    assert_eq!(
        cpu.read_u32(Ds, 0),
        Err(GP0),
        "null selectors may be loaded, not used"
    );
    // The user.
    cpu.iret(USER_CODE, USER_DATA).unwrap();
    assert_eq!(cpu.load(Ds, KERNEL_DATA), Err(gp(KERNEL_DATA)));
    assert_eq!(cpu.load(Ss, extra(1, 3)), absent(12));
    assert_eq!(cpu.far_jump(KERNEL_CODE), Err(gp(KERNEL_CODE)));
    // Conforming code of the kernel runs at the caller's privilege.
    cpu.far_jump(extra(4, 0)).unwrap();
    assert_eq!((cpu.cpl(), cpu.register(Cs).selector), (3, extra(4, 3)));
    assert_eq!(cpu.lgdt(0, 0), Err(GP0));
    assert_eq!(cpu.lldt(extra(2, 0)), Err(GP0));
}

#[test]
fn a_refused_far_jump_and_iret_change_nothing() {
    let machine = machine(&[Descriptor::segment(0, 0xfff, 0xa, 0).absent()]);
    let cpu = machine.cpu(0).segments();
    let state = |cpu: SegmentedCpu<'_>| [Cs, Ss, Ds].map(|register| cpu.register(register));
    let before = state(cpu);
    assert_eq!(cpu.far_jump(Selector::NULL), Err(GP0));
    assert_eq!(cpu.far_jump(KERNEL_DATA), Err(gp(KERNEL_DATA)));
    assert_eq!(cpu.far_jump(USER_CODE), Err(gp(USER_CODE)));
    assert!(matches!(
        cpu.far_jump(extra(0, 0)),
        Err(Fault::Selector { vector: 11, .. })
    ));
    assert_eq!(cpu.iret(USER_CODE, KERNEL_DATA), Err(gp(KERNEL_DATA)));
    assert_eq!(
        cpu.iret(Selector::gdt(12, 3), USER_DATA),
        Err(gp(KERNEL_CODE))
    );
    assert_eq!(state(cpu), before);
    assert_eq!(cpu.far_jump(KERNEL_CODE), Ok(()));
}

#[test]
fn the_local_table() {
    let machine = machine(&[
        Descriptor::local_table(LDT as u32, 15),
        Descriptor::local_table(LDT as u32, 15).absent(),
    ]);
    let store = |at, word| assert!(machine.memory().store(at, 8, word));
    store(LDT + 8, Descriptor::segment(0x20_0000, 0xfff, 0x2, 0).0);
    let cpu = machine.cpu(0).segments();
    let local = Selector::ldt(1, 0);
    assert_eq!(cpu.load(Es, local), Err(gp(local)), "no table yet");
    assert_eq!(cpu.lldt(KERNEL_DATA), Err(gp(KERNEL_DATA)));
    assert!(matches!(
        cpu.lldt(extra(1, 0)),
        Err(Fault::Selector { vector: 11, .. })
    ));
    cpu.lldt(extra(0, 0)).unwrap();
    cpu.load(Es, local).unwrap();
    assert_eq!(cpu.linear(Es, 4, 4, AccessKind::Write), Ok(0x20_0004));
    assert_eq!(
        cpu.load(Es, Selector::ldt(2, 0)),
        Err(gp(Selector::ldt(2, 0)))
    );
    cpu.lldt(Selector::NULL).unwrap();
    assert_eq!(cpu.load(Fs, local), Err(gp(local)));
    assert!(cpu.read_u32(Es, 0).is_ok(), "what is loaded stays");
}

#[test]
fn the_hidden_part_is_what_counts() {
    let machine = machine(&[Descriptor::segment(0x10_0000, 0xff, 0x2, 0)]);
    let cpu = machine.cpu(0).segments();
    cpu.load(Es, extra(0, 0)).unwrap();
    let at = GDT + 16 * 8;
    let word = machine.memory().load(at, 8).unwrap();
    assert_eq!(
        Descriptor(word).kind(),
        3,
        "the accessed bit is set by the load"
    );
    // Another descriptor in memory changes nothing until the register is loaded again.
    let other = Descriptor::segment(0x20_0000, 0xfff, 0x2, 0);
    assert!(machine.memory().store(at, 8, other.0));
    assert_eq!(cpu.linear(Es, 0x10, 4, AccessKind::Read), Ok(0x10_0010));
    assert_eq!(cpu.linear(Es, 0x200, 4, AccessKind::Read), Err(GP0));
    cpu.load(Es, extra(0, 0)).unwrap();
    assert_eq!(cpu.linear(Es, 0x200, 4, AccessKind::Read), Ok(0x20_0200));
}

#[test]
fn tables_are_read_through_paging() {
    let machine = builder().registers(Registers::LONG).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    // The descriptor table is the kernel's: an access of the processor itself, whatever the privilege.
    let entry = tables.map(0x40_0000, GDT, 12, P | RW);
    tables.map(0x41_0000, 0x80_0000, 12, P | RW | US);
    tables.load(0);
    let store = |index: u64, word: u64| assert!(machine.memory().store(GDT + index * 8, 8, word));
    for (index, &word) in LINUX_GDT_64.iter().enumerate() {
        store(1 + index as u64, word);
    }
    let cpu = machine.cpu(0).segments();
    let kernel = (Selector::gdt(2, 0), Descriptor(LINUX_GDT_64[1]));
    cpu.start(kernel, (Selector::gdt(3, 0), Descriptor(LINUX_GDT_64[2])));
    cpu.lgdt(0x40_0000, 0x7f).unwrap();
    // 64-bit code: no limits, and bases of FS and GS alone.
    cpu.set_base(Gs, 0x41_0000).unwrap();
    cpu.set_base(Ds, 0x1000).unwrap();
    cpu.iret(Selector::gdt(6, 3), Selector::gdt(5, 3)).unwrap();
    assert_eq!(cpu.set_base(Gs, 0), Err(GP0), "WRMSR is the kernel's");
    cpu.load(Ds, Selector::gdt(5, 3)).unwrap();
    assert_eq!(cpu.linear(Gs, 8, 4, AccessKind::Write), Ok(0x41_0008));
    assert_eq!(
        cpu.linear(Ds, 0x7fff_0000_0000, 4, AccessKind::Read),
        Ok(0x7fff_0000_0000)
    );
    cpu.write_u32(Gs, 8, 5).unwrap();
    assert_eq!(cpu.read_u32(Ds, 0x41_0008), Ok(5));
    // At CPL 3 the kernel's pages are out of reach, the descriptor table included.
    let refused = Fault::Page {
        address: 0x40_0000,
        code: pf::P | pf::U,
    };
    assert_eq!(cpu.read_u32(Ds, 0x40_0000), Err(refused));
    // A table that is not mapped faults as an access of the kernel's.
    tables.set(entry, 0);
    machine.cpu(0).invlpg(0x40_0000).unwrap();
    let missing = Fault::Page {
        address: 0x40_0000 + 5 * 8,
        code: 0,
    };
    assert_eq!(cpu.load(Es, Selector::gdt(5, 3)), Err(missing));
}

/// A machine in 64-bit mode, in Linux's kernel segments, whose GDT at 0x40_0000 has `extra` from entry 8 on.
fn long_machine(extra: &[Descriptor]) -> (Machine, u64) {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(0x40_0000, GDT, 12, P | RW);
    let second = tables.map(0x40_1000, GDT + 0x1000, 12, P | RW);
    tables.load(0);
    let store = |index: u64, word: u64| assert!(machine.memory().store(GDT + index * 8, 8, word));
    for (index, &word) in LINUX_GDT_64.iter().enumerate() {
        store(1 + index as u64, word);
    }
    for (index, descriptor) in extra.iter().enumerate() {
        store(8 + index as u64, descriptor.0);
    }
    let cpu = machine.cpu(0).segments();
    let kernel = (Selector::gdt(2, 0), Descriptor(LINUX_GDT_64[1]));
    cpu.start(kernel, (Selector::gdt(3, 0), Descriptor(LINUX_GDT_64[2])));
    cpu.lgdt(0x40_0000, 0x1fff).unwrap();
    (machine, second)
}

#[test]
fn a_load_of_fs_or_gs_sets_its_base_in_64_bit_mode_too() {
    let (machine, _) = long_machine(&[Descriptor::segment(0x8765_4000, 0xfff, 0x2, 0)]);
    let cpu = machine.cpu(0).segments();
    let base = |register| cpu.linear(register, 0, 4, AccessKind::Read).unwrap();
    for register in [Fs, Gs] {
        cpu.set_base(register, 0xffff_8000_0000_0000).unwrap();
        assert_eq!(base(register), 0xffff_8000_0000_0000);
        cpu.load(register, Selector::gdt(8, 0)).unwrap();
        assert_eq!(base(register), 0x8765_4000, "32 bits, and zeros above");
        cpu.load(register, Selector::NULL).unwrap();
        assert_eq!(base(register), 0);
    }
    cpu.load(Ds, Selector::gdt(8, 0)).unwrap();
    assert_eq!(base(Ds), 0);
}

#[test]
fn bases_must_be_canonical() {
    let (machine, _) = long_machine(&[]);
    let cpu = machine.cpu(0).segments();
    let value = 1 << 60;
    let refused = Err(Fault::GeneralProtection { value });
    assert_eq!(cpu.lgdt(value, 0x7f), refused);
    assert_eq!(cpu.set_base(Fs, value), refused);
    // A table at the end of the address space: the address of its entries wraps.
    cpu.lgdt(0xffff_ffff_ffff_fff8, 0x7f).unwrap();
    assert!(matches!(
        cpu.load(Ds, Selector::gdt(2, 0)),
        Err(Fault::Page { address: 8, .. })
    ));
}

#[test]
fn a_null_stack_segment_has_the_privilege_of_the_code() {
    let (machine, _) = long_machine(&[]);
    let cpu = machine.cpu(0).segments();
    assert_eq!(cpu.load(Ss, Selector(3)), Err(GP0));
    assert_eq!(cpu.load(Ss, Selector::NULL), Ok(()));
}

#[test]
fn an_iret_that_faults_changes_no_register() {
    let (machine, second) = long_machine(&[]);
    // The stack's descriptor is the first of the table's second page, which cannot be written: its accessed bit faults.
    let stack = Descriptor::segment(0, u32::MAX, 0x2, 3);
    assert!(machine.memory().store(GDT + 0x1000, 8, stack.0));
    let entry = machine.memory().load(second, 8).unwrap();
    assert!(machine.memory().store(second, 8, entry & !RW));
    let cpu = machine.cpu(0).segments();
    let before = [cpu.register(Cs), cpu.register(Ss)];
    assert_eq!(
        cpu.iret(Selector::gdt(6, 3), Selector::gdt(512, 3)),
        Err(Fault::Page {
            address: 0x40_1000,
            code: pf::P | pf::W
        })
    );
    assert_eq!(before, [cpu.register(Cs), cpu.register(Ss)]);
    assert_eq!(cpu.cpl(), 0);
}
