//! Files: the programs that are built into the image, one file that can be written, and `/proc/self/maps`.

use core::fmt::{self, Write as _};

use kmem::IrqSafe;
use kmem::cow_mm::{FileRef, OpenFile};
use kmem::hal::{Lock, UserAccess, VirtAddr};

use crate::error::Error;
use crate::platform::{Machine, MemoryFile};
use crate::{console, memory, process};

/// A file by name. Its page cache exists while `cache` holds it.
pub struct Inode {
    /// The path.
    pub path: &'static str,
    contents: MemoryFile,
    writable: bool,
    number: u64,
    cache: Lock<Option<FileRef>, IrqSafe>,
}

impl Inode {
    const fn program(path: &'static str, number: u64, bytes: &'static [u8]) -> Self {
        let bytes = core::ptr::from_ref(bytes).cast_mut();
        Self {
            path,
            contents: MemoryFile(bytes),
            writable: false,
            number,
            cache: Lock::new(None),
        }
    }

    /// An open file; the caller closes it.
    pub fn open(&'static self) -> Result<FileRef, Error> {
        let mm = memory::mm();
        let cached = *self.cache.lock();
        let file = match cached {
            Some(file) => file,
            None => {
                let file = mm.open_file(&self.contents, self.path, self.number)?;
                let mut cache = self.cache.lock();
                match *cache {
                    Some(first) => {
                        drop(cache);
                        mm.close(file); // another CPU was faster
                        first
                    }
                    None => *cache.insert(file),
                }
            }
        };
        Ok(mm.reopen(file))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.contents.0.len() as u64
    }

    fn read(&self, at: u64, to: &mut [u8]) -> usize {
        let left = self.size().saturating_sub(at) as usize;
        let count = left.min(to.len());
        for (index, byte) in to.iter_mut().enumerate().take(count) {
            // SAFETY: inside the file, whose bytes are static; nobody holds a reference to them. A mapping that is written back meanwhile
            // (msync, reclaim, the end of its cache) may change a byte before it is read or after.
            *byte = unsafe {
                self.contents
                    .0
                    .cast::<u8>()
                    .add(at as usize + index)
                    .read_volatile()
            };
        }
        count
    }
}

/// The writable file's bytes.
const SCRATCH_BYTES: usize = 65536;
static mut SCRATCH: [u8; SCRATCH_BYTES] = [0; SCRATCH_BYTES];
static SCRATCH_FILE: Inode = Inode {
    path: "/tmp/scratch",
    contents: MemoryFile(&raw mut SCRATCH),
    writable: true,
    number: 99,
    cache: Lock::new(None),
};

// `pub static PROGRAMS: [Inode; N]`, written by build.rs.
include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// The file of that path.
pub fn find(path: &str) -> Option<&'static Inode> {
    PROGRAMS
        .iter()
        .chain([&SCRATCH_FILE])
        .find(|inode| inode.path == path && inode.size() > 0)
}

/// Gives every file's cache back, when no process is left.
pub fn drop_caches() {
    for inode in PROGRAMS.iter().chain([&SCRATCH_FILE]) {
        let file = inode.cache.lock().take();
        if let Some(file) = file {
            memory::mm().close(file);
        }
    }
}

/// What a file descriptor stands for.
#[derive(Clone, Copy)]
pub enum Descriptor {
    /// Nothing.
    Closed,
    /// The serial port.
    Console,
    /// `/proc/self/maps`, and how far it was read.
    Maps(u64),
    /// A file, the open of it, its mode, and the position.
    File(&'static Inode, OpenFile, u64),
}

/// The descriptors of a process.
pub struct Files([Descriptor; 16]);

impl Files {
    /// None.
    pub const NONE: Self = Self([Descriptor::Closed; 16]);
    /// Input, output and errors at the console.
    pub const CONSOLE: Self = {
        let mut files = Self::NONE;
        files.0[0] = Descriptor::Console;
        files.0[1] = Descriptor::Console;
        files.0[2] = Descriptor::Console;
        files
    };

    /// The descriptor's place.
    pub fn get(&mut self, number: u64) -> Result<&mut Descriptor, Error> {
        match self.0.get_mut(number as usize) {
            Some(Descriptor::Closed) | None => Err(Error::EBADF),
            Some(open) => Ok(open),
        }
    }

    /// Takes the lowest free number.
    pub fn insert(&mut self, descriptor: Descriptor) -> Result<u64, Error> {
        let free = |place: &Descriptor| matches!(place, Descriptor::Closed);
        let number = self.0.iter().position(free).ok_or(Error::EMFILE)?;
        self.0[number] = descriptor;
        Ok(number as u64)
    }

    /// For a child: the same files, each an open of its own.
    pub fn duplicate(&self) -> Self {
        let mut files = Self(self.0);
        for place in &mut files.0 {
            if let Descriptor::File(_, open, _) = place {
                open.file = memory::mm().reopen(open.file);
            }
        }
        files
    }

    /// Closes one.
    pub fn close(&mut self, number: u64) -> Result<(), Error> {
        let place = self.get(number)?;
        if let Descriptor::File(_, open, _) = *place {
            memory::mm().close(open.file);
        }
        *place = Descriptor::Closed;
        Ok(())
    }

    /// Closes all.
    pub fn close_all(&mut self) {
        for number in 0..self.0.len() as u64 {
            let _ = self.close(number);
        }
    }
}

/// open: `O_RDONLY`, `O_WRONLY` or `O_RDWR` of what exists.
pub fn open(path: &str, flags: u64) -> Result<u64, Error> {
    let (_, process) = process::current();
    let descriptor = if path == "/proc/self/maps" {
        Descriptor::Maps(0)
    } else {
        let inode = find(path).ok_or(Error::ENOENT)?;
        let writable = flags & 3 != 0;
        if writable && !inode.writable {
            return Err(Error::EACCES);
        }
        let open = OpenFile {
            file: inode.open()?,
            readable: flags & 3 != 1,
            writable,
        };
        Descriptor::File(inode, open, 0)
    };
    process.files.lock().insert(descriptor)
}

/// read, through a buffer of the kernel's: user memory may fault, and no lock may be held then.
pub fn read(number: u64, to: VirtAddr, length: u64) -> Result<u64, Error> {
    let (_, process) = process::current();
    let descriptor = *process.files.lock().get(number)?;
    let mut buffer = [0; 512];
    let mut done = 0;
    while done < length {
        let room = &mut buffer[..(length - done).min(512) as usize];
        let count = match descriptor {
            Descriptor::Maps(at) => read_maps(at + done, room),
            Descriptor::File(inode, open, at) if open.readable => inode.read(at + done, room),
            Descriptor::Console => 0,
            _ => return Err(Error::EBADF),
        };
        if count == 0 {
            break;
        }
        let target = VirtAddr::new(to.as_u64() + done);
        if Machine.copy_to_user(target, &buffer[..count]).is_err() {
            return if done == 0 {
                Err(Error::EFAULT)
            } else {
                Ok(done)
            };
        }
        done += count as u64;
    }
    match process.files.lock().get(number)? {
        Descriptor::Maps(at) | Descriptor::File(_, _, at) => *at += done,
        _ => {}
    }
    Ok(done)
}

/// write: to the console only.
pub fn write(number: u64, from: VirtAddr, length: u64) -> Result<u64, Error> {
    let (_, process) = process::current();
    let Descriptor::Console = *process.files.lock().get(number)? else {
        return Err(Error::EBADF);
    };
    let mut buffer = [0; 512];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(512) as usize;
        let source = VirtAddr::new(from.as_u64() + done);
        if Machine.copy_from_user(&mut buffer[..part], source).is_err() {
            return if done == 0 {
                Err(Error::EFAULT)
            } else {
                Ok(done)
            };
        }
        console::write_bytes(&buffer[..part]);
        done += part as u64;
    }
    Ok(done)
}

/// Part of the running process's maps, made anew at each call.
fn read_maps(at: u64, to: &mut [u8]) -> usize {
    let mut part = Part {
        skip: at as usize,
        to,
        done: 0,
    };
    let _ = write!(part, "{}", process::current().1.space().maps());
    part.done
}

/// Keeps some bytes of a text.
struct Part<'a> {
    skip: usize,
    to: &'a mut [u8],
    done: usize,
}

impl fmt::Write for Part<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let skipped = self.skip.min(text.len());
        self.skip -= skipped;
        let rest = &text.as_bytes()[skipped..];
        let count = rest.len().min(self.to.len() - self.done);
        self.to[self.done..self.done + count].copy_from_slice(&rest[..count]);
        self.done += count;
        if count < rest.len() {
            Err(fmt::Error)
        } else {
            Ok(())
        }
    }
}
