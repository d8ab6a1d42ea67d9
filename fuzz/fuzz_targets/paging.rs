//! Page tables of every format against a flat map: any bytes become operations, six bytes each.
//!
//! The first byte chooses the format, and whether every operation is also tried with its allocations failing, one after the
//! other (of many, not each of the later ones).
#![no_main]

#[path = "../../crates/paging/tests/common/machine.rs"]
mod machine;
#[path = "../../crates/paging/tests/common/ops/mod.rs"]
mod ops;

use kmem_paging::format::{
    Aarch64, Format, RiscvSv39, RiscvSv48, RiscvSv57, X86_64, X86_64La57, X86Pae, X86Pse36,
    X86TwoLevel,
};
use libfuzzer_sys::fuzz_target;
use ops::World;

fn run<F: Format>(codes: &[u8], failures: bool) {
    let mut world = World::<F>::new();
    for code in codes.chunks_exact(6).take(100) {
        let code = code.try_into().unwrap();
        if failures {
            world.step_failing(code, |_| ());
        } else {
            world.step(code, None);
        }
    }
    world.finish();
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, codes)) = bytes.split_first() else {
        return;
    };
    let failures = first & 0x80 != 0;
    match (first & 0x7f) % 9 {
        0 => run::<X86_64>(codes, failures),
        1 => run::<X86_64La57>(codes, failures),
        2 => run::<X86Pae>(codes, failures),
        3 => run::<X86TwoLevel>(codes, failures),
        4 => run::<X86Pse36>(codes, failures),
        5 => run::<RiscvSv39>(codes, failures),
        6 => run::<RiscvSv57>(codes, failures),
        7 => run::<RiscvSv48>(codes, failures),
        _ => run::<Aarch64>(codes, failures),
    }
});
