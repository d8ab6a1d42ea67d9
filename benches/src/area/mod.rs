//! The areas: one module each, with its workloads and the programs that run them, behind a feature of its own name.

use crate::harness::Runner;

#[cfg(feature = "buddy")]
pub mod buddy;
#[cfg(feature = "fork")]
pub mod fork;
#[cfg(feature = "fork")]
mod host_program;
#[cfg(feature = "paging")]
pub mod paging;
#[cfg(feature = "slab")]
pub mod slab;
#[cfg(feature = "vma")]
pub mod vma;
#[cfg(feature = "vmalloc")]
pub mod vmalloc;

/// The areas of this build, in the order in which they run.
pub const AREAS: &[&str] = &[
    #[cfg(feature = "buddy")]
    "buddy",
    #[cfg(feature = "slab")]
    "slab",
    #[cfg(feature = "paging")]
    "paging",
    #[cfg(feature = "fork")]
    "fork",
    #[cfg(feature = "vma")]
    "vma",
    #[cfg(feature = "vmalloc")]
    "vmalloc",
];

/// Runs the workloads of one area.
///
/// # Panics
///
/// For a name that is not in [`AREAS`].
pub fn run(area: &str, runner: &mut Runner) {
    match area {
        #[cfg(feature = "buddy")]
        "buddy" => buddy::run(runner),
        #[cfg(feature = "slab")]
        "slab" => slab::run(runner),
        #[cfg(feature = "paging")]
        "paging" => paging::run(runner),
        #[cfg(feature = "fork")]
        "fork" => fork::run(runner),
        #[cfg(feature = "vma")]
        "vma" => vma::run(runner),
        #[cfg(feature = "vmalloc")]
        "vmalloc" => vmalloc::run(runner),
        other => panic!("there is no area {other}"),
    }
}

/// Adds the rows of counts of an area, where one of them was asked for.
#[cfg(not(kmem_counting))]
#[allow(dead_code, reason = "an area without such rows may be built alone")]
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
#[allow(dead_code, reason = "as above")]
fn counted(_runner: &mut Runner, _area: &str, _workloads: &[&str]) {}
