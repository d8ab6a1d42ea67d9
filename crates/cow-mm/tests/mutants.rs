//! Faults on purpose, one at a time: each must be noticed by the entry of the list that guards against it, and no entry is without one.
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

use kmem_cow_mm::mutants::ALL;

/// Turns a fault on as the list names it, and every other one off.
fn select(name: &str) {
    match name.strip_prefix("paging:") {
        Some(name) => kmem_paging::mutants::select(name),
        None => kmem_cow_mm::mutants::select(name),
    }
}

#[test]
fn every_fault_is_noticed() {
    std::panic::set_hook(Box::new(|_| {}));
    let parts = [list::ALL, swap::ALL, device::ALL, pins::ALL];
    let mut unnoticed = Vec::new();
    let mut tried = Vec::new();
    for (regression, run, faults) in parts.into_iter().flatten() {
        if faults.is_empty() {
            unnoticed.push(("no fault", *regression));
        }
        for fault in *faults {
            select(fault);
            let noticed = catch_unwind(AssertUnwindSafe(run)).is_err();
            kmem_cow_mm::mutants::select("");
            kmem_paging::mutants::select("");
            if !noticed {
                unnoticed.push((*fault, *regression));
            }
            tried.push(*fault);
        }
    }
    for (name, _) in ALL {
        if !tried.contains(name) {
            unnoticed.push((*name, "no entry is about it"));
        }
    }
    let _ = std::panic::take_hook();
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
    println!("{} mutants noticed in kmem-cow-mm", ALL.len());
}
