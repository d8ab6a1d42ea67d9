//! Users' pages, which may be moved, and their owner, who moves them, or refuses as each page's mood says.
//!
//! The owner notes all that it answers. The world replays the notes on its model: what was moved, what came free, and whether an error
//! that names a frame is what the owner said of that frame.
#![allow(dead_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;

use kmem_buddy::{ClaimError, PlaceError};
use kmem_hal::{Frame, FrameRange, FrameSink, Migrate, MigrateError, Order, OwnedFrame, PhysMap};

use super::NoOwner;
use super::window::Window;
use super::world::Kernel;

/// What a page does when it is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It moves.
    Willing,
    /// It is pinned once more, and then moves.
    PinnedOnce,
    /// It is pinned for good.
    Pinned,
    /// Its owner does not know how to move it.
    Unmovable,
    /// It is freed at that moment.
    Vanishing,
    /// Its owner says that it was freed, which is not so.
    Lying,
    /// The owner has no memory for what a move takes.
    Starving,
    /// Its owner meddles with the range that is being emptied, and then moves it.
    Meddling,
}

impl Mood {
    /// A page's mood by number; half of them are willing.
    pub fn of(number: u8) -> Self {
        match number % 14 {
            0 => Self::PinnedOnce,
            1 => Self::Pinned,
            2 => Self::Unmovable,
            3 => Self::Vanishing,
            4 => Self::Lying,
            5 => Self::Starving,
            6 => Self::Meddling,
            _ => Self::Willing,
        }
    }

    /// Whether whoever asks often enough gets the frame.
    pub fn yields(self) -> bool {
        matches!(
            self,
            Self::Willing | Self::PinnedOnce | Self::Vanishing | Self::Meddling
        )
    }
}

/// A page: the frame it is in, what stands there, its mood.
#[derive(Debug)]
struct Page {
    frame: OwnedFrame,
    id: u64,
    mood: Mood,
}

/// What the owner did when it was asked about a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The page is there now.
    Moved(Frame, Frame),
    /// The page is no more.
    Freed(Frame),
    /// Nothing changed.
    Refused(Frame, MigrateError),
}

/// All pages, by frame.
#[derive(Debug)]
pub struct Users<'a> {
    window: &'a Window,
    pages: BTreeMap<u64, Page>,
    next_id: u64,
}

impl<'a> Users<'a> {
    pub fn new(window: &'a Window) -> Self {
        Self {
            window,
            pages: BTreeMap::new(),
            next_id: 1,
        }
    }

    /// The words of a frame in which its page's id stands.
    fn words(&self, frame: Frame) -> [*mut u64; 2] {
        let first = self.window.to_ptr(frame.start()).cast::<u64>();
        [first, first.wrapping_add(511)]
    }

    fn stored(&self, frame: Frame) -> [u64; 2] {
        // SAFETY: the window backs all frames, and nothing else runs.
        self.words(frame).map(|word| unsafe { word.read() })
    }

    fn store(&self, frame: Frame, words: [u64; 2]) {
        for (word, value) in self.words(frame).into_iter().zip(words) {
            // SAFETY: as above; the frame is a page of this owner's.
            unsafe { word.write(value) };
        }
    }

    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// The frame of page number `which`, modulo their number.
    pub fn nth(&self, which: usize) -> Option<u64> {
        let which = which.checked_rem(self.pages.len())?;
        self.pages.keys().nth(which).copied()
    }

    /// A new page; its id.
    pub fn add(&mut self, frame: OwnedFrame) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.store(frame.first(), [id, !id]);
        let (number, mood) = (frame.first().number(), Mood::Willing);
        self.pages.insert(number, Page { frame, id, mood });
        id
    }

    pub fn set_mood(&mut self, frame: u64, mood: Mood) {
        self.pages.get_mut(&frame).unwrap().mood = mood;
    }

    /// The mood of the page in a frame, if one is there.
    pub fn mood(&self, frame: u64) -> Option<Mood> {
        self.pages.get(&frame).map(|page| page.mood)
    }

    /// Takes a page away, with all that stood in it.
    pub fn remove(&mut self, frame: u64) -> OwnedFrame {
        let page = self.pages.remove(&frame).unwrap();
        self.check(page.frame.first(), page.id);
        page.frame
    }

    /// The page is in this frame, and so are its contents.
    pub fn check(&self, frame: Frame, id: u64) {
        assert_eq!(self.stored(frame), [id, !id], "page {id} in {frame:?}");
    }
}

/// The owner whom one call asks.
pub struct Owner<'o, 'a> {
    users: RefCell<&'o mut Users<'a>>,
    kernel: &'o Kernel<'a>,
    answers: RefCell<Vec<Answer>>,
}

impl<'o, 'a> Owner<'o, 'a> {
    pub fn new(users: &'o mut Users<'a>, kernel: &'o Kernel<'a>) -> Self {
        Self {
            users: RefCell::new(users),
            kernel,
            answers: RefCell::default(),
        }
    }

    /// All answers, in order.
    pub fn into_answers(self) -> Vec<Answer> {
        self.answers.into_inner()
    }

    fn note(&self, answer: Answer) {
        self.answers.borrow_mut().push(answer);
    }

    /// Asks for a frame that is just being emptied: nobody but the claim may have it.
    fn meddle(&self, frame: Frame) {
        let range = FrameRange::of_order(frame, Order::ZERO).unwrap();
        assert_eq!(self.kernel.claim(range, &NoOwner), Err(ClaimError::Busy));
        let refusal = self.kernel.alloc_at(frame, Order::ZERO).unwrap_err();
        assert!(matches!(refusal, PlaceError::InUse | PlaceError::InUseHere));
    }

    fn refuse<T>(
        &self,
        from: Frame,
        to: T,
        reason: MigrateError,
    ) -> Result<OwnedFrame, (MigrateError, T)> {
        self.note(Answer::Refused(from, reason));
        Err((reason, to))
    }
}

impl Migrate for Owner<'_, '_> {
    fn migrate(
        &self,
        from: Frame,
        to: OwnedFrame,
    ) -> Result<OwnedFrame, (MigrateError, OwnedFrame)> {
        let number = from.number();
        let mood = self.users.borrow().mood(number);
        match mood {
            None | Some(Mood::Unmovable) => {
                return self.refuse(from, to, MigrateError::NotMovable);
            }
            Some(Mood::Pinned) => return self.refuse(from, to, MigrateError::Pinned),
            Some(Mood::PinnedOnce) => {
                self.users.borrow_mut().set_mood(number, Mood::Willing);
                return self.refuse(from, to, MigrateError::Pinned);
            }
            Some(Mood::Lying) => return self.refuse(from, to, MigrateError::Gone),
            Some(Mood::Starving) => return self.refuse(from, to, MigrateError::OutOfMemory),
            Some(Mood::Vanishing) => {
                let frame = self.users.borrow_mut().remove(number);
                self.note(Answer::Freed(from));
                self.kernel.free(frame);
                return Err((MigrateError::Gone, to));
            }
            Some(Mood::Meddling) => self.meddle(from),
            Some(Mood::Willing) => {}
        }
        let mut users = self.users.borrow_mut();
        let mut page = users.pages.remove(&number).unwrap();
        let contents = users.stored(from);
        users.store(to.first(), contents);
        self.note(Answer::Moved(from, to.first()));
        let (place, id) = (to.first(), page.id);
        let old = std::mem::replace(&mut page.frame, to);
        users.check(place, id);
        users.pages.insert(place.number(), page);
        Ok(old)
    }
}
