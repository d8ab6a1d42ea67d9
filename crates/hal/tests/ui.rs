//! Misuse that must not compile, and what the compiler says about it.
#![cfg(not(any(loom, shuttle, kmem_counting)))]

/// The twin of the failing programs: the same values, used rightly.
#[path = "ui/pass.rs"]
#[allow(dead_code)]
mod pass;

#[test]
fn misuse_does_not_compile() {
    // Programs that must fail are only checked, which is several times faster than building them.
    trybuild::TestCases::new().compile_fail("tests/ui/fail_*.rs");
}
