//! Each liberty of the adversary earns its place: a kernel's mistake that is noticed with it, and neither in plain mode nor with all the others.

mod common;

use std::cell::Cell;

use common::{A, P, PS, RW, Tables, US, builder};
use kmem_mock_x86::{Adversary, Machine, MachineBuilder, Scheduler};

/// Where the mistakes play.
const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x80_0000;
const HUGE: u64 = 0xa0_0000;
/// Pages that fill the TLB, so that a random eviction hits them and not what a mistake rests on.
const CROWD: u64 = 0x1000_0000;
const SEEDS: u64 = 24;

/// A mistake; whether anybody notices.
type Mistake = fn(&Machine, &mut Tables<'_>, &dyn Fn()) -> bool;

fn fill_the_tlb(machine: &Machine, tables: &mut Tables<'_>) {
    for page in 0..1024 {
        tables.map(CROWD + (page << 12), PAGE + 0x10_0000, 12, P | RW | US);
        machine.cpu(0).read_u8(CROWD + (page << 12)).unwrap();
    }
}

fn mark(machine: &Machine, physical: u64, value: u8) {
    assert!(machine.memory().store(physical, 1, u64::from(value)));
}

/// Copies from a page through the TLB after its entry was cleared: "it is still cached".
fn relies_on_an_entry_that_stays(
    machine: &Machine,
    tables: &mut Tables<'_>,
    go: &dyn Fn(),
) -> bool {
    let leaf = tables.map(VA, PAGE, 12, P | RW | US);
    machine.cpu(0).read_u8(VA).unwrap();
    tables.set(leaf, 0);
    go();
    (0..400).any(|_| machine.cpu(0).read_u8(VA).is_err())
}

/// Exchanges the frame of a page without a flush: "nobody has touched it yet".
fn remaps_a_page_that_nobody_touched(
    machine: &Machine,
    tables: &mut Tables<'_>,
    go: &dyn Fn(),
) -> bool {
    for page in 0..8 {
        tables.map(VA + (page << 12), PAGE + (page << 12), 12, P | RW | US);
    }
    mark(machine, PAGE + 0x7000, 1);
    mark(machine, PAGE + 0x9000, 2);
    go();
    for _ in 0..400 {
        machine.cpu(0).read_u8(VA).unwrap();
    }
    tables.map(VA + 0x7000, PAGE + 0x9000, 12, P | RW | US);
    machine.cpu(0).read_u8(VA + 0x7000) != Ok(2)
}

/// Takes an accessed bit for a proof that the program was there.
fn trusts_accessed_bits(machine: &Machine, tables: &mut Tables<'_>, go: &dyn Fn()) -> bool {
    for page in 0..8 {
        tables.map(VA + (page << 12), PAGE + (page << 12), 12, P | RW | US);
    }
    go();
    for _ in 0..400 {
        machine.cpu(0).read_u8(VA).unwrap();
    }
    let untouched = tables.entry(VA + 0x7000, 12);
    tables.get(untouched) & A != 0
}

/// Splits a large page without a flush, after the small pages below it were in use before: "the small entry is found first".
fn leaves_a_large_and_a_small_entry(
    machine: &Machine,
    tables: &mut Tables<'_>,
    go: &dyn Fn(),
) -> bool {
    let cpu = machine.cpu(0);
    mark(machine, PAGE, 1);
    mark(machine, HUGE, 2);
    for page in 0..8 {
        tables.map(VA + (page << 12), PAGE + (page << 12), 12, P | RW | US);
    }
    cpu.read_u8(VA).unwrap();
    let directory = tables.entry(VA, 21);
    let table = tables.get(directory);
    tables.set(directory, HUGE | P | RW | US | PS);
    // The cached way to the table goes, the small page stays.
    cpu.invlpg(0x7000_0000).unwrap();
    cpu.read_u8(VA + 0x5000).unwrap();
    tables.set(directory, table);
    go();
    (0..40).any(|_| cpu.read_u8(VA) != Ok(1))
}

/// Takes every fault for an error: "the right was there before the access".
fn knows_no_spurious_faults(machine: &Machine, tables: &mut Tables<'_>, go: &dyn Fn()) -> bool {
    let leaf = tables.map(VA, PAGE, 12, P | US);
    let cpu = machine.cpu(0).user();
    cpu.read_u8(VA).unwrap();
    go();
    tables.set(leaf, tables.get(leaf) | RW);
    cpu.write_u8(VA, 1).is_err()
}

/// Uses all of a large page through the TLB after its entry was cleared: "one touch has cached it whole".
fn relies_on_large_pages_being_whole(
    machine: &Machine,
    tables: &mut Tables<'_>,
    go: &dyn Fn(),
) -> bool {
    let leaf = tables.map(VA, HUGE, 21, P | RW | US);
    go();
    machine.cpu(0).read_u8(VA).unwrap();
    tables.set(leaf, 0);
    machine.cpu(0).read_u8(VA + 0x9000).is_err()
}

/// Frees a frame when the interrupt is sent: "it will have arrived".
fn does_not_wait_for_answers(machine: &Machine, tables: &mut Tables<'_>, go: &dyn Fn()) -> bool {
    let leaf = tables.map(VA, PAGE, 12, P | RW | US);
    machine.note_allocated(PAGE >> 12, 1);
    tables.load(1);
    machine.cpu(1).read_u8(VA).unwrap();
    go();
    let over = Cell::new(false);
    let mut scheduler = Scheduler::new(machine, machine.seed());
    let (root, over) = (tables.root, &over);
    scheduler.spawn(0, move || {
        machine.memory().store(leaf, 8, 0);
        machine.cpu(0).invlpg(VA).unwrap();
        let work = kmem_mock_x86::FlushWork {
            root,
            pcid: 0,
            what: kmem_mock_x86::FlushWhat::Range {
                first: VA,
                last: VA,
                stride: 4096,
            },
            global: false,
            tables_freed: false,
        };
        let ticket = machine.send_flush(&[1], work);
        machine.note_freed(PAGE >> 12, 1);
        machine.wait_for(ticket);
        over.set(true);
    });
    scheduler.spawn(1, move || {
        while !over.get() {
            let _ = machine.cpu(1).read_u8(VA);
        }
    });
    scheduler.run();
    !machine.take_violations().is_empty()
}

fn is_noticed(
    mistake: Mistake,
    adversary: Adversary,
    build: fn(MachineBuilder) -> MachineBuilder,
) -> bool {
    (0..SEEDS).any(|seed| {
        let machine = build(builder().cpus(2).seed(seed)).build().unwrap();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.load(0);
        if mistake as usize != relies_on_an_entry_that_stays as Mistake as usize {
            fill_the_tlb(&machine, &mut tables);
        }
        mistake(&machine, &mut tables, &|| machine.set_adversary(adversary))
    })
}

#[test]
fn each_liberty_finds_a_mistake_that_no_other_finds() {
    const FULL: Adversary = Adversary::FULL;
    const OFF: Adversary = Adversary::OFF;
    let cases: [(&str, Mistake, Adversary, Adversary); 7] = [
        (
            "evict",
            relies_on_an_entry_that_stays,
            Adversary {
                evict: FULL.evict,
                ..OFF
            },
            Adversary { evict: 0, ..FULL },
        ),
        (
            "speculate",
            remaps_a_page_that_nobody_touched,
            Adversary {
                speculate: FULL.speculate,
                ..OFF
            },
            Adversary {
                speculate: 0,
                ..FULL
            },
        ),
        (
            "speculate (early A)",
            trusts_accessed_bits,
            Adversary {
                speculate: FULL.speculate,
                ..OFF
            },
            Adversary {
                speculate: 0,
                ..FULL
            },
        ),
        (
            "any_hit",
            leaves_a_large_and_a_small_entry,
            Adversary {
                any_hit: FULL.any_hit,
                ..OFF
            },
            Adversary { any_hit: 0, ..FULL },
        ),
        (
            "stale_fault",
            knows_no_spurious_faults,
            Adversary {
                stale_fault: FULL.stale_fault,
                ..OFF
            },
            Adversary {
                stale_fault: 0,
                ..FULL
            },
        ),
        (
            "fracture",
            relies_on_large_pages_being_whole,
            Adversary {
                fracture: FULL.fracture,
                ..OFF
            },
            Adversary {
                fracture: 0,
                ..FULL
            },
        ),
        (
            "delay_interrupts",
            does_not_wait_for_answers,
            Adversary {
                delay_interrupts: FULL.delay_interrupts,
                ..OFF
            },
            Adversary {
                delay_interrupts: 0,
                ..FULL
            },
        ),
    ];
    for (name, mistake, alone, without) in cases {
        let plain = |builder| builder;
        assert!(
            is_noticed(mistake, alone, plain),
            "{name} alone finds nothing"
        );
        assert!(
            !is_noticed(mistake, without, plain),
            "others than {name} find it"
        );
        assert!(
            !is_noticed(mistake, OFF, plain),
            "{name}: plain mode finds it"
        );
    }
}

/// Fills a hole without a flush: right on x86, wrong where absent entries are remembered.
fn fills_a_hole_without_a_flush(machine: &Machine, tables: &mut Tables<'_>, go: &dyn Fn()) -> bool {
    go();
    let _ = machine.cpu(0).read_u8(VA);
    tables.map(VA, PAGE, 12, P | RW | US);
    machine.cpu(0).read_u8(VA).is_err()
}

#[test]
fn remembered_absence_finds_what_no_x86_finds() {
    let absent = |builder: MachineBuilder| builder.caches_absent(true);
    assert!(is_noticed(
        fills_a_hole_without_a_flush,
        Adversary::OFF,
        absent
    ));
    assert!(!is_noticed(
        fills_a_hole_without_a_flush,
        Adversary::FULL,
        |builder| builder
    ));
}
