# From PVH's entry to `kernel_main`, the trampoline of further CPUs, and the exception stubs.
#
# PVH (the Xen HVM direct boot ABI) enters in 32-bit protected mode with flat segments, paging off, no
# stack, and ebx = physical address of the start info. Multiboot 2 (GRUB) enters in the same state at the same place,
# with a number in eax and its own information behind ebx, of which a start info is made.

.section .note.pvh, "a", @note
.p2align 2
    .long 4, 8, 18                  # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .multiboot, "a", @progbits
.p2align 3
multiboot_header:                   # no wish but to be loaded
    .long 0xe85250d6, 0, 24, 0x17adaf12 # magic, i386, bytes, and what makes their sum 0
    .long 0, 8

# ---------------------------------------------------------------- 32 bits
.section .boot, "awx", @progbits
.code32
.globl pvh_entry
pvh_entry:
    cli
    cld
    lea esp, [boot_stack_end]
    cmp eax, 0x36d76289
    jne 1f
    call from_multiboot
1:  mov esi, ebx

    # The top table reaches physical memory three times: the first 4 GiB where they are (entry 0, until the CPU
    # has left this file) and at the image (entry 511), and 512 GiB at the direct map (entry 256): 16 GiB there where
    # the CPU has no leaves of 1 GiB.
    lea eax, [boot_pdpt + 3]
    mov dword ptr [boot_pml4], eax
    lea eax, [boot_pdpt_direct + 3]
    mov dword ptr [boot_pml4 + 256 * 8], eax
    lea eax, [boot_pdpt_image + 3]
    mov dword ptr [boot_pml4 + 511 * 8], eax
    lea eax, [boot_pd + 3]          # directories, 1 GiB each
    mov dword ptr [boot_pdpt_image + 510 * 8], eax
    xor ecx, ecx
2:  mov dword ptr [boot_pdpt + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 2b
    xor ecx, ecx
    mov eax, 0x83                   # present, writable, 2 MiB; the address is 64 bits wide
    xor edx, edx
3:  mov dword ptr [boot_pd + ecx * 8], eax
    mov dword ptr [boot_pd + ecx * 8 + 4], edx
    add eax, 0x200000
    adc edx, 0
    inc ecx
    cmp ecx, 16 * 512
    jne 3b
    lea eax, [boot_pd + 3]
    xor ecx, ecx
8:  mov dword ptr [boot_pdpt_direct + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 16
    jne 8b
    mov eax, 0x80000001
    cpuid
    bt edx, 26                      # leaves of 1 GiB
    jnc 9f
    xor ecx, ecx
    mov eax, 0x83                   # as above, 1 GiB
    xor edx, edx
4:  mov dword ptr [boot_pdpt_direct + ecx * 8], eax
    mov dword ptr [boot_pdpt_direct + ecx * 8 + 4], edx
    add eax, 0x40000000
    adc edx, 0
    inc ecx
    cmp ecx, 512
    jne 4b
9:  lea eax, [boot_pml4 + 3]        # with five levels the old top table stands below a new one
    mov dword ptr [boot_pml5], eax
    mov dword ptr [boot_pml5 + 511 * 8], eax

    call enter_long_mode
    lgdt [boot_gdt_pointer]
    ljmp 0x08, offset boot64

# Makes PVH's start info of Multiboot's (ebx), and leaves its address in ebx. Both have the same entries of a map.
from_multiboot:
    mov dword ptr [start_info], 0x336ec578
    mov dword ptr [start_info + 4], 1
    add ebx, 8                      # to the first tag: kind, size, and what it says
1:  mov eax, [ebx]
    mov edx, [ebx + 4]
    cmp eax, 1                      # command line
    jne 2f
    lea ecx, [ebx + 8]
    mov [start_info + 24], ecx
2:  cmp eax, 6                      # memory map
    jne 3f
    lea ecx, [ebx + 16]
    mov [start_info + 40], ecx
    lea ecx, [edx - 16]             # its bytes, 24 an entry
4:  inc dword ptr [start_info + 48]
    sub ecx, 24
    ja 4b
3:  add edx, 7
    and edx, -8
    add ebx, edx
    test eax, eax                   # the last one
    jnz 1b
    lea ebx, [start_info]
    ret

enter_long_mode:
    mov eax, 7
    xor ecx, ecx
    cpuid
    lea edx, [boot_pml4]
    mov eax, cr4
    or eax, 0x6a0                   # PAE, PGE, OSFXSR, OSXMMEXCPT
    bt ecx, 16                      # LA57: five levels where the CPU has them
    jnc 5f
    or eax, 0x1000
    lea edx, [boot_pml5]
5:  test ebx, 0x80                  # SMEP
    jz 6f
    or eax, 0x100000
6:  test ebx, 0x100000              # SMAP
    jz 7f
    or eax, 0x200000
7:  mov cr4, eax
    mov cr3, edx
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x901                   # SCE, LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb             # EM off: the prebuilt core uses SSE
    or eax, 0x80010003              # PG, WP (the kernel obeys read-only pages too), MP, PE
    mov cr0, eax
    ret

# ---------------------------------------------------------------- 64 bits
.code64
boot64:
    mov eax, 0x10
    mov ss, eax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    movabs rsp, offset kernel_stack_end
    xor ebp, ebp
    mov edi, esi
    movabs rax, offset kernel_main
    call rax
    ud2

.p2align 3
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08: 64-bit code
    .quad 0x00cf93000000ffff        # 0x10: data
    .quad 0x00cf9b000000ffff        # 0x18: 32-bit code, for the trampoline
boot_gdt_pointer:
    .word 31
    .quad boot_gdt

# ---------------------------------------------------------------- further CPUs
# Copied to physical 0x8000, where a SIPI with vector 8 starts a CPU in real mode. LLVM's Intel syntax takes no
# difference of labels as an operand, so two instructions are given as bytes.
.globl trampoline, trampoline_end
.code16
trampoline:
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0xbb                # mov ebx, imm32
    .long 0x8000 + (trampoline_gdt - trampoline)
    lgdt [ebx]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                # ljmp ptr16:32
    .long 0x8000 + (trampoline32 - trampoline)
    .word 0x18
.code32
trampoline32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x8ff0                 # the rest of the trampoline's own page
    lea eax, [enter_long_mode]
    call eax
    ljmp 0x08, offset boot64_further
.p2align 3
trampoline_gdt:
    .word 31
    .long boot_gdt
trampoline_end:

.code64
boot64_further:
    mov eax, 0x10
    mov ss, eax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    movabs rax, offset FURTHER_STACK
    mov rsp, [rax]
    xor ebp, ebp
    movabs rax, offset further_main
    call rax
    ud2

.section .boot.bss, "aw", @nobits
.p2align 12
.globl boot_pml4
boot_pml4:       .skip 4096
boot_pml5:       .skip 4096
.globl boot_pml5, boot_pdpt
boot_pdpt:       .skip 4096
boot_pdpt_direct: .skip 4096
boot_pdpt_image: .skip 4096
boot_pd:         .skip 16 * 4096         # 1 GiB each; the first four are also the identity map and the image's
start_info:      .skip 56
                 .skip 256
boot_stack_end:

.section .bss.stack, "aw", @nobits
.p2align 12
    .skip 65536
kernel_stack_end:
