//! Checks of [`CpuCall`], clauses `R1` to `R3`.

use kmem_hal::sync::{AtomicU32, LocalU64, Ordering};
use kmem_hal::{Cpu, CpuCall, CpuSet};

use super::Report;

const NAME: &str = "CpuCall";

/// Checks `call` from the calling context, for the CPUs of `online`, all of which are running.
pub fn check<C: Cpu + Sync>(report: &Report, call: &impl CpuCall, cpu: &C, online: &CpuSet) {
    run(report, call, cpu, online, 3);
    let ran = AtomicU32::new(0);
    let answer = call.run_on(&CpuSet::EMPTY, &|_| {
        ran.fetch_add(1, Ordering::Relaxed);
    });
    let quiet = answer.is_err() || ran.load(Ordering::Relaxed) == 0;
    report.check(NAME, "R1", quiet, || "f ran though no CPU was named".into());
}

/// One call, small enough for loom.
pub fn check_once<C: Cpu + Sync>(report: &Report, call: &impl CpuCall, cpu: &C, online: &CpuSet) {
    run(report, call, cpu, online, 1);
}

fn run<C: Cpu + Sync>(report: &Report, call: &impl CpuCall, cpu: &C, online: &CpuSet, rounds: u64) {
    let count = cpu.count() as usize;
    let runs: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
    let written: Vec<LocalU64> = (0..count).map(|_| LocalU64::new(0)).collect();
    let before: Vec<LocalU64> = (0..count).map(|_| LocalU64::new(0)).collect();
    for round in 1..=rounds {
        for word in &before {
            word.set(round);
        }
        let answer = call.run_on(online, &|id| {
            let index = id.index();
            let pin = cpu.pin();
            report.check(NAME, "R1", pin.id() == id && index < count, || {
                format!("f({id}) ran on CPU {}", pin.id())
            });
            if index < count {
                report.check(NAME, "R3", before[index].get() == round, || {
                    "f did not see what the caller wrote before the call".into()
                });
                runs[index].fetch_add(1, Ordering::Relaxed);
                written[index].set(round);
            }
        });
        for (index, (runs, written)) in runs.iter().zip(&written).enumerate() {
            let times = runs.swap(0, Ordering::Relaxed);
            let named = online.iter().any(|id| id.index() == index);
            match answer {
                Ok(()) => {
                    report.check(NAME, "R1", times == u32::from(named), || {
                        format!(
                            "f ran {times} times on CPU {index}, which is named {} time",
                            u32::from(named)
                        )
                    });
                    if named && times == 1 {
                        report.check(NAME, "R3", written.get() == round, || {
                            format!("what f wrote on CPU {index} is not visible after the call")
                        });
                    }
                }
                Err(error) => {
                    report.check(NAME, "R2", times == 0, || {
                        format!("the call failed ({error}), and f ran on CPU {index}")
                    });
                }
            }
        }
        if answer.is_err() {
            report.skip(NAME, "R1", "the call was refused");
            return;
        }
    }
}
