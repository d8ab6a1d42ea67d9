//! `compare`: kmem beside its peers.

fn main() {}
