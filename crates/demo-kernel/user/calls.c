/* mremap, munmap in the middle, brk, madvise, mprotect, and what they answer to nonsense. */
#include "user.h"

int main(int argc, char **argv, char **environment) {
    word memory = map(16 * PAGE, MAP_PRIVATE);
    for (int i = 0; i < 16; i++) AT(memory + i * PAGE) = i;
    EQUAL(call(SYS_munmap, memory + 4 * PAGE, 4 * PAGE), 0);
    long larger = call(SYS_mremap, memory, 4 * PAGE, 12 * PAGE, 1 /* MREMAP_MAYMOVE */);
    CHECK(larger > 0);
    for (int i = 0; i < 4; i++) EQUAL(AT(larger + i * PAGE), i);
    for (int i = 4; i < 12; i++) EQUAL(AT(larger + i * PAGE), 0);
    for (int i = 8; i < 16; i++) EQUAL(AT(memory + i * PAGE), i);
    EQUAL(call(SYS_mremap, larger, 12 * PAGE, 2 * PAGE, 0), larger);
    EQUAL(AT(larger + PAGE), 1);
    EQUAL(call(SYS_mremap, larger + 4 * PAGE, PAGE, 2 * PAGE, 1), -EFAULT);

    word heap = call(SYS_brk, 0);
    EQUAL(call(SYS_brk, heap + 5 * PAGE), heap + 5 * PAGE);
    for (int i = 0; i < 5; i++) AT(heap + i * PAGE) = i + 1;
    EQUAL(call(SYS_brk, heap + PAGE), heap + PAGE);
    EQUAL(AT(heap), 1);
    EQUAL(call(SYS_brk, heap + 5 * PAGE), heap + 5 * PAGE);
    EQUAL(AT(heap + 3 * PAGE), 0);
    EQUAL(call(SYS_brk, heap), heap);

    EQUAL(call(SYS_munmap, memory + 1, PAGE), -EINVAL);
    EQUAL(call(SYS_mprotect, memory + 5 * PAGE, PAGE, PROT_READ), -ENOMEM);
    EQUAL(call(SYS_mmap, 0, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), -EINVAL);
    EQUAL(call(SYS_mmap, 0, 1L << 60, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), -ENOMEM);
    EQUAL(call(SYS_madvise, memory + 8 * PAGE, PAGE, 4), 0);
    EQUAL(AT(memory + 8 * PAGE), 0);
    EQUAL(call(SYS_madvise, memory + 8 * PAGE, PAGE, 12345), -EINVAL);
    EQUAL(call(SYS_msync, memory + 5 * PAGE, PAGE, 4), -ENOMEM);
    EQUAL(call(SYS_open, "/no/such/file", 0), -ENOENT);

    word limit[2] = { 64 << 20, 64 << 20 };
    EQUAL(call(SYS_prlimit64, 0, 9 /* RLIMIT_AS */, limit, 0), 0);
    EQUAL(call(SYS_mmap, 0, 128 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), -ENOMEM);
    return 0;
}
