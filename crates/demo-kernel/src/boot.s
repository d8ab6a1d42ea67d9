# From PVH's entry to `kernel_main`, the trampoline of further CPUs, and the exception stubs.
#
# PVH (the Xen HVM direct boot ABI) enters in 32-bit protected mode with flat segments, paging off, no
# stack, and ebx = physical address of the start info.

.section .note.pvh, "a", @note
.p2align 2
    .long 4, 8, 18                  # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

# ---------------------------------------------------------------- 32 bits
.section .boot, "awx", @progbits
.code32
.globl pvh_entry
pvh_entry:
    cli
    cld
    lea esp, [boot_stack_end]
    mov esi, ebx

    # The top table reaches the first 4 GiB of physical memory three times: where it is (0, until the
    # CPU has left this file), at the direct map (entry 256), and at the image (entry 511).
    lea eax, [boot_pdpt + 3]
    mov dword ptr [boot_pml4], eax
    mov dword ptr [boot_pml4 + 256 * 8], eax
    lea eax, [boot_pdpt_image + 3]
    mov dword ptr [boot_pml4 + 511 * 8], eax
    lea eax, [boot_pd + 3]          # four directories, 1 GiB each
    mov dword ptr [boot_pdpt_image + 510 * 8], eax
    xor ecx, ecx
2:  mov dword ptr [boot_pdpt + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 2b
    xor ecx, ecx
    mov eax, 0x83                   # present, writable, 2 MiB
3:  mov dword ptr [boot_pd + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 3b

    call enter_long_mode
    lgdt [boot_gdt_pointer]
    ljmp 0x08, offset boot64

enter_long_mode:
    mov eax, cr4
    or eax, 0x6a0                   # PAE, PGE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    lea eax, [boot_pml4]
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x900                   # LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb             # EM off: the prebuilt core uses SSE
    or eax, 0x80010003              # PG, WP (the kernel obeys read-only pages too), MP, PE
    mov cr0, eax
    ret

# ---------------------------------------------------------------- 64 bits
.code64
boot64:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov ss, eax
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
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov ss, eax
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
boot_pdpt:       .skip 4096
boot_pdpt_image: .skip 4096
boot_pd:         .skip 4 * 4096
                 .skip 256
boot_stack_end:

.section .bss.stack, "aw", @nobits
.p2align 12
    .skip 65536
kernel_stack_end:

# ---------------------------------------------------------------- exceptions
# One stub a vector. Each pushes an error code where the CPU pushed none, and its own number; the rest is
# shared. Every gate switches to a stack of its own (IST): the prebuilt core keeps data below rsp.
.section .text.traps, "ax", @progbits
.macro stub vector, has_error
    .p2align 4
    .if \has_error == 0
    push 0
    .endif
    push \vector
    jmp trap_common
.endm

.p2align 4
.globl trap_stubs
trap_stubs:                         # 16 bytes each
    stub 0, 0
    stub 1, 0
    stub 2, 0
    stub 3, 0
    stub 4, 0
    stub 5, 0
    stub 6, 0
    stub 7, 0
    stub 8, 1
    stub 9, 0
    stub 10, 1
    stub 11, 1
    stub 12, 1
    stub 13, 1
    stub 14, 1
    stub 15, 0
    stub 16, 0
    stub 17, 1
    stub 18, 0
    stub 19, 0
    stub 20, 0
    stub 21, 1
    stub 64, 0                      # slot 22: a call from another CPU (smp.rs)
    .p2align 4

trap_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rdi, rsp                    # &mut TrapFrame
    mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]                  # the interrupted code's vector registers
    cld
    call trap
    fxrstor64 [rsp]
    mov rsp, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq
