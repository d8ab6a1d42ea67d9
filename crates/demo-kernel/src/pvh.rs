//! What PVH hands over: the memory map and the command line.
//!
//! Pitfall: the start info, the map and the command line lie in memory that the map calls usable (below
//! 1 MiB). They are copied out here, before any frame is given to an allocator.

use kmem::boot::PvhEntry;

use crate::layout::direct;

/// Entries kept; QEMU's machines have fewer than 16.
const MAX: usize = 64;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    reserved: u32,
}

/// The copied hand-over.
pub struct Boot {
    map: [PvhEntry; MAX],
    entries: usize,
    line: [u8; 256],
    line_length: usize,
}

impl Boot {
    /// Copies the start info at physical address `at`.
    ///
    /// # Safety
    /// `at` must be what PVH passed in ebx, with memory still as the loader left it and the first 4 GiB in
    /// the direct map.
    pub unsafe fn read(at: u64) -> Self {
        let empty = PvhEntry {
            base: 0,
            length: 0,
            kind: 0,
            reserved: 0,
        };
        let mut boot = Self {
            map: [empty; MAX],
            entries: 0,
            line: [0; 256],
            line_length: 0,
        };
        // SAFETY: the caller's promise: start info, map and NUL-terminated line stand below 4 GiB.
        unsafe {
            let info = &*direct(at).cast::<StartInfo>();
            assert_eq!(info.magic, 0x336e_c578, "not booted through PVH");
            assert!(info.version >= 1, "this PVH has no memory map");
            assert!(
                info.map_entries as usize <= MAX,
                "{} map entries, room for {MAX}",
                info.map_entries
            );
            boot.entries = info.map_entries as usize;
            let map = direct(info.map).cast::<PvhEntry>();
            for i in 0..boot.entries {
                boot.map[i] = map.add(i).read_unaligned();
            }
            if info.command_line != 0 {
                let line = direct(info.command_line);
                while boot.line_length < boot.line.len() && *line.add(boot.line_length) != 0 {
                    boot.line[boot.line_length] = *line.add(boot.line_length);
                    boot.line_length += 1;
                }
            }
        }
        boot
    }

    /// The memory map, in the firmware's order.
    pub fn map(&self) -> &[PvhEntry] {
        &self.map[..self.entries]
    }

    /// The entries that are memory, in the order of their addresses.
    pub fn usable(&self) -> impl Iterator<Item = &PvhEntry> {
        self.map().iter().filter(|entry| entry.kind == 1)
    }

    /// The word after `scenario=` on the command line.
    pub fn scenario(&self) -> &str {
        self.word("scenario=").unwrap_or("boot")
    }

    /// The number after `cpus=` on the command line: how many the machine has.
    pub fn cpus(&self) -> u32 {
        self.word("cpus=")
            .and_then(|number| number.parse().ok())
            .unwrap_or(1)
    }

    /// The word after `name`, which ends in `=`.
    pub fn word(&self, name: &str) -> Option<&str> {
        let line = core::str::from_utf8(&self.line[..self.line_length]).unwrap_or("");
        line.split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(name))
    }
}
