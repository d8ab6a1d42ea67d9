//! The model: every process's pages, every shared word, every file and every pin.

use std::collections::BTreeMap;

use super::{
    FILE_PAGES, FILES, PINS, PROCESSES, ProcessOp, WINDOW, first_word, pinned_word, span, stored,
    written,
};

/// What an access or call comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// The word read.
    Value(u64),
    /// `SIGSEGV`, nothing mapped.
    NotMapped,
    /// `SIGSEGV`, not allowed.
    NotAllowed,
    /// `SIGBUS`: beyond the end of the file.
    BusError,
    /// `ENOMEM`: a hole in the range, or a page in it that cannot be brought in.
    Hole,
    /// `EFAULT`: nothing to move.
    NothingThere,
    /// `EINVAL`.
    Invalid,
    /// `EACCES`.
    Denied,
    /// `EOPNOTSUPP`.
    Unsupported,
    /// Not one byte: beyond the end of the file.
    End,
    /// A step that does not apply: nothing is called.
    Skipped,
}

/// A page of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PageModel {
    rights: u8,
    content: Content,
    locked: bool,
    /// The pin that sees this page, if it is the process's own.
    pin: Option<usize>,
}

/// What many may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Object {
    Memory(usize, u8),
    File(usize, u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Private(u64),
    Shared(Object),
    /// A private page of a file, and its copy once there is one.
    FilePrivate(usize, u8, Option<u64>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sees {
    /// A page of the process's own, and what it was last.
    Own(u64),
    Object(Object),
}

#[derive(Clone, Copy, Debug)]
struct Pin {
    process: usize,
    write: bool,
    sees: Sees,
}

type Table = [Option<PageModel>; WINDOW as usize];

/// The model: every process's pages and every shared word.
#[derive(Clone, Debug)]
pub struct Processes {
    tables: Vec<Option<Table>>,
    shared: BTreeMap<(usize, u8), u64>,
    files: [Vec<u64>; FILES],
    pins: [Option<Pin>; PINS],
    objects: usize,
}

impl Processes {
    /// One process without mappings, and files of [`FILE_PAGES`] pages.
    #[must_use]
    pub fn new() -> Self {
        let mut tables = vec![None; PROCESSES];
        tables[0] = Some([None; WINDOW as usize]);
        Self {
            tables,
            shared: BTreeMap::new(),
            files: core::array::from_fn(|file| {
                (0..FILE_PAGES)
                    .map(|index| first_word(file, index))
                    .collect()
            }),
            pins: [None; PINS],
            objects: 0,
        }
    }

    /// The process that a step means: the number wraps, and dead ones stand for the next living one.
    #[must_use]
    pub fn living(&self, process: u8) -> usize {
        let start = usize::from(process) % PROCESSES;
        (0..PROCESSES)
            .map(|i| (start + i) % PROCESSES)
            .find(|&i| self.tables[i].is_some())
            .unwrap_or(0)
    }

    /// Where a child would go; `None` where there is no room.
    #[must_use]
    pub fn vacancy(&self) -> Option<usize> {
        self.tables.iter().position(Option::is_none)
    }

    /// The processes that live.
    pub fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        (0..PROCESSES).filter(|&i| self.tables[i].is_some())
    }

    /// Where the next pin would be; `None` where there is no room.
    #[must_use]
    pub fn vacant_pin(&self) -> Option<usize> {
        self.pins.iter().position(Option::is_none)
    }

    /// The word that a pin sees.
    #[must_use]
    pub fn pinned(&self, pin: usize) -> Option<u64> {
        self.pins[pin].map(|pin| match pin.sees {
            Sees::Own(word) => word,
            Sees::Object(object) => self.object(object).unwrap_or(0),
        })
    }

    /// The pins that end with a process.
    pub fn pins_of(&self, process: usize) -> impl Iterator<Item = usize> + '_ {
        (0..PINS).filter(move |&pin| self.pins[pin].is_some_and(|pin| pin.process == process))
    }

    /// The pins of shared memory and files, which must end before their pages are taken away.
    pub fn pins_of_objects(&self) -> impl Iterator<Item = usize> + '_ {
        let seen = |pin: &Pin| matches!(pin.sees, Sees::Object(_));
        (0..PINS).filter(move |&pin| self.pins[pin].as_ref().is_some_and(seen))
    }

    /// A pin ends.
    pub fn unpin(&mut self, pin: usize) {
        self.pins[pin] = None;
        for page in self.tables.iter_mut().flatten().flatten().flatten() {
            page.pin = page.pin.filter(|&seen| seen != pin);
        }
    }

    /// The words that the disk has after a step that synced: file, page, word. Those that somebody may be writing to through a pin
    /// are left out.
    #[must_use]
    pub fn synced(&self, living: usize, op: ProcessOp) -> Vec<(usize, u8, u64)> {
        let pinned = |object| {
            let seen = |pin: &Pin| pin.sees == Sees::Object(object);
            self.pins.iter().flatten().any(seen)
        };
        let found: Vec<_> = match op {
            ProcessOp::SyncFile { file } => {
                let file = usize::from(file) % FILES;
                (0..FILE_PAGES).map(|index| (file, index)).collect()
            }
            ProcessOp::Sync { page, pages, .. } => {
                let (first, last) = span(page, pages);
                let table = self.tables[living].as_ref();
                let pages = table.into_iter().flat_map(|table| &table[first..last]);
                pages
                    .flatten()
                    .filter_map(|page| match page.content {
                        Content::Shared(Object::File(file, index)) => Some((file, index)),
                        _ => None,
                    })
                    .collect()
            }
            _ => Vec::new(),
        };
        found
            .into_iter()
            .filter(|&(file, index)| !pinned(Object::File(file, index)))
            .filter_map(|(file, index)| {
                Some((file, index, self.object(Object::File(file, index))?))
            })
            .collect()
    }

    /// The word of a page: its value, or why it cannot be read.
    #[must_use]
    pub fn load(&self, process: usize, page: u8) -> Answer {
        match self.tables[process]
            .as_ref()
            .and_then(|table| table[usize::from(page % WINDOW)])
        {
            None => Answer::NotMapped,
            Some(PageModel { rights: 0, .. }) => Answer::NotAllowed,
            Some(page) => self
                .value(page.content)
                .map_or(Answer::BusError, Answer::Value),
        }
    }

    /// `None` beyond the end.
    fn value(&self, content: Content) -> Option<u64> {
        match content {
            Content::Private(value) | Content::FilePrivate(_, _, Some(value)) => Some(value),
            Content::Shared(object) => self.object(object),
            Content::FilePrivate(file, index, None) => self.object(Object::File(file, index)),
        }
    }

    fn object(&self, object: Object) -> Option<u64> {
        match object {
            Object::Memory(number, index) => {
                Some(self.shared.get(&(number, index)).copied().unwrap_or(0))
            }
            Object::File(file, index) => self.files[file].get(usize::from(index)).copied(),
        }
    }

    fn set_object(&mut self, object: Object, word: u64) {
        match object {
            Object::Memory(number, index) => {
                self.shared.insert((number, index), word);
            }
            Object::File(file, index) => {
                if let Some(place) = self.files[file].get_mut(usize::from(index)) {
                    *place = word;
                }
            }
        }
    }

    /// Applies a step that is not a fork or an exit to process `living`; says what Linux answers.
    ///
    /// # Panics
    ///
    /// Where `living` does not live, or the step is a fork or an exit.
    pub fn apply(&mut self, living: usize, op: ProcessOp) -> Answer {
        match op {
            ProcessOp::Store { page, value, .. } => {
                self.store(living, usize::from(page % WINDOW), stored(page, value))
            }
            ProcessOp::Load { page, .. } => self.load(living, page),
            ProcessOp::Remove { page, pages, .. } => self.remove(living, span(page, pages)),
            ProcessOp::Lock { page, pages, .. } => self.lock(living, span(page, pages)),
            ProcessOp::Pin { page, write, .. } => {
                self.pin(living, usize::from(page % WINDOW), write)
            }
            ProcessOp::Truncate { file, pages } => {
                let size = usize::from(pages % (FILE_PAGES + 1));
                self.truncate(usize::from(file) % FILES, size)
            }
            ProcessOp::WriteFile { file, index, value } => {
                let index = index % FILE_PAGES;
                let object = Object::File(usize::from(file) % FILES, index);
                if self.object(object).is_none() {
                    return Answer::End;
                }
                self.set_object(object, written(index, value));
                Answer::Done
            }
            ProcessOp::ReadFile { file, index } => {
                let object = Object::File(usize::from(file) % FILES, index % FILE_PAGES);
                self.object(object).map_or(Answer::End, Answer::Value)
            }
            ProcessOp::PinWrite { pin, value } => self.pin_write(pin, value),
            ProcessOp::PinRead { pin } => self
                .pinned(usize::from(pin) % PINS)
                .map_or(Answer::Skipped, Answer::Value),
            ProcessOp::SyncFile { .. } | ProcessOp::Migrate { .. } => Answer::Done,
            ProcessOp::Fork { .. }
            | ProcessOp::Exit { .. }
            | ProcessOp::Reclaim { .. }
            | ProcessOp::Unpin { .. }
            | ProcessOp::DiskError { .. } => {
                unreachable!("not a step of one process")
            }
            _ => self.change(living, op),
        }
    }

    /// Steps that change one process's mappings and nothing else.
    fn change(&mut self, living: usize, op: ProcessOp) -> Answer {
        self.objects += usize::from(matches!(op, ProcessOp::Map { shared: true, .. }));
        let object = self.objects;
        let table = self.tables[living].as_mut().expect("a living process");
        let map = |slots: &mut [Option<PageModel>], rights, content: &dyn Fn(u8) -> Content| {
            for (index, slot) in (0u8..).zip(slots) {
                *slot = Some(PageModel {
                    rights: rights & 3,
                    content: content(index),
                    locked: false,
                    pin: None,
                });
            }
            Answer::Done
        };
        match op {
            ProcessOp::Map {
                page,
                pages,
                rights,
                shared,
                ..
            } => {
                let (first, last) = span(page, pages);
                map(&mut table[first..last], rights, &|index| match shared {
                    true => Content::Shared(Object::Memory(object, index)),
                    false => Content::Private(0),
                })
            }
            ProcessOp::MapFile {
                page,
                pages,
                rights,
                shared,
                file,
                index,
                ..
            } => {
                let (first, last) = span(page, pages);
                let (file, from) = (usize::from(file) % FILES, index % FILE_PAGES);
                map(&mut table[first..last], rights, &|index| match shared {
                    true => Content::Shared(Object::File(file, from + index)),
                    false => Content::FilePrivate(file, from + index, None),
                })
            }
            ProcessOp::Unmap { page, pages, .. } => {
                let (first, last) = span(page, pages);
                table[first..last].fill(None);
                Answer::Done
            }
            ProcessOp::Protect {
                page,
                pages,
                rights,
                ..
            } => each(table, span(page, pages), |page| page.rights = rights & 3),
            ProcessOp::Unlock { page, pages, .. } => {
                each(table, span(page, pages), |page| page.locked = false)
            }
            ProcessOp::Sync { page, pages, .. } => {
                let (first, last) = span(page, pages);
                match table[first..last].iter().all(Option::is_some) {
                    true => Answer::Done,
                    false => Answer::Hole,
                }
            }
            ProcessOp::DontNeed { page, pages, .. } => {
                let (first, last) = span(page, pages);
                let mut answer = Answer::Done;
                for slot in &mut table[first..last] {
                    let Some(page) = slot else {
                        answer = Answer::Hole;
                        continue;
                    };
                    if page.locked {
                        return Answer::Invalid;
                    }
                    match &mut page.content {
                        Content::Private(word) => *word = 0,
                        Content::FilePrivate(_, _, copy) => *copy = None,
                        Content::Shared(_) => {}
                    }
                    page.pin = None;
                }
                answer
            }
            ProcessOp::Move {
                page, pages, to, ..
            } => {
                let (first, last) = span(page, pages);
                let (to, end) = span(to, (last - first) as u8);
                if end - to != last - first || to < last && first < end {
                    return Answer::Invalid;
                }
                if table[first].is_none() {
                    return Answer::NothingThere;
                }
                // Holes do not move: what is mapped at their place stays.
                for offset in 0..last - first {
                    if let Some(moved) = table[first + offset].take() {
                        table[to + offset] = Some(moved);
                    }
                }
                Answer::Done
            }
            _ => unreachable!("`apply` does the others"),
        }
    }

    fn page(&mut self, process: usize, page: usize) -> Option<&mut PageModel> {
        self.tables[process].as_mut()?[page].as_mut()
    }

    fn store(&mut self, living: usize, page: usize, word: u64) -> Answer {
        let Some(found) = self.page(living, page).copied() else {
            return Answer::NotMapped;
        };
        if found.rights & 2 == 0 {
            return Answer::NotAllowed;
        }
        if self.value(found.content).is_none() {
            return Answer::BusError;
        }
        match found.content {
            Content::Shared(object) => self.set_object(object, word),
            Content::Private(_) | Content::FilePrivate(..) => {
                self.set_own(living, page, word);
                if let Some(pin) = found.pin.and_then(|pin| self.pins[pin].as_mut()) {
                    pin.sees = Sees::Own(word);
                }
            }
        }
        Answer::Done
    }

    /// Writes a page of a process's own.
    fn set_own(&mut self, process: usize, page: usize, word: u64) {
        if let Some(found) = self.page(process, page) {
            match &mut found.content {
                Content::Private(own) => *own = word,
                Content::FilePrivate(_, _, copy) => *copy = Some(word),
                Content::Shared(_) => {}
            }
        }
    }

    fn remove(&mut self, living: usize, (first, last): (usize, usize)) -> Answer {
        let mut answer = Answer::Done;
        for page in first..last {
            match self.page(living, page).copied() {
                None => answer = Answer::Hole,
                Some(PageModel { locked: true, .. }) => return Answer::Invalid,
                Some(page) => match page.content {
                    Content::Private(_) => return Answer::Invalid,
                    Content::FilePrivate(..) => return Answer::Denied,
                    Content::Shared(Object::File(..)) => return Answer::Unsupported,
                    Content::Shared(object) => self.set_object(object, 0),
                },
            }
        }
        answer
    }

    fn lock(&mut self, living: usize, (first, last): (usize, usize)) -> Answer {
        let table = self.tables[living].as_mut().expect("a living process");
        let copies = |page: &PageModel| matches!(page.content, Content::FilePrivate(..));
        if table[first..last].iter().flatten().any(copies) {
            // When a copy is made would depend on what is in memory.
            return Answer::Skipped;
        }
        let answer = each(table, (first, last), |page| page.locked = true);
        if answer != Answer::Done {
            return answer;
        }
        let readable = |page: usize| matches!(self.load(living, page as u8), Answer::Value(_));
        match (first..last).all(readable) {
            true => Answer::Done,
            false => Answer::Hole,
        }
    }

    fn pin(&mut self, living: usize, page: usize, write: bool) -> Answer {
        let Some(place) = self.vacant_pin() else {
            return Answer::Skipped;
        };
        let Some(found) = self.page(living, page).copied() else {
            return Answer::NotMapped;
        };
        if found.pin.is_some() {
            return Answer::Skipped;
        }
        if found.rights == 0 || write && found.rights & 2 == 0 {
            return Answer::NotAllowed;
        }
        let Some(word) = self.value(found.content) else {
            return Answer::BusError;
        };
        let sees = match found.content {
            Content::Shared(object) => Sees::Object(object),
            Content::Private(_) | Content::FilePrivate(..) => {
                // From now on it is the process's own, if it was not.
                self.set_own(living, page, word);
                if let Some(found) = self.page(living, page) {
                    found.pin = Some(place);
                }
                Sees::Own(word)
            }
        };
        self.pins[place] = Some(Pin {
            process: living,
            write,
            sees,
        });
        Answer::Done
    }

    fn pin_write(&mut self, pin: u8, value: u8) -> Answer {
        let number = usize::from(pin) % PINS;
        let Some(found) = self.pins[number].filter(|pin| pin.write) else {
            return Answer::Skipped;
        };
        let word = pinned_word(pin, value);
        if let Sees::Object(object) = found.sees {
            self.set_object(object, word);
            return Answer::Done;
        }
        self.pins[number] = Some(Pin {
            sees: Sees::Own(word),
            ..found
        });
        let table = self.tables[found.process].as_ref();
        let seen = |page: &Option<PageModel>| page.is_some_and(|page| page.pin == Some(number));
        if let Some(page) = table.and_then(|table| table.iter().position(seen)) {
            self.set_own(found.process, page, word);
        }
        Answer::Done
    }

    fn truncate(&mut self, file: usize, size: usize) -> Answer {
        self.files[file].resize(size, 0);
        for page in self.tables.iter_mut().flatten().flatten().flatten() {
            match &mut page.content {
                Content::FilePrivate(of, index, copy)
                    if *of == file && usize::from(*index) >= size =>
                {
                    // Copies go too.
                    *copy = None;
                    page.pin = None;
                }
                _ => {}
            }
        }
        Answer::Done
    }

    /// Process `child` becomes a copy of process `parent`. Pins stay the parent's.
    pub fn fork(&mut self, parent: usize, child: usize) {
        self.tables[child] = self.tables[parent];
        for page in self.tables[child].iter_mut().flatten().flatten() {
            page.locked = false;
            page.pin = None;
        }
    }

    /// Process `process` ends, and its pins have.
    pub fn exit(&mut self, process: usize) {
        self.tables[process] = None;
    }
}

impl Default for Processes {
    fn default() -> Self {
        Self::new()
    }
}

/// Changes each page of a range up to the first hole.
fn each(
    table: &mut Table,
    (first, last): (usize, usize),
    mut change: impl FnMut(&mut PageModel),
) -> Answer {
    for slot in &mut table[first..last] {
        match slot {
            Some(page) => change(page),
            None => return Answer::Hole,
        }
    }
    Answer::Done
}
