/* Every kind of bad access ends the culprit, and nobody else. */
#include "user.h"

static const word constant = 5;
static word data = 6;

static int attempt(int number, word memory) {
    long child = call(SYS_fork);
    CHECK(child >= 0);
    if (child == 0) {
        switch (number) {
        case 0: AT(memory) = 1; break;                       /* read only */
        case 1: AT(&constant) = 1; break;                    /* constants of the image */
        case 2: AT(&main) = 1; break;                        /* its code */
        case 3: (void)AT(memory + PAGE); break;              /* PROT_NONE */
        case 4: ((void (*)(void))(memory + 2 * PAGE))(); break; /* data, not code */
        case 5: (void)AT(8); break;                          /* a null pointer */
        case 6: (void)AT(0xffff800000000000); break;         /* the kernel's memory */
        case 7: AT(0xffffffff80001000) = 1; break;           /* the kernel's code */
        case 8: (void)AT(memory + 3 * PAGE); break;          /* unmapped */
        case 9: __asm__ volatile("hlt"); break;              /* privileged */
        case 10: (void)AT(0x800000000000000); break;         /* not canonical */
        }
        leave(0);
    }
    return wait_for(child);
}

int main(int argc, char **argv, char **environment) {
    word memory = map(4 * PAGE, MAP_PRIVATE);
    for (int i = 0; i < 3; i++) AT(memory + i * PAGE) = 0xc3; /* ret */
    EQUAL(call(SYS_mprotect, memory, PAGE, PROT_READ), 0);
    EQUAL(call(SYS_mprotect, memory + PAGE, PAGE, PROT_NONE), 0);
    EQUAL(call(SYS_munmap, memory + 3 * PAGE, PAGE), 0);
    for (int number = 0; number < 11; number++) {
        int status = attempt(number, memory);
        if ((status & 0x7f) != SIGSEGV) failed(__FILE__, number, "status", status);
    }
    EQUAL(attempt(11, memory), 0);
    EQUAL(AT(memory), 0xc3);
    EQUAL(data, 6);
    EQUAL(constant, 5);
    EQUAL(call(SYS_mprotect, memory, PAGE, PROT_READ | PROT_WRITE), 0);
    AT(memory) = 9;
    EQUAL(AT(memory), 9);
    EQUAL(call(SYS_mprotect, memory + 2 * PAGE, PAGE, PROT_READ | PROT_EXEC), 0);
    ((void (*)(void))(memory + 2 * PAGE))();
    return 0;
}
