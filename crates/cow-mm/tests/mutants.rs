//! Faults on purpose, one at a time: each must be noticed by the entry of the list that guards against it.
//!
//! Built with `--cfg kmem_mutants` alone; `cargo xtask mutants` runs it.
#![cfg(kmem_mutants)]

mod common;
#[path = "regressions/device.rs"]
mod device;
#[path = "regressions/list.rs"]
mod list;
#[path = "regressions/pins.rs"]
mod pins;
#[path = "regressions/swap.rs"]
mod swap;

use std::panic::{AssertUnwindSafe, catch_unwind};

use kmem_cow_mm::mutants::{ALL, select};

#[test]
fn every_fault_is_noticed() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut unnoticed = Vec::new();
    for (name, _) in ALL {
        let guards: Vec<_> = list::ALL
            .iter()
            .chain(swap::ALL)
            .chain(device::ALL)
            .chain(pins::ALL)
            .filter(|entry| entry.2.contains(name))
            .collect();
        for (regression, run, _) in &guards {
            select(name);
            let noticed = catch_unwind(AssertUnwindSafe(run)).is_err();
            select("");
            if !noticed {
                unnoticed.push((*name, *regression));
            }
        }
        if guards.is_empty() {
            unnoticed.push((*name, "no entry is about it"));
        }
    }
    let _ = std::panic::take_hook();
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
    println!("{} mutants noticed in kmem-cow-mm", ALL.len());
}
