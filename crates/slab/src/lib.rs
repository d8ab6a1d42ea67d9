//! Object caches and kmalloc with per-CPU arrays, safe in interrupts.
#![no_std]
