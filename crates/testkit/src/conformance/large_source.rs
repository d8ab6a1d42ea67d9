//! Checks of [`LargeSource`], clauses `V1` and `V2`.

use kmem_hal::LargeSource;

use super::Report;

const NAME: &str = "LargeSource";

/// Checks a source with a few blocks of up to `largest` bytes.
pub fn check<L: LargeSource>(report: &Report, source: &L, largest: usize) {
    let foreign = 0u8;
    report.check(NAME, "V2", !source.contains(&foreign), || {
        "contains says yes to a variable of the caller's".into()
    });
    let mut given = Vec::new();
    for (index, align) in [1usize, 64, 4096, 8192].into_iter().enumerate() {
        for size in [1, largest / 2 + 1, largest] {
            let Ok(memory) = source.alloc_large(size.max(1), align) else {
                continue;
            };
            let address = memory.addr().get();
            report.check(NAME, "V1", address % align == 0, || {
                format!("{memory:p} is not aligned to {align}")
            });
            let usable = source.size_of(memory).unwrap_or(0);
            report.check(NAME, "V1", usable >= size, || {
                format!("{size} bytes were asked for, size_of says {usable}")
            });
            let free =
                given
                    .iter()
                    .all(|&(other, length, _): &(std::ptr::NonNull<u8>, usize, u8)| {
                        let other = other.addr().get();
                        address + size <= other || other + length <= address
                    });
            report.check(NAME, "V1", free, || {
                format!("{memory:p} overlaps memory that somebody owns")
            });
            for at in [0, size / 2, size - 1] {
                let inside = source.contains(memory.as_ptr().wrapping_add(at));
                report.check(NAME, "V2", inside, || {
                    format!("contains says no to byte {at} of {size} that were given")
                });
            }
            // SAFETY: V1: owned and valid for `size` bytes.
            unsafe { memory.write_bytes(index as u8, size) };
            given.push((memory, size, index as u8));
        }
    }
    for &(memory, size, byte) in &given {
        // SAFETY: as above.
        let kept = (0..size).all(|at| unsafe { memory.add(at).read() } == byte);
        report.check(NAME, "V1", kept, || {
            format!("{memory:p} does not keep what is written to it")
        });
    }
    for (memory, _, _) in given {
        // SAFETY: from this source, freed once.
        unsafe { source.free_large(memory) };
        report.check(NAME, "V2", !source.contains(memory.as_ptr()), || {
            "contains says yes to memory that was freed".into()
        });
        report.check(NAME, "V2", source.size_of(memory).is_none(), || {
            "size_of knows memory that was freed".into()
        });
    }
}
