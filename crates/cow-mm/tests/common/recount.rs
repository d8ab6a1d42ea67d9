//! What spaces and frames remember, counted again from scratch.
//!
//! | remembered | held against |
//! |---|---|
//! | sizes of the mappings by kind, and their number | a walk through the VMAs |
//! | table frames of a space | a walk through the tables themselves, word by word |
//! | pins of a leaf table | the pins in the slots of the pages that it maps |
//! | pins of a space | those of its tables |
//! | promised pages of all spaces | their VMAs, and the objects |

use std::collections::BTreeMap;

use kmem_cow_mm::Env as _;
use kmem_hal::{Frame, FrameTag, Page};
use kmem_paging::Env as _;
use kmem_paging::format::{Format, Kind, Word};

use super::counted::counted;
use super::{Program, World};

/// References that a pin counts (`GUP_PIN_COUNTING_BIAS`).
const PIN: u32 = 1024;

/// Holds what spaces remember against a recount; `programs` are all the spaces of their world.
pub fn check_counters<'p, F: Format>(programs: impl IntoIterator<Item = &'p Program<F>>) {
    let mut mm = None;
    for program in programs {
        let space = &program.space;
        let usage = space.recount();
        assert_eq!(space.map_count() as u64, usage.mappings, "mappings");
        assert_eq!(
            space.counters(),
            counted(&usage),
            "remembered, and counted again"
        );
        let walk = Walk::new(program);
        let remembered = space.page_tables().table_count();
        assert_eq!(walk.tables, remembered, "table frames");
        check_pins(program, &walk);
        mm = Some(space.mm());
    }
    if let Some(mm) = mm {
        assert_eq!(mm.committed(), mm.recount_committed(), "promised pages");
    }
}

/// The tables of a space, as the processor would find them.
#[derive(Default)]
struct Walk {
    tables: usize,
    /// By the first page of a leaf table: the pins that the slots of its anonymous pages count.
    pins: BTreeMap<u64, u32>,
}

impl Walk {
    fn new<F: Format>(program: &Program<F>) -> Self {
        let world = program.space.mm().env();
        let path = program.space.page_tables().path(Page::ZERO);
        let levels = path.steps().next().unwrap().level;
        let mut walk = Self::default();
        walk.table(world, program.space.root().frame, levels, 0);
        walk
    }

    fn table<F: Format>(&mut self, world: &World<F>, frame: Frame, level: usize, first: u64) {
        self.tables += 1;
        // SAFETY: a table of a space that lives, and nobody is in a call that frees one.
        let words = unsafe { F::Word::words(world.paging().map(), frame) };
        let below = F::LEVELS[..level - 1].iter();
        let pages: u64 = below.map(|level| level.entries() as u64).product();
        for (index, entry) in words[..F::LEVELS[level - 1].entries()].iter().enumerate() {
            let word = F::Word::load(entry);
            if F::is_table(level, word) {
                let at = first + index as u64 * pages;
                self.table(world, F::table_frame(word), level - 1, at);
            } else if level == 1 && F::kind(level, word) == Kind::Leaf {
                let pins = pins_of(world, F::leaf_frame(level, word));
                *self.pins.entry(first).or_default() += pins;
            }
        }
    }
}

/// How often the slot of an anonymous page says that it is pinned.
pub fn pins_of<F: Format>(world: &World<F>, frame: Frame) -> u32 {
    let page = world
        .paging()
        .slots()
        .slot(frame)
        .and_then(|slot| slot.as_user());
    let page = page.filter(|page| page.slot().tag() == FrameTag::Anon);
    page.map_or(0, |page| page.references() / PIN)
}

/// Pins of pages that are mapped: no table and no space counts fewer, and more only where a pinned page was unmapped or moved.
fn check_pins<F: Format>(program: &Program<F>, walk: &Walk) {
    let space = &program.space;
    for (&first, &pins) in &walk.pins {
        let table = space.page_tables().pins(Page::from_number(first));
        assert!(table >= pins, "a table counts {table} of {pins} pins");
    }
    let all: u32 = walk.pins.values().sum();
    assert!(space.pins() >= all, "{} of {all} pins", space.pins());
}
