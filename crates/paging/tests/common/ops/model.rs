// What the table should say: a flat map from pages to what they have, cut and joined as the operations do it; and the comparison, which
// reads the table as runs, and counts its tables and frames.

use std::collections::{BTreeMap, BTreeSet};

use kmem_hal::{Order, Page};
use kmem_paging::format::Format;
use kmem_paging::{Attributes, Leaf, Rights, Run};

use super::World;

/// What a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Leaf {
        frame: u64,
        order: Order,
        attributes: Attributes,
    },
    Payload(u64),
}

impl Slot {
    pub(super) fn pages(&self) -> u64 {
        match self {
            Self::Leaf { order, .. } => order.frames(),
            Self::Payload(_) => 1,
        }
    }
}

impl<F: Format> World<F> {
    /// The orders that leaves can have, ascending.
    pub(super) fn orders(&self) -> Vec<Order> {
        F::LEVELS[..self.table.levels()]
            .iter()
            .filter(|level| level.leaf)
            .map(|level| level.order())
            .collect()
    }

    /// The entry that covers `page`.
    pub(super) fn find(&self, page: u64) -> Option<(u64, Slot)> {
        let (&first, &slot) = self.model.range(..=page).next_back()?;
        (first + (slot.pages() - 1) >= page).then_some((first, slot))
    }

    /// Cuts leaves until `page` starts one, if one covers it.
    fn cut(&mut self, page: u64) {
        while let Some((first, slot)) = self.find(page) {
            let Slot::Leaf {
                frame,
                order,
                attributes,
            } = slot
            else {
                return;
            };
            if first == page {
                return;
            }
            self.split_model(first, frame, order, attributes);
        }
    }

    pub(super) fn split_model(
        &mut self,
        first: u64,
        frame: u64,
        order: Order,
        attributes: Attributes,
    ) {
        let orders = self.orders();
        let position = orders.iter().position(|&other| other == order).unwrap();
        // A level without leaves in between would show here; x86 has none.
        let part = orders[position - 1];
        self.model.remove(&first);
        for index in 0..order.frames() / part.frames() {
            let offset = index * part.frames();
            let slot = Slot::Leaf {
                frame: frame + offset,
                order: part,
                attributes,
            };
            self.model.insert(first + offset, slot);
        }
    }

    /// Cuts leaves at both ends of a range, and gives what starts inside.
    pub(super) fn inside(&mut self, first: u64, count: u64) -> Vec<(u64, Slot)> {
        self.cut(first);
        if first + count < Page::LIMIT {
            self.cut(first + count);
        }
        let end = first + (count - 1);
        self.model
            .range(first..=end)
            .map(|(&page, &slot)| (page, slot))
            .collect()
    }

    pub(super) fn inside_free(&self, first: u64, count: u64) -> bool {
        self.find(first).is_none()
            && self
                .model
                .range(first..=first + (count - 1))
                .next()
                .is_none()
    }

    /// What becomes of attributes in a leaf: on x86 by the manual alone (any access includes reading, and where there is no XD, executing; a
    /// leaf without access keeps of its rights nothing but G), elsewhere as the format says, whose words have tests of their own.
    pub(super) fn expressed(&self, order: Order, attributes: &Attributes) -> Attributes {
        if F::NAME.starts_with("x86") {
            let mut rights = attributes.rights & Rights::GLOBAL;
            if attributes.rights.grants_access() {
                rights = attributes.rights | Rights::READ;
                if F::LEVELS[0].bits != 9 {
                    rights |= Rights::EXECUTE;
                }
            }
            return Attributes {
                rights,
                ..*attributes
            };
        }
        let levels = F::LEVELS.iter();
        let number = 1 + levels.take_while(|level| level.order() < order).count();
        F::expressible(number, attributes)
    }

    /// Gives every leaf that starts in a range other attributes; gives how many pages are another than before.
    pub(super) fn change(
        &mut self,
        page: u64,
        count: u64,
        how: impl Fn(Attributes) -> Attributes,
    ) -> u64 {
        let mut changed = 0;
        for (first, slot) in self.inside(page, count) {
            if let Slot::Leaf {
                frame,
                order,
                attributes,
            } = slot
            {
                let before = attributes;
                let attributes = self.expressed(order, &how(before));
                changed += if attributes == before {
                    0
                } else {
                    slot.pages()
                };
                self.model.insert(
                    first,
                    Slot::Leaf {
                        frame,
                        order,
                        attributes,
                    },
                );
            }
        }
        changed
    }

    /// Tables that the model needs: emptied ones must be gone, others must be there.
    fn expected_tables(&self) -> usize {
        let levels = self.table.levels();
        let mut tables = BTreeSet::new();
        let fixed = if F::FIXED_TOP {
            F::LEVELS[levels - 1].entries() as u64
        } else {
            0
        };
        for top in 0..fixed {
            let level = F::LEVELS[levels - 1];
            tables.insert((levels - 1, top << level.shift));
        }
        for (&page, slot) in &self.model {
            let order = match slot {
                Slot::Leaf { order, .. } => *order,
                Slot::Payload(_) => Order::ZERO,
            };
            let lowest = F::LEVELS
                .iter()
                .position(|level| level.order() == order)
                .unwrap()
                + 1;
            for number in lowest..levels {
                let level = F::LEVELS[number - 1];
                tables.insert((
                    number,
                    page >> (level.shift + level.bits) << (level.shift + level.bits),
                ));
            }
        }
        tables.len() + 1
    }

    /// Everything that the table says, held against everything that the model says.
    pub fn compare(&self) {
        let mut seen = BTreeMap::new();
        let mut halves = vec![self.half(0)];
        if F::canonical(self.table.levels()).upper_start().is_some() {
            halves.push(self.half(Page::LIMIT - 1));
        }
        for half in halves {
            let mut cursor = self.table.cursor(half).unwrap();
            let mut expected = half.first().number();
            while let Some(run) = cursor.next_run() {
                assert_eq!(
                    run.range().first().number(),
                    expected,
                    "runs follow each other"
                );
                expected = run.range().last().number().wrapping_add(1);
                match run {
                    Run::Absent(_) => {}
                    Run::Payload(page, payload) => {
                        seen.insert(page.number(), Slot::Payload(payload.number()));
                    }
                    Run::Leaves { range, first } => {
                        let step = first.order.frames();
                        for index in 0..range.count() / step {
                            let offset = index * step;
                            let slot = Slot::Leaf {
                                frame: first.frame.number() + offset,
                                order: first.order,
                                attributes: first.attributes,
                            };
                            seen.insert(first.page.number() + offset, slot);
                        }
                    }
                    _ => unreachable!(),
                }
            }
            assert_eq!(
                expected,
                half.last().number().wrapping_add(1) & (Page::LIMIT | (Page::LIMIT - 1))
            );
        }
        assert_eq!(seen, self.model);
        assert_eq!(self.table.table_count(), self.expected_tables(), "tables");
        let leaves: u64 = self
            .model
            .values()
            .map(|slot| {
                if let Slot::Leaf { order, .. } = slot {
                    order.frames()
                } else {
                    0
                }
            })
            .sum();
        assert_eq!(self.pool.out.values().sum::<u64>(), leaves, "frames");
        let cached = kmem_paging::Env::cache(self.machine.env()).length();
        assert_eq!(
            self.machine.frames.out(),
            self.table.table_count() + cached,
            "table frames"
        );
    }
}

pub(super) fn same(first: u64, slot: &Slot, leaf: &Leaf) {
    let found = Slot::Leaf {
        frame: leaf.frame.number(),
        order: leaf.order,
        attributes: leaf.attributes,
    };
    assert_eq!((first, *slot), (leaf.page.number(), found));
}
