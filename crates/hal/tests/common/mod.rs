//! Checks of hal against models that need no cleverness: 128-bit numbers, sets, counters. Used by the property tests
//! and by the fuzz target.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ptr::NonNull;

use arbitrary::Arbitrary;
use kmem_hal::lock::{Rank, RankTracker};
use kmem_hal::{
    CachePadded, Canonical, CountError, CpuId, CpuSet, Deferred, EpochArea, EpochGrace, Frame,
    FrameRange, FrameSlot, FrameTag, Grace, Order, Page, PageRange, PhysAddr, SingleCpu,
    SingleGrace, SlotFlags, Spin, UserSlot, VirtAddr,
};

const SPACE: u128 = 1 << 64;

fn narrow(value: Option<u128>) -> Option<u64> {
    value.and_then(|value| u64::try_from(value).ok())
}

/// Addresses: every answer is that of 128-bit arithmetic, and `None` exactly where that leaves the space.
pub fn addresses(a: u64, b: u64, shift: u8) {
    let (wide_a, wide_b) = (u128::from(a), u128::from(b));
    let address = PhysAddr::new(a);
    let raw = |address: Option<PhysAddr>| address.map(PhysAddr::as_u64);
    assert_eq!(raw(address.checked_add(b)), narrow(Some(wide_a + wide_b)));
    assert_eq!(
        raw(address.checked_sub(b)),
        narrow(wide_a.checked_sub(wide_b))
    );
    assert_eq!(
        address.offset_from(PhysAddr::new(b)),
        narrow(wide_a.checked_sub(wide_b))
    );
    let align = 1u64 << (shift % 64);
    let down = wide_a / u128::from(align) * u128::from(align);
    let up = wide_a.div_ceil(u128::from(align)) * u128::from(align);
    assert_eq!(u128::from(address.align_down(align).as_u64()), down);
    assert_eq!(raw(address.align_up(align)), narrow(Some(up)));
    assert_eq!(address.is_aligned(align), down == wide_a);
    assert_eq!(address.page_offset(), a % 4096);

    assert_eq!(Frame::containing(address).number(), a / 4096);
    assert_eq!(
        Frame::starting_at(address).is_some(),
        a.is_multiple_of(4096)
    );
    assert_eq!(Frame::new(a).is_some(), a < 1 << 52);
    assert_eq!(Page::new(a).is_some(), a < 1 << 52);
    let frame = Frame::from_number(a);
    let sum = u128::from(frame.number()) + wide_b;
    assert_eq!(
        frame.checked_add(b).map(|frame| u128::from(frame.number())),
        (sum < 1 << 52).then_some(sum)
    );
}

/// Canonical forms: sign extension, halves and sums by the definition, not by shifts.
pub fn canonical(a: u64, b: u64, bits: u8) {
    let bits = u32::from(bits % 64) + 1;
    for (form, extended) in [
        (Canonical::sign_extended(bits), true),
        (Canonical::zero_extended(bits), false),
    ] {
        let low = u128::from(a) % (1 << bits);
        let top_set = low >> (bits - 1) == 1;
        let expected = if extended && top_set {
            SPACE - (1 << bits) + low
        } else {
            low
        };
        let address = VirtAddr::new(a);
        let canonical = form.sign_extend(address);
        assert_eq!(u128::from(canonical.as_u64()), expected);
        assert_eq!(form.contains(address), u128::from(a) == expected);
        assert!(form.contains(form.lower_end()));
        assert!(!extended || bits == 64 || form.upper_start().is_some_and(|at| form.contains(at)));

        // A sum stays in its half, or is none.
        let sum = form.checked_add(canonical, b);
        let plain = expected + u128::from(b);
        let lower = u128::from(form.lower_end().as_u64());
        let same_half = plain < SPACE
            && if expected <= lower {
                plain <= lower
            } else {
                plain > lower
            };
        assert_eq!(
            sum.map(|sum| u128::from(sum.as_u64())),
            same_half.then_some(plain),
            "{canonical} + {b:#x} with {bits} bits"
        );
    }
}

/// Frame ranges from bytes, tilings, cuts and intersections.
pub fn frame_ranges(base: u64, length: u64, cut: u64, top: u8) {
    let (first, end) = (u128::from(base), u128::from(base) + u128::from(length));
    let limit = 1u128 << 52;
    let range = |first: u128, end: u128| {
        let end = end.min(limit);
        if first < end {
            (first, end - first)
        } else {
            (0, 0)
        }
    };
    let parts = |range: FrameRange| {
        (
            u128::from(range.first().number()),
            u128::from(range.count()),
        )
    };
    let inside = FrameRange::inside(PhysAddr::new(base), length);
    assert_eq!(parts(inside), range(first.div_ceil(4096), end / 4096));
    let touching = FrameRange::touching(PhysAddr::new(base), length);
    let expected = if length == 0 {
        (0, 0)
    } else {
        range(first / 4096, end.div_ceil(4096))
    };
    assert_eq!(parts(touching), expected);
    assert!(touching.contains_range(inside));

    let (below, above) = inside.split_at(cut);
    assert_eq!(below.count() + above.count(), inside.count());
    assert!(below.is_empty() || below.end_number() <= cut);
    assert!(above.is_empty() || above.first().number() >= cut);
    assert_eq!(below.intersection(above), FrameRange::EMPTY);

    let top = Order::new(top % 52).unwrap_or_default();
    let mut next = inside.first().number();
    let mut before: Option<(Frame, Order)> = None;
    // The tiling of any range has at most two blocks for each order below the top; of large ones, look at a part.
    for (frame, order) in inside.blocks(top).take(200) {
        assert_eq!(frame.number(), next, "tiles leave no gap");
        assert!(frame.is_aligned(order) && order <= top);
        next += order.frames();
        assert!(next <= inside.end_number());
        if let Some((other, same)) = before
            && same == order
            && order < top
        {
            let merged = other.number() ^ order.frames() == frame.number();
            assert!(!merged || !other.is_aligned(Order::new(order.get() + 1).unwrap_or_default()));
        }
        before = Some((frame, order));
    }
    if inside.blocks(top).nth(200).is_none() {
        assert_eq!(next, inside.first().number() + inside.count());
    }
}

/// Page ranges: hull, intersection, containment, by their ends.
pub fn page_ranges(a: u64, n: u64, b: u64, m: u64) {
    let make = |first, count| PageRange::with_count(Page::from_number(first), count);
    let (Some(x), Some(y)) = (make(a, n % (1 << 53)), make(b, m % (1 << 53))) else {
        return;
    };
    let ends = |range: PageRange| (range.first().number(), range.last().number());
    let ((x0, x1), (y0, y1)) = (ends(x), ends(y));
    assert_eq!(x.count(), x1 - x0 + 1);
    let common = x0.max(y0)..=x1.min(y1);
    assert_eq!(x.overlaps(y), !common.is_empty());
    assert_eq!(
        x.intersection(y).map(ends),
        (!common.is_empty()).then_some((*common.start(), *common.end()))
    );
    assert_eq!(ends(x.hull(y)), (x0.min(y0), x1.max(y1)));
    assert_eq!(x.contains_range(y), x0 <= y0 && y1 <= x1);
    assert!(x.hull(y).contains_range(x) && x.hull(y).contains_range(y));
}

/// One step on a set of CPUs.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum SetOp {
    /// Add.
    Insert(u16),
    /// Take out.
    Remove(u16),
    /// Add the CPUs below a number.
    First(u16),
}

/// Sets of CPUs against sets of numbers.
pub fn cpu_sets(ops: &[SetOp]) {
    let (mut set, mut model) = (CpuSet::EMPTY, BTreeSet::new());
    let fits = |cpu: u16| u32::from(cpu) < CpuSet::CAPACITY;
    for op in ops {
        match *op {
            SetOp::Insert(cpu) => {
                let new = set.insert(CpuId::new(u32::from(cpu)));
                assert_eq!(new, fits(cpu) && model.insert(cpu));
            }
            SetOp::Remove(cpu) => {
                let was = set.remove(CpuId::new(u32::from(cpu)));
                assert_eq!(was, model.remove(&cpu));
            }
            SetOp::First(count) => {
                set.union_with(&CpuSet::first(u32::from(count)));
                model.extend((0..count).filter(|&cpu| fits(cpu)));
            }
        }
    }
    assert_eq!(set.len() as usize, model.len());
    assert_eq!(set.is_empty(), model.is_empty());
    assert!(
        set.iter()
            .map(|cpu| cpu.get() as u16)
            .eq(model.iter().copied())
    );
    assert_eq!(set.iter().collect::<CpuSet>(), set);
}

/// One step on a page's slot.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum SlotOp {
    /// Another leaf table maps the page.
    AddMapping,
    /// One unmaps it.
    SubMapping,
    /// A look-up.
    AddReference,
    /// Its end.
    SubReference,
    /// Flags on.
    Set(u16),
    /// Flags off.
    Clear(u16),
    /// The page moves to another object.
    Move(u32, u64),
    /// The replacement policy's bits.
    Age(u16),
    /// Links of a list.
    Link(u32, u32),
}

/// A user page's slot against plain fields.
pub fn slots(ops: &[SlotOp]) {
    let slot = FrameSlot::new();
    let page = UserSlot::claim(&slot, FrameTag::Anon, Order::HUGE_2M, 3, 5).expect("a user tag");
    let (mut mappings, mut references, mut flags) = (0u32, 1u32, 0u16);
    let (mut object, mut index, mut age) = (3, 5, 0);
    let mut links = (None, None);
    for op in ops {
        match *op {
            SlotOp::AddMapping => {
                assert_eq!(page.add_mapping(), Ok(mappings));
                references += u32::from(mappings == 0);
                mappings += 1;
            }
            SlotOp::SubMapping => {
                let expected = match (mappings, references) {
                    (0, _) => Err(CountError::Underflow),
                    // The last mapping's reference was given back by somebody who did not hold it.
                    (1, 0) => Err(CountError::Underflow),
                    (1, _) => Ok((0, references - 1)),
                    _ => Ok((mappings - 1, references)),
                };
                assert_eq!(page.sub_mapping(), expected);
                if mappings == 1 {
                    references = references.saturating_sub(1);
                }
                mappings = mappings.saturating_sub(1);
            }
            SlotOp::AddReference => {
                let expected = match references {
                    0 => Err(CountError::Underflow),
                    n => Ok(n),
                };
                assert_eq!(page.add_reference(), expected);
                references += u32::from(references != 0);
            }
            SlotOp::SubReference => {
                let expected = references.checked_sub(1).ok_or(CountError::Underflow);
                assert_eq!(page.sub_reference(), expected);
                references = references.saturating_sub(1);
            }
            SlotOp::Set(bits) => {
                let before = slot.set_flags(SlotFlags::from_bits_retain(bits));
                assert_eq!(before.bits(), flags);
                flags |= bits;
            }
            SlotOp::Clear(bits) => {
                let before = slot.clear_flags(SlotFlags::from_bits_retain(bits));
                assert_eq!(before.bits(), flags);
                flags &= !bits;
            }
            SlotOp::Move(to, at) => {
                page.set_object(to, at);
                (object, index) = (to, at % (1 << 52));
            }
            SlotOp::Age(bits) => {
                page.set_age(bits);
                age = bits & UserSlot::AGE_MAX;
            }
            SlotOp::Link(next, previous) => {
                let frame = |number: u32| {
                    (number != u32::MAX).then(|| Frame::from_number(u64::from(number)))
                };
                links = (frame(next), frame(previous));
                slot.set_links(links.0, links.1);
            }
        }
        assert_eq!(slot.tag(), FrameTag::Anon);
        assert_eq!(slot.order(), Order::HUGE_2M);
        assert_eq!((page.mappings(), page.references()), (mappings, references));
        assert_eq!(slot.flags().bits(), flags);
        assert_eq!(
            (page.object(), page.page(), page.age()),
            (object, index, age)
        );
        assert_eq!((slot.next(), slot.previous()), links);
    }
}

/// One step on a grace period's bookkeeping.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum GraceOp {
    /// A guard begins.
    Read,
    /// The guard number so-and-so ends.
    Drop(u8),
    /// A call is deferred.
    Defer,
    /// Whatever is due is done.
    Poll,
    /// Everything is waited for, where no guard lives.
    Synchronize,
}

unsafe fn note(context: *const (), object: NonNull<()>) {
    // SAFETY: the checks pass flags that outlive the queue, which they drain.
    let made = unsafe { &*context.cast::<[Cell<u32>; 512]>() };
    let flag = &made[object.as_ptr().addr() - 1];
    flag.set(flag.get() + 1);
}

fn one_grace<G: Grace>(grace: &G, ops: &[GraceOp]) {
    let made: [Cell<u32>; 512] = std::array::from_fn(|_| Cell::new(0));
    // Guards with their birth, calls with theirs: a call may be made when every guard older than it is gone.
    let mut guards: Vec<(usize, G::Guard<'_>)> = Vec::new();
    let mut calls: Vec<usize> = Vec::new();
    for (now, op) in ops.iter().take(400).enumerate() {
        match *op {
            GraceOp::Read => guards.push((now, grace.read())),
            GraceOp::Drop(which) => {
                if !guards.is_empty() {
                    guards.swap_remove(usize::from(which) % guards.len());
                }
            }
            GraceOp::Defer => {
                let object = std::ptr::without_provenance_mut(calls.len() + 1);
                let context = std::ptr::from_ref(&made).cast();
                let object = NonNull::new(object).expect("from 1");
                // SAFETY: the flags outlive the queue, which is drained below.
                let call = unsafe { Deferred::new(note, context, object) };
                if grace.defer(call).is_ok() {
                    calls.push(now);
                } else {
                    assert!(grace.pending() > 0, "an empty queue refused a call");
                }
            }
            GraceOp::Poll => {
                grace.poll();
            }
            GraceOp::Synchronize => {
                if guards.is_empty() {
                    grace.synchronize();
                    assert_eq!(grace.pending(), 0);
                }
            }
        }
        for (call, &born) in calls.iter().enumerate() {
            let times = made[call].get();
            let guarded = guards.iter().any(|&(guard, _)| guard < born);
            assert!(
                times <= 1 && !(guarded && times == 1),
                "call {call} of step {born} was made {times} times at step {now}"
            );
        }
        let done: u32 = made.iter().map(Cell::get).sum();
        assert_eq!(done as usize + grace.pending(), calls.len());
    }
    guards.clear();
    grace.synchronize();
    assert!(made[..calls.len()].iter().all(|times| times.get() == 1));
}

/// Both of hal's grace periods on one CPU: a call waits for every guard that is older than it, and is made once.
pub fn graces(ops: &[GraceOp]) {
    // SAFETY: one thread uses the values.
    let (single, cpu) = unsafe { (SingleGrace::new(), SingleCpu::new()) };
    one_grace(&single, ops);
    let areas = [CachePadded::new(EpochArea::<Spin, 4>::new())];
    let epoch = EpochGrace::<_, Spin, 4>::new(cpu);
    // Without an area first, and then with one.
    one_grace(&epoch, &ops[..ops.len() / 2]);
    assert_eq!(epoch.init(&areas), 1);
    assert_eq!(epoch.init(&areas), 0, "only the first call has an effect");
    // The area is the first value's: another goes on without one.
    let other = EpochGrace::<_, Spin, 4>::new(cpu);
    assert_eq!(other.init(&areas), 0, "two values share an area");
    let reading = other.read();
    one_grace(&epoch, ops);
    drop(reading);
    one_grace(&other, ops);
}

const RANKS: [Rank; 11] = [
    Rank::Mm,
    Rank::Vma,
    Rank::ReverseMap,
    Rank::Page,
    Rank::Table5,
    Rank::Table4,
    Rank::Table3,
    Rank::Table2,
    Rank::Table1,
    Rank::SlabDepot,
    Rank::BuddyBlock,
];

/// A rank is legal exactly where everything held is lower.
pub fn ranks(steps: &[(bool, u8)]) {
    let tracker = RankTracker::new();
    let mut held = BTreeSet::new();
    for &(take, rank) in steps {
        let rank = RANKS[usize::from(rank) % RANKS.len()];
        if take {
            let legal = held.last().is_none_or(|&highest| highest < rank);
            assert_eq!(tracker.acquire(rank), legal);
            held.insert(rank);
        } else {
            tracker.release(rank);
            held.remove(&rank);
        }
        assert_eq!(tracker.holds_any(), !held.is_empty());
    }
}
