//! Checks of [`FrameSource`] and [`FrameSink`], clauses `F1` to `F4`.

use std::collections::BTreeMap;

use kmem_hal::{
    FrameRequest, FrameSink, FrameSource, Order, OwnedFrame, PAGE_SIZE, PhysAddr, PhysMap,
};

use super::Report;

const NAME: &str = "FrameSource";

/// Checks a source of which nobody takes frames meanwhile. Takes all that it has, and gives it back.
///
/// `map` reaches the frames that the source gives. Blocks up to order `top` are asked for.
pub fn check<S: FrameSource + FrameSink, M: PhysMap>(
    report: &Report,
    source: &S,
    map: &M,
    top: Order,
) {
    requests(report, source, map, top);
    exhaustion(report, source, map);
    batches(report, source);
}

fn bytes(block: &OwnedFrame) -> usize {
    (block.range().count() * PAGE_SIZE) as usize
}

fn meets(report: &Report, request: &FrameRequest, block: &OwnedFrame) {
    report.check(NAME, "F2", block.order() == request.order, || {
        format!("order {} was asked for, {block:?} given", request.order)
    });
    let align = request.order.max(request.alignment);
    report.check(NAME, "F2", block.first().is_aligned(align), || {
        format!("{block:?} is not aligned to order {align}")
    });
    let last = block.range().last().map_or(0, |last| last.start().as_u64()) | (PAGE_SIZE - 1);
    report.check(NAME, "F2", last <= request.max_address.as_u64(), || {
        format!(
            "{block:?} ends at {last:#x}, the limit was {}",
            request.max_address
        )
    });
}

fn requests<S: FrameSource + FrameSink, M: PhysMap>(
    report: &Report,
    source: &S,
    map: &M,
    top: Order,
) {
    // Where memory ends and begins is not known here: what the source gives tells.
    let Ok(probe) = source.alloc(&FrameRequest::ONE) else {
        report.skip(NAME, "F2", "the source has no frame");
        return;
    };
    // Held meanwhile, so that the lowest and best aligned frame is not there for every request.
    let middle = PhysAddr::new(probe.first().start().as_u64() + PAGE_SIZE);
    for n in 0..=top.get() {
        let Some(order) = Order::new(n) else { break };
        let requests = [
            FrameRequest::new(order),
            FrameRequest::new(order).zeroed(),
            FrameRequest::new(order).below(middle),
            FrameRequest::new(Order::ZERO).aligned(order).zeroed(),
        ];
        for request in requests {
            let Ok(block) = source.alloc(&request) else {
                continue;
            };
            meets(report, &request, &block);
            let start = map.to_ptr(block.first().start());
            if request.zeroed {
                // SAFETY: the block is owned, by F1, and mapped.
                let dirty =
                    (0..bytes(&block)).find(|&at| unsafe { start.add(at).read_volatile() } != 0);
                report.check(NAME, "F2", dirty.is_none(), || {
                    format!("zeroes were asked for, byte {dirty:?} of {block:?} is not")
                });
            }
            // SAFETY: as above. The next one who asks for zeroes may get these frames.
            unsafe { start.write_bytes(0xa5, bytes(&block)) };
            source.free(block);
        }
    }
    source.free(probe);
}

/// Takes single frames until the source refuses, each marked with its own number.
fn take_all<S: FrameSource, M: PhysMap>(
    report: &Report,
    source: &S,
    map: &M,
) -> BTreeMap<u64, OwnedFrame> {
    let mut taken = BTreeMap::new();
    while let Ok(block) = source.alloc(&FrameRequest::ONE) {
        let number = block.first().number();
        let word = map.to_ptr(block.first().start()).cast::<u64>();
        // SAFETY: owned, by F1.
        unsafe { word.write_volatile(number) };
        if let Some(other) = taken.insert(number, block) {
            report.check(NAME, "F1", false, || {
                format!("{other:?} was given to two owners")
            });
            // Kept out of the way: giving it back twice is not ours to do.
            let _ = other.into_raw();
            break;
        }
        report.check(NAME, "F1", true, String::new);
    }
    for (number, block) in &taken {
        let word = map.to_ptr(block.first().start()).cast::<u64>();
        // SAFETY: owned, by F1.
        let found = unsafe { word.read_volatile() };
        report.check(NAME, "F1", found == *number, || {
            format!("frame {number:#x} does not keep what is written: {found:#x}")
        });
    }
    taken
}

fn exhaustion<S: FrameSource + FrameSink, M: PhysMap>(report: &Report, source: &S, map: &M) {
    let first = take_all(report, source, map);
    let count = first.len();
    // With nothing left, requests of all kinds are refused, and a refusal costs nothing.
    for n in 0..=10 {
        if let Some(order) = Order::new(n) {
            match source.alloc(&FrameRequest::new(order)) {
                Err(_) => {}
                Ok(block) => {
                    let double = block
                        .range()
                        .iter()
                        .any(|frame| first.contains_key(&frame.number()));
                    report.check(NAME, "F1", !double, || {
                        format!("{block:?} overlaps a frame that is owned")
                    });
                    if double {
                        let _ = block.into_raw();
                    } else {
                        source.free(block);
                    }
                }
            }
        }
    }
    let mut blocks = first.into_values();
    // Room for some: the refusals below have something to lose.
    let half: Vec<_> = blocks.by_ref().take(count / 2).collect();
    for block in half {
        source.free(block);
    }
    let impossible = FrameRequest::ONE.below(PhysAddr::new(PAGE_SIZE - 1));
    for _ in 0..count.min(64) {
        if let Ok(block) = source.alloc(&impossible) {
            report.check(NAME, "F2", false, || {
                format!("{block:?} is not below {}", impossible.max_address)
            });
            source.free(block);
        }
        if let Some(order) = Order::for_frames(count as u64 + 1)
            && let Ok(block) = source.alloc(&FrameRequest::new(order))
        {
            report.check(NAME, "F1", false, || {
                format!("{block:?} is larger than all that the source has")
            });
            source.free(block);
        }
    }
    let again = take_all(report, source, map);
    report.check(NAME, "F3", again.len() == count / 2, || {
        format!(
            "{} frames were free before some requests were refused, {} after",
            count / 2,
            again.len()
        )
    });
    for block in blocks.chain(again.into_values()) {
        source.free(block);
    }
    let last = take_all(report, source, map);
    report.check(NAME, "F4", last.len() == count, || {
        format!(
            "{count} frames were given and came back, {} can be given again",
            last.len()
        )
    });
    let mut last = last.into_values();
    source.free_batch(&mut || last.next());
}

fn batches<S: FrameSource + FrameSink>(report: &Report, source: &S) {
    let mut got = Vec::new();
    let answer = source.alloc_batch(&FrameRequest::ONE, 5, &mut |block| got.push(block));
    let said = answer.unwrap_or(0);
    report.check(NAME, "F2", said == got.len() && said <= 5, || {
        format!("alloc_batch says {said} blocks and gave {}", got.len())
    });
    source.free_batch(&mut || got.pop());
}
