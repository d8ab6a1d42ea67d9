//! Checks of [`PhysMap`], clauses `P1` to `P6`.

use kmem_hal::sync::Ordering;
use kmem_hal::{Frame, FrameRange, PAGE_SIZE, PhysAddr, PhysMap};

use super::Report;

const NAME: &str = "PhysMap";
/// Offsets inside a frame at which it is written and read.
const PROBES: [u64; 4] = [0, 8, 2048, PAGE_SIZE - 8];

/// Checks `map` with the frames of `scratch`, whose content is lost.
///
/// # Safety
///
/// The caller owns the frames of `scratch`, and they are memory.
pub unsafe fn check<M: PhysMap>(report: &Report, map: &M, scratch: FrameRange) {
    let before = map.reach();
    let reached = report.check(NAME, "P1", before.contains_range(scratch), || {
        format!("{scratch:?} is mapped by the caller's word, but reach() is {before:?}")
    });
    if !reached || scratch.is_empty() {
        return;
    }
    pointers(report, map, scratch);
    // SAFETY: the caller owns the frames.
    unsafe {
        contents(report, map, scratch);
        // Where pointers are wrong, what follows would write wherever they lead.
        if !report.fails(NAME, "P1") && !report.fails(NAME, "P2") {
            temporary(report, map, scratch);
            helpers(report, map, scratch);
        }
    }
    let after = map.reach();
    report.check(NAME, "P4", after.contains_range(before), || {
        format!("reach() was {before:?} and shrank to {after:?}")
    });
}

fn pointers<M: PhysMap>(report: &Report, map: &M, scratch: FrameRange) {
    let first = scratch.first().start();
    let base = map.to_ptr(first);
    for frame in scratch.iter() {
        for offset in PROBES {
            let Some(address) = frame.start().checked_add(offset) else {
                continue;
            };
            let pointer = map.to_ptr(address);
            let expected = base.wrapping_add((address.as_u64() - first.as_u64()) as usize);
            report.check(NAME, "P1", pointer == expected, || {
                format!(
                    "{address} is at {pointer:p}; frames in reach are contiguous, so {expected:p} was expected"
                )
            });
            let back = map.to_phys(pointer);
            report.check(NAME, "P3", back == address, || {
                format!("to_phys(to_ptr({address})) is {back}")
            });
        }
    }
}

fn value(frame: Frame, offset: u64) -> u64 {
    (frame.start().as_u64() ^ offset).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// # Safety
///
/// The caller owns the frames, which are in reach.
unsafe fn contents<M: PhysMap>(report: &Report, map: &M, scratch: FrameRange) {
    let word = |frame: Frame, offset: u64| {
        map.to_ptr(PhysAddr::new(frame.start().as_u64() + offset))
            .cast::<u64>()
    };
    for frame in scratch.iter() {
        for offset in PROBES {
            // SAFETY: owned, in reach, aligned to 8.
            unsafe { word(frame, offset).write_volatile(value(frame, offset)) };
        }
    }
    // Read after all was written: two addresses that share memory show now.
    for frame in scratch.iter() {
        for offset in PROBES {
            // SAFETY: as above.
            let found = unsafe { word(frame, offset).read_volatile() };
            report.check(NAME, "P2", found == value(frame, offset), || {
                format!("what was written at {frame:?} + {offset} was changed by a write elsewhere")
            });
        }
    }
}

/// # Safety
///
/// As [`contents`].
unsafe fn temporary<M: PhysMap>(report: &Report, map: &M, scratch: FrameRange) {
    let mut windows = Vec::new();
    for frame in scratch.iter().take(2) {
        let Some(window) = map.map_temporary(frame) else {
            continue;
        };
        // SAFETY: a temporary mapping of an owned frame.
        unsafe { window.cast::<u64>().write_volatile(value(frame, 1)) };
        windows.push((frame, window));
    }
    for &(frame, window) in &windows {
        // SAFETY: as above, and not unmapped yet.
        let (through, direct) = unsafe {
            (
                window.cast::<u64>().read_volatile(),
                map.to_ptr(frame.start()).cast::<u64>().read_volatile(),
            )
        };
        report.check(
            NAME,
            "P5",
            through == value(frame, 1) && direct == through,
            || format!("the temporary mapping of {frame:?} is not private to its caller, or not of that frame"),
        );
    }
    for (_, window) in windows.into_iter().rev() {
        // SAFETY: from `map_temporary`, not used afterwards.
        unsafe { map.unmap_temporary(window) };
    }
}

/// # Safety
///
/// As [`contents`].
unsafe fn helpers<M: PhysMap>(report: &Report, map: &M, scratch: FrameRange) {
    let bytes = |frame: Frame| {
        let pointer = map.to_ptr(frame.start());
        (0..PAGE_SIZE as usize)
            // SAFETY: owned and in reach.
            .map(|offset| unsafe { pointer.add(offset).read_volatile() })
            .collect::<Vec<u8>>()
    };
    let first = scratch.first();
    // SAFETY: owned and in reach.
    unsafe {
        map.to_ptr(first.start())
            .write_bytes(0xa5, PAGE_SIZE as usize);
    }
    if let Some(second) = scratch.iter().nth(1) {
        // SAFETY: both owned, different.
        unsafe { map.copy(first, second) };
        report.check(NAME, "P6", bytes(second) == bytes(first), || {
            "copy did not copy every byte".into()
        });
    }
    if let Some(one) = FrameRange::new(first, 1) {
        // SAFETY: owned.
        unsafe { map.zero(one) };
    }
    report.check(
        NAME,
        "P6",
        bytes(first).iter().all(|&byte| byte == 0),
        || "zero left a byte".into(),
    );
    #[cfg(not(loom))]
    {
        // SAFETY: owned, and reached through atomics only while the reference lives.
        let last = unsafe {
            let words = map.words(first);
            words[511].store(0x0123_4567_89ab_cdef, Ordering::Relaxed);
            words[511].load(Ordering::Relaxed)
        };
        let seen = &bytes(first)[4088..];
        report.check(NAME, "P6", seen == last.to_ne_bytes(), || {
            "words() reaches other bytes than to_ptr()".into()
        });
        // SAFETY: as above.
        let narrow = unsafe { map.words32(first)[1022].load(Ordering::Relaxed) };
        report.check(NAME, "P6", narrow.to_ne_bytes() == seen[..4], || {
            "words32() reaches other bytes than to_ptr()".into()
        });
    }
    #[cfg(loom)]
    {
        // SAFETY: owned; the words are atomics of the model, and no memory.
        let words = unsafe { map.words(first) };
        words[1].store(7, Ordering::Relaxed);
        let found = words[1].load(Ordering::Relaxed);
        report.check(NAME, "P6", found == 7 && words.len() == 512, || {
            "words() forgets".into()
        });
    }
}
