//! A call is deferred once: what it reclaims is freed once.
use kmem_hal::{Deferred, Grace, SingleGrace};

fn defer(grace: &SingleGrace, call: Deferred) {
    let _ = grace.defer(call);
    let _ = grace.defer(call);
}

fn main() {}
