//! The page walk: from a linear address and a root to a page, as the manual describes it, with no cache of any kind.
//!
//! ```text
//!  root --index--> entry --P?--> reserved bits? --leaf?--> rights = AND of R/W, AND of U/S, OR of XD
//!                    |  no: #PF P=0   | yes: #PF RSVD,P=1      |
//!                    |                                          `--> access check --no--> #PF P=1
//!                    `-- A is set in each upper entry as the walk passes it; in the leaf (with D for a write) only
//!                        after the access check has passed
//! ```
//!
//! Invariants
//! - `I1` rights are only judged on a complete path: a not-present or reserved-bit entry anywhere decides first (SDM 3A 4.7).
//! - `I2` A and D are written by compare-and-exchange from the value the walk judged; if the entry changed in between, the walk
//!   starts again. So an A or D bit never lands in an entry that the walk did not judge.
//! - `I3` a silent walk ([`Touch::Nothing`]) writes nothing.
//!
//! Where processors differ in A bits on a faulting walk this does what QEMU's emulated processor does.

use crate::manual::{cr3, pf, pte};
use crate::memory::PhysMemory;
use crate::mode::{Mode, ReservedInputs};

/// The most levels of any mode.
pub const MAX_LEVELS: usize = 5;

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write (or a read-modify-write).
    Write,
    /// An instruction fetch.
    Fetch,
}

/// An access to linear memory, apart from its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// Made at CPL 3.
    pub user: bool,
    /// The processor's own access to a system structure (descriptor table, TSS): supervisor whatever the CPL is.
    pub implicit: bool,
}

impl Access {
    /// An access of the kernel's code.
    pub const fn kernel(kind: AccessKind) -> Self {
        Self {
            kind,
            user: false,
            implicit: false,
        }
    }

    /// An access of user code.
    pub const fn user(kind: AccessKind) -> Self {
        Self {
            kind,
            user: true,
            implicit: false,
        }
    }

    /// The error-code bits that say what the access was, apart from I, which depends on the processor's mode.
    fn code(self) -> u32 {
        let mut code = 0;
        if self.kind == AccessKind::Write {
            code |= pf::W;
        }
        if self.user && !self.implicit {
            code |= pf::U;
        }
        code
    }
}

/// Everything outside of memory that decides a walk.
#[derive(Debug, Clone, Copy)]
pub struct WalkContext {
    /// The paging mode.
    pub mode: &'static Mode,
    /// CR3.
    pub cr3: u64,
    /// The four PDPTE registers of PAE paging.
    pub pdptes: [u64; 4],
    /// What is reserved.
    pub inputs: ReservedInputs,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// RFLAGS.AC.
    pub ac: bool,
    /// CR4.PGE.
    pub pge: bool,
    /// PKRU, if CR4.PKE = 1 in a mode that has protection keys.
    pub pkru: Option<u32>,
}

impl WalkContext {
    /// The physical address of the root table.
    pub fn root(&self) -> u64 {
        if self.mode.entry_bytes == 4 {
            self.cr3 & 0xffff_f000
        } else if self.mode.levels[0].accessed {
            self.cr3 & !cr3::NO_FLUSH & !cr3::PCID_MASK
        } else {
            self.cr3 & 0xffff_ffe0
        }
    }

    fn start(&self) -> Position {
        let first = usize::from(!self.mode.levels[0].accessed);
        Position {
            index: first,
            table: self.root(),
            rights: Rights::ALL,
        }
    }

    /// The I bit of an error code: reported only where NX or SMEP exists (SDM 3A 4.7).
    fn fetch_bit(&self, access: Access) -> u32 {
        let told = self.smep || (self.inputs.nxe && self.mode.entry_bytes == 8);
        if access.kind == AccessKind::Fetch && told {
            pf::I
        } else {
            0
        }
    }
}

/// The rights that a path of entries leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    /// R/W = 1 in every entry.
    pub writable: bool,
    /// U/S = 1 in every entry.
    pub user: bool,
    /// XD = 0 in every entry.
    pub executable: bool,
}

impl Rights {
    /// What the empty path allows.
    pub const ALL: Self = Self {
        writable: true,
        user: true,
        executable: true,
    };

    pub(crate) fn and(self, entry: u64, has_xd: bool) -> Self {
        Self {
            writable: self.writable && entry & pte::RW != 0,
            user: self.user && entry & pte::US != 0,
            executable: self.executable && !(has_xd && entry & pte::XD != 0),
        }
    }

    /// Returns whether these rights allow anything that `other` does not.
    pub fn exceed(self, other: Self) -> bool {
        (self.writable && !other.writable)
            || (self.user && !other.user)
            || (self.executable && !other.executable)
    }
}

/// Where a walk stands: the table it reads next and the rights so far. A walk cache keeps these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Index into the mode's levels.
    pub index: usize,
    /// Physical address of the table.
    pub table: u64,
    /// Rights of the entries passed.
    pub rights: Rights,
}

/// One entry that a walk read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Index into the mode's levels.
    pub index: usize,
    /// Physical address of the entry; `None` for a PDPTE register.
    pub address: Option<u64>,
    /// Its value when it was read.
    pub entry: u64,
}

/// A complete translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Physical address of the page's first byte.
    pub page: u64,
    /// log2 of the page's bytes.
    pub shift: u32,
    /// Rights of the whole path.
    pub rights: Rights,
    /// G in the leaf, under CR4.PGE.
    pub global: bool,
    /// D in the leaf.
    pub dirty: bool,
    /// The protection key of the leaf (0 where the mode has none).
    pub key: u8,
    /// Which entry of the PAT it picks: PAT, PCD and PWT of the leaf as bits 2 to 0.
    pub pat: u8,
    /// Index of the leaf's level.
    pub index: usize,
}

impl Translation {
    /// The physical address of `linear`, an address in the page.
    pub fn physical(&self, linear: u64) -> u64 {
        self.page | (linear & ((1 << self.shift) - 1))
    }
}

/// Why a walk found no page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An entry with P = 0.
    NotPresent,
    /// An entry with a reserved bit set.
    Reserved,
    /// A table that is no memory at this physical address: not an x86 fault but a broken program.
    NoMemory(u64),
}

/// A walk: what it read and how it ended.
#[derive(Debug, Clone, Copy)]
pub struct Walk {
    steps: [Step; MAX_LEVELS],
    count: usize,
    /// How it ended.
    pub outcome: Result<Translation, Stop>,
}

impl Walk {
    /// The entries it read, from the root down.
    pub fn steps(&self) -> &[Step] {
        &self.steps[..self.count]
    }

    /// Physical addresses of the tables it read, from the root down.
    pub fn tables(&self) -> impl Iterator<Item = u64> + '_ {
        self.steps()
            .iter()
            .filter_map(|step| step.address.map(|address| address & !0xfff))
    }
}

/// What a walk may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// Nothing.
    Nothing,
    /// A in the upper entries.
    UpperAccessed,
}

/// Walks to `linear`, from the root or from a cached position.
pub fn walk(
    memory: &PhysMemory,
    context: &WalkContext,
    linear: u64,
    from: Option<Position>,
    touch: Touch,
) -> Walk {
    loop {
        if let Some(done) = walk_once(memory, context, linear, from, touch) {
            return done;
        }
    }
}

/// One attempt; `None` if an entry changed under the update of its A bit (`I2`).
fn walk_once(
    memory: &PhysMemory,
    context: &WalkContext,
    linear: u64,
    from: Option<Position>,
    touch: Touch,
) -> Option<Walk> {
    let mode = context.mode;
    let none = Step {
        index: 0,
        address: None,
        entry: 0,
    };
    let mut walk = Walk {
        steps: [none; MAX_LEVELS],
        count: 0,
        outcome: Err(Stop::NotPresent),
    };
    let mut at = from.unwrap_or_else(|| context.start());
    if from.is_none() && at.index == 1 {
        // PAE: the first level is a register, and its rights bits do not exist (SDM 3A 4.4.1).
        let entry = context.pdptes[(linear >> 30 & 3) as usize];
        walk.steps[0] = Step {
            index: 0,
            address: None,
            entry,
        };
        walk.count = 1;
        if entry & pte::P == 0 {
            return Some(walk);
        }
        at.table = mode.address(0, entry, false);
    }
    loop {
        let level = &mode.levels[at.index];
        let slot = linear >> level.shift & ((1 << level.bits) - 1);
        let address = at.table + slot * mode.entry_bytes;
        let Some(entry) = memory.load(address, mode.entry_bytes) else {
            walk.outcome = Err(Stop::NoMemory(address));
            return Some(walk);
        };
        walk.steps[walk.count] = Step {
            index: at.index,
            address: Some(address),
            entry,
        };
        walk.count += 1;
        if entry & pte::P == 0 {
            return Some(walk);
        }
        if entry & mode.reserved(at.index, entry, &context.inputs) != 0 {
            walk.outcome = Err(Stop::Reserved);
            return Some(walk);
        }
        let rights = at.rights.and(entry, mode.has_xd);
        let leaf = mode.is_leaf(at.index, entry, context.inputs.pse);
        let target = mode.address(at.index, entry, leaf);
        if leaf {
            walk.outcome = Ok(Translation {
                page: target,
                shift: level.shift,
                rights,
                global: context.pge && entry & pte::G != 0,
                dirty: entry & pte::D != 0,
                key: if mode.has_pkey {
                    (entry >> pte::PKEY_SHIFT & pte::PKEY_MASK) as u8
                } else {
                    0
                },
                pat: mode.pat(at.index, entry),
                index: at.index,
            });
            return Some(walk);
        }
        if touch == Touch::UpperAccessed && entry & pte::A == 0 {
            if !memory.compare_exchange(address, mode.entry_bytes, entry, entry | pte::A) {
                return None;
            }
            walk.steps[walk.count - 1].entry |= pte::A;
        }
        at = Position {
            index: at.index + 1,
            table: target,
            rights,
        };
    }
}

/// Sets A, and D for a write, in the leaf of a walk that passed the access check.
///
/// Returns the leaf's new value, `None` if it changed since the walk read it: walk again (`I2`).
pub fn touch_leaf(memory: &PhysMemory, mode: &Mode, leaf: Step, write: bool) -> Option<u64> {
    let wanted = leaf.entry | pte::A | if write { pte::D } else { 0 };
    if wanted == leaf.entry {
        return Some(wanted);
    }
    let address = leaf.address?;
    memory
        .compare_exchange(address, mode.entry_bytes, leaf.entry, wanted)
        .then_some(wanted)
}

/// Judges an access by the rights of a translation (SDM 3A 4.6): `Err` with the page-fault error code.
pub fn check(context: &WalkContext, rights: Rights, key: u8, access: Access) -> Result<(), u32> {
    let supervisor = !access.user || access.implicit;
    let mut denied = false;
    if supervisor && rights.user {
        denied |= match access.kind {
            AccessKind::Fetch => context.smep,
            _ => context.smap && (access.implicit || !context.ac),
        };
    }
    if !supervisor && !rights.user {
        denied = true;
    }
    match access.kind {
        AccessKind::Read => {}
        AccessKind::Write => denied |= !rights.writable && (!supervisor || context.wp),
        AccessKind::Fetch => denied |= !rights.executable,
    }
    let mut code = pf::P | access.code() | context.fetch_bit(access);
    if let Some(pkru) = context.pkru
        && rights.user
        && access.kind != AccessKind::Fetch
    {
        let bits = pkru >> (2 * u32::from(key)) & 3;
        let (access_disable, write_disable) = (bits & 1 != 0, bits & 2 != 0);
        let write = access.kind == AccessKind::Write && (!supervisor || context.wp);
        if access_disable || (write_disable && write) {
            code |= pf::PK;
            denied = true;
        }
    }
    if denied { Err(code) } else { Ok(()) }
}

/// The error code of a walk that found no page.
pub fn stop_code(context: &WalkContext, stop: Stop, access: Access) -> u32 {
    let base = access.code() | context.fetch_bit(access);
    match stop {
        Stop::NotPresent | Stop::NoMemory(_) => base,
        Stop::Reserved => base | pf::P | pf::RSVD,
    }
}
