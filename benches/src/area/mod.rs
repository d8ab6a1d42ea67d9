//! The areas: one module each, with its workloads and the programs that run them.

use crate::harness::Runner;

pub mod buddy;
pub mod fork;
pub mod paging;
pub mod slab;
pub mod vma;
pub mod vmalloc;

/// All areas, in the order in which they run.
pub const AREAS: [&str; 6] = ["buddy", "slab", "paging", "fork", "vma", "vmalloc"];

/// Runs the workloads of one area.
///
/// # Panics
///
/// For a name that is not in [`AREAS`].
pub fn run(area: &str, runner: &mut Runner) {
    match area {
        "buddy" => buddy::run(runner),
        "slab" => slab::run(runner),
        "paging" => paging::run(runner),
        "fork" => fork::run(runner),
        "vma" => vma::run(runner),
        "vmalloc" => vmalloc::run(runner),
        other => panic!("there is no area {other}"),
    }
}

/// Adds the rows of counts of an area, where one of them was asked for.
#[cfg(not(kmem_counting))]
fn counted(runner: &mut Runner, area: &str, workloads: &[&str]) {
    if !workloads.iter().any(|name| runner.wants(name)) {
        return;
    }
    match crate::counting::rows_of(area) {
        Ok(rows) => {
            let wanted = rows
                .into_iter()
                .filter(|row| runner.wants(&row.workload))
                .collect();
            runner.add_rows(wanted);
        }
        Err(problem) => runner.problem(problem),
    }
}

#[cfg(kmem_counting)]
fn counted(_runner: &mut Runner, _area: &str, _workloads: &[&str]) {}
