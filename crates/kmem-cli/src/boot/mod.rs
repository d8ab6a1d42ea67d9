//! `kmem boot`: the main job, stage by stage.
//!
//! ```text
//!   map ─> early allocator ─> zones ─> object caches ─> kernel page tables
//!       ─> vmalloc ─> exec of the running binary ─> recorded programs ─> fork and write ─> reclaim and swap ─> figures ─> tear down ─> nothing leaked
//! ```
//!
//! Invariants
//! - I1: every figure that is printed with a recount is checked; one that differs makes the exit status 1.
//! - I2: input is read and checked before anything is built.
//! - I3: what the machine reports (an access through a stale translation, a frame used after it was freed) fails the run.

pub mod exec;
pub mod figures;
pub mod forks;
pub mod kernel_areas;
pub mod machine;
pub mod picture;
mod programs;
pub mod recount;
pub mod swap;
mod waiting;

pub use waiting::{Waiting, open_traces};

use crate::Status;
use crate::args::Boot;
use crate::elf::Image;
use crate::embedded;
use crate::input::map::{self, MemoryMap};
use crate::input::{InputError, lines::Source};
use crate::output::units::{bytes, grouped};
use crate::output::{Checks, Stages};
use crate::report::Report;
use crate::say;
use crate::world::counted::Counted;
use crate::world::process::Process;
use crate::world::types::Source as Books;
use crate::world::{self, World, forever};
use kmem_cow_mm::Usage;
use kmem_hal::PAGE_SIZE;
use kmem_mock_x86::Tracked;
use std::fmt::Write;

/// The map that is booted from where none is given.
pub const DEFAULT_MAP: &str = "firecracker-24g";
/// Processors of the machine: a child runs on another one than its parent, so that flushes have to travel.
const CPUS: usize = 2;
/// Bytes that a boot needs beside the program and the frame table: kernel image, tables, forks, the recorded programs.
const NEED: u64 = 14 << 20;

/// Runs the command.
///
/// # Errors
/// Unusable input.
pub fn run(args: &Boot) -> Result<Status, InputError> {
    let map = map::read(match &args.map {
        Some(path) => Source::open(path)?,
        None => default_map()?,
    })?;
    let traces = open_traces(&args.trace)?;
    let image = Image::running()?;
    enough(&map, &image)?;

    let mut boot = Running {
        stages: Stages::new(10 + traces.len()),
        checks: Checks::new(),
        report: Report::default(),
    };
    boot.report.title = format!("kmem boot: {}", map.name);
    say!("kmem boots on {}\n", map.name);
    boot.read_map(&map);
    let world = boot.bring_up(&map)?;
    let idle = Idle::of(world);
    let areas = boot.kernel_areas(world, &map);
    boot.user_land(world, &image, traces)?;
    areas.free(world.areas());
    boot.tear_down(world, &idle);
    boot.finish(world, args, &image)
}

/// The embedded map that a boot without `--map` starts from.
///
/// # Errors
/// Never in a binary that was built from this source.
pub fn default_map() -> Result<Source, InputError> {
    match embedded::find(embedded::MAPS, DEFAULT_MAP) {
        Some(map) => map.open(),
        None => Err(InputError::new(
            "embedded",
            0,
            "map",
            DEFAULT_MAP,
            "is not embedded",
        )),
    }
}

/// Refuses a machine on which the program itself has no room.
fn enough(map: &MemoryMap, image: &Image) -> Result<(), InputError> {
    let sections = recount::sections(map);
    let need = NEED
        + image.file_pages() * PAGE_SIZE * 2
        + sections * kmem_hal::FrameTable::SECTION_BYTES as u64;
    if map.usable_bytes() < need {
        let what = format!(
            "too little memory to boot on: {} are needed for this program",
            bytes(need)
        );
        return Err(map.error("usable", &bytes(map.usable_bytes()), what));
    }
    Ok(())
}

/// What was allocated before the first process.
///
/// Pages of object caches are apart: a cache whose memory has to stay what it is keeps empty slabs, so of those the
/// objects count, and the slabs that hold any.
struct Idle {
    pages: u64,
    objects: u64,
    slabs: u64,
    free: u64,
}

impl Idle {
    fn of(world: &World) -> Self {
        world.settle();
        let caches = figures::caches(world);
        let slab_pages = figures::Tags::of(world).slab;
        Self {
            pages: figures::Tags::of(world).without_slab(),
            objects: caches.iter().map(|c| c.active_objects).sum(),
            slabs: caches.iter().map(|c| c.active_slabs).sum(),
            free: world.frames().mem_info().free + slab_pages,
        }
    }
}

struct Running {
    stages: Stages,
    checks: Checks,
    report: Report,
}

impl Running {
    fn read_map(&mut self, map: &MemoryMap) {
        let stage = self.stages.start("memory map", 0);
        let nodes = map.node_numbers().len();
        let holes = map.usable().len();
        stage.done(&format!(
            "{} ranges, {} usable in {holes} pieces on {nodes} node{}",
            map.entries.len(),
            bytes(map.usable_bytes()),
            if nodes == 1 { "" } else { "s" }
        ));
        for remark in &map.remarks {
            say!("        note: {remark}");
        }
        let mut text = String::new();
        for e in &map.entries {
            let _ = writeln!(
                text,
                "[mem {:#018x}-{:#018x}] {:<14} {:>10}",
                e.base,
                e.last(),
                e.kind.to_string(),
                bytes(e.len)
            );
        }
        for n in &map.nodes {
            let _ = writeln!(
                text,
                "node {}: [mem {:#018x}-{:#018x}] {:>22}",
                n.node,
                n.base,
                n.last(),
                bytes(n.len)
            );
        }
        self.report.section("Memory map", text);
    }

    /// Everything up to the first process.
    fn bring_up(&mut self, map: &MemoryMap) -> Result<&'static World, InputError> {
        let refuse = |step: &'static str| {
            move |why: String| {
                map.error(
                    "usable",
                    &bytes(map.usable_bytes()),
                    format!("{step}: {why}"),
                )
            }
        };
        let machine = forever(machine::build(map, CPUS)?);
        let mut boot_map = machine::boot_map(map)?;
        let counted = recount::zones(map);
        let present: u64 = counted.iter().map(|z| z.present).sum();

        let stage = self.stages.start("early allocator", 0);
        let (table, early) =
            world::early(machine, &mut boot_map).map_err(refuse("early allocator"))?;
        stage.done(&format!(
            "frame table of {} for {} sections, 32 bytes a frame",
            bytes(early.table_bytes),
            early.sections
        ));
        self.checks.equal(
            "present pages",
            boot_map.present_frames(),
            present,
            "pages",
            "the map",
        );

        let stage = self.stages.start("zones", 0);
        let frames = world::frames(machine, &mut boot_map).map_err(refuse("zones"))?;
        let kinds = frames.zones().filter(|z| z.present > 0).count();
        let metadata = frames.metadata().count() * PAGE_SIZE;
        stage.done(&format!(
            "{kinds} zones, {} to manage, {} of bitmaps",
            bytes(frames.mem_info().total * PAGE_SIZE),
            bytes(metadata)
        ));
        figures::zones(&mut self.checks, map, frames, &counted);
        figures::memory(&mut self.checks, frames, &boot_map);

        let stage = self.stages.start("object caches", 0);
        let source: &'static Books = forever(Counted::new(Tracked::new(machine, frames)));
        let slabs = world::slabs(machine, source, table).map_err(refuse("object caches"))?;
        let mut classes = 0;
        let _ = slabs.caches(|_| classes += 1);
        stage.done(&format!("{classes} kmalloc classes online"));

        let stage = self.stages.start("kernel page tables", 0);
        let paging = world::paging(machine, source, table);
        let kernel = world::kernel_table(machine, paging.0, &boot_map)
            .map_err(refuse("kernel page tables"))?;
        let leaves: usize = boot_map.present().map(|r| world::leaves(r).count()).sum();
        stage.done(&format!(
            "all memory at {:#x} with {} leaves in {} tables",
            world::LINEAR,
            grouped(leaves as u64),
            kernel.table_count()
        ));
        let areas = world::areas(kernel, slabs);
        let process_parts = world::processes(slabs, paging.0).map_err(refuse("processes"))?;
        let world = World::of_parts(
            machine,
            boot_map,
            table,
            frames,
            source,
            slabs,
            paging,
            (kernel, areas),
            process_parts,
        );
        self.check_linear_map(world);
        Ok(world)
    }

    /// Reads memory through the kernel's tables and straight, at the edges of every range.
    fn check_linear_map(&mut self, world: &World) {
        let machine = world.machine();
        let (mut right, mut all) = (0, 0);
        for range in world.boot_map().present() {
            let (first, last) = (
                range.first().number(),
                range.first().number() + range.count() - 1,
            );
            for frame in [first, first + (last - first) / 2, last] {
                all += 1;
                let physical = frame * PAGE_SIZE + 8 * (frame % 512);
                let seen = machine
                    .cpu(0)
                    .translate(world::LINEAR + physical, kmem_mock_x86::AccessKind::Read);
                right += u64::from(seen == Ok(physical));
            }
        }
        self.checks.equal(
            "addresses the MMU translates right",
            right,
            all,
            "",
            "edges and middles of all ranges",
        );
        let hole = machine.memory().frame_limit() * PAGE_SIZE;
        let beyond = machine
            .cpu(0)
            .translate(world::LINEAR + hole, kmem_mock_x86::AccessKind::Read)
            .is_err();
        self.checks.holds(
            "behind the last frame",
            beyond,
            "a page fault",
            if beyond {
                "a page fault"
            } else {
                "a translation"
            },
        );
    }

    /// Kernel mappings: memory that follows itself only there, a stack with guards, a window to a device.
    fn kernel_areas(&mut self, world: &World, map: &MemoryMap) -> kernel_areas::Made {
        let stage = self.stages.start("vmalloc", 0);
        let made = kernel_areas::make(world.areas(), map);
        let (count, pages) = world.areas().used();
        stage.done(&format!(
            "{count} areas of {} in the kernel's window",
            bytes(pages * PAGE_SIZE)
        ));
        let (words, right) = made.words(world.machine());
        self.checks.equal(
            "words through the areas",
            right,
            words,
            "",
            "written before, across pages",
        );
        let guards = made.guards(world.machine());
        self.checks.equal(
            "guards that fault",
            guards.1,
            guards.0,
            "",
            "one behind each area, one below a stack",
        );
        let refused = made.refused.as_deref().unwrap_or("made");
        self.checks
            .holds("areas asked for", made.refused.is_none(), "made", refused);
        let windows = made.window_pages();
        let tags = figures::Tags::of(world).vmalloc;
        self.checks.equal(
            "VmallocUsed",
            pages * 4,
            (tags + windows) * 4,
            "kB",
            "tags of frames, the window to a device",
        );
        let printed = kernel_areas::printed_pages(&world.areas().info().to_string());
        self.checks.equal(
            "vmallocinfo, summed as printed",
            printed,
            tags,
            "pages",
            "tags of frames",
        );
        made
    }

    fn figures(&mut self, world: &'static World, init: &Process) {
        say!();
        let usage = init.space().recount();
        let slab = world.slabs().slabinfo().to_string();
        let meminfo = meminfo(world, init);
        let sections = [
            ("/proc/buddyinfo", world.frames().buddy_info().to_string()),
            ("/proc/meminfo", meminfo),
            ("/proc/slabinfo", slab),
            ("/proc/vmallocinfo", world.areas().info().to_string()),
            ("/proc/zoneinfo", world.frames().zone_info().to_string()),
            ("/proc/1/maps", init.space().maps().to_string()),
        ];
        for (name, text) in sections {
            say!("--- {name}\n{text}");
            self.report.section(name, text);
        }
        say!("--- figures and their recounts");
        let processes = figures::Processes {
            tables: tables_of(init, &usage),
            anon: usage.rss_anon,
        };
        figures::memory(&mut self.checks, world.frames(), world.boot_map());
        figures::owners(&mut self.checks, world, &processes);
        let cached = init.cached_pages() + 1;
        let files = figures::Tags::of(world).file;
        self.checks.equal(
            "page cache and zero page",
            cached,
            files,
            "pages",
            "tags of frames",
        );
        self.check_list(init);
        say!();
        self.report.picture = picture::of(world);
    }

    /// The list of mappings as text, against the tree it was printed from.
    fn check_list(&mut self, init: &Process) {
        let lines = init.space().maps().to_string().lines().count() as u64;
        self.checks.equal(
            "lines of /proc/1/maps",
            lines,
            init.space().map_count() as u64,
            "mappings",
            "the tree of VMAs",
        );
    }

    fn tear_down(&mut self, world: &'static World, idle: &Idle) {
        let stage = self.stages.start("tear down", 0);
        world.settle();
        let (given, taken) = world.source().ledger(|l| (l.given, l.taken));
        stage.done(&format!(
            "{} blocks given and {} taken back so far",
            grouped(given),
            grouped(taken)
        ));
        let now = Idle::of(world);
        let from = "before the first process";
        self.checks.equal(
            "pages of tables, files and programs",
            now.pages,
            idle.pages,
            "pages",
            from,
        );
        self.checks
            .equal("objects in use", now.objects, idle.objects, "objects", from);
        self.checks.equal(
            "slabs with an object in use",
            now.slabs,
            idle.slabs,
            "slabs",
            from,
        );
        self.checks.equal(
            "free pages, empty slabs with them",
            now.free,
            idle.free,
            "pages",
            from,
        );
        figures::memory(&mut self.checks, world.frames(), world.boot_map());
        let violations = world.violations();
        let first = violations
            .first()
            .map_or("nothing", |v| v.lines().next().unwrap_or("something"));
        self.checks.holds(
            "stale translations, uses after free",
            violations.is_empty(),
            "nothing",
            first,
        );
        for story in violations.iter().take(3) {
            say!("{story}");
        }
    }

    fn finish(mut self, world: &World, args: &Boot, image: &Image) -> Result<Status, InputError> {
        let all = self.checks.all().len();
        let broken = self.checks.broken();
        let mut text = String::new();
        for line in self.stages.lines() {
            let _ = writeln!(text, "{line}");
        }
        self.report.sections.insert(0, ("Stages".into(), text));
        let mut text = String::new();
        for check in self.checks.all() {
            let _ = writeln!(text, "{}", crate::output::checks::line(check).trim_start());
        }
        self.report.section("Figures and their recounts", text);
        self.report.section(
            "The program",
            format!("{} with {} segments", image.name, image.segments.len()),
        );
        if let Some(folder) = &args.report {
            self.report.write(folder)?;
            say!("report written to {}", folder.join("report.html").display());
        }
        let peak = world.source().ledger(|l| l.peak);
        let host = world.machine().memory().committed_bytes();
        say!(
            "peak {} allocated; the host lent {} for it",
            bytes(peak * PAGE_SIZE),
            bytes(host)
        );
        if broken == 0 {
            say!("all {all} figures equal their recounts; nothing leaked");
            Ok(Status::Held)
        } else {
            say!("{broken} of {all} figures DIFFER from their recounts");
            Ok(Status::Broken)
        }
    }
}

/// Frames that a process's page tables hold, those set aside for copies of shared tables too.
fn tables_of(process: &Process, usage: &Usage) -> u64 {
    usage.tables + process.space().page_tables().spares() as u64
}

/// `/proc/meminfo`: the allocator's lines, then those of the allocator's users.
fn meminfo(world: &World, init: &Process) -> String {
    let mut text = world.frames().mem_info().to_string();
    let usage = init.space().recount();
    let totals = world.slabs().totals();
    let tables =
        world.kernel().table_count() as u64 + tables_of(init, &usage) + world.cached_tables();
    for (name, pages) in [
        ("AnonPages", usage.rss_anon),
        ("Mapped", usage.rss_file + usage.rss_shmem),
        (
            "Slab",
            totals.slab_frames + totals.page_frames + totals.overhead_frames,
        ),
        ("PageTables", tables),
        ("VmallocUsed", world.areas().used().1),
    ] {
        if !text.lines().any(|l| l.starts_with(&format!("{name}:"))) {
            let _ = writeln!(text, "{:<16}{:>8} kB", format!("{name}:"), pages * 4);
        }
    }
    text
}
