//! A process of the mock machine: one address space of cow-mm, entered through the MMU of one virtual CPU.
//!
//! ```text
//!   load, store ──> virtual CPU at user level ── page fault ──> AddressSpace::fault ──> again
//!   mmap, fork, .. ───────────────────────────────────────────> AddressSpace
//! ```
//!
//! Invariants
//! - I1: a call or access runs on the process's CPU, with its root loaded.
//! - I2: a space ends only when no CPU has its root loaded any more: the kernel's own root is put in its place.
//! - I3: an access that faults more than [`TRIES`] times in a row is reported, never repeated for ever.
//! - I4: files are closed when the last process of a run is gone, so that a run leaves no page in a cache.

use super::World;
use super::provider::HostFile;
use super::types::{Mach, Space};
use crate::elf::Image;
use crate::input::oracle::{Errno, Perms, Recorded};
use crate::replay::mm::{
    Access, Backing, Content, FileHandle, FileSpec, MAP_ANONYMOUS, MAP_FIXED, MAP_GROWSDOWN,
    MAP_PRIVATE, MmUnderTest, VmaSeen, Whose,
};
use kmem_cow_mm::{
    Advice, ExecError, FileRef, Layout, MapFlags, MapRequest, OpenFile, Outcome, Prot, RemapFlags,
    Signal, Start, VmFlags,
};
use kmem_hal::{FaultCode, Mmu, PAGE_SIZE, PageFault, VirtAddr};
use kmem_mock_x86::{Fault, VirtualCpu};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

/// How often one access may fault: a page, its tables and a copy make three at most; stale translations add some.
pub const TRIES: usize = 64;

/// What processes of a run did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Faults that were handled.
    pub faults: u64,
    /// Loads and stores that went through.
    pub accesses: u64,
    /// Calls.
    pub calls: u64,
    /// Processes that were forked.
    pub forks: u64,
}

/// What all processes of a run share.
struct Run {
    world: &'static World,
    open: Vec<OpenFile>,
    by_inode: HashMap<u64, FileRef>,
    specials: Vec<FileRef>,
    counts: Counts,
}

impl Drop for Run {
    fn drop(&mut self) {
        for file in self
            .open
            .iter()
            .map(|o| o.file)
            .chain(self.specials.drain(..))
        {
            self.world.mm().close(file);
        }
    }
}

/// A process.
pub struct Process {
    world: &'static World,
    space: Option<Space>,
    cpu: usize,
    run: Rc<RefCell<Run>>,
}

impl Process {
    /// Makes the first process of a run, on CPU 0, with an empty user half.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(world: &'static World) -> Result<Self, Errno> {
        let space = Space::new(world.mm(), Layout::x86_64()).map_err(errno)?;
        let run = Run {
            world,
            open: Vec::new(),
            by_inode: HashMap::new(),
            specials: Vec::new(),
            counts: Counts::default(),
        };
        Ok(Self {
            world,
            space: Some(space),
            cpu: 0,
            run: Rc::new(RefCell::new(run)),
        })
    }

    /// The address space.
    pub fn space(&self) -> &Space {
        match &self.space {
            Some(space) => space,
            None => unreachable!("a process has its space until it is dropped"),
        }
    }

    /// What the processes of this run did so far.
    pub fn counts(&self) -> Counts {
        self.run.borrow().counts
    }

    /// Runs `f` on the process's CPU with its root loaded (I1).
    fn enter<R>(&self, f: impl FnOnce(&Space, VirtualCpu<'static>) -> R) -> R {
        let machine: Mach = self.world.machine();
        machine.on_cpu(self.cpu, || {
            let root = self.space().root();
            if machine.loaded_root(self.cpu).frame != root.frame {
                // SAFETY: only user accesses of this process are made through the root, and it stays loaded until
                // `drop` or another process puts its own in its place (I2).
                unsafe { machine.load_root(root, false) };
            }
            f(self.space(), machine.cpu(self.cpu).user())
        })
    }

    fn call<R>(&self, f: impl FnOnce(&Space) -> R) -> R {
        self.run.borrow_mut().counts.calls += 1;
        self.enter(|space, _| f(space))
    }

    /// Makes an access until it goes through or ends in a signal.
    fn access<R>(
        &self,
        mut make: impl FnMut(VirtualCpu<'static>) -> Result<R, Fault>,
    ) -> Result<R, Access> {
        let mut faults = 0;
        let result = self.enter(|space, cpu| {
            for _ in 0..TRIES {
                let (address, code) = match make(cpu) {
                    Ok(value) => return Ok(value),
                    Err(Fault::Page { address, code }) => (address, code),
                    Err(_) => return Err(Access::MapErr),
                };
                let fault = PageFault {
                    address: VirtAddr::new(address),
                    code: FaultCode::from_bits_retain(code),
                };
                match space.fault(&fault) {
                    Outcome::Handled | Outcome::NeedIo(_) => faults += 1,
                    Outcome::Signal {
                        signal: Signal::MapError,
                        ..
                    }
                    | Outcome::KernelFault => return Err(Access::MapErr),
                    Outcome::Signal {
                        signal: Signal::AccessError | Signal::KeyError(_),
                        ..
                    } => return Err(Access::AccErr),
                    Outcome::Signal {
                        signal: Signal::BusError,
                        ..
                    } => return Err(Access::Bus),
                    Outcome::OutOfMemory => return Err(Access::NoMemory),
                }
            }
            Err(Access::Endless)
        });
        let counts = &mut self.run.borrow_mut().counts;
        counts.faults += faults;
        counts.accesses += u64::from(result.is_ok());
        result
    }

    /// Executes a program: its segments are mapped from its file, and its stack is made.
    ///
    /// # Errors
    /// Why it cannot be executed, in words.
    pub fn exec(&mut self, image: &Image, arguments: &[&str]) -> Result<Start, String> {
        let spec = FileSpec {
            name: image.name.clone(),
            inode: 0,
            writable: false,
            pages: (image.bytes.len() as u64).div_ceil(PAGE_SIZE),
            content: Content::Bytes(image.bytes.clone().into()),
        };
        let handle = self.open(&spec).map_err(|e| e.to_string())?;
        let file = self.run.borrow().open[handle.0 as usize];
        let arguments: Vec<&[u8]> = arguments.iter().map(|a| a.as_bytes()).collect();
        let what = kmem_cow_mm::Image {
            arguments: &arguments,
            environment: &[b"HOME=/", b"TERM=linux"],
            random: *b"sixteen bytes ok",
            ..kmem_cow_mm::Image::new(file, image.name.as_bytes())
        };
        for _ in 0..TRIES {
            match self.call(|space| space.exec(&what)) {
                Err(ExecError::NeedIo(_)) => {}
                other => return other.map_err(|e| e.to_string()),
            }
        }
        Err("the headers are never read".into())
    }

    /// Pages that the caches of this run's files hold.
    pub fn cached_pages(&self) -> u64 {
        let run = self.run.borrow();
        let files = run.by_inode.values().chain(&run.specials);
        files.map(|f| self.world.mm().cached_pages(*f)).sum()
    }

    fn host_file(&self, spec: &FileSpec) -> Result<FileRef, Errno> {
        let file = HostFile::new(self.world.machine(), spec.content.clone(), spec.pages);
        // The manager keeps references to a provider and its name until the last mapping ends, which no lifetime here can
        // express: both stay for the life of the program.
        let file: &'static HostFile = Box::leak(Box::new(file));
        let name: &'static str = spec.name.clone().leak();
        self.world
            .mm()
            .open_file(file, name, spec.inode + 1)
            .map_err(errno)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let machine = self.world.machine();
        let root = self.space().root();
        for cpu in 0..machine.cpu_count() {
            if machine.loaded_root(cpu).frame == root.frame {
                // SAFETY: the kernel's tables live as long as the machine and map all of its memory.
                machine.on_cpu(cpu, || unsafe {
                    machine.load_root(self.world.kernel_root(), false)
                });
            }
        }
        machine.on_cpu(self.cpu, || drop(self.space.take()));
    }
}

/// Linux's errno of an error of cow-mm.
pub fn errno(e: kmem_cow_mm::Errno) -> Errno {
    Errno::from_number(e as i32).unwrap_or(Errno::EIO)
}

impl MmUnderTest for Process {
    fn open(&mut self, spec: &FileSpec) -> Result<FileHandle, Errno> {
        let known = self.run.borrow().by_inode.get(&spec.inode).copied();
        let file = match known {
            Some(file) => self.world.mm().reopen(file),
            None => self.host_file(spec)?,
        };
        let mut run = self.run.borrow_mut();
        run.by_inode.entry(spec.inode).or_insert(file);
        run.open.push(OpenFile {
            file,
            readable: true,
            writable: spec.writable,
        });
        Ok(FileHandle(run.open.len() as u32 - 1))
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
        let file = match backing {
            Backing::File(handle) => self.run.borrow().open.get(handle.0 as usize).copied(),
            Backing::None | Backing::BadDescriptor => None,
        };
        let request = MapRequest {
            address: addr,
            length: len,
            prot: Prot::from_bits_retain(prot),
            flags: MapFlags::from_bits_retain(flags),
            file,
            offset,
        };
        self.call(|space| space.mmap(&request))
            .map(|at| at.as_u64())
            .map_err(errno)
    }

    fn munmap(&mut self, addr: u64, len: u64) -> Result<(), Errno> {
        self.call(|space| space.munmap(addr, len)).map_err(errno)
    }

    fn mprotect(&mut self, addr: u64, len: u64, prot: u32) -> Result<(), Errno> {
        // PROT_SEM means nothing on x86; other bits are errors (Linux, `arch_validate_prot`).
        if prot & !0xf != 0 {
            return Err(Errno::EINVAL);
        }
        self.call(|space| space.mprotect(addr, len, Prot::from_bits_retain(prot)))
            .map_err(errno)
    }

    fn mremap(&mut self, addr: u64, old: u64, new: u64, flags: u32, to: u64) -> Recorded {
        let flags = RemapFlags::from_bits_retain(flags);
        self.call(|space| space.mremap(addr, old, new, flags, to))
            .map_err(errno)
    }

    fn madvise(&mut self, addr: u64, len: u64, advice: u32) -> Result<(), Errno> {
        let advice = i32::try_from(advice)
            .ok()
            .and_then(Advice::from_number)
            .ok_or(Errno::EINVAL)?;
        self.call(|space| space.madvise(addr, len, advice))
            .map_err(errno)
    }

    fn set_break(&mut self, addr: u64) {
        self.call(|space| space.set_heap(addr));
    }

    fn brk(&mut self, addr: u64) -> u64 {
        self.call(|space| space.brk(addr))
    }

    fn special(&mut self, name: &str, start: u64, end: u64, perms: Perms) -> Result<(), Errno> {
        let flags = MAP_PRIVATE | MAP_FIXED;
        if name == "[stack]" {
            let flags = flags | MAP_ANONYMOUS | MAP_GROWSDOWN;
            return self
                .mmap(start, end - start, perms.prot, flags, Backing::None, 0)
                .map(drop);
        }
        // What the kernel maps there is a page or a few of its own: a file whose name no directory has.
        let spec = FileSpec {
            name: name.to_string(),
            inode: u64::MAX / 2,
            writable: false,
            pages: (end - start) / PAGE_SIZE,
            content: Content::Zeros,
        };
        let file = self.host_file(&spec)?;
        self.run.borrow_mut().specials.push(file);
        let request = MapRequest {
            address: start,
            length: end - start,
            prot: Prot::from_bits_truncate(perms.prot),
            flags: MapFlags::from_bits_retain(flags),
            file: Some(OpenFile {
                file,
                readable: true,
                writable: false,
            }),
            offset: 0,
        };
        self.call(|space| space.mmap(&request))
            .map(drop)
            .map_err(errno)
    }

    fn load(&mut self, addr: u64) -> Result<u64, Access> {
        self.access(|cpu| cpu.read_u64(addr))
    }

    fn store(&mut self, addr: u64, value: u64) -> Result<(), Access> {
        self.access(|cpu| cpu.write_u64(addr, value))
    }

    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), Access> {
        let mut done = 0;
        while done < into.len() {
            let at = addr + done as u64;
            let part = (into.len() - done).min((PAGE_SIZE - at % PAGE_SIZE) as usize);
            let target = &mut into[done..done + part];
            self.access(|cpu| cpu.read(at, target).map_err(|(_, fault)| fault))?;
            done += part;
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Access> {
        let mut done = 0;
        while done < from.len() {
            let at = addr + done as u64;
            let part = (from.len() - done).min((PAGE_SIZE - at % PAGE_SIZE) as usize);
            self.access(|cpu| {
                cpu.write(at, &from[done..done + part])
                    .map_err(|(_, fault)| fault)
            })?;
            done += part;
        }
        Ok(())
    }

    fn fork(&mut self) -> Result<Self, Errno> {
        let space = self.call(Space::fork).map_err(errno)?;
        self.run.borrow_mut().counts.forks += 1;
        let cpu = (self.cpu + 1) % self.world.machine().cpu_count();
        Ok(Self {
            world: self.world,
            space: Some(space),
            cpu,
            run: Rc::clone(&self.run),
        })
    }

    fn list(&mut self, each: &mut dyn FnMut(VmaSeen)) {
        let mm = self.world.mm();
        self.space().for_each_vma(|vma| {
            let bit = |flag, prot: u32| if vma.flags.contains(flag) { prot } else { 0 };
            let prot = bit(VmFlags::READ, 1) | bit(VmFlags::WRITE, 2) | bit(VmFlags::EXEC, 4);
            let start = vma.range.start().as_u64();
            let info = vma.file.and_then(|file| mm.object_info(file).ok());
            let whose = match vma.file.zip(info) {
                Some((file, info)) => {
                    if info.is_shared_memory {
                        let mut hasher = DefaultHasher::new();
                        file.hash(&mut hasher);
                        Whose::Shared(hasher.finish())
                    } else if info.name.starts_with('[') {
                        Whose::Special(info.name.to_string())
                    } else {
                        Whose::File(info.name.to_string())
                    }
                }
                None if vma.flags.contains(VmFlags::GROWSDOWN) => Whose::Special("[stack]".into()),
                None => Whose::Anonymous,
            };
            each(VmaSeen {
                start,
                end: start + vma.range.count() * PAGE_SIZE,
                perms: Perms {
                    prot,
                    shared: vma.flags.contains(VmFlags::MAYSHARE),
                },
                offset: if vma.file.is_some() {
                    vma.offset * PAGE_SIZE
                } else {
                    0
                },
                whose,
            });
            true
        });
    }
}
