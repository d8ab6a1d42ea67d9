//! Memory is short: pages go to a swap device and come back, and some are moved to other frames.
//!
//! ```text
//!   512 pages written ── fork ── reclaim ──> swap device ── parent and child read all ──> memory
//!                                    │                             └─ each word as it was written
//!                                    └─ figures beside the device's own counts and the entries of the page tables
//!   every page moved to another frame, under parent and child ── read again ── swapoff
//! ```

use crate::replay::mm::{
    Backing, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MmUnderTest, PROT_READ, PROT_WRITE,
};
use crate::world::process::Process;
use crate::world::{World, forever};
use kmem_cow_mm::replacement::TwoLists;
use kmem_cow_mm::{Events, Reclaimer, SwapSlot};
use kmem_hal::{FrameRequest, FrameSink, FrameSource, Migrate, Page, PageRange, VirtAddr};
use kmem_mock_x86::Disk;

const PAGE: u64 = 4096;
/// Pages that are written.
const PAGES: u64 = 512;
/// Slots of swap: more than pages.
const SLOTS: u64 = 2048;

/// A figure and its recount.
#[derive(Debug)]
pub struct Figure {
    /// What it is.
    pub what: &'static str,
    /// What the memory manager says.
    pub said: u64,
    /// What was counted elsewhere.
    pub recount: u64,
    /// Of what.
    pub unit: &'static str,
    /// Where the recount is from.
    pub of: &'static str,
}

/// What the stage came to.
#[derive(Debug)]
pub struct Made {
    /// What happened.
    pub events: Events,
    /// Figures with their recounts.
    pub figures: Vec<Figure>,
    /// Words that were read and compared.
    pub compared: u64,
    /// meminfo's lines while pages were in swap.
    pub meminfo: String,
}

/// Runs the stage on pages from `at` on; leaves the space as it was.
///
/// # Errors
/// The first word that is not what was written, or a call that failed.
pub fn run(world: &'static World, init: &mut Process, at: u64) -> Result<Made, String> {
    let mm = world.mm();
    let disk: &'static Disk<'static> = forever(Disk::in_memory(world.machine(), SLOTS));
    disk.set_latency(1);
    let slots: &'static [SwapSlot] = Box::leak((0..SLOTS).map(|_| SwapSlot::new()).collect());
    let area = mm.swap_on(disk, slots).map_err(|e| e.to_string())?;
    let before = mm.events();
    let length = PAGES * PAGE;
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    init.mmap(at, length, PROT_READ | PROT_WRITE, flags, Backing::None, 0)
        .map_err(|e| format!("mmap of {length:#x} bytes: {e}"))?;
    for page in 0..PAGES {
        store(init, at, page, word(0, page))?;
    }
    let mut child = init.fork().map_err(|e| format!("fork: {e}"))?;
    for page in (0..PAGES).step_by(8) {
        store(&mut child, at, page, word(1, page))?;
    }
    let resident = init.space().recount().rss_anon;
    let mut figures = Vec::new();
    let mut reclaimer = Reclaimer::new(TwoLists);
    // Once to take the accessed bits away, then in earnest.
    for _ in 0..4 {
        reclaimer.reclaim(mm, PAGES);
        while mm.poll_swap().is_some() {}
    }
    let info = mm.meminfo();
    let meminfo = info.to_string();
    let events = mm.events();
    let slots_used = slots_of(init, &child);
    figures.push(Figure {
        what: "SwapTotal - SwapFree",
        said: (info.swap.total - info.swap.free) * 4,
        recount: slots_used * 4,
        unit: "kB",
        of: "entries of page tables, each slot once",
    });
    figures.push(Figure {
        what: "pswpout",
        said: events.swapped_out - before.swapped_out,
        recount: disk.transfers().1,
        unit: "pages",
        of: "the device",
    });
    figures.push(Figure {
        what: "VmSwap of init",
        said: init.space().swapped(),
        recount: resident - init.space().recount().rss_anon,
        unit: "pages",
        of: "anonymous pages before, less those now",
    });
    let mut compared = 0;
    read_all(init, &mut child, at, &mut compared)?;
    let events = mm.events();
    figures.push(Figure {
        what: "pswpin",
        said: events.swapped_in - before.swapped_in,
        recount: disk.transfers().0,
        unit: "pages",
        of: "the device",
    });
    let moved = move_all(world, init, at)? + move_all(world, &child, at)?;
    let events = mm.events();
    figures.push(Figure {
        what: "pages moved to another frame",
        said: events.moved - before.moved,
        recount: moved,
        unit: "",
        of: "entries that name the new frame",
    });
    read_all(init, &mut child, at, &mut compared)?;
    drop(child);
    init.munmap(at, length)
        .map_err(|e| format!("munmap: {e}"))?;
    for _ in 0..64 {
        match mm.swap_off(area) {
            Ok(None) => break,
            Ok(Some(_)) => {}
            Err(error) => return Err(format!("swapoff: {error}")),
        }
    }
    let info = mm.meminfo();
    figures.push(Figure {
        what: "SwapTotal after swapoff",
        said: info.swap.total * 4,
        recount: 0,
        unit: "kB",
        of: "no area is left",
    });
    let last = mm.events();
    let events = Events {
        swapped_in: last.swapped_in - before.swapped_in,
        swapped_out: last.swapped_out - before.swapped_out,
        read_ahead: last.read_ahead - before.read_ahead,
        scanned: last.scanned - before.scanned,
        freed: last.freed - before.freed,
        moved: last.moved - before.moved,
        ..last
    };
    Ok(Made {
        events,
        figures,
        compared,
        meminfo,
    })
}

/// What a process writes to a page.
fn word(process: u64, page: u64) -> u64 {
    (process + 7) << 32 | page
}

fn store(process: &mut Process, at: u64, page: u64, word: u64) -> Result<(), String> {
    let address = at + page * PAGE;
    process
        .store(address, word)
        .map_err(|e| format!("a write at {address:#x}: {e}"))
}

fn read_all(
    init: &mut Process,
    child: &mut Process,
    at: u64,
    compared: &mut u64,
) -> Result<(), String> {
    for page in 0..PAGES {
        let address = at + page * PAGE;
        let of_child = if page % 8 == 0 {
            word(1, page)
        } else {
            word(0, page)
        };
        for (name, process, wanted) in [
            ("init", &mut *init, word(0, page)),
            ("its child", &mut *child, of_child),
        ] {
            let got = process
                .load(address)
                .map_err(|e| format!("{name} reads at {address:#x}: {e}"))?;
            if got != wanted {
                return Err(format!(
                    "{name} sees {got:#x} at {address:#x}, written was {wanted:#x}"
                ));
            }
            *compared += 1;
        }
    }
    Ok(())
}

fn pages(at: u64) -> impl Iterator<Item = Page> {
    let first = Page::containing(VirtAddr::new(at));
    PageRange::with_count(first, PAGES)
        .into_iter()
        .flat_map(PageRange::iter)
}

/// Different slots that entries of both processes name.
fn slots_of(init: &Process, child: &Process) -> u64 {
    let mut seen = std::collections::BTreeSet::new();
    for process in [init, child] {
        process.space().for_each_swap_entry(|_, entry| {
            seen.insert((entry.area, entry.offset));
        });
    }
    seen.len() as u64
}

/// Gives every page another frame; how many entries name it afterwards.
fn move_all(world: &'static World, process: &Process, at: u64) -> Result<u64, String> {
    let frames = world.source();
    let mut moved = 0;
    for page in pages(at) {
        let Some(from) = process.space().frame_at(page) else {
            continue;
        };
        let to = frames
            .alloc(&FrameRequest::ONE)
            .map_err(|e| format!("a frame: {e}"))?;
        let target = to.first();
        match world.mm().migrate(from, to) {
            Ok(old) => frames.free(old),
            Err((_, back)) => {
                frames.free(back);
                continue;
            }
        }
        moved += u64::from(process.space().frame_at(page) == Some(target));
    }
    Ok(moved)
}
