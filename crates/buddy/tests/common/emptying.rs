//! The world's calls that empty ranges: claims, CMA areas and compaction, beside users whose pages are in the way.
//!
//! Each call is given an owner, whose answers are replayed on the model before the call's own answer is looked at. So a claim that
//! says yes must have got frames that the model knows to be free by then, and one that says no must name what the owner said last.
#![allow(dead_code)]

use kmem_buddy::{ClaimError, Emptying, PlaceError};
use kmem_hal::{Frame, FrameRange, FrameRequest, FrameSource, MigrateError, Mobility, Order};

use super::hands::Hand;
use super::layout::{BLOCK, END, segment_of};
use super::users::{Answer, Mood, Owner};
use super::world::{Kernel, Need, World};

/// A claim looks so often at a frame that is pinned, or is said to be gone, before it gives up.
const RETRIES: usize = 4;

/// The page blocks that hold `range`, as far as they are in its segment: what a claim isolates.
fn isolated_by(range: FrameRange) -> FrameRange {
    let (first, end) = segment_of(range).unwrap();
    let low = range.first().number() / BLOCK * BLOCK;
    let high = range.end_number().next_multiple_of(BLOCK);
    FrameRange::from_numbers(low.max(first), high.min(end)).unwrap()
}

impl World<'_> {
    /// Users allocate pages.
    pub(super) fn add_pages(&mut self, count: usize) {
        for _ in 0..count {
            match self.buddy.alloc(&FrameRequest::ONE.movable()) {
                Ok(frame) => {
                    let range = frame.range();
                    let id = self.users.add(frame);
                    self.hand_out(range, Hand::Page(id));
                }
                Err(error) => {
                    self.refused(error, &Need::one_movable());
                    return;
                }
            }
        }
    }

    pub(super) fn set_mood(&mut self, which: usize, mood: Mood) {
        if let Some(frame) = self.users.nth(which) {
            self.users.set_mood(frame, mood);
        }
    }

    pub(super) fn free_pages(&mut self, which: usize, count: usize) {
        for step in 0..count {
            if let Some(frame) = self.users.nth(which + 3 * step) {
                let frame = self.users.remove(frame);
                self.gave(frame);
            }
        }
    }

    /// Makes a call with the users' owner, and replays on the model what the owner did.
    fn with_owner<R>(
        &mut self,
        call: impl FnOnce(&Kernel<'_>, &Owner<'_, '_>) -> R,
    ) -> (R, Vec<Answer>) {
        let owner = Owner::new(&mut self.users, &self.buddy);
        let result = call(&self.buddy, &owner);
        let answers = owner.into_answers();
        for &answer in &answers {
            match answer {
                Answer::Moved(from, to) => {
                    let (from, to) = (single(from), single(to));
                    let Hand::Page(id) = self.returned(from) else {
                        panic!("{from:?} is no page");
                    };
                    self.hand_out(to, Hand::Page(id));
                }
                Answer::Freed(frame) => {
                    self.returned(single(frame));
                }
                // Nobody is asked about a frame that is free, unless that is where it cannot be seen.
                Answer::Refused(frame, _) => {
                    let free = self.is_free(frame.number(), frame.number() + 1);
                    assert!(!free || self.calls.is_deaf(), "asked for {frame:?}");
                }
            }
        }
        (result, answers)
    }

    /// The owner was asked for frames of `range` alone, and got none of the page blocks that were being emptied.
    fn kept_apart(answers: &[Answer], range: FrameRange, isolated: FrameRange) {
        for &answer in answers {
            match answer {
                Answer::Moved(from, to) => {
                    assert!(range.contains(from) && !isolated.contains(to), "{answer:?}");
                }
                Answer::Freed(frame) | Answer::Refused(frame, _) => {
                    assert!(range.contains(frame), "{answer:?}");
                }
            }
        }
    }

    /// Whether a refusal says of its frame what the owner said last, or what the model knows of the memory outside of `isolated`.
    fn refusal_is_honest(
        &self,
        error: ClaimError,
        answers: &[Answer],
        range: FrameRange,
        isolated: FrameRange,
    ) {
        let deaf = self.calls.is_deaf();
        let last = answers.last().copied();
        let said = |frame: Frame, reason| last == Some(Answer::Refused(frame, reason));
        let stubborn = |frame, reason| {
            let looks = answers.iter().rev();
            let same = looks.take_while(|&&answer| answer == Answer::Refused(frame, reason));
            same.count() >= RETRIES
        };
        let honest = match error {
            ClaimError::NotMovable(frame) | ClaimError::NotAsked(frame) => {
                let asked = matches!(error, ClaimError::NotMovable(_));
                let unknown = said(frame, MigrateError::NotMovable);
                asked != deaf && (unknown || stubborn(frame, MigrateError::Gone))
            }
            ClaimError::Pinned(frame) => stubborn(frame, MigrateError::Pinned),
            ClaimError::OutOfMemory(frame) => {
                assert!(range.contains(frame));
                let need = Need {
                    outside: isolated,
                    ..Need::one_movable()
                };
                said(frame, MigrateError::OutOfMemory)
                    || (!self.is_free(frame.number(), frame.number() + 1)
                        && (deaf || !self.possible(&need)))
            }
            ClaimError::Foreign => segment_of(range).is_none() && answers.is_empty(),
            _ => false,
        };
        assert!(honest, "{range:?} refused: {error:?}, after {last:?}");
    }

    pub(super) fn claim(&mut self, range: FrameRange) {
        let (result, answers) = self.with_owner(|buddy, owner| buddy.claim(range, owner));
        let isolated = segment_of(range).map_or(FrameRange::EMPTY, |_| isolated_by(range));
        Self::kept_apart(&answers, range, isolated);
        match result {
            Ok(claimed) => {
                assert_eq!(claimed.range(), range);
                self.took(range, Hand::Claimed);
                self.claims.push(claimed);
            }
            Err(error) => self.refusal_is_honest(error, &answers, range, isolated),
        }
    }

    pub(super) fn unclaim(&mut self, which: usize) {
        if let Some(which) = which.checked_rem(self.claims.len()) {
            let claimed = self.claims.swap_remove(which);
            let range = claimed.range();
            assert_eq!(self.buddy.free_range(claimed), Ok(()));
            assert_eq!(self.returned(range), Hand::Claimed);
        }
    }

    pub(super) fn lend(&mut self, range: FrameRange) {
        let free = !range.is_empty() && self.is_free(range.first().number(), range.end_number());
        match self.buddy.cma_area("lent", range) {
            Ok(area) => {
                assert!(free && !self.is_lent(range) && segment_of(range).is_some());
                assert!(!self.calls.is_deaf(), "a CPU may remember a block");
                assert_eq!(area.range(), range);
                self.areas.push(area);
            }
            Err(PlaceError::Foreign) => assert_eq!(segment_of(range), None, "{range:?}"),
            Err(PlaceError::Busy) => assert!(self.calls.is_deaf()),
            Err(PlaceError::InUse) => assert!(!free || self.is_lent(range), "{range:?} is free"),
            Err(error) => panic!("{range:?}: {error:?}"),
        }
    }

    /// Whether nothing of `range` stands in the way of whoever empties it.
    fn can_be_emptied(&self, range: FrameRange) -> bool {
        range.iter().map(Frame::number).all(|frame| {
            let mood = self.users.mood(frame);
            mood.map_or_else(|| self.is_free(frame, frame + 1), Mood::yields)
        })
    }

    pub(super) fn claim_of_area(&mut self, which: usize, frames: u64, align: Order) {
        let Some(which) = which.checked_rem(self.areas.len()) else {
            return;
        };
        let area = self.areas[which];
        let range = area.range();
        let (result, answers) =
            self.with_owner(|buddy, owner| buddy.cma_claim(&area, frames, align, owner));
        Self::kept_apart(&answers, range, FrameRange::EMPTY);
        match result {
            Ok(claimed) => {
                let got = claimed.range();
                assert!(range.contains_range(got) && got.first().is_aligned(align));
                assert_eq!(got.count(), frames);
                self.took(got, Hand::Claimed);
                self.claims.push(claimed);
            }
            Err(ClaimError::NoRoom) => {
                let mut first = range.first().number().next_multiple_of(align.frames());
                while frames > 0 && first + frames <= range.end_number() {
                    let place = FrameRange::from_numbers(first, first + frames).unwrap();
                    assert!(!self.can_be_emptied(place), "{place:?} of {range:?}");
                    first += align.frames();
                }
            }
            // Want of memory ends the search for a place; what nobody was asked about is told where no place was found.
            Err(error @ (ClaimError::OutOfMemory(frame) | ClaimError::NotAsked(frame))) => {
                // The place that was given up: it holds the frame, wherever it begins.
                let (low, high) = (
                    frame.number() + 1 - frames.min(frame.number()),
                    frame.number() + frames,
                );
                let around = FrameRange::from_numbers(low, high).unwrap();
                let isolated = isolated_by(around.intersection(range));
                if matches!(error, ClaimError::NotAsked(_)) {
                    assert!(self.calls.is_deaf() && range.contains(frame));
                } else {
                    self.refusal_is_honest(error, &answers, range, isolated);
                }
            }
            Err(error) => panic!("{frames} of {range:?}: {error:?}"),
        }
    }

    /// Page blocks that are wholly free.
    fn whole_blocks(&self) -> u64 {
        let starts = (0..END).step_by(BLOCK as usize);
        starts.filter(|&at| self.is_free(at, at + BLOCK)).count() as u64
    }

    pub(super) fn compact(&mut self, blocks: u64) {
        self.plan_is_true();
        let before = self.whole_blocks();
        let (done, answers) = self.with_owner(|buddy, owner| buddy.compact(blocks, owner));
        let after = self.whole_blocks();
        let moved = answers.iter();
        let moved = moved.filter(|answer| matches!(answer, Answer::Moved(..)));
        assert_eq!(done.moved, moved.count() as u64);
        assert!(done.blocks <= blocks, "{done:?} where {blocks} were asked");
        let freed = answers.iter();
        let freed = freed.filter(|answer| matches!(answer, Answer::Freed(_)));
        if self.calls.is_deaf() {
            return;
        }
        assert!(
            after >= before + done.blocks,
            "{done:?}: {before}, then {after}"
        );
        if freed.count() == 0 {
            assert_eq!(after, before + done.blocks, "{done:?}");
        }
    }

    /// The plan names partly free page blocks, what is in their frames, and the cheapest first.
    fn plan_is_true(&mut self) {
        if !self.buddy.drain_all() {
            return;
        }
        let mut plan = [Emptying {
            first: Frame::ZERO,
            moves: 0,
        }; 16];
        let count = self.buddy.plan_blocks(&mut plan);
        let plan = &plan[..count];
        assert!(plan.is_sorted_by_key(|entry| (entry.moves, entry.first)));
        for entry in plan {
            let first = entry.first.number();
            assert_eq!(first % BLOCK, 0);
            let frames = first..first + BLOCK;
            let taken = frames
                .filter(|&frame| !self.is_free(frame, frame + 1))
                .count();
            assert_eq!(taken as u32, entry.moves, "{entry:?}");
            assert!(taken > 0 && taken < BLOCK as usize);
        }
    }
}

fn single(frame: Frame) -> FrameRange {
    FrameRange::of_order(frame, Order::ZERO).unwrap()
}

impl Need {
    /// What a page that moves needs.
    pub(super) fn one_movable() -> Self {
        Self::new(1, 1, Mobility::Movable)
    }
}
