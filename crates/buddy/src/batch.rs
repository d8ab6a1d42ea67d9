//! Many blocks in one call: one look at the CPU's arrays for up to 64 of them.
//!
//! [`alloc_batch`](FrameSource::alloc_batch) and [`free_batch`](kmem_hal::FrameSink::free_batch) of hal's traits are these calls with a
//! closure that is not known when they are compiled, which costs a call for each block.

use kmem_hal::{
    AllocError, Cpu, CpuCall, Frame, FrameRequest, OwnedFrame, PhysMap, Pressure, RawLock,
};

use crate::alloc::Attempt;
use crate::buddy::Buddy;
use crate::cpu_cache::CpuArea;
use crate::state::State;
use crate::wanted::is_plain;
use crate::zone::Mark;
use crate::zone::bits::TOP;
use crate::zone::kind::MigrateType;

/// Blocks that are moved between two looks at the caller.
const CHUNK: usize = 64;

impl<M: PhysMap, C: Cpu, L: RawLock + 'static, K: CpuCall, P: Pressure> Buddy<M, C, L, K, P> {
    /// Allocates up to `count` blocks and hands each to `give`; how many.
    ///
    /// Stops at the first refusal, whose error is lost where something was given before it.
    ///
    /// # Errors
    ///
    /// [`AllocError`] where not even the first block could be given.
    ///
    /// # Examples
    ///
    /// ```
    /// # use kmem_buddy::{BootMap, Buddy, Config, RegionKind, ZoneLimits};
    /// # use kmem_hal::{FrameRequest, OffsetMap, PhysAddr, SingleCpu};
    /// # let arena = Box::leak(vec![0u8; 17 << 20].into_boxed_slice());
    /// # let base = (arena.as_mut_ptr().expose_provenance() + 0xf_ffff) & !0xf_ffff;
    /// # let mut map: BootMap = BootMap::new();
    /// # map.push(PhysAddr::new(0), 16 << 20, RegionKind::Usable)?;
    /// # let (memory, cpu) = unsafe { (OffsetMap::new(base, 4096), SingleCpu::new()) };
    /// # let buddy: Buddy<_, _> = Buddy::new(memory, cpu);
    /// # // SAFETY: X1: nobody else uses the memory of the map.
    /// # unsafe { buddy.init(&mut map, &Config::new().limits(ZoneLimits::NORMAL_ONLY))? };
    /// let mut pages = Vec::with_capacity(100);
    /// let given = buddy.alloc_bulk(&FrameRequest::ONE.movable(), 100, |page| pages.push(page))?;
    /// assert_eq!(given, pages.len());
    /// buddy.free_bulk(pages);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "alloc_pages_bulk")]
    pub fn alloc_bulk(
        &self,
        request: &FrameRequest,
        count: usize,
        mut give: impl FnMut(OwnedFrame),
    ) -> Result<usize, AllocError> {
        let state = self.state().ok_or(AllocError::NotInitialised)?;
        let mut given = 0;
        while given < count {
            if request.order.index() > TOP {
                match self.alloc_huge(request) {
                    Ok(frame) => give(frame),
                    Err(error) if given == 0 => return Err(error),
                    Err(_) => break,
                }
                given += 1;
                continue;
            }
            let mut out = [0; CHUNK];
            let some = &mut out[..(count - given).min(CHUNK)];
            let got = match self.hit_some(state, request, some) {
                Attempt::Got(got) => got,
                _ => match self.alloc_slow(state, request, some) {
                    Ok(got) => got,
                    Err(error) if given == 0 => return Err(error),
                    Err(_) => break,
                },
            };
            if !request.zeroed {
                for &first in &out[..got] {
                    // SAFETY: O1, O2, O3 as in `finish`: the block was taken for this call.
                    give(unsafe { OwnedFrame::from_raw(Frame::from_number(first), request.order) });
                }
                given += got;
                continue;
            }
            for (at, &first) in out[..got].iter().enumerate() {
                match self.finish(request, first) {
                    Ok(frame) => give(frame),
                    Err(error) => {
                        // No mapping for zeroing: what was taken and not given goes back.
                        for &first in &out[at + 1..got] {
                            self.give_back(first, request.order);
                        }
                        return if given == 0 { Err(error) } else { Ok(given) };
                    }
                }
                given += 1;
            }
        }
        Ok(given)
    }

    /// Fills `out` from the array of the zone that served last, else from the zones above the low watermark.
    fn hit_some(&self, state: &State<L>, request: &FrameRequest, out: &mut [u64]) -> Attempt {
        if is_plain(request) {
            let pin = self.cpu.pin();
            let arrays = self.own_area(&pin).and_then(CpuArea::enter);
            let (order, migrate) = (request.order.index(), MigrateType::of(request.mobility));
            let given = arrays.map_or(0, |arrays| arrays.pop_some(order, migrate, out));
            if given > 0 {
                return Attempt::Got(given);
            }
        }
        self.attempt(state, request, Mark::Low, out)
    }

    /// Frees blocks, of any orders.
    #[doc(alias = "free_pages_bulk")]
    #[doc(alias = "release_pages")]
    pub fn free_bulk(&self, blocks: impl IntoIterator<Item = OwnedFrame>) {
        let mut blocks = blocks.into_iter();
        loop {
            // The iterator is the caller's code: it runs outside the pin. Blocks of one order go together.
            let mut firsts = [0; CHUNK];
            let mut count = 0;
            let mut order = 0;
            let mut odd = None;
            while count < CHUNK {
                let Some(block) = blocks.next() else { break };
                let (first, its) = block.into_raw();
                if count == 0 {
                    order = its.index();
                } else if its.index() != order {
                    odd = Some((first.number(), its.index()));
                    break;
                }
                firsts[count] = first.number();
                count += 1;
            }
            self.put_some(&firsts[..count], order);
            if let Some((first, order)) = odd {
                self.put_some(&[first], order);
            } else if count < CHUNK {
                break;
            }
        }
    }

    /// Frees blocks of one order.
    fn put_some(&self, firsts: &[u64], order: usize) {
        let pin = self.cpu.pin();
        let area = self.own_area(&pin);
        let mut rest = firsts;
        while !rest.is_empty() {
            if let Some(arrays) = area.and_then(CpuArea::enter) {
                rest = &rest[arrays.push_some(rest, order)..];
            }
            // What is not of the window, or finds its array full.
            if let Some((&first, tail)) = rest.split_first() {
                self.put_or_note(area, first, order);
                rest = tail;
            }
        }
    }
}
