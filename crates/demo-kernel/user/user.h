/* What a program needs without a C library: system calls, output, and checks.
 *
 * Every program here also runs on Linux itself, and must end with 0 there too: `cargo xtask qemu` checks that. */

typedef unsigned long word;
typedef unsigned char byte;
typedef int i32;

enum {
    PROT_NONE = 0, PROT_READ = 1, PROT_WRITE = 2, PROT_EXEC = 4,
    MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_FIXED = 0x10, MAP_ANONYMOUS = 0x20, MAP_POPULATE = 0x8000,
    SYS_read = 0, SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_mmap = 9, SYS_mprotect = 10, SYS_munmap = 11,
    SYS_brk = 12, SYS_rt_sigaction = 13, SYS_rt_sigreturn = 15, SYS_sched_yield = 24, SYS_mremap = 25,
    SYS_msync = 26, SYS_mincore = 27, SYS_madvise = 28, SYS_getpid = 39, SYS_clone = 56, SYS_fork = 57,
    SYS_execve = 59, SYS_exit = 60, SYS_wait4 = 61, SYS_uname = 63, SYS_getppid = 110, SYS_exit_group = 231,
    SYS_prlimit64 = 302,
    ENOENT = 2, ECHILD = 10, EAGAIN = 11, ENOMEM = 12, EACCES = 13, EFAULT = 14, EINVAL = 22,
    SIGKILL = 9, SIGSEGV = 11, PAGE = 4096,
};

static inline long call6(long n, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return n;
}
#define call(n, ...) CALL_(n, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define CALL_(n, a, b, c, d, e, f, ...) \
    call6((n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

void *memset(void *to, int value, word count) {
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, word count) {
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}

static word length(const char *text) {
    word n = 0;
    while (text[n]) n++;
    return n;
}

static void print(const char *text) { call(SYS_write, 1, text, length(text)); }

static void print_number(long number) {
    char digits[24];
    int at = 23, negative = number < 0;
    word left = negative ? -(word)number : (word)number;
    digits[at] = 0;
    do digits[--at] = '0' + left % 10; while (left /= 10);
    if (negative) digits[--at] = '-';
    print(digits + at);
}

static void __attribute__((noreturn)) leave(int status) {
    for (;;) call(SYS_exit_group, status);
}

static void __attribute__((noreturn)) failed(const char *file, int line, const char *what, long value) {
    print(file); print(":"); print_number(line); print(": "); print(what); print(" = "); print_number(value);
    print("\n");
    leave(1);
}

/* Ends the program where the two numbers differ. */
#define EQUAL(a, b) do { long a_ = (long)(a); if (a_ != (long)(b)) failed(__FILE__, __LINE__, #a, a_); } while (0)
#define CHECK(a) do { if (!(a)) failed(__FILE__, __LINE__, #a, 0); } while (0)

/* Memory of a compiler's that it must really read and write. */
#define AT(address) (*(volatile word *)(address))

static word map(word bytes, int flags) {
    long at = call(SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    CHECK(at > 0 || at < -4095);
    return at;
}

/* Waits for a child; gives its status as wait4 encodes it. */
static int wait_for(long child) {
    int status = -1;
    EQUAL(call(SYS_wait4, child, &status, 0, 0), child);
    return status;
}

struct action { void (*handler)(int, void *, void *); word flags; void (*restorer)(void); word mask; };

__attribute__((naked, used)) static void restore(void) { __asm__("mov $15, %eax; syscall"); }

static void on_fault(void (*handler)(int, void *, void *)) {
    struct action action = { handler, 0x04000004 /* SA_SIGINFO | SA_RESTORER */ | 0x40000000 /* SA_NODEFER */, restore, 0 };
    EQUAL(call(SYS_rt_sigaction, SIGSEGV, &action, 0, 8), 0);
}

/* The registers in a handler's third argument: ucontext_t. */
enum { REG_RAX = 13, REG_RSP = 15, REG_RIP = 16, REG_ERR = 19, REG_CR2 = 22 };
#define REGISTERS(context) ((volatile word *)((byte *)(context) + 40))

int main(int argc, char **argv, char **environment);

__attribute__((used)) static void begin(word *stack) {
    int argc = stack[0];
    char **argv = (char **)(stack + 1);
    leave(main(argc, argv, argv + argc + 1));
}

__attribute__((naked, used)) void _start(void) { __asm__("mov %rsp, %rdi; and $-16, %rsp; call begin"); }
