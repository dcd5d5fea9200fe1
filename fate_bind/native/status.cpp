#include "status.h"

#include "fate_build_id.h"

#include <cstdarg>
#include <cstdio>
#include <vector>

static thread_local std::string last_error;

std::string fate_format(const char * format, ...) {
    va_list args;
    va_start(args, format);
    va_list again;
    va_copy(again, args);
    const int n = vsnprintf(nullptr, 0, format, args);
    va_end(args);
    std::vector<char> text(static_cast<size_t>(n) + 1);
    vsnprintf(text.data(), text.size(), format, again);
    va_end(again);
    return text.data();
}

void fate_set_last_error(const std::string & message) {
    last_error = message;
}

const char * fate_last_error(void) {
    return last_error.c_str();
}

int32_t fate_abi_version(void) {
    return FATE_ABI_VERSION;
}

const char * fate_build_id(void) {
    return FATE_BUILD_ID;
}
