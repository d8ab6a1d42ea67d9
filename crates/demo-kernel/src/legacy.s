# From long mode to 32-bit paging and back: tables that kmem made for another processor's mode, walked by this one.
#
# legacy_walk(edi = root, esi = CR4 bits of the mode): runs `legacy_list`, which is (address, what, value, 0) in words of
# 32 bits, what = 0 to read into value, 1 to write value, 2 at the end. Called at its low address, on boot.s's tables.
.section .boot, "awx", @progbits
.code64
.globl legacy_walk
legacy_walk:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rax, cr4
    push rax
    mov [legacy_stack], rsp
    and eax, 0xfffdffff             # PCIDE: paging cannot end, nor begin, while it is set
    mov [legacy_cr4], rax
    mov rcx, cr3                    # the tag in its low bits means something else from here on
    mov cr4, rax
    mov [legacy_cr3], rcx
    mov eax, 0x10
    mov ds, eax
    mov ss, eax
    push 0x18                       # 32-bit code
    lea rax, [legacy32]
    push rax
    retfq
.code32
legacy32:
    mov eax, cr0
    and eax, 0x7fffffff             # paging off: long mode ends
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff             # LME off
    wrmsr
    mov cr4, esi
    mov cr3, edi
    mov eax, cr0
    or eax, 0x80000000              # paging on, in the mode that CR4 says
    mov cr0, eax
    lea ebx, [legacy_list]
1:  mov eax, [ebx]
    cmp dword ptr [ebx + 4], 1
    je 2f
    ja 3f
    mov edx, [eax]
    mov [ebx + 8], edx
    jmp 4f
2:  mov edx, [ebx + 8]
    mov [eax], edx
4:  add ebx, 16
    jmp 1b
3:  mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov eax, [legacy_cr4]
    mov cr4, eax
    mov eax, [legacy_cr3]
    and eax, 0xfffff000             # PCIDE can be set only under tag 0
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    ljmp 0x08, offset legacy64
.code64
legacy64:
    xor eax, eax
    mov ds, eax
    mov ss, eax
    mov rsp, [legacy_stack]
    pop rax
    mov cr4, rax
    mov rax, [legacy_cr3]
    mov cr3, rax
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

.section .boot.bss, "aw", @nobits
.p2align 4
legacy_stack: .skip 8
legacy_cr4:   .skip 8
legacy_cr3:   .skip 8
.p2align 4
.globl legacy_list
legacy_list:  .skip 16 * 32
