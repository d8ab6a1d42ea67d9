//! Forgotten flushes are found, and told with their history; correct programs are left in peace.

mod common;

use common::{D, G, P, RW, Tables, US, builder};
use kmem_mock_x86::{Adversary, FrameState, Invpcid, Machine, Registers, ViolationKind};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x80_0000;
const FRAME: u64 = PAGE >> 12;

struct Setup {
    machine: Machine,
    leaf: u64,
    root: u64,
    table: u64,
}

/// Two CPUs on one space, the page at `VA` cached by both.
fn setup(flags: u64) -> Setup {
    let machine = builder().cpus(2).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    machine.note_allocated(0x200, 4);
    machine.note_allocated(FRAME, 1);
    let leaf = tables.map(VA, PAGE, 12, P | flags);
    let root = tables.root;
    for cpu in 0..2 {
        tables.load(cpu);
        machine.cpu(cpu).read_u8(VA).unwrap();
        if flags & RW != 0 {
            machine.cpu(cpu).write_u8(VA, 1).unwrap();
        }
    }
    Setup {
        table: leaf & !0xfff,
        machine,
        leaf,
        root,
    }
}

fn kinds(machine: &Machine) -> Vec<ViolationKind> {
    machine
        .take_violations()
        .iter()
        .map(|violation| violation.kind)
        .collect()
}

impl Setup {
    fn set(&self, at: u64, value: u64) {
        assert!(self.machine.memory().store(at, 8, value));
    }
    fn declare(&self) {
        self.machine
            .declare_flushed(Some(self.root), VA, VA + 0xfff, self.machine.step());
    }
}

#[test]
fn an_unmapped_and_freed_page_that_another_cpu_still_reaches() {
    let s = setup(RW);
    s.set(s.leaf, 0);
    s.machine.cpu(0).invlpg(VA).unwrap();
    s.machine.note_freed(FRAME, 1);
    assert!(s.machine.cpu(0).read_u8(VA).is_err());
    assert_eq!(kinds(&s.machine), []);
    assert_eq!(
        s.machine.cpu(1).write_u64(VA + 0x10, 7),
        Ok(()),
        "the hardware lets it happen"
    );
    let violations = s.machine.take_violations();
    assert_eq!(violations.len(), 1);
    assert_eq!(violations[0].kind, ViolationKind::FreedFrame);
    assert_eq!(
        (violations[0].cpu, violations[0].frame, violations[0].linear),
        (1, Some(FRAME), Some(VA + 0x10))
    );
    let story = violations[0].to_string();
    for part in [
        "CPU 1 wrote to 0x400010",
        "frame 0x800",
        "freed at step",
        "stale.rs",
        "not present",
        "missing: invlpg 0x400000",
    ] {
        assert!(story.contains(part), "{part} in {story}");
    }
}

#[test]
fn a_frame_with_a_new_owner_is_still_the_old_owners_through_the_tlb() {
    let s = setup(RW);
    s.set(s.leaf, 0);
    s.machine.note_freed(FRAME, 1);
    s.machine.note_allocated(FRAME, 1);
    // Even mapped again at the same address: in between it was free.
    s.set(s.leaf, PAGE | P | RW);
    s.machine.cpu(1).read_u8(VA).unwrap();
    assert_eq!(kinds(&s.machine), [ViolationKind::FreedFrame]);
    s.machine.cpu(1).invlpg(VA).unwrap();
    s.machine.cpu(1).read_u8(VA).unwrap();
    assert_eq!(kinds(&s.machine), []);
}

#[test]
fn a_flush_before_the_free_is_all_it_takes() {
    let s = setup(RW);
    s.set(s.leaf, 0);
    for cpu in 0..2 {
        s.machine.cpu(cpu).invlpg(VA).unwrap();
    }
    s.declare();
    s.machine.note_freed(FRAME, 1);
    assert!(s.machine.audit(0, u64::MAX).is_empty());
    for cpu in 0..2 {
        assert!(s.machine.cpu(cpu).read_u8(VA).is_err());
    }
    assert_eq!(kinds(&s.machine), []);
    assert_eq!(s.machine.stats().stale_hits, 0);
}

#[test]
fn a_frame_freed_while_it_is_mapped() {
    let s = setup(RW);
    s.machine.note_freed(FRAME, 1);
    s.machine.cpu(0).read_u8(VA).unwrap();
    assert_eq!(kinds(&s.machine), [ViolationKind::MappedFreeFrame]);
    s.machine.cpu(0).invlpg(VA).unwrap();
    s.machine.cpu(0).read_u8(VA).unwrap();
    assert_eq!(
        kinds(&s.machine),
        [ViolationKind::MappedFreeFrame],
        "also without a stale entry"
    );
    s.machine.exempt(VA, VA + 0xfff);
    s.machine.cpu(0).read_u8(VA).unwrap();
    assert_eq!(kinds(&s.machine), [], "a map of all memory may");
}

#[test]
fn write_protection_without_a_flush() {
    let s = setup(RW);
    s.set(s.leaf, PAGE | P | D);
    s.machine.cpu(0).invlpg(VA).unwrap();
    assert!(s.machine.cpu(0).write_u8(VA, 2).is_err());
    s.machine.cpu(1).write_u8(VA, 3).unwrap();
    assert_eq!(kinds(&s.machine), [], "in flight: the flush may still come");
    assert_eq!(s.machine.stats().stale_hits, 1);
    s.declare();
    s.machine.cpu(1).read_u8(VA).unwrap();
    assert_eq!(
        kinds(&s.machine),
        [],
        "reading is still allowed by the tables"
    );
    s.machine.cpu(1).write_u8(VA, 3).unwrap();
    let violations = s.machine.take_violations();
    assert_eq!(violations.len(), 1);
    assert_eq!(violations[0].kind, ViolationKind::Unflushed);
    assert!(
        violations[0].to_string().contains("rw"),
        "{}",
        violations[0]
    );
    s.machine.cpu(1).invlpg(VA).unwrap();
    assert!(s.machine.cpu(1).write_u8(VA, 3).is_err());
}

#[test]
fn a_cleared_dirty_bit_without_a_flush_loses_writes() {
    let s = setup(RW);
    s.set(s.leaf, PAGE | P | RW);
    s.declare();
    s.machine.cpu(0).read_u8(VA).unwrap();
    assert_eq!(kinds(&s.machine), []);
    s.machine.cpu(0).write_u8(VA, 9).unwrap();
    assert_eq!(kinds(&s.machine), [ViolationKind::Unflushed]);
    assert_eq!(
        s.machine.memory().load(s.leaf, 8).unwrap() & D,
        0,
        "the write left no trace"
    );
}

#[test]
fn a_freed_table_behind_a_walk_cache() {
    let s = setup(RW);
    let pde = s.machine.memory().load(0x20_2000 + 2 * 8, 8).unwrap();
    assert_eq!(pde & !0xfff, s.table);
    // The whole table goes; only the page itself is flushed, with INVPCID's narrow rule on CPU 1's side: nothing at all.
    s.set(0x20_2000 + 2 * 8, 0);
    s.set(s.leaf, 0);
    s.machine.cpu(0).invlpg(VA).unwrap();
    s.machine.note_freed(s.table >> 12, 1);
    assert!(s.machine.cpu(0).read_u8(VA).is_err());
    assert_eq!(kinds(&s.machine), []);
    // A neighbour that was never in CPU 1's TLB: its walk starts in the freed table.
    assert!(s.machine.cpu(1).read_u8(VA + 0x1000).is_err());
    let violations = s.machine.take_violations();
    assert_eq!(violations.len(), 1);
    assert_eq!(violations[0].kind, ViolationKind::FreedTable);
    assert_eq!(violations[0].frame, Some(s.table >> 12));
    assert!(
        violations[0].to_string().contains("cached PDE"),
        "{}",
        violations[0]
    );
    // And the page that is in its TLB rests on it.
    s.machine.cpu(1).read_u8(VA).unwrap();
    assert_eq!(kinds(&s.machine), [ViolationKind::FreedTable]);
}

#[test]
fn evidence_is_not_laundered_through_a_walk_cache() {
    // CPU 1 has the table cached but not the page; the page is unmapped by detaching the table, and declared flushed.
    let machine = builder().cpus(2).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(VA, PAGE, 12, P);
    tables.map(VA + 0x1000, PAGE + 0x1000, 12, P);
    let pde = tables.entry(VA, 21);
    tables.load(1);
    machine.cpu(1).read_u8(VA + 0x1000).unwrap();
    tables.set(pde, 0);
    machine.declare_flushed(None, VA, VA + 0x1f_ffff, machine.step());
    machine.cpu(1).read_u8(VA).unwrap();
    assert_eq!(kinds(&machine), [ViolationKind::Unflushed]);
    // Now it is in the TLB, filled after the declaration, from evidence older than it.
    machine.cpu(1).read_u8(VA).unwrap();
    assert_eq!(kinds(&machine), [ViolationKind::Unflushed]);
}

#[test]
fn a_walk_from_an_old_table_to_a_new_page_accuses_nobody() {
    // CPU 0 has the table cached; then a frame changes hands, and is mapped in that table.
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(VA, PAGE, 12, P);
    let leaf = tables.entry(VA + 0x1000, 12);
    tables.load(0);
    machine.cpu(0).read_u8(VA).unwrap();
    let frame = (PAGE >> 12) + 7;
    machine.note_allocated(frame, 1);
    machine.note_freed(frame, 1);
    machine.note_allocated(frame, 1);
    tables.set(leaf, frame << 12 | P);
    machine.cpu(0).read_u8(VA + 0x1000).unwrap();
    machine.cpu(0).read_u8(VA + 0x1000).unwrap();
    assert_eq!(machine.stats().short_walks, 1);
    assert_eq!(kinds(&machine), []);
    assert!(machine.audit(0, u64::MAX).is_empty());
    // Freed again, it is a crime.
    machine.note_freed(frame, 1);
    machine.note_allocated(frame, 1);
    machine.cpu(0).read_u8(VA + 0x1000).unwrap();
    assert_eq!(kinds(&machine), [ViolationKind::FreedFrame]);
}

#[test]
fn a_pcid_that_is_reused_without_a_flush() {
    let machine = builder().registers(Registers::LONG_PCID).build().unwrap();
    let mut first = Tables::new(&machine, 0x20_0000);
    first.map(VA, PAGE, 12, P | US);
    let mut second = Tables::new(&machine, 0x30_0000);
    second.map(VA, PAGE + 0x1000, 12, P | US);
    let cpu = machine.cpu(0);
    cpu.write_cr3(first.root | 7).unwrap();
    cpu.user().read_u8(VA).unwrap();
    cpu.write_cr3(second.root | 8 | 1 << 63).unwrap();
    cpu.user().read_u8(VA).unwrap();
    assert_eq!(kinds(&machine), []);
    cpu.write_cr3(second.root | 7 | 1 << 63).unwrap();
    cpu.user().read_u8(VA).unwrap();
    assert_eq!(kinds(&machine), [ViolationKind::ForeignSpace]);
    cpu.write_cr3(second.root | 7).unwrap();
    cpu.user().read_u8(VA).unwrap();
    assert_eq!(kinds(&machine), []);
}

#[test]
fn a_shared_table_that_one_side_leaves_accuses_nobody() {
    // Entries filled through a table that is freed later are fine where the tables still say the same.
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, PAGE, 12, P);
    tables.load(0);
    machine.cpu(0).read_u8(VA).unwrap();
    let pde = tables.entry(VA, 21);
    let copy = tables.next;
    tables.set(copy + (leaf & 0xfff), tables.get(leaf));
    tables.set(pde, copy | P | RW | US);
    // INVLPG of another page: walk caches go, the entry stays.
    machine.cpu(0).invlpg(VA + 0x1000).unwrap();
    machine.note_freed(leaf >> 12, 1);
    machine.declare_flushed(None, 0, u64::MAX, machine.step());
    machine.cpu(0).read_u8(VA).unwrap();
    assert!(machine.audit(0, u64::MAX).is_empty());
    assert_eq!(kinds(&machine), []);
}

#[test]
fn the_audit_finds_what_nobody_has_used_yet() {
    let s = setup(RW);
    assert!(s.machine.audit(0, u64::MAX).is_empty());
    s.set(s.leaf, PAGE | P | D);
    let found = s.machine.audit(VA, VA + 0xfff);
    assert_eq!(
        found
            .iter()
            .map(|found| (found.cpu, found.kind))
            .collect::<Vec<_>>(),
        [(0, ViolationKind::Unflushed), (1, ViolationKind::Unflushed)]
    );
    assert!(
        s.machine.audit(VA + 0x1000, u64::MAX).is_empty(),
        "only the range that is asked for"
    );
    s.machine.cpu(0).invlpg(VA).unwrap();
    assert_eq!(s.machine.audit(0, u64::MAX).len(), 1);
    s.set(s.leaf, 0);
    s.machine.note_freed(FRAME, 1);
    assert_eq!(
        s.machine.audit(0, u64::MAX)[0].kind,
        ViolationKind::FreedFrame
    );
    s.machine.cpu(1).invlpg(VA).unwrap();
    assert!(s.machine.audit(0, u64::MAX).is_empty());
    assert_eq!(kinds(&s.machine), [], "an audit only reports");
}

#[test]
fn the_audit_finds_cleared_dirty_bits_and_stale_walk_caches() {
    let s = setup(RW);
    s.set(s.leaf, PAGE | P | RW);
    assert_eq!(
        s.machine.audit(0, u64::MAX).len(),
        2,
        "D is cached by both CPUs"
    );
    s.machine.cpu(0).invlpg(VA).unwrap();
    s.machine.cpu(1).invlpg(VA).unwrap();
    assert!(s.machine.audit(0, u64::MAX).is_empty());
    // Only the walk cache: the page itself goes by INVPCID's narrow rule after another page was walked to.
    let pde = (s.root + 0x2000) + (VA >> 21 & 511) * 8;
    s.machine.cpu(1).read_u8(VA).unwrap();
    let old = s.machine.memory().load(pde, 8).unwrap();
    s.machine
        .cpu(1)
        .invpcid(Invpcid::Address {
            pcid: 0,
            linear: VA + (1 << 21),
        })
        .unwrap();
    s.set(s.leaf, 0);
    s.set(pde, 0);
    let found = s.machine.audit(0, u64::MAX);
    assert_eq!(found.len(), 2, "a TLB entry and a cached PDE");
    assert!(
        found
            .iter()
            .any(|found| found.to_string().contains("cached PDE"))
    );
    // Less rights above count as well.
    s.set(pde, old & !RW);
    let found = s.machine.audit(VA + 0x1000, VA + 0x1fff);
    assert_eq!(
        found.iter().map(|found| found.kind).collect::<Vec<_>>(),
        [ViolationKind::Unflushed]
    );
    s.set(pde, old);
    assert!(s.machine.audit(VA + 0x1000, VA + 0x1fff).is_empty());
}

#[test]
fn the_audit_looks_into_large_pages_that_were_split() {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let pde = tables.map(VA, PAGE, 21, P | G);
    tables.load(0);
    machine.cpu(0).read_u8(VA).unwrap();
    let table = tables.next;
    for page in 0..512 {
        tables.set(table + page * 8, (PAGE + page * 0x1000) | P | G);
    }
    tables.set(pde, table | P | RW | US);
    assert!(
        machine.audit(0, u64::MAX).is_empty(),
        "the split says the same"
    );
    tables.set(table + 300 * 8, 0);
    let found = machine.audit(0, u64::MAX);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].linear, Some(VA + 300 * 0x1000));
    machine.cpu(0).invlpg(VA).unwrap();
    assert!(machine.audit(0, u64::MAX).is_empty());
}

#[test]
fn frames_change_hands_in_order() {
    let machine = builder().build().unwrap();
    machine.note_freed(5, 1);
    machine.note_allocated(5, 1);
    assert_eq!(machine.frame_state(5), FrameState::Allocated);
    assert_eq!(kinds(&machine), []);
    machine.note_allocated(5, 1);
    machine.note_freed(5, 1);
    machine.note_freed(5, 1);
    assert_eq!(kinds(&machine), [ViolationKind::Ownership; 2]);
    assert_eq!(machine.frame_history(5).len(), 5);
}

#[test]
fn by_default_a_violation_panics_where_it_happens_with_its_seed() {
    let machine = Machine::builder().seed(77).build().unwrap();
    machine.note_freed(5, 1);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| machine.note_freed(5, 1)))
        .unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert!(
        text.contains("freed while it was free") && text.contains("machine seed 77"),
        "{text}"
    );
    assert_eq!(
        machine.frame_state(5),
        FrameState::Free,
        "the machine can still be asked"
    );
}

#[test]
fn no_liberty_of_the_adversary_hurts_a_correct_program() {
    for seed in 0..20 {
        let machine = builder()
            .adversary(Adversary::FULL)
            .seed(seed)
            .build()
            .unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.load(0);
        let cpu = machine.cpu(0);
        let mut rng = kmem_mock_x86::SeededRng::new(seed);
        for round in 0..300u64 {
            let page = VA + rng.below(32) * 0x1000;
            let frame = 0x800 + rng.below(64);
            let leaf = tables.entry(page, 12);
            let old = tables.get(leaf);
            tables.set(leaf, 0);
            cpu.invlpg(page).unwrap();
            machine.declare_flushed(None, page, page + 0xfff, machine.step());
            if old & P != 0 {
                machine.note_freed(old >> 12 & 0xf_ffff, 1);
            }
            if machine.frame_state(frame) != FrameState::Allocated {
                machine.note_allocated(frame, 1);
                tables.set(leaf, frame << 12 | P | RW);
                loop {
                    // A spurious fault is allowed; a second one in a row for the same page is not excluded by speculation.
                    if cpu.write_u64(page, round).is_ok() {
                        break;
                    }
                }
                assert_eq!(cpu.read_u64(page), Ok(round));
            }
        }
        assert_eq!(kinds(&machine), [], "seed {seed}");
    }
}

#[test]
fn a_table_in_a_frame_that_was_freed_long_ago_accuses_nobody() {
    let machine = builder().build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(VA, PAGE, 12, P | RW);
    tables.load(0);
    let cpu = machine.cpu(0);
    cpu.read_u8(VA).unwrap();
    // The next table's frame had another owner, after CPU 0 cached the way to it and before it became a table.
    let frame = tables.next >> 12;
    machine.note_allocated(frame, 1);
    machine.note_freed(frame, 1);
    machine.note_allocated(frame, 1);
    let neighbour = VA + 0x20_0000;
    tables.map(neighbour, PAGE + 0x1000, 12, P | RW);
    cpu.read_u8(neighbour).unwrap();
    assert!(machine.audit(0, u64::MAX).is_empty());
    // Freed now, it is a crime.
    machine.note_freed(frame, 1);
    assert!(!machine.audit(0, u64::MAX).is_empty());
    assert!(machine.take_violations().is_empty());
    let _ = cpu.read_u8(neighbour + 0x2000);
    assert_eq!(kinds(&machine)[0], ViolationKind::FreedTable);
}
