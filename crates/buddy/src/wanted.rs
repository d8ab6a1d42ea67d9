//! A request in the zones' own terms, and how it is served from one zone's bits.

use kmem_hal::{Context, FrameRequest, Mobility, NodeId, NodePolicy, RawLock};

use crate::state::frame_limit;
use crate::zone::bits::TOP;
use crate::zone::core::{Core, FEW, Give, STEP};
use crate::zone::kind::{MigrateType, ZoneKind};
use crate::zone::{Mark, Zone};

/// A request in the zones' own terms.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub order: usize,
    pub align: usize,
    /// Exclusive frame number.
    pub limit: u64,
    pub migrate: MigrateType,
    pub highest: ZoneKind,
    pub movable: bool,
    pub reserve: bool,
    pub atomic: bool,
    pub strict: Option<NodeId>,
    /// Whether it may be served by whichever zone a hit of its type would come from.
    pub plain: bool,
}

/// Whether the request asks for nothing that a hit could not give: no place, no alignment, no node, no kind of zone.
#[inline(always)]
pub(crate) fn is_plain(request: &FrameRequest) -> bool {
    request.alignment <= request.order
        && request.max_address.as_u64() == u64::MAX
        && !request.high
        && matches!(request.node, NodePolicy::Local)
}

/// Remembers the block that it hands on.
struct First<'a, G>(&'a mut G, Option<u64>);

impl<G: Give> Give for First<'_, G> {
    fn one(&mut self, first: u64) {
        self.1 = Some(first);
        self.0.one(first);
    }

    fn run(&mut self, first: u64, count: usize, order: usize) {
        self.1 = Some(first);
        self.0.run(first, count, order);
    }
}

/// The highest kind of zone that may serve the request.
fn highest_for(request: &FrameRequest) -> ZoneKind {
    let highest = ZoneKind::highest_for(request.mobility);
    if request.high {
        highest.max(ZoneKind::HighMem)
    } else {
        highest
    }
}

impl Wanted {
    pub fn new(request: &FrameRequest) -> Self {
        Self {
            order: request.order.index(),
            align: request.alignment.index().max(request.order.index()),
            limit: frame_limit(request.max_address),
            migrate: MigrateType::of(request.mobility),
            highest: highest_for(request),
            movable: request.mobility == Mobility::Movable,
            reserve: request.reserve,
            atomic: request.context == Context::Atomic,
            strict: match request.node {
                NodePolicy::Strict(node) => Some(node),
                _ => None,
            },
            plain: is_plain(request),
        }
    }

    /// Whether the zone may serve the request at all.
    #[inline]
    pub fn admits<L: RawLock + 'static>(&self, zone: &Zone<L>) -> bool {
        zone.kind <= self.highest
            && zone.start < self.limit
            && self.strict.is_none_or(|node| zone.node == node)
    }

    /// How many frames the zone can spare for it at a level.
    pub fn spare<L: RawLock + 'static>(&self, zone: &Zone<L>, level: Mark) -> u64 {
        if self.reserve && level == Mark::Min {
            let lent = if self.movable { 0 } else { zone.free_cma() };
            return zone.free().saturating_sub(lent);
        }
        let mark = zone.mark(level);
        let mark = if level == Mark::Min && self.atomic {
            mark / 2
        } else {
            mark
        };
        let spare = zone.spare(mark, self.highest, self.movable);
        if level == Mark::Min && self.atomic {
            spare
        } else {
            spare.saturating_sub(zone.high_atomic())
        }
    }

    /// Whether it is one of those that page blocks are kept for: of more than a frame, and cannot wait.
    fn is_high_atomic(&self) -> bool {
        self.atomic && self.order > 0 && !self.movable
    }

    /// Whether frames of blocks of this type may serve it, where it is served by place and not by type.
    pub fn may_use(&self, migrate: MigrateType) -> bool {
        match migrate {
            MigrateType::Isolate => false,
            MigrateType::Cma => self.movable,
            MigrateType::HighAtomic => self.atomic,
            _ => true,
        }
    }

    /// Takes one block at the min watermark for a request that cannot wait; as [`take`](Self::take).
    ///
    /// The page blocks that are kept for large ones serve these first, and single frames where nothing else is left. A block that
    /// gave a large one is kept from now on, up to `most_kept` of them.
    pub fn take_atomic(&self, core: &mut Core, most_kept: u64, give: &mut impl Give) -> bool {
        let kept = MigrateType::HighAtomic;
        if self.is_high_atomic()
            && self.align <= self.order
            && core.take_batch(self.order, kept, self.limit, 1, give) > 0
        {
            return false;
        }
        let mut first = First(give, None);
        let again = self.take(core, 1, &mut first);
        match first.1 {
            Some(first) if self.is_high_atomic() => core.reserve_high_atomic(first, most_kept),
            None if !again && self.align <= self.order => {
                core.take_batch(self.order, kept, self.limit, 1, give);
            }
            _ => {}
        }
        again
    }

    /// Takes up to `most` blocks from a zone's bits and hands them to `give`; `true` where it found none and there is more to be
    /// brought up to date before that means anything.
    pub fn take(&self, core: &mut Core, most: usize, give: &mut impl Give) -> bool {
        let mut left = core.refresh(FEW);
        let mut take = |core: &mut Core, last: bool| -> bool {
            if self.align <= self.order {
                if core.take_batch(self.order, self.migrate, self.limit, most, give) > 0 {
                    return true;
                }
                if last
                    && let Some(found) = core.find_fallback(self.order, self.migrate, self.limit)
                    && let Some(first) = core.take(&found, self.order)
                {
                    give.one(first);
                    if core.type_of(found.block) == self.migrate {
                        core.take_batch(self.order, self.migrate, self.limit, most - 1, give);
                    }
                    return true;
                }
                return false;
            }
            let first = if last { self.take_aligned(core) } else { None };
            first.map(|first| give.one(first)).is_some()
        };
        if left && !take(core, false) {
            left = core.refresh(STEP);
            if left {
                return true;
            }
        } else if left {
            return false;
        }
        take(core, true);
        false
    }

    /// One block whose alignment is beyond its order.
    fn take_aligned(&self, core: &mut Core) -> Option<u64> {
        let large = (self.align <= TOP)
            .then(|| {
                core.find(self.align, self.migrate, self.limit)
                    .or_else(|| core.find_fallback(self.align, self.migrate, self.limit))
            })
            .flatten();
        if let Some(found) = large
            && let Some(first) = core.take(&found, self.order)
        {
            return Some(first);
        }
        let frames = 1 << self.order;
        let first = core.find_range(frames, 1 << self.align, self.limit, |migrate| {
            self.may_use(migrate)
        })?;
        core.mark_found(first, frames);
        Some(first)
    }
}
