// The kernel's own part, which all spaces see: it is changed through one table, and flushed in every space.

use kmem_hal::{FrameSink, Order};
use kmem_paging::format::Format;
use kmem_paging::{MapError, Rights};

use super::model::{Item, expressed};
use super::{World, pages};

impl<F: Format> World<F> {
    pub(super) fn kernel_page(&mut self) -> u64 {
        self.kernel_base + self.rng.below(24)
    }

    /// What the kernel does in its own part, which all spaces see.
    pub(super) fn operate_kernel(&mut self) {
        let page = self.kernel_page();
        let count = 1 + self.rng.below(4);
        let range = pages(page, count);
        let global = if self.rng.below(2) == 0 {
            Rights::GLOBAL
        } else {
            Rights::empty()
        };
        let rights = [
            Rights::KERNEL_DATA,
            Rights::READ,
            Rights::READ | Rights::EXECUTE,
        ][self.rng.below(3) as usize]
            | global;
        let frame = self.alloc(Order::ZERO);
        let choice = self.rng.below(5);
        let env = self.env;
        let kernel = self.kernel.as_mut().unwrap();
        let mut gather = kernel.table.gather::<16>();
        let mut cursor = kernel.table.cursor(range).unwrap();
        match (choice, frame) {
            (0..=1, Some(frame)) => {
                let number = frame.first().number();
                match cursor.map(range.first(), frame, rights) {
                    Ok(()) => {
                        let before = kernel.model.insert(
                            page,
                            Item::Leaf {
                                frame: number,
                                order: Order::ZERO,
                                attributes: expressed::<F>(&rights.into()),
                                dirty: Some(false),
                            },
                        );
                        assert_eq!(before, None);
                    }
                    Err((error, frame)) => {
                        match error {
                            MapError::Occupied => assert!(kernel.model.contains_key(&page)),
                            MapError::Memory(_) => {}
                            other => panic!("{other}"),
                        }
                        env.pool.free(frame);
                    }
                }
            }
            (2, frame) => {
                if let Some(frame) = frame {
                    env.pool.free(frame);
                }
                cursor.unmap(range, &mut gather).unwrap();
                for page in page..page + count {
                    kernel.model.remove(&page);
                }
            }
            (_, frame) => {
                if let Some(frame) = frame {
                    env.pool.free(frame);
                }
                cursor.protect(range, rights, &mut gather).unwrap();
                for (_, item) in kernel.model.range_mut(page..page + count) {
                    if let Item::Leaf { attributes, .. } = item {
                        *attributes = expressed::<F>(&attributes.rights(rights));
                    }
                }
            }
        }
        drop(cursor);
        gather.commit_to(&env.pool);
    }
}
