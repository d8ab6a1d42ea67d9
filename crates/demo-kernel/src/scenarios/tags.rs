//! Scenario `tags`: every way of [`Tlb`] to drop a translation, on tables made by hand whose entries change without anybody being told.

use alloc::vec::Vec;

use kmem::hal::{Asid, Page, Root, Tlb, VirtAddr};
use kmem::{Frame, FrameRequest, FrameSink, FrameSource, OwnedFrame};

use crate::layout::{self, direct};
use crate::memory::{self, frames};
use crate::pvh::Boot;
use crate::scenarios::{end, start};
use crate::tlb::BootTlb;
use crate::{cpu, println};

/// What is mapped, in the half that the kernel does not use.
const ADDRESS: u64 = 0x1234_5000;
/// Present, writable; for the kernel alone, so that SMAP does not matter.
const ENTRY: u64 = 3;
/// Tags that `AsidMmu` does not deal out.
const TAGS: [u16; 2] = [100, 4095];

/// A root that leads to one page, which is one of two frames.
struct Tables {
    root: Root,
    entry: *mut u64,
    pages: [Frame; 2],
}

impl Tables {
    /// Makes tables whose pages begin with `value` and `value + 1`; what they are made of goes to `owned`.
    fn new(tag: Asid, value: u64, owned: &mut Vec<OwnedFrame>) -> Self {
        let mut frame = || {
            let frame = frames().alloc(&FrameRequest::ONE.zeroed());
            owned.push(frame.expect("a frame"));
            owned[owned.len() - 1].first()
        };
        let words = |frame: Frame| direct(frame.start().as_u64()).cast::<u64>();
        let pages = [frame(), frame()];
        let root = frame();
        let mut levels = if layout::five_levels() { 5 } else { 4 };
        let mut table = root;
        // SAFETY: the frames are ours; the kernel's root is read, whose upper half no longer changes.
        unsafe {
            words(pages[0]).write(value);
            words(pages[1]).write(value + 1);
            let kernel = words(memory::table().root().frame);
            words(root)
                .add(256)
                .copy_from_nonoverlapping(kernel.add(256), 256);
            while levels > 1 {
                let next = frame();
                let index = ADDRESS >> (3 + 9 * levels) & 511;
                words(table)
                    .add(index as usize)
                    .write(next.start().as_u64() | ENTRY);
                (table, levels) = (next, levels - 1);
            }
        }
        let entry = words(table).wrapping_add((ADDRESS >> 12 & 511) as usize);
        let root = Root {
            frame: root,
            asid: tag,
        };
        Self { root, entry, pages }
    }

    fn load(&self, keep: bool) {
        // SAFETY: the tables map the kernel's half; under the tag is nothing but what was read through them.
        unsafe { BootTlb.load(self.root, keep) };
    }

    /// Maps the first page or the second, and tells nobody.
    fn map(&self, second: bool) {
        let page = self.pages[usize::from(second)].start().as_u64();
        // SAFETY: the entry is ours.
        unsafe { self.entry.write_volatile(page | ENTRY) };
    }
}

fn read() -> u64 {
    // SAFETY: the loaded tables map the page.
    unsafe { (ADDRESS as *const u64).read_volatile() }
}

/// Counts the ways to drop that left the old translation, and those that this CPU has.
fn try_all(own: &Tables, other: &Tables) -> [u32; 3] {
    let (page, tag) = (Page::containing(VirtAddr::new(ADDRESS)), own.root.asid);
    // The last two begin under the other tag, and the page is read after the way back.
    let ways: [(&str, &dyn Fn() -> bool); 8] = [
        ("load", &|| {
            own.load(false);
            true
        }),
        ("drop_page", &|| {
            BootTlb.drop_page(page);
            true
        }),
        ("drop_current", &|| {
            BootTlb.drop_current();
            true
        }),
        ("drop_all", &|| {
            BootTlb.drop_all();
            true
        }),
        ("drop_page_of", &|| BootTlb.drop_page_of(tag, page)),
        ("drop_tag", &|| BootTlb.drop_tag(tag)),
        ("drop_page_of another", &|| {
            other.load(false);
            let dropped = BootTlb.drop_page_of(tag, page);
            own.load(dropped);
            dropped
        }),
        ("drop_tag another", &|| {
            other.load(false);
            let dropped = BootTlb.drop_tag(tag);
            own.load(dropped);
            dropped
        }),
    ];
    let [mut wrong, mut has, mut kept] = [0; 3];
    for (name, way) in ways {
        own.map(false);
        own.load(false);
        let before = read();
        own.map(true);
        let untold = read();
        let dropped = way();
        let after = read();
        has += u32::from(dropped);
        kept += u32::from(untold == before);
        if dropped && after != before + 1 {
            println!("{name}: the page reads {after} as before");
            wrong += 1;
        }
    }
    [wrong, has, kept]
}

/// Two roots that map one address, under tags of their own: each keeps its own page, through switches that drop nothing.
fn try_switches(roots: &[Tables; 2], keep: bool) -> u32 {
    let mut wrong = 0;
    for root in roots {
        root.map(false);
        root.load(false);
        read();
    }
    for round in 0..1000 {
        let root = &roots[round % 2];
        root.load(keep);
        let expected = 10 * (1 + round as u64 % 2);
        if read() != expected {
            println!("root {}: the page reads {}", round % 2, read());
            wrong += 1;
        }
    }
    wrong
}

/// Runs the scenario: what was dropped must be gone, whatever else the processor keeps.
pub fn run(boot: &Boot) -> bool {
    let baseline = start(boot);
    let mut owned = Vec::with_capacity(16);
    let tagged = BootTlb.tags() > 1;
    let tags = TAGS.map(|tag| Asid::new(if tagged { tag } else { 0 }));
    let roots = [
        Tables::new(tags[0], 10, &mut owned),
        Tables::new(tags[1], 20, &mut owned),
    ];
    let ([wrong, has, kept], mixed) = cpu::without_interrupts(|| {
        let tried = try_all(&roots[0], &roots[1]);
        let mixed = try_switches(&roots, tagged);
        let kernel = Root {
            asid: Asid::ZERO,
            ..memory::table().root()
        };
        // SAFETY: what `AsidMmu` believes is loaded; nothing of the scenario's tags is used again.
        unsafe { BootTlb.load(kernel, false) };
        BootTlb.drop_all();
        (tried, mixed)
    });
    println!("{:?}", crate::tlb::describe());
    println!("{has} ways to drop, {kept} times of 8 the old translation stayed until then");
    println!("{wrong} ways dropped nothing, {mixed} times another root's page was read");
    for frame in owned.drain(..) {
        frames().free(frame);
    }
    drop(owned);
    end(baseline) && wrong == 0 && mixed == 0 && has >= 4
}
