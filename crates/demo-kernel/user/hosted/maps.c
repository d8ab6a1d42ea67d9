/* The lecture's first program: malloc, and where everything is. Built by the system's C compiler with its C library. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int zero[5000];
static int set[5000] = { 1 };

int main(void) {
    char *small = malloc(100), *large = malloc(1 << 20);
    if (!small || !large) return 1;
    memset(small, 1, 100);
    memset(large, 2, 1 << 20);
    zero[1] = set[0];
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return 2;
    char line[256];
    while (fgets(line, sizeof line, maps)) fputs(line, stdout);
    fclose(maps);
    free(large);
    free(small);
    return zero[1] == 1 ? 0 : 3;
}
