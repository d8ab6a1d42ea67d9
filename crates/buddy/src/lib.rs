//! Boot memory map, nodes, zones and a buddy page-frame allocator for any kernel.
#![no_std]
