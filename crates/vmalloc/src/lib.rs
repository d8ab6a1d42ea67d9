//! Kernel virtual mappings: vmalloc, ioremap, kmap, fixmap, kernel stacks.
#![no_std]
