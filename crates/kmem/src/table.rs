//! The frame table's memory: a slot for every frame that is there, none for holes of 128 MiB and more.

use core::ptr::NonNull;

use kmem_buddy::{BootMap, EarlyAllocator, EarlyError};
use kmem_hal::{FrameTable, PAGE_SIZE, PhysAddr, PhysMap, SECTION_FRAMES, Section};

/// Pieces in which the slots may lie.
const PIECES: usize = 16;

/// The sections that hold present frames, ascending, each once.
fn sections<const N: usize>(map: &BootMap<N>) -> impl Iterator<Item = u64> + '_ {
    let mut next = 0;
    map.present().flat_map(move |run| {
        let first = (run.first().number() / SECTION_FRAMES).max(next);
        let end = run.end_number().div_ceil(SECTION_FRAMES);
        next = end.max(next);
        first..end
    })
}

/// Carves slots for every section that has memory and hands them to `table`. They are zeroed at the first use.
///
/// # Errors
///
/// [`EarlyError`]; the boot map and the table are as they were.
///
/// # Safety
///
/// `X1` of [`EarlyAllocator::new`] holds for `map`.
pub unsafe fn carve<const N: usize, M: PhysMap>(
    table: &FrameTable,
    map: &mut BootMap<N>,
    memory: &M,
) -> Result<(), EarlyError> {
    let bytes = FrameTable::SECTION_BYTES as u64;
    let Some(last) = sections(map).last() else {
        return Ok(());
    };
    let count = sections(map).count() as u64;
    let mut pieces = [(PhysAddr::ZERO, 0); PIECES];
    let mut used = 0;
    let mut left = count;
    let mut want = count;
    // SAFETY: X1, by contract.
    let mut early = unsafe { EarlyAllocator::new(map, memory) };
    let directory = loop {
        if left == 0 {
            match early.alloc_slice((last + 1) as usize, |_| Section::absent()) {
                Ok(directory) => break directory,
                Err(error) => return Err(undo(&mut early, &pieces[..used], error)),
            }
        }
        match early.alloc(want * bytes, PAGE_SIZE) {
            Ok(base) => {
                pieces[used] = (base, want);
                used += 1;
                left -= want;
                want = left;
            }
            Err(EarlyError::NoSpace { .. }) if want > 1 => want = want.div_ceil(2),
            Err(error) => return Err(undo(&mut early, &pieces[..used], error)),
        }
        if used == PIECES && left > 0 {
            let error = EarlyError::NoSpace {
                bytes: left * bytes,
                limit: u64::MAX,
            };
            return Err(undo(&mut early, &pieces, error));
        }
    };
    let mut slots = pieces[..used]
        .iter()
        .flat_map(|&(base, count)| (0..count).map(move |index| base.as_u64() + index * bytes));
    for section in sections(map) {
        let place = slots.next().map(|base| memory.to_ptr(PhysAddr::new(base)));
        if let (Some(entry), Some(place)) = (
            directory.get(section as usize),
            place.and_then(NonNull::new),
        ) {
            // SAFETY: the memory was just carved for these slots: in reach, page-aligned, nobody else's for ever.
            unsafe { entry.set_memory(place) };
        }
    }
    table.init(directory);
    Ok(())
}

/// Gives carved pieces back.
fn undo<const N: usize, M: PhysMap>(
    early: &mut EarlyAllocator<'_, M, N>,
    pieces: &[(PhysAddr, u64)],
    error: EarlyError,
) -> EarlyError {
    for &(base, count) in pieces {
        // SAFETY: nobody has seen the pieces. Giving a whole piece back needs no room in the list.
        let _ = unsafe { early.free(base, count * FrameTable::SECTION_BYTES as u64) };
    }
    error
}
