//! How fast the mock machine is: accesses a second by TLB hit, by walk, and under a schedule.

use std::time::Instant;

use kmem_mock_x86::{Adversary, Machine, MemoryMap, Scheduler};

const ROOT: u64 = 0x10_0000;
const PAGES: u64 = 4096;

fn machine(cpus: usize, verify: bool, adversary: Adversary) -> Machine {
    let machine = Machine::builder()
        .memory(MemoryMap::pc(64 << 20))
        .cpus(cpus)
        .verify(verify)
        .adversary(adversary)
        .build()
        .expect("address space");
    let store = |at, value| assert!(machine.memory().store(at, 8, value));
    store(ROOT, (ROOT + 0x1000) | 7);
    store(ROOT + 0x1000, (ROOT + 0x2000) | 7);
    for page in 0..PAGES {
        let table = ROOT + 0x3000 + (page / 512) * 0x1000;
        store(ROOT + 0x2000 + page / 512 * 8, table | 7);
        store(table + page % 512 * 8, (0x100_0000 + page * 4096) | 7);
    }
    for cpu in 0..cpus {
        machine.cpu(cpu).write_cr3(ROOT).expect("a good root");
    }
    machine
}

fn rate(name: &str, count: u64, run: impl FnOnce()) {
    let start = Instant::now();
    run();
    println!(
        "{name:<44} {:>6.2} million/s",
        count as f64 / start.elapsed().as_secs_f64() / 1e6
    );
}

fn main() {
    const COUNT: u64 = 2_000_000;
    for verify in [true, false] {
        let m = machine(1, verify, Adversary::OFF);
        let cpu = m.cpu(0);
        let name = if verify {
            "hit, verified"
        } else {
            "hit, not verified"
        };
        rate(name, COUNT, || {
            for turn in 0..COUNT {
                cpu.read_u64(turn * 4096 % (PAGES * 4096)).expect("mapped");
            }
        });
    }
    let m = machine(1, true, Adversary::OFF);
    rate("invlpg and miss", COUNT / 4, || {
        for turn in 0..COUNT / 4 {
            let at = turn * 4096 % (PAGES * 4096);
            m.cpu(0).invlpg(at).unwrap();
            m.cpu(0).write_u64(at, turn).expect("mapped");
        }
    });
    let m = machine(1, true, Adversary::FULL);
    rate("adversary", COUNT / 4, || {
        for turn in 0..COUNT / 4 {
            let at = turn * 4096 % (PAGES * 4096);
            while m.cpu(0).read_u64(at).is_err() {}
        }
    });
    println!("    {}", m.stats());
    let m = machine(4, true, Adversary::OFF);
    rate("four CPUs under a schedule", COUNT, || {
        let mut scheduler = Scheduler::new(&m, 1);
        for cpu in 0..4 {
            let m = &m;
            scheduler.spawn(cpu, move || {
                for turn in 0..COUNT / 4 {
                    m.cpu(cpu)
                        .read_u64(turn * 4096 % (PAGES * 4096))
                        .expect("mapped");
                }
            });
        }
        scheduler.run();
    });
    let start = Instant::now();
    let big = Machine::pc(256 << 30, 8);
    println!(
        "a machine of 256 GiB starts in {:.2} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
    drop(big);
}
