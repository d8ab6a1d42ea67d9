/* Threads of one process on both CPUs, with unmap under their feet.
 *
 * The main thread replaces the memory of a page again and again, each time with a newer number in it, or with
 * nothing. The others read it all the time: they may fault, but once they began after the main thread said that number N
 * is gone, they must never read N again: that would be a translation that should have been flushed. */
#include "user.h"

enum { READERS = 3, ROUNDS = 300 };

static volatile word oldest, stop, reads[READERS], faults[READERS], bad;
static volatile int alive;
static word page;
static byte stacks[READERS][16384] __attribute__((aligned(16)));

extern byte probe_at[], probe_failed[];
__asm__(".globl probe, probe_at, probe_failed\n"
        "probe: \n"
        "probe_at: mov (%rdi), %rax\n"
        "ret\n"
        "probe_failed: mov $-1, %rax\n"
        "ret\n");
extern word probe(word address);

static void handler(int signal, void *info, void *context) {
    if (REGISTERS(context)[REG_RIP] != (word)probe_at) failed(__FILE__, __LINE__, "rip", REGISTERS(context)[REG_RIP]);
    REGISTERS(context)[REG_RIP] = (word)probe_failed;
}

__attribute__((used)) static void reader(word number) {
    while (!stop) {
        word least = oldest;
        word value = probe(page);
        if (value == (word)-1) faults[number]++;
        else if (value != 0 && value < least) bad = value;
        else reads[number]++;
    }
    __atomic_sub_fetch(&alive, 1, __ATOMIC_SEQ_CST);
    for (;;) call(SYS_exit, 0);
}

/* clone with a stack of its own; the new thread never returns from here. */
extern long start_thread(word flags, byte *stack, word number);
__asm__("start_thread: mov %rdx, %r8\n"
        "xor %edx, %edx\n xor %r10d, %r10d\n mov $56, %eax\n syscall\n"
        "test %rax, %rax\n jnz 1f\n"
        "mov %r8, %rdi\n call reader\n"
        "1: ret\n");

int main(int argc, char **argv, char **environment) {
    on_fault(handler);
    page = map(PAGE, MAP_PRIVATE);
    oldest = 1;
    AT(page) = 1;
    alive = READERS;
    for (word i = 0; i < READERS; i++) {
        /* CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM */
        CHECK(start_thread(0x50f00, stacks[i] + sizeof stacks[i], i) > 0);
    }
    for (word i = 0; i < READERS; i++)
        while (!reads[i]) call(SYS_sched_yield);
    for (word round = 2; round < ROUNDS; round++) {
        switch (round % 3) {
        case 0: /* gone, and back as a new page */
            EQUAL(call(SYS_munmap, page, PAGE), 0);
            break;
        case 1: /* no access, then thrown away */
            EQUAL(call(SYS_mprotect, page, PAGE, PROT_NONE), 0);
            break;
        case 2: /* emptied in place */
            EQUAL(call(SYS_madvise, page, PAGE, 4), 0);
            break;
        }
        for (volatile int wait = 0; wait < 2000; wait++) {}
        oldest = round; /* whatever was there before must not be seen by a read that begins now */
        EQUAL(call(SYS_mmap, page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), page);
        AT(page) = round;
        for (volatile int wait = 0; wait < 2000; wait++) {}
        EQUAL(bad, 0);
    }
    stop = 1;
    while (alive) call(SYS_sched_yield);
    EQUAL(bad, 0);
    word sum = 0;
    for (int i = 0; i < READERS; i++) sum += faults[i];
    print("reads refused while the page was gone: "); print_number(sum); print("\n");
    return 0;
}
