// Looks at everything: what the tables say of their pages, what the manual's walk finds in them, how many tables there are, and what is in
// the caches of all CPUs.

use std::collections::BTreeSet;

use kmem_hal::{Frame, Order, PageRange};
use kmem_mock_x86::walker::{Stop, Touch, WalkContext, walk};
use kmem_mock_x86::{Mode, ReservedInputs, Violation, ViolationKind, manual};
use kmem_paging::format::Format;
use kmem_paging::{Leaf, MemoryType, Rights, Run};

use super::model::{Item, Model, level_of, same};
use super::{Space, Table, World, at, pages};

impl<F: Format> Space<F> {
    pub(super) fn new(table: Table<F>, asid: u16) -> Self {
        Self {
            table: Box::leak(Box::new(table)),
            model: Model::new(),
            gathers: Vec::new(),
            waiting: BTreeSet::new(),
            asid,
        }
    }

    pub(super) fn wait(&mut self, first: u64, count: u64) {
        self.waiting.extend(first..first + count);
    }

    /// The tables that the model asks for: emptied ones must be gone, others must be there.
    fn expected_tables(&self) -> usize {
        let levels = self.table.levels();
        let mut tables = BTreeSet::new();
        for (&page, item) in &self.model {
            let order = match item {
                Item::Leaf { order, .. } => *order,
                Item::Payload(_) => Order::ZERO,
            };
            for number in level_of::<F>(order)..levels {
                let level = F::LEVELS[number - 1];
                tables.insert((number, page >> (level.shift + level.bits)));
            }
        }
        tables.len() + 1
    }

    /// Everything that the table says of `range`, held against the model.
    pub(super) fn compare(&self, range: PageRange) {
        let mut cursor = self.table.cursor(range).unwrap();
        let mut seen = Model::new();
        while let Some(run) = cursor.next_run() {
            match run {
                Run::Absent(_) => {}
                Run::Payload(page, payload) => {
                    seen.insert(page.number(), Item::Payload(payload.number()));
                }
                Run::Leaves { range, first } => {
                    let step = first.order.frames();
                    for index in 0..range.count() / step {
                        let page = first.page.number() + index * step;
                        let leaf = Leaf {
                            page: at(page),
                            frame: Frame::from_number(first.frame.number() + index * step),
                            ..first
                        };
                        let item = self.model.get(&page);
                        same(page, item.expect("a leaf that nobody mapped"), &leaf);
                        seen.insert(page, *item.unwrap());
                    }
                }
                _ => {}
            }
        }
        drop(cursor);
        let expected = self
            .model
            .range(range.first().number()..=range.last().number());
        for (page, item) in expected {
            assert_eq!(seen.get(page), Some(item), "page {page:#x}");
        }
    }
}

impl<F: Format> World<F> {
    /// After a refusal for want of memory: all is as it was.
    pub(super) fn unchanged(&self, space: usize) {
        let of = &self.spaces[space];
        of.compare(self.lower());
        if !F::FIXED_TOP {
            assert_eq!(of.table.table_count(), of.expected_tables(), "tables");
        }
    }

    /// Looks through all caches.
    pub(super) fn audit(&self) {
        let all_quiet = self
            .spaces
            .iter()
            .chain(&self.kernel)
            .all(|space| space.waiting.is_empty());
        let is_crime = |violation: &&Violation| {
            all_quiet
                || matches!(
                    violation.kind,
                    ViolationKind::FreedFrame | ViolationKind::FreedTable
                )
        };
        let found = self.env.machine.audit(0, u64::MAX);
        if let Some(story) = found.iter().find(is_crime) {
            panic!("{story}");
        }
    }

    pub(super) fn compare(&self) {
        let lower = self.lower();
        for space in &self.spaces {
            space.compare(lower);
            self.agree(space);
            if !F::FIXED_TOP {
                assert_eq!(space.table.table_count(), space.expected_tables(), "tables");
            }
        }
        if let Some(kernel) = &self.kernel {
            kernel.compare(pages(self.kernel_base, 1024));
            self.agree(kernel);
        }
    }

    /// Holds the tables of a space, read as the manual says, against the model.
    fn agree(&self, space: &Space<F>) {
        let memory = self.env.machine.memory();
        let registers = self.setup.registers;
        let mode = Mode::of(registers.cr0, registers.cr4, registers.efer).unwrap();
        let root = space.table.root().frame.start().as_u64();
        let register = |index: u64| match mode.levels[0].accessed {
            true => 0,
            false => memory.load(root + index * 8, 8).unwrap(),
        };
        let context = WalkContext {
            mode,
            cr3: root,
            pdptes: [register(0), register(1), register(2), register(3)],
            inputs: ReservedInputs {
                max_phys_bits: 46,
                nxe: registers.efer & manual::efer::NXE != 0,
                pse: registers.cr4 & manual::cr4::PSE != 0,
                gigabyte: true,
            },
            wp: true,
            smep: false,
            smap: false,
            ac: false,
            pge: true,
            pkru: None,
        };
        for (&page, item) in &space.model {
            let walk = walk(
                memory,
                &context,
                mode.wrap(page << 12),
                None,
                Touch::Nothing,
            );
            let Item::Leaf {
                frame,
                order,
                attributes,
                dirty,
            } = *item
            else {
                assert_eq!(walk.outcome, Err(Stop::NotPresent), "payload at {page:#x}");
                continue;
            };
            if !attributes.rights.grants_access() {
                assert_eq!(
                    walk.outcome,
                    Err(Stop::NotPresent),
                    "no access at {page:#x}"
                );
                continue;
            }
            let found = walk
                .outcome
                .unwrap_or_else(|stop| panic!("page {page:#x}: {stop:?}: {:x?}", walk.steps()));
            // SDM 3A 12.12.2 and table 12-10, with the value that the crate asks kernels to give the register.
            let memory_type = match 0x0007_0106_0007_0406u64 >> (8 * found.pat) & 0xff {
                6 => MemoryType::WriteBack,
                4 => MemoryType::WriteThrough,
                0 => MemoryType::Uncached,
                1 => MemoryType::WriteCombining,
                other => panic!("memory type {other}"),
            };
            let has = |right| attributes.rights.contains(right);
            assert_eq!(
                (
                    found.page,
                    found.shift,
                    found.rights.writable,
                    found.rights.user,
                    found.rights.executable,
                    found.global,
                    found.key,
                    memory_type
                ),
                (
                    frame << 12,
                    12 + u32::from(order.get()),
                    has(Rights::WRITE),
                    has(Rights::USER),
                    has(Rights::EXECUTE),
                    has(Rights::GLOBAL),
                    attributes.pkey,
                    attributes.memory_type
                ),
                "page {page:#x}: {attributes:?}: {:x?}",
                walk.steps()
            );
            if let Some(dirty) = dirty {
                assert_eq!(found.dirty, dirty, "page {page:#x}");
            }
        }
    }
}
