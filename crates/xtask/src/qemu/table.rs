//! What is booted: every scenario on one CPU and on two, some on larger machines, and faults that must be caught.

use super::machine::Machine;

/// Every scenario, with what it proves.
pub const SCENARIOS: &[(&str, &str)] = &[
    ("boot", "the memory map is read; an exception returns"),
    (
        "fault",
        "a real page fault is handled and the access retried",
    ),
    (
        "smp",
        "every CPU starts; calls between CPUs nest without deadlock",
    ),
    (
        "heap",
        "Box, VecDeque, BTreeMap from kmem's slab on every CPU at once",
    ),
    (
        "storm",
        "frames and objects on every CPU while the timer interrupt allocates",
    ),
    ("red-zone", "interrupts leave data below rsp alone"),
    ("memory", "all memory is used, above 4 GiB too"),
    (
        "paging",
        "faults fill the kernel's table on every CPU, a shootdown empties it",
    ),
    (
        "tags",
        "what each of the TLB's instructions drops is gone, and two tags are kept apart where the CPU has tags",
    ),
    (
        "overflow",
        "a kernel stack's overflow is a double fault on its own stack that names the guard page",
    ),
    (
        "differential",
        "page tables and faults as on the mock machine",
    ),
    ("legacy", "32-bit and PAE tables walked by the MMU"),
    ("demand", "demand zero, a stack that grows"),
    ("fork", "copy on write both ways, three generations deep"),
    ("shared", "shared memory and a mapped file over a fork"),
    ("protect", "bad accesses end the culprit only"),
    (
        "repair",
        "a SIGSEGV handler repairs and the program goes on",
    ),
    (
        "efault",
        "the kernel writes to user memory with the user's rights",
    ),
    ("calls", "mremap, munmap, brk, madvise, limits, errors"),
    ("exec", "execve and what it leaves"),
    ("reuse", "no frame is used again before every CPU forgot it"),
    (
        "threads",
        "threads on both CPUs with unmap under their feet",
    ),
    ("forkbomb", "a fork bomb is bounded, and over"),
    ("oom", "out of memory ends one process, not the kernel"),
    ("maps", "a static C program's maps are as on Linux"),
];

/// Faults of `plant.rs` and scenarios that report them.
const PLANTED: &[(&str, &str, u32)] = &[
    ("paging", "lost-flush", 1),
    ("paging", "lost-flush", 2),
    ("paging", "deaf", 2),
    ("reuse", "deaf", 2),
    ("reuse", "no-wait", 2),
    ("red-zone", "red-zone", 1),
    ("tags", "lost-drop", 1),
    ("demand", "wrong-error-bit", 1),
    ("fork", "double-free", 1),
    ("fork", "leak", 1),
];

fn machine(scenario: &str, cpus: u32, memory: &str) -> Machine {
    Machine {
        scenario: scenario.to_owned(),
        cpus,
        memory: memory.to_owned(),
        five_levels: false,
        kvm: false,
        without: Vec::new(),
        plant: None,
        trace: false,
    }
}

/// Runs that must pass.
pub fn good() -> Vec<Machine> {
    let mut runs = Vec::new();
    for (name, _) in SCENARIOS {
        for cpus in [1, 2] {
            runs.push(machine(name, cpus, "64M"));
        }
    }
    for name in ["smp", "heap", "paging"] {
        runs.push(machine(name, 4, "64M"));
    }
    for name in ["boot", "memory", "fork"] {
        runs.push(machine(name, 2, "8G"));
    }
    let five = [
        "boot", "paging", "legacy", "fork", "threads", "overflow", "maps",
    ];
    for name in five {
        runs.push(Machine {
            five_levels: true,
            ..machine(name, 2, "64M")
        });
    }
    // A processor without leaves of 1 GiB, SMEP and SMAP.
    for (name, memory) in [
        ("boot", "64M"),
        ("memory", "8G"),
        ("paging", "64M"),
        ("fork", "64M"),
        ("efault", "64M"),
        ("threads", "64M"),
    ] {
        runs.push(without(
            &["pdpe1gb", "smep", "smap"],
            machine(name, 2, memory),
        ));
    }
    runs
}

fn without(features: &[&str], machine: Machine) -> Machine {
    Machine {
        without: features.iter().map(|&name| name.to_owned()).collect(),
        ..machine
    }
}

/// The boot that says whether KVM can run the kernel.
pub fn kvm_probe() -> Machine {
    Machine {
        kvm: true,
        ..machine("boot", 1, "64M")
    }
}

/// Runs under KVM that must pass: with all tags, with those that only MOV CR3 can drop, and with none.
pub fn kvm() -> Vec<Machine> {
    let mut runs = Vec::new();
    for lacks in [&[][..], &["invpcid"], &["pcid", "invpcid"]] {
        // `differential` compares with what QEMU's emulation does.
        let names = SCENARIOS.iter().map(|(name, _)| *name);
        for name in names.filter(|name| *name != "differential") {
            for cpus in [1, 2] {
                let machine = machine(name, cpus, "64M");
                runs.push(without(
                    lacks,
                    Machine {
                        kvm: true,
                        ..machine
                    },
                ));
            }
        }
    }
    runs
}

/// Runs that must not pass: they prove that the runner and the checks can tell.
pub fn bad() -> Vec<Machine> {
    let mut runs: Vec<Machine> = ["fail", "panic", "triple", "no-such-scenario"]
        .iter()
        .map(|name| machine(name, 1, "64M"))
        .collect();
    for (name, plant, cpus) in PLANTED {
        runs.push(Machine {
            plant: Some((*plant).to_owned()),
            ..machine(name, *cpus, "64M")
        });
    }
    runs
}
