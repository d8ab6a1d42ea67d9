/* execve: the same process, another memory. Runs itself with one argument more, three times. */
#include "user.h"

static word touched = 1;

int main(int argc, char **argv, char **environment) {
    EQUAL(touched, 1); /* the image is as in the file each time */
    touched = 2;
    long own = call(SYS_getpid);
    if (argc < 4) {
        char *arguments[5] = { argv[0], "a", argc > 1 ? "b" : 0, argc > 2 ? "c" : 0, 0 };
        char *strings[2] = { "NAME=value", 0 };
        long child = call(SYS_fork);
        if (child == 0) {
            CHECK(call(SYS_getpid) != own);
            EQUAL(call(SYS_execve, "/no/such/program", arguments, strings), -ENOENT);
            call(SYS_execve, argv[0], arguments, strings);
            leave(2);
        }
        EQUAL(wait_for(child), 0);
    } else {
        EQUAL(argv[3][0], 'c');
        EQUAL(environment[0][5], 'v');
    }
    return 0;
}
