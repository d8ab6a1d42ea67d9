//! `cargo xtask`: the gate, the QEMU runner, golden files.

fn main() {}
