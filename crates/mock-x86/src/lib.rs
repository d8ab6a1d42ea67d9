//! A mock x86 machine with TLBs that stay stale until flushed: test a memory manager on it.
