/* A frame must not be used again before every CPU has forgotten it.
 *
 * The reader watches memory that the main thread gives back and fills with something else elsewhere: seeing the other
 * thing through the old address would be a stale translation to a frame that has a new owner. */
#include "user.h"

enum { PAGES = 8, ROUNDS = 60, SECRET = 0x5ec7e7 };

static volatile word stop, bad, ready;
static volatile int alive;
static word memory;
static byte stack[16384] __attribute__((aligned(16)));

extern byte probe_at[], probe_failed[];
__asm__(".globl probe, probe_at, probe_failed\n"
        "probe: \n"
        "probe_at: mov (%rdi), %rax\n"
        "ret\n"
        "probe_failed: xor %eax, %eax\n"
        "ret\n");
extern word probe(word address);

static void handler(int signal, void *info, void *context) {
    if (REGISTERS(context)[REG_RIP] != (word)probe_at) failed(__FILE__, __LINE__, "rip", REGISTERS(context)[REG_RIP]);
    REGISTERS(context)[REG_RIP] = (word)probe_failed;
}

__attribute__((used)) static void reader(void) {
    while (!stop) {
        for (int i = 0; i < PAGES; i++)
            if (probe(memory + i * PAGE) == SECRET) bad++;
        ready++;
    }
    alive = 0;
    for (;;) call(SYS_exit, 0);
}

extern long start_thread(word flags, byte *stack);
__asm__("start_thread: xor %edx, %edx\n xor %r10d, %r10d\n mov $56, %eax\n syscall\n"
        "test %rax, %rax\n jnz 1f\n call reader\n"
        "1: ret\n");

int main(int argc, char **argv, char **environment) {
    on_fault(handler);
    memory = map(PAGES * PAGE, MAP_PRIVATE);
    alive = 1;
    CHECK(start_thread(0x50f00, stack + sizeof stack) > 0);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < PAGES; i++) AT(memory + i * PAGE) = 1;
        word before = ready;
        while (ready < before + 2) call(SYS_sched_yield); /* the reader's CPU has the translations */
        EQUAL(call(SYS_madvise, memory, PAGES * PAGE, 4), 0); /* MADV_DONTNEED: the frames come free */
        word other = map(PAGES * PAGE, MAP_PRIVATE);
        for (int i = 0; i < PAGES; i++) AT(other + i * PAGE) = SECRET; /* and have a new owner */
        before = ready;
        while (ready < before + 2) call(SYS_sched_yield);
        EQUAL(call(SYS_munmap, other, PAGES * PAGE), 0);
        EQUAL(bad, 0);
    }
    stop = 1;
    while (alive) call(SYS_sched_yield);
    EQUAL(bad, 0);
    return 0;
}
