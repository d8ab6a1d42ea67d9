//! Ordered ranges with gap search and lock-free readers: the index under an address space.
#![no_std]
