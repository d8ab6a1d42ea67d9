//! The machine against an independent model: bit strings, no caches, written from the manual's prose a second time.
//!
//! The model keeps tables as maps from an index path to an entry, looks at bits one by one, and knows nothing of physical addresses of
//! tables. Random entries (with reserved and odd bits) at random levels, random control bits, random accesses: translation, error code and
//! the A and D bits left behind must agree.

mod common;

use std::collections::BTreeMap;

use common::builder;
use kmem_mock_x86::manual::{cr0, cr4, efer};
use kmem_mock_x86::{AccessKind, Fault, Machine, Registers};
use proptest::prelude::*;

/// An entry to be placed: which of two slots at each level, and its raw bits.
#[derive(Debug, Clone)]
struct Plan {
    /// Flags of the upper entries by path: `[slot]`, `[slot, slot]`, ...
    flags: Vec<u64>,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    nxe: bool,
    pke: bool,
    pkru: u32,
    five: bool,
    accesses: Vec<(u8, u8, bool)>,
}

fn flags() -> impl Strategy<Value = u64> {
    // Mostly usable entries; now and then any bit, so that every kind of failure happens.
    let usual = (any::<[bool; 8]>(), 0u64..16).prop_map(|(bits, key)| {
        let [rw, us, pwt, pcd, accessed, dirty, global, xd] = bits.map(u64::from);
        1 | rw << 1
            | us << 2
            | pwt << 3
            | pcd << 4
            | accessed << 5
            | dirty << 6
            | global << 8
            | xd << 63
            | key << 59
    });
    prop_oneof![
        6 => usual.clone(),
        2 => usual.clone().prop_map(|flags| flags | 1 << 7),
        1 => usual.clone().prop_map(|flags| flags & !1),
        1 => (usual, 9u32..63).prop_map(|(flags, bit)| flags ^ 1 << bit),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    (
        prop::collection::vec(flags(), 62),
        any::<[bool; 7]>(),
        any::<u32>(),
        prop::collection::vec((any::<u8>(), 0u8..3, any::<bool>()), 1..12),
    )
        .prop_map(
            |(flags, [wp, smep, smap, ac, nxe, pke, five], pkru, accesses)| Plan {
                flags,
                wp,
                smep,
                smap,
                ac,
                nxe,
                pke,
                pkru,
                five,
                accesses,
            },
        )
}

const SLOTS: [u64; 2] = [3, 5];
const MAXPHYADDR: u32 = 46;

impl Plan {
    fn levels(&self) -> usize {
        if self.five { 5 } else { 4 }
    }

    /// The linear address that takes these slots, top level first.
    fn linear(&self, path: u8) -> u64 {
        let mut linear = 0x9a8;
        for level in 0..self.levels() {
            let slot = SLOTS[usize::from(path >> level & 1)];
            linear |= slot << (12 + 9 * (self.levels() - 1 - level));
        }
        linear
    }
}

/// The model: entries by path, as (bits, where they are stored for the comparison).
struct Model {
    entries: BTreeMap<Vec<u8>, (u64, u64)>,
}

fn bit(value: u64, number: u32) -> bool {
    value >> number & 1 == 1
}

impl Model {
    /// What the manual says an access does: the physical address, or the error code.
    fn access(&mut self, plan: &Plan, path: u8, kind: AccessKind, user: bool) -> Result<u64, u32> {
        let levels = plan.levels();
        let linear = plan.linear(path);
        let fetch_told = kind == AccessKind::Fetch && (plan.smep || plan.nxe);
        let mut code = 0;
        code |= u32::from(kind == AccessKind::Write) << 1;
        code |= u32::from(user) << 2;
        code |= u32::from(fetch_told) << 4;
        let (mut all_rw, mut all_us, mut any_xd) = (true, true, false);
        let mut key = Vec::new();
        let mut passed = Vec::new();
        for level in 0..levels {
            key.push(path >> level & 1);
            let (entry, _) = self.entries[&key];
            let height = levels - 1 - level; // 0 = PTE, 1 = PDE, 2 = PDPTE, 3 = PML4E, 4 = PML5E
            if !bit(entry, 0) {
                self.accessed(&passed);
                return Err(code);
            }
            let leaf = height == 0 || (bit(entry, 7) && height <= 2);
            let mut reserved = (MAXPHYADDR..52).any(|number| bit(entry, number));
            reserved |= !plan.nxe && bit(entry, 63);
            reserved |= height >= 3 && bit(entry, 7);
            if leaf && height > 0 {
                reserved |= (13..12 + 9 * height as u32).any(|number| bit(entry, number));
            }
            if reserved {
                self.accessed(&passed);
                return Err(code | 1 | 8);
            }
            all_rw &= bit(entry, 1);
            all_us &= bit(entry, 2);
            any_xd |= bit(entry, 63);
            if leaf {
                self.accessed(&passed);
                let allowed =
                    self.allowed(plan, kind, user, (all_rw, all_us, any_xd), entry >> 59 & 15);
                if let Err(key_bit) = allowed {
                    return Err(code | 1 | key_bit << 5);
                }
                let stored = self.entries.get_mut(&key).unwrap();
                stored.0 |= 1 << 5 | u64::from(kind == AccessKind::Write) << 6;
                let size = 1u64 << (12 + 9 * height);
                let base = (12 + 9 * height as u32..52)
                    .map(|number| entry & 1 << number)
                    .sum::<u64>();
                return Ok(base + linear % size);
            }
            passed.push(key.clone());
        }
        unreachable!("the last level is a leaf")
    }

    fn accessed(&mut self, passed: &[Vec<u8>]) {
        for key in passed {
            self.entries.get_mut(key).unwrap().0 |= 1 << 5;
        }
    }

    /// Access rights in the manual's order of cases; the error carries the PK bit.
    fn allowed(
        &self,
        plan: &Plan,
        kind: AccessKind,
        user: bool,
        (rw, us, xd): (bool, bool, bool),
        key: u64,
    ) -> Result<(), u32> {
        let ad = plan.pkru >> (2 * key) & 1 == 1;
        let wd = plan.pkru >> (2 * key + 1) & 1 == 1;
        let keyed = plan.pke && us && kind != AccessKind::Fetch;
        let by_key = keyed && (ad || (wd && kind == AccessKind::Write && (user || plan.wp)));
        let by_rights = match (user, kind) {
            (true, AccessKind::Read) => us,
            (true, AccessKind::Write) => us && rw,
            (true, AccessKind::Fetch) => us && !xd,
            (false, AccessKind::Read) => !us || !plan.smap || plan.ac,
            (false, AccessKind::Write) => (!us || !plan.smap || plan.ac) && (rw || !plan.wp),
            (false, AccessKind::Fetch) => (!us || !plan.smep) && !xd,
        };
        if by_rights && !by_key {
            Ok(())
        } else {
            Err(u32::from(by_key))
        }
    }
}

/// Places the plan's entries: two slots at every level, a full binary tree of tables.
fn place(machine: &Machine, plan: &Plan) -> Model {
    let levels = plan.levels();
    let mut entries = BTreeMap::new();
    let mut next = 0x20_1000;
    let mut tables = vec![(Vec::new(), 0x20_0000u64)];
    let mut flags = plan.flags.iter().copied();
    for level in 0..levels {
        let mut below = Vec::new();
        for (path, table) in tables {
            for slot in 0..2u8 {
                let mut key: Vec<u8> = path.clone();
                key.push(slot);
                let flags = flags.next().unwrap();
                let at = table + SLOTS[usize::from(slot)] * 8;
                let height = (levels - 1 - level) as u32;
                let leaf = height == 0 || (bit(flags, 7) && height <= 2);
                // Large pages need a physical address of their own alignment: 1 GiB pages begin at 0 or 1 GiB.
                let target = if leaf {
                    (u64::from(slot) << (12 + 9 * height)) | if height == 0 { 0x80_0000 } else { 0 }
                } else {
                    next += 0x1000;
                    next - 0x1000
                };
                // The model knows no addresses of tables, so these are left as they are.
                let address_bits = ((1 << MAXPHYADDR) - 1) & !0xfff;
                let entry = target | if leaf { flags } else { flags & !address_bits };
                assert!(machine.memory().store(at, 8, entry));
                entries.insert(key.clone(), (entry, at));
                // A deeper table exists even under an entry that leads elsewhere: the model then never goes there.
                below.push((key, if leaf { 0x30_0000 } else { target }));
            }
        }
        tables = below
            .into_iter()
            .filter(|(_, table)| *table != 0x30_0000)
            .collect();
        // Paths below a leaf have no entries; nobody asks for them.
    }
    Model { entries }
}

fn check(plan: &Plan, cached: bool) -> Result<(), TestCaseError> {
    let registers = Registers {
        cr0: cr0::PE | cr0::PG | if plan.wp { cr0::WP } else { 0 },
        cr4: cr4::PAE
            | if plan.smep { cr4::SMEP } else { 0 }
            | if plan.smap { cr4::SMAP } else { 0 }
            | if plan.pke { cr4::PKE } else { 0 }
            | if plan.five { cr4::LA57 } else { 0 },
        efer: efer::LME | efer::LMA | if plan.nxe { efer::NXE } else { 0 },
        pkru: plan.pkru,
        ..Registers::LONG
    };
    let machine = builder().registers(registers).build().unwrap();
    let mut model = place(&machine, plan);
    let cpu = machine.cpu(0);
    cpu.write_cr3(0x20_0000).unwrap();
    cpu.set_ac(plan.ac).unwrap();
    for &(path, kind, user) in &plan.accesses {
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][usize::from(kind)];
        let linear = plan.linear(path);
        let view = if user { cpu.user() } else { cpu };
        let seen = match view.translate(linear, kind) {
            Ok(physical) => Ok(physical),
            Err(Fault::Page { address, code }) => {
                prop_assert_eq!(address, linear);
                Err(code)
            }
            Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
        };
        let expected = model.access(plan, path, kind, user);
        prop_assert_eq!(seen, expected, "{:#x} {:?} user {}", linear, kind, user);
        for (key, (entry, at)) in &model.entries {
            prop_assert_eq!(
                machine.memory().load(*at, 8).unwrap(),
                *entry,
                "A and D of {:?}",
                key
            );
        }
        if !cached {
            cpu.write_cr3(0x20_0000).unwrap();
        }
    }
    // Entries may point anywhere above memory; only the walker is under test here.
    drop(machine.take_violations());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_walk_agrees_with_the_model(plan in plan()) {
        check(&plan, false)?;
    }

    #[test]
    fn caches_change_nothing_while_the_tables_stand_still(plan in plan()) {
        check(&plan, true)?;
    }
}
