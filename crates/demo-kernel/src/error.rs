//! Error numbers of system calls: kmem's, and those of calls that are not about memory.

use kmem::cow_mm::Errno;

/// Why a system call failed: Linux's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error(pub i32);

#[allow(missing_docs)]
impl Error {
    pub const ENOENT: Self = Self(2);
    pub const E2BIG: Self = Self(7);
    pub const EBADF: Self = Self(9);
    pub const ECHILD: Self = Self(10);
    pub const EAGAIN: Self = Self(11);
    pub const ENOMEM: Self = Self(12);
    pub const EACCES: Self = Self(13);
    pub const EFAULT: Self = Self(14);
    pub const EINVAL: Self = Self(22);
    pub const EMFILE: Self = Self(24);
    pub const ENOTTY: Self = Self(25);
    pub const ENOSYS: Self = Self(38);
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self(errno.number())
    }
}

impl From<kmem::hal::UserFault> for Error {
    fn from(_: kmem::hal::UserFault) -> Self {
        Self::EFAULT
    }
}
