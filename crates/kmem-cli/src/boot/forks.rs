//! Forks and writes on both sides: what one process writes after a fork, no other may see.
//!
//! ```text
//!   parent  P P P P P P P P      every page holds its own word
//!      fork |
//!   child   P C P C P C P C      the child writes the odd pages
//!   parent  Q P Q P Q P Q P      the parent writes the even ones
//!      fork of the child: a grandchild writes all; then it ends, then the child
//! ```
//! After each step all living processes are read through the MMU and held against what each of them wrote.

use crate::replay::mm::{
    Backing, MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MmUnderTest, PROT_READ, PROT_WRITE,
};

const PAGE: u64 = 4096;

/// What the forks did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forked {
    /// Processes that were made.
    pub children: u64,
    /// Words that were written.
    pub written: u64,
    /// Words that were read and compared.
    pub compared: u64,
}

/// A process and what stands in its pages.
struct Process<M> {
    name: &'static str,
    mm: M,
    words: Vec<u64>,
}

impl<M: MmUnderTest> Process<&mut M> {
    fn reborrow(&mut self) -> Side<'_, M> {
        Side {
            name: self.name,
            mm: self.mm,
            words: &mut self.words,
        }
    }
}

impl<M: MmUnderTest> Process<M> {
    fn side(&mut self) -> Side<'_, M> {
        Side {
            name: self.name,
            mm: &mut self.mm,
            words: &mut self.words,
        }
    }
}

struct Side<'a, M> {
    name: &'static str,
    mm: &'a mut M,
    words: &'a mut Vec<u64>,
}

impl<M: MmUnderTest> Side<'_, M> {
    fn write(
        &mut self,
        at: u64,
        which: impl Fn(usize) -> bool,
        tag: u64,
        done: &mut Forked,
    ) -> Result<(), String> {
        for (i, word) in self.words.iter_mut().enumerate().filter(|(i, _)| which(*i)) {
            *word = (tag << 32) | i as u64;
            let address = at + i as u64 * PAGE;
            self.mm
                .store(address, *word)
                .map_err(|e| format!("{} writes at {address:#x}: {e}", self.name))?;
            done.written += 1;
        }
        Ok(())
    }

    fn check(&mut self, at: u64, done: &mut Forked) -> Result<(), String> {
        for (i, word) in self.words.iter().enumerate() {
            let address = at + i as u64 * PAGE;
            let got = self
                .mm
                .load(address)
                .map_err(|e| format!("{} reads at {address:#x}: {e}", self.name))?;
            if got != *word {
                return Err(format!(
                    "{} sees {got:#x} at {address:#x}, it wrote {word:#x}",
                    self.name
                ));
            }
            done.compared += 1;
        }
        Ok(())
    }

    fn fork(&mut self, name: &'static str, done: &mut Forked) -> Result<Process<M>, String> {
        let mm = self
            .mm
            .fork()
            .map_err(|e| format!("{} forks: {e}", self.name))?;
        done.children += 1;
        Ok(Process {
            name,
            mm,
            words: self.words.clone(),
        })
    }
}

/// Maps `pages` anonymous pages at `at` and forks over them; leaves the space as it was.
///
/// # Errors
/// The first word that the wrong process wrote, or a call that failed.
pub fn run<M: MmUnderTest>(mm: &mut M, at: u64, pages: usize) -> Result<Forked, String> {
    let mut done = Forked::default();
    let d = &mut done;
    let len = pages as u64 * PAGE;
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    mm.mmap(at, len, PROT_READ | PROT_WRITE, flags, Backing::None, 0)
        .map_err(|e| format!("mmap of {len:#x} bytes: {e}"))?;
    {
        let mut parent = Process {
            name: "the parent",
            mm: &mut *mm,
            words: vec![0; pages],
        };
        parent.reborrow().write(at, |_| true, 1, d)?;
        let mut child = parent.reborrow().fork("the child", d)?;
        child.side().check(at, d)?;
        child.side().write(at, |i| i % 2 == 1, 2, d)?;
        parent.reborrow().check(at, d)?;
        parent.reborrow().write(at, |i| i % 2 == 0, 3, d)?;
        child.side().check(at, d)?;
        let mut grandchild = child.side().fork("the grandchild", d)?;
        grandchild.side().write(at, |_| true, 4, d)?;
        child.side().check(at, d)?;
        parent.reborrow().check(at, d)?;
        // The processes end in the order opposite to their births; those that stay keep their pages.
        drop(grandchild);
        child.side().check(at, d)?;
        child.side().write(at, |_| true, 5, d)?;
        drop(child);
        parent.reborrow().check(at, d)?;
        parent.reborrow().write(at, |_| true, 6, d)?;
        parent.reborrow().check(at, d)?;
    }
    mm.munmap(at, len)
        .map_err(|e| format!("munmap of {len:#x} bytes: {e}"))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::flat::{Bug, Flat};

    #[test]
    fn processes_keep_their_own_words() {
        let done = run(&mut Flat::new(Bug::None), 0x10_0000, 64).unwrap();
        assert_eq!(
            done,
            Forked {
                children: 2,
                written: 64 * 5,
                compared: 64 * 8
            }
        );
    }

    #[test]
    fn one_shared_page_is_found() {
        let e = run(&mut Flat::new(Bug::SharedPage), 0x10_0000, 64).unwrap_err();
        assert!(e.contains("it wrote"), "{e}");
    }
}
