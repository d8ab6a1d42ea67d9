//! kmem on a host: a fast platform over an mmap arena, and HostHeap as a global allocator.
