//! Instruction counts: `counts NAME` runs one workload of fixed size, for callgrind.
//!
//! A count does not depend on what else the machine does, so that it can stand in the gate, where a time cannot.
//! `cargo xtask counts` runs each workload under valgrind, counts what happens below [`measured`], and compares with the
//! committed figures. Setting up is outside. Without a name the program lists its workloads.

use std::hint::black_box;

use kmem_hal::{Cpu, FixedPool, Lock, ObjectAlloc, SingleCpu, Spin};

/// Operations in one workload.
const N: usize = 1000;

/// What is counted: the body of a workload and nothing else.
#[unsafe(no_mangle)]
#[inline(never)]
fn measured(body: &mut dyn FnMut()) {
    body();
}

/// A name and a function that sets up and calls [`measured`] once.
type Workload = (&'static str, fn());

/// Every workload, in the order of the published table.
const WORKLOADS: &[Workload] = &[
    ("hal/pin", || {
        // SAFETY: one thread.
        let cpu = unsafe { SingleCpu::new() };
        measured(&mut || {
            for _ in 0..N {
                black_box(cpu.pin().id());
            }
        });
    }),
    ("hal/lock_spin", || {
        let lock = Lock::<u64, Spin>::new(0);
        measured(&mut || {
            for _ in 0..N {
                *black_box(&lock).lock() += 1;
            }
        });
    }),
    ("hal/pool_pair", || {
        static POOL: FixedPool<u64, 256> = FixedPool::new();
        measured(&mut || {
            for _ in 0..N {
                let object = black_box(&POOL).alloc().expect("256 objects");
                // SAFETY: just given, and freed once.
                unsafe { POOL.free(black_box(object)) };
            }
        });
    }),
];

fn main() {
    match std::env::args().nth(1) {
        None => WORKLOADS.iter().for_each(|(name, _)| println!("{name}")),
        Some(wanted) => match WORKLOADS.iter().find(|(name, _)| *name == wanted) {
            Some((_, run)) => run(),
            None => {
                eprintln!("counts: there is no workload {wanted}");
                std::process::exit(2);
            }
        },
    }
}
