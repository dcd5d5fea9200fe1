// Errors: thrown as fate_error inside the library, turned into a status and a message at its edge.
#pragma once

#include "fate.h"

#include <new>
#include <stdexcept>
#include <string>

class fate_error : public std::runtime_error {
public:
    fate_error(int32_t status, const std::string & message) : std::runtime_error(message), status_(status) {}

    int32_t status() const { return status_; }

private:
    int32_t status_;
};

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string fate_format(const char * format, ...);

void fate_set_last_error(const std::string & message);

// Runs f and turns what it throws into a status; other is the status of exceptions that are not ours.
template <typename F> int32_t fate_guard(int32_t other, F && f) {
    try {
        f();
        return FATE_STATUS_OK;
    } catch (const fate_error & e) {
        fate_set_last_error(e.what());
        return e.status();
    } catch (const std::bad_alloc &) {
        fate_set_last_error("out of memory");
        return FATE_STATUS_MEMORY;
    } catch (const std::exception & e) {
        fate_set_last_error(e.what());
        return other;
    }
}
