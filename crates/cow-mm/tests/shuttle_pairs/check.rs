//! What must hold when the threads of a schedule are done.

use std::sync::atomic::Ordering;

use kmem_cow_mm::Reclaimer;
use kmem_cow_mm::replacement::Fifo;
use kmem_hal::{Page, VirtAddr};

use super::counted::counted;
use super::kernel::Space;
use super::ops::{Done, Op, Program};
use super::{ANON, COPY, ELSEWHERE, FILE, PAGE, SHARED, access};

/// Holds the program's words, its children's and the disk's against what the threads wrote.
pub fn check(program: &Program, done: &[Done], children: &[Space], elder: usize) {
    let Program {
        kernel,
        space,
        file,
        provider,
        ..
    } = program;
    let kernel = *kernel;
    for space in children.iter().chain([space]) {
        assert_eq!(space.counters(), counted(&space.recount()));
        assert_eq!(space.pins(), 0);
    }
    let moved = |page: u64| {
        let at = if page & !PAGE == ANON
            && space.vma_at(VirtAddr::new(ANON)).is_none()
            && program.one_of(&[Op::Move])
        {
            page - ANON + ELSEWHERE
        } else {
            page
        };
        space.vma_at(VirtAddr::new(at)).map(|_| at)
    };
    // Every page of the program's own can go, and no child's keeps it.
    if kernel.mm.meminfo().swap.total > 0 {
        let stays = || {
            let places = [ANON, ANON + PAGE, SHARED].into_iter().filter_map(moved);
            let mut pages = places.map(|at| Page::containing(VirtAddr::new(at)));
            let zero = kernel.mm.zero_page();
            pages.find(|&page| space.frame_at(page).is_some_and(|frame| frame != zero))
        };
        for _ in 0..4 {
            if stays().is_some() {
                let _ = Reclaimer::new(Fifo).reclaim(kernel.mm, 64);
            }
            while kernel.mm.poll_swap().is_some() {}
        }
        assert_eq!(stays(), None, "a page that cannot go");
    }
    let gone = program.provider.size.load(Ordering::SeqCst) == PAGE;
    for page in [ANON, ANON + PAGE, SHARED, FILE, FILE + PAGE, COPY] {
        let stamp = if page == COPY { FILE } else { page };
        let Some(at) = moved(page) else {
            assert!(program.one_of(&[Op::Unmap]));
            continue;
        };
        if page == FILE + PAGE && gone {
            assert!(access(kernel, space, at, None).is_err());
            continue;
        }
        let mut want = [stamp, 0, 0];
        for (thread, done) in done.iter().enumerate() {
            let last = done.wrote.iter().rev().find(|wrote| wrote.0 == page);
            want[thread + 1] = last.map_or(0, |wrote| wrote.1);
        }
        // A private copy sees what is written to the file until it is made.
        let of_file =
            |word: usize, found: u64| page == COPY && done[word - 1].wrote.contains(&(FILE, found));
        let shared = page == SHARED || page & !PAGE == FILE;
        let mut seen = want;
        for (word, &want) in want.iter().enumerate() {
            let found = access(kernel, space, at + 8 * word as u64, None).unwrap();
            let fine = found == want
                || found == 0 && program.may_lose(page)
                || word > 0 && want == 0 && of_file(word, found);
            assert!(fine, "{found:#x} in word {word} of {at:#x}, not {want:#x}");
            seen[word] = found;
        }
        for (number, child) in children.iter().enumerate() {
            // A child of the schedule's may have been made after its parent's pages moved or went.
            let born_here = number >= elder;
            for (word, &seen) in seen.iter().enumerate() {
                let Ok(found) = access(kernel, child, page + 8 * word as u64, None) else {
                    assert!(
                        born_here && page & !PAGE == ANON && program.one_of(&[Op::Move, Op::Unmap])
                    );
                    continue;
                };
                let ever = |word: usize| done[word - 1].wrote.contains(&(page, found));
                let fine = match word {
                    _ if shared => found == seen,
                    0 => found == stamp || found == 0 && born_here && program.may_lose(page),
                    _ => found == 0 || born_here && ever(word) || of_file(word, found),
                };
                assert!(
                    fine,
                    "child {number} has {found:#x} in word {word} of {page:#x}"
                );
            }
        }
        if page & !PAGE == FILE {
            kernel.mm.sync_file(file.file).unwrap();
            for (word, &want) in want.iter().enumerate() {
                let found = kernel.on_disk(provider, (page - FILE) / PAGE, word);
                assert_eq!(found, want, "on disk, word {word} of {at:#x}");
            }
        }
    }
}
