//! Checks of [`ObjectAlloc`], clauses `B1`, `B2` and `B4`.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use kmem_hal::ObjectAlloc;

use super::Report;

const NAME: &str = "ObjectAlloc";
/// The most objects that a check takes.
const MOST: usize = 2000;

/// Checks an allocator of which nobody takes objects meanwhile.
pub fn check<T, A: ObjectAlloc<T>>(report: &Report, objects: &A) {
    let (first, refused) = take_all(report, objects);
    let count = first.len();
    for _ in 0..32 {
        // Refused where the first one was: a refusal must not cost anything.
        if refused && let Ok(object) = objects.alloc() {
            report.check(
                NAME,
                "B1",
                !first.contains_key(&object.addr().get()),
                || format!("{object:p} was given to two owners"),
            );
        }
    }
    give_back(objects, first);
    let (again, _) = take_all(report, objects);
    report.check(NAME, "B2", again.len() == count, || {
        format!(
            "{count} objects could be had; after some refusals, and all given back, {} can",
            again.len()
        )
    });
    give_back(objects, again);
    bulk(report, objects);
    report.skip(
        NAME,
        "B3",
        "what a stale reader may see is not for a test to read",
    );
}

type Taken<T> = BTreeMap<usize, NonNull<T>>;

fn fill<T>(object: NonNull<T>, byte: u8) {
    // SAFETY: B1: memory for a `T`, owned.
    unsafe {
        object
            .cast::<u8>()
            .as_ptr()
            .write_bytes(byte, size_of::<T>());
    }
}

fn take_all<T, A: ObjectAlloc<T>>(report: &Report, objects: &A) -> (Taken<T>, bool) {
    let mut taken = Taken::new();
    let mut refused = false;
    while taken.len() < MOST {
        let Ok(object) = objects.alloc() else {
            refused = true;
            break;
        };
        report.check(NAME, "B1", object.is_aligned(), || {
            format!("{object:p} is not aligned to {}", align_of::<T>())
        });
        let address = object.addr().get();
        let below = taken.range(..=address).next_back();
        let above = taken.range(address..).next();
        let apart = below.is_none_or(|(&other, _)| address - other >= size_of::<T>())
            && above.is_none_or(|(&other, _)| other - address >= size_of::<T>());
        if !report.check(NAME, "B1", apart, || {
            format!("{object:p} overlaps an object that somebody owns")
        }) {
            break;
        }
        fill(object, taken.len() as u8);
        taken.insert(address, object);
    }
    (taken, refused)
}

fn give_back<T, A: ObjectAlloc<T>>(objects: &A, taken: Taken<T>) {
    for object in taken.into_values() {
        // SAFETY: taken from this allocator, freed once, of no value.
        unsafe { objects.free(object) };
    }
}

fn bulk<T, A: ObjectAlloc<T>>(report: &Report, objects: &A) {
    let mut places: [MaybeUninit<NonNull<T>>; 24] = [const { MaybeUninit::zeroed() }; 24];
    let given = objects.alloc_bulk(&mut places);
    if !report.check(NAME, "B4", given <= places.len(), || {
        format!(
            "alloc_bulk gave {given} objects for {} places",
            places.len()
        )
    }) {
        return;
    }
    let mut taken = Taken::new();
    for place in &places[..given] {
        // SAFETY: a place that nobody wrote is zero, and an option of a non-null pointer reads that as "none".
        let object: Option<NonNull<T>> =
            unsafe { place.as_ptr().cast::<Option<NonNull<T>>>().read() };
        let written = report.check(NAME, "B4", object.is_some(), || {
            format!("alloc_bulk says {given} objects and did not write all of their places")
        });
        if let (true, Some(object)) = (written, object) {
            fill(object, 1);
            let other = taken.insert(object.addr().get(), object);
            report.check(NAME, "B1", other.is_none(), || {
                format!("alloc_bulk gave {object:p} twice")
            });
        }
    }
    give_back(objects, taken);
}
