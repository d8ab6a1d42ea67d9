/* Demand zero, and a stack that grows: nothing is there until it is touched, and then it is zero. */
#include "user.h"

static byte untouched[64 * PAGE];

static word deep(int levels) {
    volatile byte room[3000];
    room[0] = levels;
    return levels ? deep(levels - 1) + room[0] : room[0];
}

static word below;
static void handler(int signal, void *info, void *context) {
    EQUAL(signal, SIGSEGV);
    below = REGISTERS(context)[REG_CR2];
    leave(below == AT((byte *)info + 16) && below == 16 ? 7 : 1);
}

int main(int argc, char **argv, char **environment) {
    for (int i = 0; i < 64; i++) EQUAL(AT(untouched + i * PAGE + 8 * i), 0);
    for (int i = 0; i < 64; i++) untouched[i * PAGE] = i;
    for (int i = 0; i < 64; i++) EQUAL(untouched[i * PAGE], i);

    word memory = map(256 * PAGE, MAP_PRIVATE);
    byte present[256];
    EQUAL(call(SYS_mincore, memory, 64 * PAGE, present), 0);
    for (int i = 0; i < 64; i++) EQUAL(present[i] & 1, 0);
    for (int i = 0; i < 64; i += 2) AT(memory + i * PAGE) = i;      /* write faults */
    for (int i = 1; i < 64; i += 2) EQUAL(AT(memory + i * PAGE), 0); /* read faults: the zero page */
    for (int i = 1; i < 64; i += 2) AT(memory + i * PAGE) = i;      /* and its copies */
    for (int i = 0; i < 64; i++) EQUAL(AT(memory + i * PAGE), i);
    EQUAL(call(SYS_madvise, memory, 64 * PAGE, 4), 0);              /* MADV_DONTNEED */
    for (int i = 0; i < 64; i++) EQUAL(AT(memory + i * PAGE), 0);

    CHECK(deep(1000) > 0); /* 3 MiB of stack */

    long child = call(SYS_fork);
    if (child == 0) {
        on_fault(handler);
        AT(16) = 1;
    }
    EQUAL(wait_for(child), 7 << 8);
    child = call(SYS_fork);
    if (child == 0) deep(4000); /* beyond the limit of 8 MiB */
    EQUAL(wait_for(child) & 0x7f, SIGSEGV);
    return 0;
}
