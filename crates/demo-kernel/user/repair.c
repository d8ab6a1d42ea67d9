/* A handler for SIGSEGV that repairs what was wrong; the program goes on where it was. */
#include "user.h"

static word memory;
static int faults;

static void handler(int signal, void *info, void *context) {
    word address = AT((byte *)info + 16);
    EQUAL(signal, SIGSEGV);
    EQUAL(address, REGISTERS(context)[REG_CR2]);
    CHECK(address >= memory && address < memory + 64 * PAGE);
    EQUAL(REGISTERS(context)[REG_ERR] & 4, 4); /* from user mode */
    faults++;
    EQUAL(call(SYS_mprotect, address & -PAGE, PAGE, PROT_READ | PROT_WRITE), 0);
}

static void skip(int signal, void *info, void *context) {
    faults++;
    REGISTERS(context)[REG_RIP] += 3; /* mov (%rdi), %rax */
    REGISTERS(context)[REG_RAX] = 4711;
}

int main(int argc, char **argv, char **environment) {
    memory = map(64 * PAGE, MAP_PRIVATE);
    EQUAL(call(SYS_mprotect, memory, 64 * PAGE, PROT_READ), 0);
    on_fault(handler);
    double kept = 1.5; /* vector registers survive the handler */
    __asm__ volatile("" : "+x"(kept));
    for (int i = 0; i < 64; i++) AT(memory + i * PAGE) = i;
    __asm__ volatile("" : "+x"(kept));
    CHECK(kept == 1.5);
    EQUAL(faults, 64);
    for (int i = 0; i < 64; i++) EQUAL(AT(memory + i * PAGE), i);
    EQUAL(faults, 64);
    on_fault(skip);
    word value = 0;
    __asm__ volatile("mov (%%rdi), %%rax" : "=a"(value) : "D"(16) : "memory");
    EQUAL(value, 4711);
    EQUAL(faults, 65);
    return 0;
}
