//! The plainest manager that can be: pages in a hash map, copied whole at a fork. What exec and fork stages are tested with.

use super::mm::{
    Access, Backing, FileHandle, FileSpec, MAP_ANONYMOUS, MAP_FIXED, MmUnderTest, PROT_READ,
    PROT_WRITE, VmaSeen, Whose,
};
use crate::input::oracle::{Errno, Perms, Recorded};
use std::collections::{BTreeMap, HashMap};

const PAGE: u64 = 4096;

/// A planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// None.
    None,
    /// A child's stores reach a parent that was copied at the same moment: the copy shares one page.
    SharedPage,
    /// Bytes behind a file's end are not zero.
    DirtyTail,
    /// One page of a file is read one page too low.
    WrongPage(u64),
}

/// One address space.
#[derive(Clone)]
pub struct Flat {
    vmas: BTreeMap<u64, (u64, u32)>,
    pages: HashMap<u64, Vec<u8>>,
    files: Vec<FileSpec>,
    bug: Bug,
    shared: std::rc::Rc<std::cell::RefCell<HashMap<u64, u64>>>,
}

impl Flat {
    /// An empty address space.
    pub fn new(bug: Bug) -> Self {
        Self {
            vmas: BTreeMap::new(),
            pages: HashMap::new(),
            files: Vec::new(),
            bug,
            shared: std::rc::Rc::default(),
        }
    }

    fn check(&self, addr: u64, prot: u32) -> Result<(), Access> {
        match self.vmas.range(..=addr).next_back() {
            Some((_, (end, have))) if addr < *end => {
                if have & prot == 0 {
                    Err(Access::AccErr)
                } else {
                    Ok(())
                }
            }
            _ => Err(Access::MapErr),
        }
    }
}

impl MmUnderTest for Flat {
    fn open(&mut self, file: &FileSpec) -> Result<FileHandle, Errno> {
        self.files.push(file.clone());
        Ok(FileHandle(self.files.len() as u32 - 1))
    }

    fn mmap(
        &mut self,
        addr: u64,
        len: u64,
        prot: u32,
        flags: u32,
        backing: Backing,
        offset: u64,
    ) -> Recorded {
        assert_ne!(flags & MAP_FIXED, 0, "only fixed places");
        let pages = len.div_ceil(PAGE);
        self.vmas.insert(addr, (addr + pages * PAGE, prot));
        for i in 0..pages {
            let mut page = vec![0; PAGE as usize];
            if let (Backing::File(f), 0) = (backing, flags & MAP_ANONYMOUS) {
                let index = offset / PAGE + i;
                let wrong = self.bug == Bug::WrongPage(index);
                let file = &self.files[f.0 as usize];
                file.content.fill(index - u64::from(wrong), &mut page);
            }
            if self.bug == Bug::DirtyTail && page.last() == Some(&0) {
                page[PAGE as usize - 1] = 1;
            }
            self.pages.insert(addr / PAGE + i, page);
        }
        Ok(addr)
    }

    fn munmap(&mut self, addr: u64, _: u64) -> Result<(), Errno> {
        self.vmas.remove(&addr);
        Ok(())
    }

    fn mprotect(&mut self, _: u64, _: u64, _: u32) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }

    fn mremap(&mut self, _: u64, _: u64, _: u64, _: u32, _: u64) -> Recorded {
        Err(Errno::ENOSYS)
    }

    fn madvise(&mut self, _: u64, _: u64, _: u32) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }

    fn set_break(&mut self, _: u64) {}

    fn brk(&mut self, addr: u64) -> u64 {
        addr
    }

    fn special(&mut self, _: &str, start: u64, end: u64, perms: Perms) -> Result<(), Errno> {
        self.mmap(
            start,
            end - start,
            perms.prot,
            MAP_FIXED | MAP_ANONYMOUS,
            Backing::None,
            0,
        )
        .map(drop)
    }

    fn load(&mut self, addr: u64) -> Result<u64, Access> {
        self.check(addr, PROT_READ)?;
        if let (Bug::SharedPage, Some(v)) = (self.bug, self.shared.borrow().get(&addr)) {
            return Ok(*v);
        }
        let at = (addr % PAGE) as usize;
        Ok(u64::from_le_bytes(
            self.pages[&(addr / PAGE)][at..at + 8].try_into().unwrap(),
        ))
    }

    fn store(&mut self, addr: u64, value: u64) -> Result<(), Access> {
        self.check(addr, PROT_WRITE)?;
        if self.bug == Bug::SharedPage && addr / PAGE % 7 == 3 {
            self.shared.borrow_mut().insert(addr, value);
        }
        let at = (addr % PAGE) as usize;
        self.pages.get_mut(&(addr / PAGE)).unwrap()[at..at + 8]
            .copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn fork(&mut self) -> Result<Self, Errno> {
        Ok(self.clone())
    }

    fn list(&mut self, each: &mut dyn FnMut(VmaSeen)) {
        for (start, (end, prot)) in &self.vmas {
            let perms = Perms {
                prot: *prot,
                shared: false,
            };
            each(VmaSeen {
                start: *start,
                end: *end,
                perms,
                offset: 0,
                whose: Whose::Anonymous,
            });
        }
    }
}
