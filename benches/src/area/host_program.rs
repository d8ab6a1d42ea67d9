//! A program of 40 mappings for the host's kernel, made here: what `fork_exec` forks and executes.
//!
//! ```text
//!   program         40 mappings of 64 KiB, every other one writable, 4 pages of each touched; end
//!   program again   the same, and then FORKS times: fork, "program" in the child, wait
//! ```
//!
//! Both ends of the fork are small: what is measured does not depend on how large the measuring process is. The image is one segment with the
//! code below, in a file of memory that children inherit.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;

/// Forks of one run of the parent.
pub const FORKS: u64 = 32;

/// Where the image lies, and the bytes of its headers.
const BASE: u64 = 0x40_0000;
const HEADER: usize = 64;
const ENTRY: usize = 56;
const CODE_AT: usize = HEADER + 2 * ENTRY;

core::arch::global_asm!(
    ".pushsection .rodata.kmem_bench_program,\"a\"",
    ".global kmem_bench_program_start",
    ".global kmem_bench_program_end",
    "kmem_bench_program_start:",
    "mov r14, rsp",
    "mov r12d, 40",
    // mmap, of which every other one may be written.
    "2:",
    "mov edx, 1",
    "test r12d, 1",
    "jnz 3f",
    "mov edx, 3",
    "3:",
    "mov eax, 9",
    "xor edi, edi",
    "mov esi, 65536",
    "mov r10d, 0x22",
    "mov r8, -1",
    "xor r9d, r9d",
    "syscall",
    "cmp rax, -4096",
    "ja 9f",
    "mov ecx, 4",
    "4:",
    "test r12d, 1",
    "jnz 5f",
    "mov byte ptr [rax], 1",
    "5:",
    "mov bl, byte ptr [rax]",
    "add rax, 4096",
    "dec ecx",
    "jnz 4b",
    "dec r12d",
    "jnz 2b",
    // With an argument it is the parent.
    "cmp qword ptr [r14], 1",
    "je 8f",
    "mov r12d, {forks}",
    "6:",
    "mov eax, 57",
    "syscall",
    "test rax, rax",
    "js 9f",
    "jnz 7f",
    "mov rdi, qword ptr [r14 + 8]",
    "push 0",
    "push rdi",
    "mov rsi, rsp",
    "xor edx, edx",
    "mov eax, 59",
    "syscall",
    "jmp 9f",
    // wait4, for a status of 0.
    "7:",
    "mov rdi, rax",
    "push 0",
    "mov rsi, rsp",
    "xor edx, edx",
    "xor r10d, r10d",
    "mov eax, 61",
    "syscall",
    "pop rbx",
    "test rax, rax",
    "js 9f",
    "test ebx, ebx",
    "jnz 9f",
    "dec r12d",
    "jnz 6b",
    "8:",
    "xor edi, edi",
    "mov eax, 60",
    "syscall",
    "9:",
    "mov edi, 1",
    "mov eax, 60",
    "syscall",
    "kmem_bench_program_end:",
    ".popsection",
    forks = const FORKS,
);

unsafe extern "C" {
    static kmem_bench_program_start: u8;
    static kmem_bench_program_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (
        &raw const kmem_bench_program_start,
        &raw const kmem_bench_program_end,
    );
    // SAFETY: the two labels stand around the bytes above, which nobody writes.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// The image: an ELF header, a segment to be read and executed, a stack that is not, and the code.
fn image() -> Vec<u8> {
    let code = code();
    let length = (CODE_AT + code.len()) as u64;
    let mut bytes = Vec::new();
    let half = |bytes: &mut Vec<u8>, value: u16| bytes.extend(value.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_le_bytes());
    let long = |bytes: &mut Vec<u8>, value: u64| bytes.extend(value.to_le_bytes());
    bytes.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    half(&mut bytes, 2);
    half(&mut bytes, 62);
    word(&mut bytes, 1);
    long(&mut bytes, BASE + CODE_AT as u64);
    long(&mut bytes, HEADER as u64);
    long(&mut bytes, 0);
    word(&mut bytes, 0);
    for value in [HEADER as u16, ENTRY as u16, 2, 0, 0, 0] {
        half(&mut bytes, value);
    }
    // PT_LOAD, PF_R | PF_X
    word(&mut bytes, 1);
    word(&mut bytes, 5);
    for value in [0, BASE, BASE, length, length, 4096] {
        long(&mut bytes, value);
    }
    // PT_GNU_STACK, PF_R | PF_W
    word(&mut bytes, 0x6474_e551);
    word(&mut bytes, 6);
    for value in [0, 0, 0, 0, 0, 16] {
        long(&mut bytes, value);
    }
    bytes.extend(code);
    bytes
}

/// The program, in a file that children inherit.
pub struct Program {
    _file: std::fs::File,
    path: String,
}

impl Program {
    /// Makes the file.
    ///
    /// # Panics
    ///
    /// Where the host has no such files.
    pub fn new() -> Self {
        let name = CString::new("kmem-program").expect("no zero in it");
        // SAFETY: a string with a zero at its end; the result is looked at.
        let file = unsafe { libc::memfd_create(name.as_ptr(), 0) };
        assert!(file >= 0, "the host has no files of memory");
        // SAFETY: a descriptor that was just made and is nobody else's.
        let mut file = unsafe { std::fs::File::from_raw_fd(file) };
        file.write_all(&image()).expect("memory for the image");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Self { _file: file, path }
    }

    /// Runs the parent to its end: [`FORKS`] forks of a program of 40 mappings, each of which executes another.
    ///
    /// # Panics
    ///
    /// Where a call of it fails.
    pub fn run(&self) {
        let status = Command::new(&self.path).arg("parent").status();
        let ended = status.is_ok_and(|status| status.success());
        assert!(ended, "the program of 40 mappings failed");
    }
}
