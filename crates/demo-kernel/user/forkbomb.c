/* A fork bomb: bounded by the number of processes, and over when its processes are. */
#include "user.h"

int main(int argc, char **argv, char **environment) {
    volatile word *go = (word *)map(PAGE, MAP_SHARED);
    for (int round = 0; round < 2; round++) {
        *go = 0;
        long children[128];
        int count = 0;
        for (; count < 128; count++) {
            children[count] = call(SYS_fork);
            if (children[count] < 0) break;
            if (children[count] == 0) {
                while (!*go) {
                    long more = call(SYS_fork); /* children of children: no room for them either, in the end */
                    if (more == 0) leave(0);
                    if (more > 0) EQUAL(wait_for(more), 0);
                    call(SYS_sched_yield);
                }
                leave(0);
            }
        }
        if (argc > 1) CHECK(count < 128); /* on Linux the limit is another */
        if (count < 128) CHECK(children[count] == -EAGAIN || children[count] == -ENOMEM);
        CHECK(count > 8);
        *go = 1;
        for (int i = 0; i < count; i++) EQUAL(wait_for(children[i]), 0);
        EQUAL(call(SYS_wait4, -1, 0, 0, 0), -ECHILD);
    }
    return 0;
}
