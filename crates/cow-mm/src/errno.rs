//! The error numbers that the calls of an address space answer, with Linux's meanings.
//!
//! Source: the ERRORS sections of mmap(2), munmap(2), mprotect(2), mremap(2), madvise(2), mlock(2), msync(2).

use core::fmt;

/// Why a call failed: Linux's number and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Errno {
    /// Operation not permitted: below the lowest mappable address, or a sealed mapping.
    EPERM = 1,
    /// No such process.
    ESRCH = 3,
    /// I/O error.
    EIO = 5,
    /// Too many arguments, or too long ones.
    E2BIG = 7,
    /// Not an executable image that can be loaded.
    ENOEXEC = 8,
    /// Not an open file.
    EBADF = 9,
    /// Would pass the limit on locked memory.
    EAGAIN = 11,
    /// No room, no mapping where one is needed, or a limit reached.
    ENOMEM = 12,
    /// The file's mode does not allow the access asked for.
    EACCES = 13,
    /// Bad address.
    EFAULT = 14,
    /// Busy: locked pages in the way.
    EBUSY = 16,
    /// Something is mapped there already.
    EEXIST = 17,
    /// The file cannot be mapped.
    ENODEV = 19,
    /// An argument makes no sense.
    EINVAL = 22,
    /// Nothing left to hand out.
    ENOSPC = 28,
    /// A name that does not fit.
    ENAMETOOLONG = 36,
    /// No such call.
    ENOSYS = 38,
    /// The offset plus the length wraps.
    EOVERFLOW = 75,
    /// An interpreter that is no image.
    ELIBBAD = 80,
    /// A flag is not supported for this mapping.
    EOPNOTSUPP = 95,
}

impl Errno {
    /// The positive number, as in `errno.h`.
    #[must_use]
    pub const fn number(self) -> i32 {
        self as i32
    }

    /// The name, as in `errno.h`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EPERM => "EPERM",
            Self::ESRCH => "ESRCH",
            Self::EIO => "EIO",
            Self::ENOEXEC => "ENOEXEC",
            Self::EBADF => "EBADF",
            Self::EAGAIN => "EAGAIN",
            Self::ENOMEM => "ENOMEM",
            Self::EACCES => "EACCES",
            Self::EFAULT => "EFAULT",
            Self::EBUSY => "EBUSY",
            Self::EEXIST => "EEXIST",
            Self::ENODEV => "ENODEV",
            Self::EINVAL => "EINVAL",
            Self::ENOSPC => "ENOSPC",
            Self::ENOSYS => "ENOSYS",
            Self::EOVERFLOW => "EOVERFLOW",
            Self::ELIBBAD => "ELIBBAD",
            Self::ENAMETOOLONG => "ENAMETOOLONG",
            Self::E2BIG => "E2BIG",
            Self::EOPNOTSUPP => "EOPNOTSUPP",
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for Errno {}

impl From<kmem_hal::AllocError> for Errno {
    fn from(_: kmem_hal::AllocError) -> Self {
        Self::ENOMEM
    }
}
