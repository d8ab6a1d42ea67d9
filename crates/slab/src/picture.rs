//! A picture of how well slabs are used: a line a cache, a sign a slab.
//!
//! ```text
//!   slabs by objects out: # all  9 .. 1 tenths  . none
//!   kmalloc-64         84% of    48K  ####97.
//!   inode              12% of   256K  1111211111111111 +40
//! ```
//!
//! Many low digits are what no shrink can give back: a slab goes with its last object. Objects in arrays of CPUs and of the depot count as
//! out of their slab here, and as unused in the percentage.

use core::fmt::{self, Write as _};

use kmem_hal::PAGE_SIZE;

use crate::platform::Platform;
use crate::raw::RawCache;
use crate::slab::Slab;
use crate::system::SlabSystem;

/// Signs in a line; what is beyond is counted.
const SIGNS: u64 = 48;

/// The picture as text: see [`SlabSystem::picture`].
#[derive(Debug)]
pub struct Picture<'s, P: Platform> {
    system: &'s SlabSystem<P>,
}

impl<P: Platform> SlabSystem<P> {
    /// How full each slab is, as text: a line a cache that has slabs, a sign a slab.
    ///
    /// A snapshot in which each slab is of some instant, exact while nothing allocates.
    #[must_use]
    pub fn picture(&self) -> Picture<'_, P> {
        Picture { system: self }
    }

    fn line_of(&self, cache: &RawCache<P::Lock>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.info_of(cache);
        if info.slabs == 0 {
            return Ok(());
        }
        let bytes = info.frames * PAGE_SIZE;
        let used = info.active_objects * info.object_size as u64;
        write!(
            f,
            "{:<17} {:3}% of {:6}K  ",
            info.name,
            used * 100 / bytes.max(1),
            bytes >> 10
        )?;
        let (mut result, mut drawn) = (Ok(()), 0);
        cache.for_each_slab(|slab| {
            if slab.objects() > 0 {
                drawn += 1;
                if drawn <= SIGNS {
                    result = f.write_char(sign(slab));
                }
            }
            result.is_ok()
        });
        result?;
        match drawn.saturating_sub(SIGNS) {
            0 => f.write_str("\n"),
            more => writeln!(f, " +{more}"),
        }
    }
}

fn sign(slab: &Slab) -> char {
    let objects = slab.objects();
    match objects.saturating_sub(slab.free_in_all()) {
        0 => '.',
        out if out == objects => '#',
        out => char::from(b'0' + (out * 10 / objects).clamp(1, 9) as u8),
    }
}

impl<P: Platform> fmt::Display for Picture<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("slabs by objects out: # all  9 .. 1 tenths  . none\n")?;
        let mut result = Ok(());
        // Before `init`, and in a context that interrupted the registry, there is nothing to draw.
        let _ = self.system.for_each_cache(|cache| {
            if result.is_ok() {
                result = self.system.line_of(cache, f);
            }
        });
        result
    }
}
