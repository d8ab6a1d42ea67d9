//! Areas against a map of what should be there, with an allocation that fails in the middle of any call, on a machine that uses
//! every liberty of the manual.

mod common;

use std::collections::BTreeMap;

use common::{Kernel, Setup, Two, on_window};
use kmem_hal::{Frame, FrameRequest, FrameSink, FrameSource, PAGE_SIZE, PhysAddr, VirtAddr};
use kmem_mock_x86::Machine;
use kmem_paging::format::{Format, X86_64};
use kmem_paging::{Attributes, Env as _, MemoryType, Rights};
use kmem_testkit::FailPlan;
use kmem_vmalloc::{DmaMask, Request, VmallocError};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Op {
    Alloc {
        pages: u64,
        aligned: u64,
        zeroed: bool,
    },
    Stack {
        pages: u64,
    },
    Device {
        frame: u64,
        pages: u64,
    },
    Dma {
        pages: u64,
    },
    Borrow {
        pages: u64,
    },
    Protect {
        pick: usize,
    },
    Free {
        pick: usize,
    },
    Purge,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1..12u64, 0..4u32, any::<bool>()).prop_map(|(pages, aligned, zeroed)| Op::Alloc {
            pages,
            aligned: 1 << aligned,
            zeroed
        }),
        1 => (512..1100u64).prop_map(|pages| Op::Alloc { pages, aligned: 1, zeroed: false }),
        2 => (1..5u64).prop_map(|pages| Op::Stack { pages }),
        1 => (0..1024u64, 1..9u64).prop_map(|(frame, pages)| Op::Device { frame, pages }),
        1 => (1..9u64).prop_map(|pages| Op::Dma { pages }),
        1 => (1..5u64).prop_map(|pages| Op::Borrow { pages }),
        1 => any::<usize>().prop_map(|pick| Op::Protect { pick }),
        6 => any::<usize>().prop_map(|pick| Op::Free { pick }),
        1 => Just(Op::Purge),
    ]
}

/// What an area should be.
struct Is {
    pages: u64,
    /// What each page's first word is; `None` for device registers, which nobody touches.
    mark: Option<u64>,
    guard_below: u64,
    writable: bool,
    borrowed: Vec<kmem_hal::OwnedFrame>,
}

struct Run<'r, 'm, F: Format> {
    machine: &'r Machine,
    vmalloc: &'r Kernel<'m, F>,
    plan: &'r FailPlan,
    live: BTreeMap<u64, Is>,
}

impl<F: Format> Run<'_, '_, F> {
    fn put(&mut self, at: VirtAddr, is: Is) {
        let (first, end) = (
            at.as_u64() - is.guard_below * PAGE_SIZE,
            at.as_u64() + (is.pages + 1) * PAGE_SIZE,
        );
        for (&other, there) in &self.live {
            let below = other - there.guard_below * PAGE_SIZE;
            let above = other + (there.pages + 1) * PAGE_SIZE;
            assert!(end <= below || above <= first, "areas overlap");
        }
        if let Some(mark) = is.mark {
            for page in 0..is.pages {
                let cpu = self.machine.cpu((mark + page) as usize % 2);
                cpu.write_u64(at.as_u64() + page * PAGE_SIZE, mark + page)
                    .unwrap();
            }
        }
        self.live.insert(at.as_u64(), is);
    }

    fn look(&self, at: u64) {
        let is = &self.live[&at];
        if let Some(mark) = is.mark {
            for page in 0..is.pages {
                let cpu = self.machine.cpu((mark + page + 1) as usize % 2);
                assert_eq!(cpu.read_u64(at + page * PAGE_SIZE), Ok(mark + page));
            }
            assert_eq!(self.machine.cpu(0).write_u64(at, mark).is_ok(), is.writable);
        }
        for outside in [at + is.pages * PAGE_SIZE]
            .into_iter()
            .chain((is.guard_below > 0).then(|| at - 8))
        {
            assert!(self.machine.cpu(0).read_u64(outside).is_err(), "no guard");
        }
        let bytes = self.vmalloc.bytes_at(VirtAddr::new(at));
        assert_eq!(bytes, Some(is.pages * PAGE_SIZE));
    }

    fn pick(&self, pick: usize) -> Option<u64> {
        self.live.keys().nth(pick % self.live.len().max(1)).copied()
    }

    fn frames(&self, pages: u64) -> Option<Vec<kmem_hal::OwnedFrame>> {
        let source = self.vmalloc.table().env().frames();
        let mut frames = Vec::new();
        for _ in 0..pages {
            match source.alloc(&FrameRequest::ONE) {
                Ok(frame) => frames.push(frame),
                Err(_) => {
                    frames.into_iter().for_each(|frame| source.free(frame));
                    return None;
                }
            }
        }
        Some(frames)
    }

    fn step(&mut self, step: u64, op: Op, fail: u64) {
        let vmalloc = self.vmalloc;
        let before = vmalloc.used();
        self.plan.fail_at(fail);
        let mark = Some(step << 16 | 1);
        let plain = |pages| Is {
            pages,
            mark,
            guard_below: 0,
            writable: true,
            borrowed: Vec::new(),
        };
        let made: Option<(Result<VirtAddr, VmallocError>, Is)> = match op {
            Op::Alloc {
                pages,
                aligned,
                zeroed,
            } => {
                let mut request = Request::new(pages).aligned(aligned);
                if zeroed {
                    request = request.zeroed();
                }
                let outcome = vmalloc.alloc_memory(request);
                if let Ok(at) = outcome {
                    assert!(at.is_aligned(aligned * PAGE_SIZE));
                    if zeroed {
                        let last = at.as_u64() + (pages - 1) * PAGE_SIZE + 8;
                        assert_eq!(self.machine.cpu(1).read_u64(last), Ok(0));
                    }
                }
                Some((outcome, plain(pages)))
            }
            Op::Stack { pages } => {
                let bottom = vmalloc
                    .alloc_stack(pages)
                    .map(|top| VirtAddr::new(top.as_u64() - pages * PAGE_SIZE));
                let is = Is {
                    guard_below: 1,
                    ..plain(pages)
                };
                Some((bottom, is))
            }
            Op::Device { frame, pages } => {
                let at = Frame::from_number(0xf_8000 + frame).start();
                let outcome = vmalloc.ioremap(at, pages * PAGE_SIZE, MemoryType::Uncached);
                let is = Is {
                    mark: None,
                    ..plain(pages)
                };
                Some((outcome, is))
            }
            Op::Dma { pages } => {
                let limit = 1 << 24;
                let outcome =
                    vmalloc.alloc_dma(pages * PAGE_SIZE, DmaMask::ISA, MemoryType::WriteBack);
                if let Ok(buffer) = &outcome {
                    let end = buffer.device.checked_add(buffer.bytes).unwrap();
                    assert!(end <= PhysAddr::new(limit));
                }
                Some((outcome.map(|buffer| buffer.address), plain(pages)))
            }
            Op::Borrow { pages } => match self.frames(pages) {
                Some(frames) => {
                    let mut numbers = frames.iter().map(|frame| frame.first());
                    let outcome =
                        vmalloc.vmap_borrowed(pages, Attributes::new(Rights::KERNEL_DATA), || {
                            numbers.next()
                        });
                    let is = Is {
                        borrowed: frames,
                        ..plain(pages)
                    };
                    Some((outcome, is))
                }
                None => None,
            },
            Op::Protect { pick } => {
                if let Some(at) = self.pick(pick) {
                    vmalloc.protect(VirtAddr::new(at), Rights::READ).unwrap();
                    if let Some(is) = self.live.get_mut(&at) {
                        is.writable = false;
                    }
                }
                None
            }
            Op::Free { pick } => {
                if let Some(at) = self.pick(pick) {
                    self.plan.stop();
                    self.look(at);
                    self.plan.fail_at(fail);
                    let is = self.live.remove(&at).unwrap();
                    vmalloc.free(VirtAddr::new(at)).unwrap();
                    assert!(vmalloc.free(VirtAddr::new(at)).is_err());
                    let source = vmalloc.table().env().frames();
                    is.borrowed.into_iter().for_each(|frame| source.free(frame));
                }
                None
            }
            Op::Purge => {
                vmalloc.purge();
                None
            }
        };
        let injected = self.plan.failed() > 0;
        self.plan.stop();
        match made {
            Some((Ok(at), is)) => self.put(at, is),
            Some((Err(error), is)) => {
                assert_eq!(vmalloc.used(), before, "a refused call left something");
                assert!(
                    injected || error == VmallocError::NoSpace,
                    "{error} for nothing"
                );
                let source = vmalloc.table().env().frames();
                is.borrowed.into_iter().for_each(|frame| source.free(frame));
            }
            None => {}
        }
        assert_eq!(vmalloc.used().0, self.live.len() as u64);
        let pages: u64 = self.live.values().map(|is| is.pages).sum();
        assert_eq!(vmalloc.used().1, pages);
    }
}

fn run<F: Format>(setup: Setup, window: u64, ops: Vec<(Op, u64)>) {
    on_window::<F>(setup, window, |machine, vmalloc, plan| {
        let mut run = Run {
            machine,
            vmalloc,
            plan,
            live: BTreeMap::new(),
        };
        for (step, (op, fail)) in ops.into_iter().enumerate() {
            run.step(step as u64 + 1, op, fail);
        }
        for at in run.live.keys() {
            run.look(*at);
        }
        let source = vmalloc.table().env().frames();
        for (at, is) in run.live {
            vmalloc.free(VirtAddr::new(at)).unwrap();
            is.borrowed.into_iter().for_each(|frame| source.free(frame));
        }
    });
}

fn program() -> impl Strategy<Value = Vec<(Op, u64)>> {
    // Every third call or so has an allocation that fails.
    let fail = prop_oneof![2 => Just(0u64), 1 => 1..12u64];
    proptest::collection::vec((op(), fail), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Four levels.
    #[test]
    fn areas_are_the_models(ops in program(), seed in 0..u64::MAX) {
        run::<X86_64>(Setup::long().adversarial(seed), 3000, ops);
    }

    /// Two levels, 32 bits, high memory.
    #[test]
    fn areas_of_the_classic_split_are_the_models(ops in program(), seed in 0..u64::MAX) {
        run::<Two>(Setup::classic().adversarial(seed), 3000, ops);
    }
}
