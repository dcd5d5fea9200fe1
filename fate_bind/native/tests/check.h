// Checks that count and report; a test program returns check_result().
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

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

// Under a tool that slows everything down fewer steps are taken, and not all that can happen does.
[[maybe_unused]] static bool takes_few_steps() {
    return getenv("FATE_FEW_STEPS") != nullptr;
}

[[maybe_unused]] static int32_t steps(int32_t n) {
    return takes_few_steps() ? (n < 80 ? 4 : n / 20) : n;
}
