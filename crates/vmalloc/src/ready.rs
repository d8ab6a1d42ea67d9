//! Addresses that were flushed and wait to be used again.
//!
//! Most areas come and go in a few sizes. What a purge has flushed stays in the tree, in a chain for its size, and the next
//! area of that size takes it without a search and without an edit. Linux keeps such pools for each of its nodes.
//!
//! ```text
//!   purge ──> ready[pages] ──> take_range        larger, too many, or no room left elsewhere ──> out of the tree
//! ```
//!
//! Source: Linux `mm/vmalloc.c` (`struct vmap_pool`, `node_pool_add_va`).

use crate::area::{AreaRef, Areas};

/// Sizes that have a chain, in pages with guards.
const SIZES: usize = 34;

/// Chains of areas by size.
#[derive(Debug)]
pub(crate) struct Ready {
    chains: [Option<AreaRef>; SIZES],
    pages: u64,
    most: u64,
}

impl Ready {
    /// Empty chains that hold at most `most` pages.
    pub const fn new(most: u64) -> Self {
        Self {
            chains: [None; SIZES],
            pages: 0,
            most,
        }
    }

    /// An area of `pages` pages, guards included.
    #[inline]
    pub fn take(&mut self, areas: &Areas, pages: u64) -> Option<AreaRef> {
        let chain = self.chains.get_mut(usize::try_from(pages).ok()?)?;
        let at = (*chain)?;
        *chain = areas.get(at).next;
        self.pages -= pages;
        Some(at)
    }

    /// Keeps an area; `false` where it is too large, or there are enough.
    #[inline]
    pub fn put(&mut self, areas: &mut Areas, at: AreaRef) -> bool {
        let mut area = areas.get(at);
        let pages = area.range.count();
        let chain = usize::try_from(pages)
            .ok()
            .and_then(|pages| self.chains.get_mut(pages));
        let Some(chain) = chain.filter(|_| self.pages + pages <= self.most) else {
            return false;
        };
        area.next = *chain;
        areas.set(at, area);
        *chain = Some(at);
        self.pages += pages;
        true
    }

    /// Any area of any size.
    pub fn take_any(&mut self, areas: &Areas) -> Option<AreaRef> {
        (0..SIZES as u64).find_map(|pages| self.take(areas, pages))
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }
}
