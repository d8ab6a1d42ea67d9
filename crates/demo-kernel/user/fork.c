/* Copy on write in both directions, three generations deep: nobody sees what another writes after the fork. */
#include "user.h"

enum { PAGES = 24 };
static word memory;

static void expect(word value) {
    for (int i = 0; i < PAGES; i++) EQUAL(AT(memory + i * PAGE), value * 1000 + i);
}

static void fill(word value) {
    for (int i = 0; i < PAGES; i++) AT(memory + i * PAGE) = value * 1000 + i;
}

static void generation(int number) {
    expect(number - 1); /* what the parent had at the fork, though it writes meanwhile */
    fill(number);
    if (number < 3) {
        long child = call(SYS_fork);
        CHECK(child >= 0);
        if (child == 0) {
            generation(number + 1);
            leave(0);
        }
        fill(number + 10);
        EQUAL(wait_for(child), 0);
        expect(number + 10);
    } else {
        expect(number);
    }
}

int main(int argc, char **argv, char **environment) {
    memory = map(PAGES * PAGE, MAP_PRIVATE);
    for (int round = 0; round < 3; round++) {
        fill(0);
        long children[2];
        for (int i = 0; i < 2; i++) {
            children[i] = call(SYS_fork);
            CHECK(children[i] >= 0);
            if (children[i] == 0) {
                generation(1);
                return 0;
            }
        }
        for (int i = 0; i < 2; i++) EQUAL(wait_for(children[i]), 0);
        expect(0);
    }
    EQUAL(call(SYS_wait4, -1, 0, 0, 0), -ECHILD);
    return 0;
}
