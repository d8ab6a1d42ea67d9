/* The kernel writes to user memory with the rights that the user has: read-only pages refuse it, shared ones are copied. */
#include "user.h"

int main(int argc, char **argv, char **environment) {
    word memory = map(4 * PAGE, MAP_PRIVATE);
    for (int i = 0; i < 4; i++) AT(memory + i * PAGE) = 0x1111;
    EQUAL(call(SYS_mprotect, memory, PAGE, PROT_READ), 0);
    EQUAL(call(SYS_uname, memory), -EFAULT);
    EQUAL(AT(memory), 0x1111);
    EQUAL(call(SYS_uname, 0), -EFAULT);
    EQUAL(call(SYS_uname, 0xffff800000000000), -EFAULT);
    EQUAL(call(SYS_write, 1, 0x10, 5), -EFAULT);
    EQUAL(call(SYS_uname, memory + PAGE), 0);
    EQUAL(AT(memory + PAGE) & 0xff, 'L');

    long child = call(SYS_fork);
    if (child == 0) {
        EQUAL(call(SYS_uname, memory + 2 * PAGE), 0); /* the kernel's write breaks the sharing */
        EQUAL(AT(memory + 2 * PAGE) & 0xff, 'L');
        return 0;
    }
    EQUAL(wait_for(child), 0);
    EQUAL(AT(memory + 2 * PAGE), 0x1111);

    word fresh = map(2 * PAGE, MAP_PRIVATE);
    EQUAL(call(SYS_uname, fresh + PAGE - 10), 0); /* two pages that nobody touched yet */
    EQUAL(call(SYS_munmap, fresh + PAGE, PAGE), 0);
    EQUAL(call(SYS_uname, fresh + PAGE - 10), -EFAULT);
    return 0;
}
