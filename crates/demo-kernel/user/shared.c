/* Shared memory over a fork, and a file that two processes map: all see each other's writes. */
#include "user.h"

int main(int argc, char **argv, char **environment) {
    word memory = map(8 * PAGE, MAP_SHARED);
    AT(memory) = 1;
    long child = call(SYS_fork);
    if (child == 0) {
        EQUAL(AT(memory), 1);
        for (int i = 0; i < 8; i++) AT(memory + i * PAGE + 8) = 100 + i; /* pages that nobody touched before, too */
        AT(memory) = 2;
        while (AT(memory) != 3) call(SYS_sched_yield);
        AT(memory) = 4;
        return 0;
    }
    while (AT(memory) != 2) call(SYS_sched_yield);
    for (int i = 0; i < 8; i++) EQUAL(AT(memory + i * PAGE + 8), 100 + i);
    AT(memory) = 3;
    EQUAL(wait_for(child), 0);
    EQUAL(AT(memory), 4);

    long file = call(SYS_open, argc > 1 ? argv[1] : "/tmp/scratch", 2 /* O_RDWR */);
    CHECK(file >= 0);
    long shared = call(SYS_mmap, 0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, PAGE);
    long private = call(SYS_mmap, 0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, PAGE);
    CHECK(shared > 0 && private > 0);
    AT(shared) = 0x1234;
    EQUAL(AT(private), 0x1234);
    AT(private) = 0x5678; /* a copy of its own from here on */
    EQUAL(AT(shared), 0x1234);
    child = call(SYS_fork);
    if (child == 0) {
        AT(shared + PAGE) = 0x9abc;
        EQUAL(AT(private), 0x5678);
        EQUAL(call(SYS_msync, shared, 2 * PAGE, 4 /* MS_SYNC */), 0);
        return 0;
    }
    EQUAL(wait_for(child), 0);
    EQUAL(AT(shared + PAGE), 0x9abc);
    EQUAL(call(SYS_munmap, shared, 2 * PAGE), 0);
    word words[1] = { 0 };
    byte skip[PAGE];
    EQUAL(call(SYS_read, file, skip, PAGE), PAGE);
    EQUAL(call(SYS_read, file, words, 8), 8);
    EQUAL(words[0], 0x1234);
    EQUAL(call(SYS_close, file), 0);
    return 0;
}
