//! Address spaces with mmap, faults, fork with copy-on-write and exec, as Linux does them.
#![no_std]
