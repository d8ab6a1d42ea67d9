/* Out of memory: the process that asks for the last page ends, and the others go on. `oom SIZE`: only where memory is small. */
#include "user.h"

int main(int argc, char **argv, char **environment) {
    if (argc < 2) return 0; /* not on Linux: it may have more memory than patience */
    word memory = map(64 * PAGE, MAP_PRIVATE);
    for (int i = 0; i < 64; i++) AT(memory + i * PAGE) = i;
    for (int round = 0; round < 2; round++) {
        long child = call(SYS_fork);
        if (child == 0) {
            word hog = map(1L << 40, MAP_PRIVATE);
            for (word at = 0;; at += PAGE) AT(hog + at) = at;
        }
        EQUAL(wait_for(child) & 0x7f, SIGKILL);
        for (int i = 0; i < 64; i++) EQUAL(AT(memory + i * PAGE), i);
        for (int i = 0; i < 64; i++) AT(memory + i * PAGE) = i;
    }
    /* The kernel's own writes end the same way. */
    long child = call(SYS_fork);
    if (child == 0) {
        word hog = map(1L << 40, MAP_PRIVATE);
        for (word at = 0;; at += PAGE)
            if (call(SYS_uname, hog + at) < 0) leave(3);
    }
    int status = wait_for(child);
    CHECK(status == 3 << 8 || (status & 0x7f) == SIGKILL);
    return 0;
}
