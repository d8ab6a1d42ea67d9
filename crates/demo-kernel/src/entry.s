# Every way into the kernel and out again: exceptions, interrupts, system calls, and the switch between stacks.
#
#   user mode ──┬ exception      CPU pushes on the thread's kernel stack (TSS.rsp0) ─┐
#               ├ interrupt      CPU pushes on an interrupt stack (IST), copied to ──┤── trap() ── trap_return
#               └ syscall        this file pushes the same frame ────────────────────┘
#   kernel mode ┬ exception      on the stack in use: only our own code faults on purpose
#               └ interrupt      on an interrupt stack: the prebuilt core keeps data below rsp
#
# Frames from user mode always lie at the top of the thread's kernel stack, with the vector registers below.

.section .text.entry, "ax", @progbits

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
    stub 64, 0                      # slot 22: a call from another CPU
    stub 65, 0                      # slot 23: the timer
    .p2align 4

# r15 last, so that it comes first in `TrapFrame`.
.macro push_registers
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
.endm

trap_common:
    push_registers
    push 2                          # DF and AC clear: the interrupted code may have been copying to user memory
    popfq                           # (CLAC is there only where SMAP is; IF is clear already)
    test byte ptr [rsp + 18 * 8], 3 # from user mode?
    jz 2f
    swapgs
    mov rdi, gs:[8]                 # the thread's kernel stack; for exceptions the frame is there already
    sub rdi, 22 * 8
    mov rsi, rsp
    mov rsp, rdi
    mov ecx, 22
    rep movsq
2:  mov rdi, rsp                    # &mut TrapFrame
    mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]                  # the interrupted code's vector registers
    call trap

# rbp = the frame; rsp = the vector registers below it.
.globl trap_return
trap_return:
    cli
    fxrstor64 [rsp]
    mov rsp, rbp
    test byte ptr [rsp + 18 * 8], 3
    jz 2f
    swapgs
2:  pop r15
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

# SYSCALL: rcx = user rip, r11 = user rflags, interrupts off (IA32_FMASK), the user's stack.
.p2align 4
.globl syscall_entry
syscall_entry:
    swapgs
    mov gs:[16], rsp
    mov rsp, gs:[8]
    push 0x2b                       # ss
    push qword ptr gs:[16]          # rsp
    push r11                        # rflags
    push 0x33                       # cs
    push rcx                        # rip
    push rax                        # in place of an error code: the call's number
    push 256                        # in place of a vector
    push_registers
    mov rdi, rsp
    mov rbp, rsp
    sub rsp, 512
    fxsave64 [rsp]
    call trap
    jmp trap_return

# switch_stacks(save: *mut u64, to: u64): goes on where `to` was left.
.p2align 4
.globl switch_stacks
switch_stacks:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi], rsp
    mov rsp, rsi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
