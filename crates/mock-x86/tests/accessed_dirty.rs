//! The accessed and dirty bits: set when, where, and never otherwise.

mod common;

use common::{A, D, P, RW, Tables, US, builder};
use kmem_mock_x86::{Adversary, Machine};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x80_0000;

fn path(tables: &mut Tables<'_>, last: u32) -> Vec<u64> {
    [39, 30, 21, 12]
        .into_iter()
        .filter(|shift| *shift >= last)
        .map(|shift| tables.entry(VA, shift))
        .collect()
}

fn bits(tables: &Tables<'_>, path: &[u64]) -> Vec<u64> {
    path.iter().map(|&at| tables.get(at) & (A | D)).collect()
}

fn machine() -> Machine {
    builder().build().unwrap()
}

#[test]
fn a_read_sets_accessed_at_every_level_and_dirty_nowhere() {
    for shift in [12, 21, 30] {
        let machine = machine();
        let mut tables = Tables::new(&machine, 0x20_0000);
        tables.map(VA, if shift == 30 { 0 } else { PAGE }, shift, P | RW);
        let path = path(&mut tables, shift);
        tables.load(0);
        assert!(bits(&tables, &path).iter().all(|&bits| bits == 0));
        machine.cpu(0).read_u8(VA).unwrap();
        assert!(
            bits(&tables, &path).iter().all(|&bits| bits == A),
            "{shift}"
        );
        machine.cpu(0).write_u8(VA, 1).unwrap();
        let (leaf, upper) = path.split_last().unwrap();
        assert_eq!(bits(&tables, &[*leaf]), [A | D]);
        assert!(
            bits(&tables, upper).iter().all(|&bits| bits == A),
            "D only in the leaf"
        );
    }
}

#[test]
fn a_cached_translation_sets_nothing_again_until_it_is_flushed() {
    let machine = machine();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, PAGE, 12, P | RW);
    tables.load(0);
    machine.cpu(0).write_u8(VA, 1).unwrap();
    tables.set(leaf, PAGE | P | RW);
    machine.cpu(0).write_u8(VA, 2).unwrap();
    assert_eq!(tables.get(leaf) & (A | D), 0, "the TLB knew that D was set");
    assert_eq!(machine.stats().stale_dirty, 1);
    machine.cpu(0).invlpg(VA).unwrap();
    machine.cpu(0).write_u8(VA, 3).unwrap();
    assert_eq!(tables.get(leaf) & (A | D), A | D);
}

#[test]
fn a_write_through_a_clean_entry_goes_back_to_the_tables_for_dirty() {
    let machine = machine();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, PAGE, 12, P | RW);
    tables.load(0);
    machine.cpu(0).read_u8(VA).unwrap();
    machine.cpu(0).write_u8(VA, 2).unwrap();
    assert_eq!(tables.get(leaf) & (A | D), A | D);
    // Write-protected between read and write: the walk for D finds it out.
    tables.set(leaf, PAGE | P | RW | A);
    machine.cpu(0).invlpg(VA).unwrap();
    machine.cpu(0).read_u8(VA).unwrap();
    tables.set(leaf, PAGE | P | A);
    assert!(machine.cpu(0).write_u8(VA, 3).is_err());
    assert_eq!(tables.get(leaf) & D, 0);
    assert_eq!(machine.cpu(0).read_u8(VA), Ok(2));
}

#[test]
fn a_refused_access_leaves_the_leaf_alone() {
    let machine = machine();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaf = tables.map(VA, PAGE, 12, P | US);
    tables.load(0);
    assert!(machine.cpu(0).user().write_u8(VA, 1).is_err());
    assert_eq!(tables.get(leaf) & (A | D), 0);
    let upper = tables.entry(VA, 21);
    assert_eq!(
        tables.get(upper) & A,
        A,
        "upper entries were used all the same"
    );
}

#[test]
fn a_faulting_walk_stops_setting_bits_where_it_stops() {
    let machine = machine();
    let mut tables = Tables::new(&machine, 0x20_0000);
    tables.map(VA, PAGE, 12, P | US);
    let pde = tables.entry(VA, 21);
    let pte = tables.entry(VA, 12);
    tables.set(pde, tables.get(pde) & !P);
    tables.load(0);
    assert!(machine.cpu(0).read_u8(VA).is_err());
    assert_eq!(tables.get(tables.root) & A, A);
    assert_eq!(tables.get(pde) & A, 0);
    assert_eq!(tables.get(pte) & A, 0);
}

#[test]
fn speculation_may_set_accessed_but_never_dirty() {
    let adversary = Adversary {
        speculate: 1024,
        ..Adversary::OFF
    };
    let machine = builder().adversary(adversary).seed(3).build().unwrap();
    let mut tables = Tables::new(&machine, 0x20_0000);
    let leaves: Vec<u64> = (0..8)
        .map(|page| tables.map(VA + page * 0x1000, PAGE + page * 0x1000, 12, P | RW))
        .collect();
    tables.load(0);
    for _ in 0..200 {
        machine.cpu(0).read_u8(VA).unwrap();
    }
    let untouched = &leaves[1..];
    assert!(
        untouched.iter().any(|&leaf| tables.get(leaf) & A != 0),
        "pages that nobody touched became accessed"
    );
    assert!(untouched.iter().all(|&leaf| tables.get(leaf) & D == 0));
    let stats = machine.stats();
    assert!(
        stats.speculative_fills > 0 && stats.early_accessed > 0,
        "{stats}"
    );
    assert!(machine.cpu(0).holds(VA + 0x1000) || machine.cpu(0).holds(VA + 0x2000));
}
