//! Page tables of every x86 mode, cursors over them, and a flush protocol that types enforce.
#![no_std]
