//! Protection keys: rights that a thread changes for all mappings of a key at once, without a system call.
//!
//! A key is a number in every entry of a mapping; a register of the thread (PKRU) says which keys it may read and write. The space
//! hands keys out and puts them into entries; the register is the kernel's and the thread's.
//!
//! Source: pkeys(7); Linux `mm/mprotect.c` (`pkey_alloc`, `pkey_free`), `arch/x86/include/asm/pkeys.h`; Intel SDM volume 3A, 4.6.2.

use kmem_paging::format::Format;

use crate::env::Env;
use crate::errno::Errno;
use crate::flags::Prot;
use crate::space::AddressSpace;

/// The keys of a space that were handed out, a bit each; key 0 is everybody's from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keys(u16);

impl Default for Keys {
    fn default() -> Self {
        Self(1)
    }
}

impl Keys {
    fn contains(self, key: i32) -> bool {
        (0..16).contains(&key) && self.0 >> key & 1 != 0
    }
}

/// What a new key forbids its thread: `PKEY_DISABLE_ACCESS` and `PKEY_DISABLE_WRITE`.
const KEY_RIGHTS: u32 = 3;

impl<E: Env> AddressSpace<'_, E> {
    /// Hands out a key. `rights` are what the caller puts into the thread's register for it.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for flags (there are none) and rights that do not exist, and where the page tables have no keys;
    /// [`Errno::ENOSPC`] where all keys are handed out.
    pub fn pkey_alloc(&self, flags: u32, rights: u32) -> Result<u8, Errno> {
        if flags != 0 || rights & !KEY_RIGHTS != 0 || E::Format::PROTECTION_KEYS <= 1 {
            return Err(Errno::EINVAL);
        }
        let mut state = self.lock();
        let key = state.keys.0.trailing_ones() as u8;
        if key >= E::Format::PROTECTION_KEYS {
            return Err(Errno::ENOSPC);
        }
        state.keys.0 |= 1 << key;
        Ok(key)
    }

    /// Takes a key back. Mappings that have it keep it, as in Linux.
    ///
    /// # Errors
    ///
    /// [`Errno::EINVAL`] for a key that was not handed out.
    pub fn pkey_free(&self, key: i32) -> Result<(), Errno> {
        let mut state = self.lock();
        if !state.keys.contains(key) || E::Format::PROTECTION_KEYS <= 1 {
            return Err(Errno::EINVAL);
        }
        state.keys.0 &= !(1 << key);
        Ok(())
    }

    /// [`mprotect`](Self::mprotect), and gives the range a key; with key -1 it keeps those that it has.
    ///
    /// # Errors
    ///
    /// As there, and [`Errno::EINVAL`] for a key that was not handed out.
    #[doc(alias = "do_mprotect_pkey")]
    pub fn pkey_mprotect(
        &self,
        address: u64,
        length: u64,
        prot: Prot,
        key: i32,
    ) -> Result<(), Errno> {
        let key = match key {
            -1 => None,
            _ if E::Format::PROTECTION_KEYS <= 1 => return Err(Errno::EINVAL),
            _ => Some(key),
        };
        self.protect(address, length, prot, key)
    }

    /// The key as one that was handed out.
    pub(crate) fn checked_key(keys: Keys, key: Option<i32>) -> Result<Option<u8>, Errno> {
        match key {
            None => Ok(None),
            Some(key) if keys.contains(key) => Ok(Some(key as u8)),
            Some(_) => Err(Errno::EINVAL),
        }
    }
}
