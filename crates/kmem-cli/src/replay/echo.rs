//! A manager that reads its answers from a recording: what the drivers are tested with.
//!
//! On the recording that is replayed it agrees with every line; on an altered one the driver must stop at the alteration.

use super::mm::{Access, Backing, FileHandle, FileSpec, MmUnderTest, VmaSeen, Whose};
use crate::input::fuzz::{self, Call, Step};
use crate::input::lines::Source;
use crate::input::oracle::{Errno, Perms, Recorded, VmaLine};
use crate::input::trace::{self, Event};
use std::cell::RefCell;
use std::rc::Rc;

/// Shared by all address spaces of a run.
enum Script {
    Fuzz(fuzz::Reader),
    Trace {
        events: Vec<Event>,
        at: usize,
        shown_initial: bool,
    },
}

/// One address space of the recording.
pub struct Echo {
    script: Rc<RefCell<Script>>,
    child: bool,
    /// Opens and the filling of the window stand in no line.
    preparing: u32,
}

impl Echo {
    /// Answers from a fuzz file.
    pub fn fuzz(mut source: Source) -> Self {
        let head = source.next_strict().unwrap().unwrap();
        let reader = fuzz::Reader::new(source, &head).unwrap();
        Self {
            script: Rc::new(RefCell::new(Script::Fuzz(reader))),
            child: false,
            preparing: 2,
        }
    }

    /// Answers from a trace.
    pub fn trace(mut source: Source) -> Self {
        let head = source.next_strict().unwrap().unwrap();
        let mut reader = trace::Reader::new(source, &head).unwrap();
        let events = core::iter::from_fn(|| reader.next_event().unwrap().map(|(_, e)| e)).collect();
        let script = Script::Trace {
            events,
            at: 0,
            shown_initial: false,
        };
        Self {
            script: Rc::new(RefCell::new(script)),
            child: false,
            preparing: 0,
        }
    }

    fn step(&self) -> Step {
        match &mut *self.script.borrow_mut() {
            Script::Fuzz(reader) => reader.next_step().unwrap().unwrap(),
            Script::Trace { .. } => unreachable!("fuzz calls only"),
        }
    }

    /// Goes on to the next event that `pick` takes.
    fn event<T>(&self, pick: impl Fn(&Event) -> Option<T>) -> T {
        match &mut *self.script.borrow_mut() {
            Script::Fuzz(_) => unreachable!("trace calls only"),
            Script::Trace { events, at, .. } => loop {
                *at += 1;
                if let Some(found) = pick(&events[*at - 1]) {
                    return found;
                }
            },
        }
    }

    fn is_fuzz(&self) -> bool {
        matches!(&*self.script.borrow(), Script::Fuzz(_))
    }
}

fn seen(v: &VmaLine) -> VmaSeen {
    let whose = match v.id.as_str() {
        "-" | "[heap]" => Whose::Anonymous,
        id if id.starts_with('[') => Whose::Special(id.into()),
        id if id.starts_with('s') => Whose::Shared(id[1..].parse().unwrap()),
        id => Whose::File(id.into()),
    };
    VmaSeen {
        start: v.start,
        end: v.end,
        perms: v.perms,
        offset: v.offset,
        whose,
    }
}

impl MmUnderTest for Echo {
    fn open(&mut self, _: &FileSpec) -> Result<FileHandle, Errno> {
        Ok(FileHandle(0))
    }

    fn mmap(&mut self, addr: u64, _: u64, _: u32, _: u32, _: Backing, _: u64) -> Recorded {
        if self.preparing > 0 {
            self.preparing -= 1;
            return Ok(addr);
        }
        if self.is_fuzz() {
            match self.step().call {
                Call::Mmap { result, .. } => result,
                other => panic!("mmap was called for {other:?}"),
            }
        } else {
            self.event(|e| match e {
                Event::Initial(v) => Some(Ok(v.start)),
                Event::Mmap { result, .. } => Some(*result),
                _ => None,
            })
        }
    }

    fn munmap(&mut self, _: u64, _: u64) -> Result<(), Errno> {
        let result = if self.is_fuzz() {
            match self.step().call {
                Call::Munmap { result, .. } => result,
                other => panic!("munmap was called for {other:?}"),
            }
        } else {
            self.event(|e| {
                if let Event::Munmap { result, .. } = e {
                    Some(*result)
                } else {
                    None
                }
            })
        };
        result.map(drop)
    }

    fn mprotect(&mut self, _: u64, _: u64, _: u32) -> Result<(), Errno> {
        let result = if self.is_fuzz() {
            match self.step().call {
                Call::Mprotect { result, .. } => result,
                other => panic!("mprotect was called for {other:?}"),
            }
        } else {
            self.event(|e| {
                if let Event::Mprotect { result, .. } = e {
                    Some(*result)
                } else {
                    None
                }
            })
        };
        result.map(drop)
    }

    fn mremap(&mut self, _: u64, _: u64, _: u64, _: u32, _: u64) -> Recorded {
        if self.is_fuzz() {
            match self.step().call {
                Call::Mremap { result, .. } => result,
                other => panic!("mremap was called for {other:?}"),
            }
        } else {
            self.event(|e| {
                if let Event::Mremap { result, .. } = e {
                    Some(*result)
                } else {
                    None
                }
            })
        }
    }

    fn madvise(&mut self, _: u64, _: u64, _: u32) -> Result<(), Errno> {
        let result = if self.is_fuzz() {
            match self.step().call {
                Call::Madvise { result, .. } => result,
                other => panic!("madvise was called for {other:?}"),
            }
        } else {
            self.event(|e| {
                if let Event::Madvise { result, .. } = e {
                    Some(*result)
                } else {
                    None
                }
            })
        };
        result.map(drop)
    }

    fn set_break(&mut self, _: u64) {}

    fn brk(&mut self, _: u64) -> u64 {
        self.event(|e| {
            if let Event::Brk { result, .. } = e {
                Some(*result)
            } else {
                None
            }
        })
    }

    fn special(&mut self, _: &str, start: u64, _: u64, _: Perms) -> Result<(), Errno> {
        let recorded = self.event(|e| {
            if let Event::Initial(v) = e {
                Some(v.start)
            } else {
                None
            }
        });
        assert_eq!(recorded, start);
        Ok(())
    }

    fn load(&mut self, _: u64) -> Result<u64, Access> {
        if !self.is_fuzz() {
            return Ok(0);
        }
        match self.step().call {
            Call::Load {
                result: Access::Value(v),
                ..
            } => Ok(v),
            Call::Load { result, .. } => Err(result),
            other => panic!("a load was made for {other:?}"),
        }
    }

    fn store(&mut self, addr: u64, _: u64) -> Result<(), Access> {
        if !self.is_fuzz() {
            let start = self.event(|e| {
                if let Event::Touch { start } = e {
                    Some(*start)
                } else {
                    None
                }
            });
            assert_eq!(start, addr);
            return Ok(());
        }
        match self.step().call {
            Call::Store {
                result: Access::Ok, ..
            } => Ok(()),
            Call::Store { result, .. } => Err(result),
            other => panic!("a store was made for {other:?}"),
        }
    }

    fn fork(&mut self) -> Result<Self, Errno> {
        assert_eq!(self.step().call, Call::Fork);
        Ok(Self {
            script: Rc::clone(&self.script),
            child: true,
            preparing: 0,
        })
    }

    fn list(&mut self, each: &mut dyn FnMut(VmaSeen)) {
        match &mut *self.script.borrow_mut() {
            Script::Fuzz(reader) => reader.expected().values().map(seen).for_each(each),
            Script::Trace {
                events,
                at,
                shown_initial,
            } => {
                if !core::mem::replace(shown_initial, true) {
                    let initial = events.iter().filter_map(|e| {
                        if let Event::Initial(v) = e {
                            Some(v)
                        } else {
                            None
                        }
                    });
                    return initial
                        .filter(|v| v.start < 1 << 47)
                        .map(seen)
                        .for_each(each);
                }
                // A list is asked for at a touch or at a checkpoint, whichever comes next.
                let next = events[*at..]
                    .iter()
                    .position(|e| matches!(e, Event::Touch { .. } | Event::Checkpoint { .. }));
                let place = *at + next.unwrap();
                match &events[place] {
                    Event::Checkpoint { list, .. } => {
                        list.iter()
                            .filter(|v| v.start < 1 << 47)
                            .map(seen)
                            .for_each(each);
                        *at = place + 1;
                    }
                    Event::Touch { start } => each(VmaSeen {
                        start: *start,
                        end: *start + 0x1000,
                        perms: Perms {
                            prot: 3,
                            shared: false,
                        },
                        offset: 0,
                        whose: Whose::Anonymous,
                    }),
                    _ => unreachable!("only these two were looked for"),
                }
            }
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // The child of a run that failed dies anywhere.
        if self.child
            && let Ok(mut script) = self.script.try_borrow_mut()
            && let Script::Fuzz(reader) = &mut *script
        {
            let _ = reader.next_step();
        }
    }
}
