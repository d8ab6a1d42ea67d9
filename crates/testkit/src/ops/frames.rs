//! Operations on a frame allocator.

use arbitrary::Arbitrary;
use kmem_hal::{FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PhysMap};
use proptest::prelude::*;

use super::{Disagreement, strategy};

/// One operation on a frame allocator.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameOp {
    /// Allocate a block of order `order % 11`.
    Alloc {
        /// The order, modulo 11.
        order: u8,
        /// Whether it must be zeroed.
        zeroed: bool,
    },
    /// Allocate up to `count % 32` single frames at once.
    Batch {
        /// How many, modulo 32.
        count: u8,
    },
    /// Free the block number `which` of those held, modulo their number.
    Free {
        /// Which one.
        which: u16,
    },
    /// Cut a held block in two halves, which are then freed apart.
    Split {
        /// Which one.
        which: u16,
    },
    /// Free everything held.
    FreeAll,
}

strategy!(
    FrameOp,
    prop_oneof![
        8 => (prop_oneof![4 => 0u8..4, 1 => 0u8..11], any::<bool>())
            .prop_map(|(order, zeroed)| Self::Alloc { order, zeroed }),
        2 => any::<u8>().prop_map(|count| Self::Batch { count }),
        7 => any::<u16>().prop_map(|which| Self::Free { which }),
        2 => any::<u16>().prop_map(|which| Self::Split { which }),
        1 => Just(Self::FreeAll),
    ]
);

/// Frames in somebody's hands, marked in memory.
struct Held<'a, M> {
    map: &'a M,
    blocks: Vec<(OwnedFrame, u64)>,
    stamp: u64,
}

impl<M: PhysMap> Held<'_, M> {
    /// Takes a block in: checks it, and writes a stamp into every frame of it.
    fn take(&mut self, block: OwnedFrame, request: &FrameRequest) -> Result<(), String> {
        let range = block.range();
        if block.order() != request.order || !block.first().is_aligned(block.order()) {
            return Err(format!("{request:?} was answered with {block:?}"));
        }
        for (other, _) in &self.blocks {
            if !other.range().intersection(range).is_empty() {
                return Err(format!("{block:?} overlaps {other:?}, which is held"));
            }
        }
        self.stamp += 1;
        for frame in range.iter() {
            let word = self.map.to_ptr(frame.start()).cast::<u64>();
            for at in [0, 511] {
                // SAFETY: the block is owned, by the source's F1, which the stamps are there to check.
                unsafe {
                    if request.zeroed && word.add(at).read_volatile() != 0 {
                        return Err(format!("{frame:?} of {block:?} is not zeroed"));
                    }
                    word.add(at).write_volatile(self.stamp << 8 | at as u64 & 1);
                }
            }
        }
        self.blocks.push((block, self.stamp));
        Ok(())
    }

    /// Lets a block go: the stamps must still be there.
    fn release(&mut self, which: usize) -> Result<Option<OwnedFrame>, String> {
        if self.blocks.is_empty() {
            return Ok(None);
        }
        let (block, stamp) = self.blocks.swap_remove(which % self.blocks.len());
        for frame in block.range().iter() {
            let word = self.map.to_ptr(frame.start()).cast::<u64>();
            for at in [0, 511] {
                // SAFETY: as above.
                let found = unsafe { word.add(at).read_volatile() };
                if found != stamp << 8 | at as u64 & 1 {
                    return Err(format!(
                        "{frame:?} of {block:?} was changed by somebody else"
                    ));
                }
            }
        }
        Ok(Some(block))
    }
}

/// Runs operations on a frame allocator and frees everything in the end.
///
/// Checks that blocks are what was asked for, apart from each other, zeroed on request, and that nobody else writes to them. A
/// refusal is no disagreement: whether one is due is the allocator's own test's to say.
///
/// # Errors
///
/// The first [`Disagreement`].
pub fn run_frames<S, M>(source: &S, map: &M, ops: &[FrameOp]) -> Result<(), Disagreement>
where
    S: FrameSource + FrameSink,
    M: PhysMap,
{
    let mut held = Held {
        map,
        blocks: Vec::new(),
        stamp: 0,
    };
    for (at, op) in ops.iter().enumerate() {
        apply(source, &mut held, op).map_err(|what| Disagreement::new(at, op, what))?;
    }
    apply(source, &mut held, &FrameOp::FreeAll)
        .map_err(|what| Disagreement::new(ops.len(), &FrameOp::FreeAll, what))
}

fn apply<S, M>(source: &S, held: &mut Held<'_, M>, op: &FrameOp) -> Result<(), String>
where
    S: FrameSource + FrameSink,
    M: PhysMap,
{
    match *op {
        FrameOp::Alloc { order, zeroed } => {
            let mut request = FrameRequest::new(Order::new(order % 11).unwrap_or_default());
            request.zeroed = zeroed;
            if let Ok(block) = source.alloc(&request) {
                held.take(block, &request)?;
            }
        }
        FrameOp::Batch { count } => {
            let mut got = Vec::new();
            let wanted = usize::from(count % 32);
            let said = source.alloc_batch(&FrameRequest::ONE, wanted, &mut |block| got.push(block));
            let given = got.len();
            for block in got {
                held.take(block, &FrameRequest::ONE)?;
            }
            if said.unwrap_or(0) != given || given > wanted {
                return Err(format!(
                    "{said:?} for a batch of {wanted}, {given} were given"
                ));
            }
        }
        FrameOp::Free { which } => {
            if let Some(block) = held.release(usize::from(which))? {
                source.free(block);
            }
        }
        FrameOp::Split { which } => {
            if let Some(block) = held.release(usize::from(which))? {
                match block.split() {
                    Ok((lower, upper)) => {
                        source.free(upper);
                        source.free(lower);
                    }
                    Err(single) => source.free(single),
                }
            }
        }
        FrameOp::FreeAll => {
            let mut error = None;
            source.free_batch(&mut || match held.release(0) {
                Ok(block) => block,
                Err(what) => {
                    error = Some(what);
                    None
                }
            });
            if let Some(what) = error {
                return Err(what);
            }
        }
    }
    Ok(())
}
