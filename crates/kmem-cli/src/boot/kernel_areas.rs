//! The kernel's own mappings, made, written through the MMU, and looked at where nothing may be.
//!
//! ```text
//!   vmalloc  [ 256 pages ][guard]      frames from anywhere, one after the other only here
//!   stack    [guard][ 4 pages ][guard]
//!   ioremap  [ registers of the local APIC ][guard]   where the machine has no memory at that address
//! ```
//! Words are written so that each crosses a border of pages: a page in the wrong place, or one that two areas share, shows
//! in what is read back.

use crate::input::map::MemoryMap;
use crate::world::types::{KernelAreas, Mach};
use kmem_hal::{PAGE_SIZE, PhysAddr, VirtAddr};
use kmem_mock_x86::AccessKind;
use kmem_paging::MemoryType;

/// Bytes that are asked of vmalloc.
const MEMORY: u64 = 1 << 20;
/// Pages of a kernel stack (Linux: `THREAD_SIZE`).
const STACK: u64 = 4;
/// Where x86 processors have the registers of their local APIC after reset (Intel SDM volume 3, 12.4.1).
const APIC: u64 = 0xfee0_0000;

/// What was made.
#[derive(Debug, Default)]
pub struct Made {
    memory: Option<VirtAddr>,
    /// One past the top.
    stack: Option<VirtAddr>,
    window: Option<VirtAddr>,
    /// Why something could not be made.
    pub refused: Option<String>,
}

/// Makes one area of each kind.
pub fn make(areas: &KernelAreas, map: &MemoryMap) -> Made {
    let mut made = Made::default();
    let mut refused = None;
    let mut keep = |what: &str, got: Result<VirtAddr, kmem_vmalloc::VmallocError>| match got {
        Ok(address) => Some(address),
        Err(why) => {
            refused = Some(format!("{what}: {why}"));
            None
        }
    };
    made.memory = keep("vmalloc", areas.alloc(MEMORY));
    made.stack = keep("stack", areas.alloc_stack(STACK));
    let is_memory = map
        .usable()
        .iter()
        .any(|(start, end)| *start < APIC + PAGE_SIZE && APIC < *end);
    if !is_memory {
        made.window = keep(
            "ioremap",
            areas.ioremap(PhysAddr::new(APIC), PAGE_SIZE, MemoryType::Uncached),
        );
    }
    made.refused = refused;
    made
}

impl Made {
    /// First and last address of the memory, then of the stack.
    fn ranges(&self) -> Vec<(u64, u64)> {
        let memory = self.memory.map(|a| (a.as_u64(), a.as_u64() + MEMORY));
        let stack = self
            .stack
            .map(|top| (top.as_u64() - STACK * PAGE_SIZE, top.as_u64()));
        memory.into_iter().chain(stack).collect()
    }

    /// Writes a word across each border of pages of all areas, and reads all of them back: (written, right).
    pub fn words(&self, machine: Mach) -> (u64, u64) {
        let cpu = machine.cpu(0);
        let places: Vec<u64> = self
            .ranges()
            .iter()
            .flat_map(|(start, end)| (start + PAGE_SIZE - 4..end - 4).step_by(PAGE_SIZE as usize))
            .collect();
        for place in &places {
            // A write that fails shows as a word that is not there.
            let _ = cpu.write(*place, &word(*place));
        }
        let right = places.iter().filter(|place| {
            let mut read = [0; 8];
            cpu.read(**place, &mut read).is_ok() && read == word(**place)
        });
        (places.len() as u64, right.count() as u64)
    }

    /// Looks behind each area and below the stack: (looked at, faulted).
    pub fn guards(&self, machine: Mach) -> (u64, u64) {
        let mut places: Vec<u64> = self.ranges().iter().map(|(_, end)| *end).collect();
        places.extend(self.stack.map(|top| top.as_u64() - STACK * PAGE_SIZE - 1));
        places.extend(self.window.map(|w| w.as_u64() + PAGE_SIZE));
        let faulted = places
            .iter()
            .filter(|p| machine.cpu(0).translate(**p, AccessKind::Read).is_err())
            .count();
        (places.len() as u64, faulted as u64)
    }

    /// Pages that are windows and no memory.
    pub fn window_pages(&self) -> u64 {
        u64::from(self.window.is_some())
    }

    /// Gives everything back, flushed.
    pub fn free(&self, areas: &KernelAreas) {
        // What is not there any more shows in the figures of the end.
        let _ = self.memory.map(|address| areas.free(address));
        let _ = self.stack.map(|top| areas.free_stack(top, STACK));
        let _ = self.window.map(|address| areas.free(address));
        areas.purge();
    }
}

fn word(place: u64) -> [u8; 8] {
    place.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

/// Sums the pages of `/proc/vmallocinfo` as a reader of the text would.
pub fn printed_pages(text: &str) -> u64 {
    let fields = text
        .split_whitespace()
        .filter_map(|w| w.strip_prefix("pages="));
    fields.filter_map(|n| n.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::default_map;
    use crate::input::map;
    use crate::world::World;

    #[test]
    fn areas_are_made_and_come_back() {
        let map = map::read(default_map().unwrap()).unwrap();
        let world = World::new(&map, 2).unwrap();
        let made = make(world.areas(), &map);
        assert_eq!(made.refused, None);
        assert_eq!(made.words(world.machine()), (255 + 3, 255 + 3));
        assert_eq!(made.guards(world.machine()), (4, 4));
        assert_eq!(printed_pages(&world.areas().info().to_string()), 260);
        made.free(world.areas());
        assert_eq!(world.areas().used(), (0, 0));
        // A mapping that is gone faults, although it was used through the TLB a moment ago.
        assert_eq!(made.words(world.machine()).1, 0);
    }
}
