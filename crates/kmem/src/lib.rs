//! A complete memory manager for any kernel: the facade of the kmem family.
#![no_std]
