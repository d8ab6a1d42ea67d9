//! Operations on an object allocator.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use arbitrary::Arbitrary;
use kmem_hal::ObjectAlloc;
use proptest::prelude::*;

use super::{Disagreement, strategy};

/// One operation on an object allocator.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectOp {
    /// Allocate an object.
    Alloc,
    /// Allocate up to `count % 40` objects at once.
    Bulk {
        /// How many, modulo 40.
        count: u8,
    },
    /// Free the object number `which` of those held, modulo their number.
    Free {
        /// Which one.
        which: u16,
    },
    /// Free the `count % 64` oldest objects: what a consumer does.
    FreeOldest {
        /// How many, modulo 64.
        count: u8,
    },
}

strategy!(
    ObjectOp,
    prop_oneof![
        6 => Just(Self::Alloc),
        1 => any::<u8>().prop_map(|count| Self::Bulk { count }),
        5 => any::<u16>().prop_map(|which| Self::Free { which }),
        1 => any::<u8>().prop_map(|count| Self::FreeOldest { count }),
    ]
);

/// Runs operations on an allocator of 64-bit words in arrays of `N`, and frees everything in the end.
///
/// Every object is filled with a stamp of its own, which must still be there when it is freed: two owners of one object, or
/// objects that overlap, show.
///
/// # Errors
///
/// The first [`Disagreement`].
pub fn run_objects<const N: usize, A>(objects: &A, ops: &[ObjectOp]) -> Result<(), Disagreement>
where
    A: ObjectAlloc<[u64; N]>,
{
    let mut held: Vec<(NonNull<[u64; N]>, u64)> = Vec::new();
    let mut stamp = 0;
    let mut take = |held: &mut Vec<_>, object: NonNull<[u64; N]>| {
        stamp += 1;
        // SAFETY: B1: owned; whether that is true shows when the stamp is read.
        unsafe { object.write([stamp; N]) };
        held.push((object, stamp));
    };
    let release = |(object, stamp): (NonNull<[u64; N]>, u64)| {
        // SAFETY: as above.
        let found = unsafe { object.read() };
        // SAFETY: from this allocator, freed once, a value without drop.
        unsafe { objects.free(object) };
        if found == [stamp; N] {
            Ok(())
        } else {
            Err(format!(
                "{object:p} was changed by somebody else: {found:x?}, not {stamp:x}"
            ))
        }
    };
    for (at, op) in ops.iter().enumerate() {
        let result = match *op {
            ObjectOp::Alloc => {
                if let Ok(object) = objects.alloc() {
                    take(&mut held, object);
                }
                Ok(())
            }
            ObjectOp::Bulk { count } => {
                let mut places = [MaybeUninit::uninit(); 40];
                let wanted = usize::from(count % 40);
                let given = objects.alloc_bulk(&mut places[..wanted]);
                for place in &places[..given.min(wanted)] {
                    // SAFETY: B4: the first `given` places are written.
                    take(&mut held, unsafe { place.assume_init() });
                }
                if given > wanted {
                    Err(format!("{given} objects for {wanted} places"))
                } else {
                    Ok(())
                }
            }
            ObjectOp::Free { which } => match held.len() {
                0 => Ok(()),
                len => release(held.swap_remove(usize::from(which) % len)),
            },
            ObjectOp::FreeOldest { count } => {
                let count = usize::from(count % 64).min(held.len());
                held.drain(..count).try_for_each(release)
            }
        };
        result.map_err(|what| Disagreement::new(at, op, what))?;
    }
    held.into_iter()
        .try_for_each(release)
        .map_err(|what| Disagreement::new(ops.len(), &"freeing the rest", what))
}
