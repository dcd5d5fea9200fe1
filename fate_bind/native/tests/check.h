// Checks that count and report; a test program returns check_result().
#pragma once

#include <cstdio>

static int check_failures = 0;
static int check_count    = 0;

#define CHECK(condition)                                                             \
    do {                                                                             \
        ++check_count;                                                               \
        if (!(condition)) {                                                          \
            ++check_failures;                                                        \
            fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
        }                                                                            \
    } while (0)

static inline int check_result(const char * name) {
    printf("%s: %d checks, %d failed\n", name, check_count, check_failures);
    return check_failures == 0 && check_count > 0 ? 0 : 1;
}
