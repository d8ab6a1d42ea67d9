//! Address spaces: kmem's beside the host's kernel, reached through libc.
//!
//! kmem's calls are function calls over kmem's whole stack (frames, slab, tables, ranges) with a fault handed in as a value; the host's are
//! real system calls and real page faults under whatever hypervisor there is, with everything that its kernel does besides. The two
//! are printed together to show orders of magnitude, not who is faster at the same work. Limits of the same run: `limit:memcpy` copies the
//! words of the tables, `limit:eager-copy` copies entries, clears their write bits and counts a reference for each, `limit:copy-table` copies the 512 entries
//! of a table and counts a reference for each (a locked addition, as other spaces count too, to a slot of 32 bytes), `limit:zero-frame` and
//! `limit:copy-frame` zero and copy 4 KiB of as much memory as the workload has, one frame behind the other, `limit:locks+zero-frame` and
//! `limit:locks+copy-frame` the same with four locked instructions in between, which end the processor's work ahead as a fault's do,
//! `limit:copy-table+frame` is a table and a frame in turn.
//!
//! `fork_exec` of the host is a program made for it (`host_program.rs`): the same 40 mappings and touched pages in parent and image, and a parent as small.
//! Comparable: the copy of the space, 40 calls of mmap and 160 first touches, and the end of both spaces. Not comparable, and in the host's
//! figure alone: making, scheduling and reaping a task, reading the image's headers, its stack, `[vdso]`, and the traps.
//!
//! | workload | an operation |
//! |---|---|
//! | `fork_1g_tables`, `fork_64g_tables` | a fork's work on the tables of 1 GiB in pages of 4 KiB, which shares leaf tables; of 64 GiB, level-2 tables |
//! | `fork_exit_tables` | the first of these and the end of the child's tables |
//! | `fork_write_all_tables` | the first of these, and every table copied at its first change: the work on tables of a child that writes to every page |
//! | `first_write_table`, `first_write_level2` | a table copied at its first change, with a count for each frame; a level-2 table and a leaf table |
//! | `fork_1g` | a fork of a space with 1 GiB of touched pages, in the parent; `limit:eager-copy` is kmem's own fork that shares no tables |
//! | `fork_read_all` | one page of a fork and a child that reads from all pages (kmem: walks its tables for each), and its end |
//! | `fork_exec` | a fork of a program with 40 mappings, another program of 40 in a new space, 4 pages of each touched, and its end |
//! | `retake_table` | a write fault after the child has gone without a write: the whole table is taken back |
//! | `fork_exit` | the same and the child's end, in parent and child |
//! | `fork_write_all` | one page of a fork, a child that writes to all pages, and its end |
//! | `first_write`, `later_write` | a write fault that copies, with the child alive: the first in each 2 MiB, and the others |
//! | `reuse_fault` | a write fault after the child has gone, which had written to a page of each table: no copy |
//! | `anon_fault` | a first write to an anonymous page |
//! | `mmap_munmap` | a page mapped and unmapped, not touched |
//! | `mprotect_split_merge` | a call that makes one page in the middle of a mapping read-only, or writable again |
//! | `brk_grow` | a call that moves the break up by a page, or down again |

mod host;
mod limits;
mod spaces;
mod tables;
mod world;

use crate::harness::{Runner, Workload};
use crate::output::Unit;
use crate::platform::Region;

pub use world::{Process, World, mm};

const AREA: &str = "fork";
const PAGE: u64 = 4096;

/// Pages of 1 GiB.
const GIB: u64 = 1 << 18;

/// Runs the workloads of this area.
pub fn run(runner: &mut Runner) {
    let of_tables = [
        "fork_1g_tables",
        "fork_exit_tables",
        "fork_64g_tables",
        "first_write_table",
        "first_write_level2",
        "fork_write_all_tables",
    ];
    if of_tables.iter().any(|name| runner.wants(name)) {
        tables::run(runner);
    }
    if runner.wants("fork_1g") || runner.wants("fork_exit") {
        spaces::whole(runner);
    }
    let count = runner.size(1 << 12, 1 << 14);
    let mm = World::leak(Region::new(4 * count + (1 << 13)).touched());
    spaces::writes(runner, mm, count);
    spaces::programs(runner, mm);
    spaces::faults(runner, mm, count);
    spaces::calls(runner, mm);
}

fn workload(name: &'static str) -> Workload<'static> {
    Workload::new(AREA, name, Unit::Ns)
}
