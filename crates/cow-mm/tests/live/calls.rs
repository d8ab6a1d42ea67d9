//! Random calls, most of which meet a mapping that exists, with the mistakes that programs make.

use kmem_mock_x86::SeededRng;

use super::kernel::{FILE_PAGES, FILES, Line, WINDOW};

const PAGE: u64 = 4096;

/// A call with the numbers that Linux gives its arguments.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    Map {
        address: u64,
        length: u64,
        prot: u32,
        flags: u32,
        /// Which open file, -1 for none, 99 for a descriptor that is not open.
        file: i64,
        offset: u64,
    },
    Unmap(u64, u64),
    Protect(u64, u64, u32),
    Remap {
        address: u64,
        old: u64,
        new: u64,
        flags: u32,
        to: u64,
    },
    Advise(u64, u64, i32),
    Lock(u64, u64),
    /// With flags: `MLOCK_ONFAULT`, or ones that are none.
    Lock2(u64, u64, u32),
    LockAll(u32),
    UnlockAll,
    Unlock(u64, u64),
    /// With flags: `MS_*`.
    Sync(u64, u64, u32),
    InCore(u64, u64),
    /// Where the heap is to end.
    Break(u64),
    Store(u64, u64),
    Load(u64),
    Fork,
    Exit,
}

/// Where the heap begins, in the part of the window where most mappings are: with a page, or in the middle of one that may be another's.
pub fn heap_of(seed: u64) -> u64 {
    WINDOW.start + (1 << 28) + 240 * PAGE + seed % 2 * 0x120
}

/// `MAP_DROPPABLE`.
const DROPPABLE: i32 = 0x08;

/// Draws calls.
pub struct Calls {
    rng: SeededRng,
    /// Advice that the running kernel knows.
    advice: Vec<i32>,
    /// Where the heap begins, if it is in the window.
    heap: Option<u64>,
}

impl Calls {
    pub fn new(seed: u64, advice: Vec<i32>, heap: Option<u64>) -> Self {
        Self {
            rng: SeededRng::new(seed),
            advice,
            heap,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.rng.below(bound)
    }

    fn length(&mut self) -> u64 {
        PAGE * match self.below(100) {
            0..60 => 1 + self.below(8),
            60..90 => 1 + self.below(40),
            90..97 => 1 + self.below(200),
            _ => 512 * (1 + self.below(3)),
        }
    }

    /// An address in the part of the window where most mappings are, so that calls meet them.
    fn address(&mut self) -> u64 {
        WINDOW.start + (1 << 28) + self.below(600) * PAGE
    }

    fn prot(&mut self) -> u32 {
        let prot = [0, 1, 3, 3, 3, 1, 5, 7][self.below(8) as usize];
        match self.below(64) {
            // PROT_SEM, GROWSDOWN, GROWSUP, both, and one that is none.
            0 => prot | 8,
            1 | 2 => prot | 0x0100_0000,
            3 => prot | 0x0200_0000,
            4 => prot | 0x0300_0000,
            5 => prot | 0x40,
            _ => prot,
        }
    }

    /// A range in or around a mapping; rarely one that no call takes.
    fn range(&mut self, lines: &[Line]) -> (u64, u64) {
        let (mut address, mut length) = match self.line(lines) {
            Some(line) if self.below(5) != 0 => {
                let pages = (line.end - line.start) / PAGE;
                let (head, tail) = (self.below(pages), 1 + self.below(pages));
                match self.below(5) {
                    0 => (line.start, line.end - line.start),
                    1 => (line.start, tail * PAGE),
                    2 => (line.end - tail * PAGE, tail * PAGE),
                    3 => (line.start + head * PAGE, (pages - head) * PAGE),
                    _ => (line.start + head * PAGE, self.length()),
                }
            }
            _ => (self.address(), self.length()),
        };
        match self.below(40) {
            0 => address += 8,
            1 => length = 0,
            2 => length -= 100,
            _ => {}
        }
        (address, length.min(WINDOW.end - address))
    }

    fn line<'l>(&mut self, lines: &'l [Line]) -> Option<&'l Line> {
        (!lines.is_empty()).then(|| &lines[self.below(lines.len() as u64) as usize])
    }

    fn page(&mut self, lines: &[Line]) -> u64 {
        match self.line(lines) {
            // Below a mapping: if that is a stack, as near to what is below it as it may grow, and nearer.
            Some(line) if self.below(12) == 0 => line.start - (1 + self.below(300)) * PAGE,
            Some(line) if self.below(12) != 0 => {
                line.start + self.below((line.end - line.start) / PAGE) * PAGE
            }
            _ => self.address(),
        }
    }

    /// An end for the heap: somewhere behind its start, as near to a mapping as it may come and nearer, and where none can be.
    fn heap_end(&mut self, heap: u64, lines: &[Line]) -> u64 {
        let inside = [0, 0, 1, 0x800, 0xee0, 0xfff][self.below(6) as usize];
        match self.below(16) {
            0 => heap.wrapping_sub(self.below(3)),
            1 => [0, 0x7fff_ffff_f000, u64::MAX, 1 << 47][self.below(4) as usize],
            // One that is far would take more memory than the mock machine has.
            2..6 => match lines.iter().find(|line| {
                let away = line.start.saturating_sub(heap);
                (1..600 * PAGE).contains(&away)
            }) {
                Some(line) => line.start - self.below(4) * PAGE - inside,
                None => heap,
            },
            _ => heap + self.below(90) * PAGE + inside,
        }
    }

    /// The next call, given what is mapped; `depth` forks are open.
    pub fn next(&mut self, lines: &[Line], depth: usize) -> Call {
        match self.below(100) {
            0..27 => self.map(lines),
            27..36 => {
                let (address, length) = self.range(lines);
                Call::Unmap(address, length)
            }
            36..48 => {
                let (address, length) = self.range(lines);
                Call::Protect(address, length, self.prot())
            }
            48..57 => self.remap(lines),
            57..66 => {
                let (address, length) = self.range(lines);
                let pick = self.below(self.advice.len() as u64);
                let advice = self.advice[pick as usize];
                Call::Advise(address, length, advice)
            }
            66..72 => {
                let (address, length) = self.range(lines);
                match self.below(20) {
                    0..4 => Call::Lock(address, length),
                    4..6 => Call::Lock2(address, length, [0, 1, 1, 1, 2][self.below(5) as usize]),
                    6 => Call::LockAll([2, 6, 1, 3, 4, 0, 8, 2][self.below(8) as usize]),
                    7 => Call::UnlockAll,
                    8..12 => Call::Unlock(address, length),
                    12..15 => Call::Sync(address, length, 4),
                    15 => Call::Sync(address, length, self.below(9) as u32),
                    _ => Call::InCore(address, length),
                }
            }
            72..85 => Call::Store(self.page(lines), self.rng.next() >> 8),
            85..92 => Call::Load(self.page(lines)),
            92..96 => match self.heap {
                Some(heap) => Call::Break(self.heap_end(heap, lines)),
                None => Call::Load(self.page(lines)),
            },
            _ if depth > 0 && self.below(3) != 0 => Call::Exit,
            _ if depth < 3 => Call::Fork,
            _ => Call::Exit,
        }
    }

    fn map(&mut self, lines: &[Line]) -> Call {
        use libc::*;
        let mut length = self.length();
        let (mut file, mut offset) = (-1, 0);
        let mut flags = match self.below(10) {
            0..5 => MAP_PRIVATE | MAP_ANONYMOUS,
            5 if self.below(6) == 0 => DROPPABLE | MAP_ANONYMOUS,
            5 => MAP_SHARED | MAP_ANONYMOUS,
            kind => {
                file = self.below(2 * FILES as u64) as i64;
                length = length.min((1 + self.below(48)) * PAGE);
                offset = self.below(FILE_PAGES - 16) * PAGE;
                if kind < 9 { MAP_PRIVATE } else { MAP_SHARED }
            }
        };
        let mut prot = self.prot();
        let mut address = 0;
        match self.below(8) {
            0 => {}
            1 => flags |= MAP_32BIT,
            2 => address = self.address(),
            3 => {
                address = self.address();
                flags |= MAP_FIXED_NOREPLACE;
            }
            4 | 5 => {
                // Beside a mapping, going on where it ends or starts, so that they may become one.
                let behind = self.below(2) == 0;
                flags |= MAP_FIXED_NOREPLACE;
                address = self.address();
                if let Some(line) = self.line(lines).cloned() {
                    let at = if behind {
                        line.end
                    } else {
                        line.start.saturating_sub(length)
                    };
                    if at >= WINDOW.start && at + length <= WINDOW.end {
                        address = at;
                    }
                    if let Some(number) = line.name.strip_prefix('f').filter(|_| file >= 0) {
                        file = number.parse().unwrap_or(0);
                        offset = if behind {
                            line.offset + (line.end - line.start)
                        } else {
                            line.offset.saturating_sub(length)
                        };
                    }
                    let letter = |letter, bit| if line.rights.contains(letter) { bit } else { 0 };
                    if self.below(3) != 0 {
                        prot = letter('r', 1) | letter('w', 2) | letter('x', 4);
                    }
                }
            }
            _ => {
                address = self.address();
                flags |= MAP_FIXED;
            }
        }
        if flags & MAP_TYPE == MAP_SHARED && self.below(3) == 0 {
            // With a flag that no file of ours takes, one that does not exist, and none.
            flags |= MAP_SHARED_VALIDATE;
            flags |= [MAP_SYNC, 0x0100_0000, 0, 0][self.below(4) as usize];
        }
        for (one_in, flag) in [
            (10, MAP_POPULATE),
            (12, MAP_NORESERVE),
            (12, MAP_STACK),
            (16, MAP_LOCKED),
            (16, MAP_GROWSDOWN),
        ] {
            if self.below(one_in) == 0 {
                flags |= flag;
            }
        }
        match self.below(90) {
            0 => length = 0,
            1 => address += 0x123,
            2 if file >= 0 => offset += 0x10,
            3 => flags &= !(MAP_SHARED | MAP_PRIVATE),
            4 if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) == 0 => length = 1 << 47,
            5 if file >= 0 => file = 99,
            6 if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) == 0 => length = u64::MAX - 100,
            _ => {}
        }
        let flags = flags as u32;
        Call::Map {
            address,
            length,
            prot,
            flags,
            file,
            offset,
        }
    }

    fn remap(&mut self, lines: &[Line]) -> Call {
        let (mut address, mut old) = self.range(lines);
        let line = lines
            .iter()
            .find(|line| line.start <= address && address < line.end);
        if let Some(line) = line.filter(|_| self.rng.below(4) != 0) {
            old = old.min(line.end - address);
        }
        let mut new = match self.below(4) {
            0 => old,
            1 => (1 + self.below(old / PAGE + 1)) * PAGE,
            _ => old + (1 + self.below(16)) * PAGE,
        };
        let mut flags = [0, 1, 1, 3][self.below(4) as usize];
        let mut to = if flags == 3 { self.address() } else { 0 };
        match self.below(80) {
            0 => address += 8,
            1 => new = 0,
            2 => to += 8,
            3 => flags &= !1,
            4 => flags |= 8,
            5..9 => {
                flags |= 5;
                new = old;
            }
            _ => {}
        }
        Call::Remap {
            address,
            old,
            new,
            flags,
            to,
        }
    }
}
