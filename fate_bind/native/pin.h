// Page-locks memory that is there already, mostly the mapping of a model file, so that kernels read it over the link. Shared by all engines of the process.
#pragma once

#include <cstddef>

class fate_pin {
public:
    // Throws fate_error with the reason and what to do. Memory that CUDA has locked already is taken as it is.
    fate_pin(const void * data, size_t size);
    ~fate_pin();

    fate_pin(fate_pin && other) noexcept;

    // The address by which kernels read what the host has at p.
    const void * on_device(const void * p) const;

private:
    fate_pin(const fate_pin &)             = delete;
    fate_pin & operator=(const fate_pin &) = delete;

    const char * begin_  = nullptr; // of what is registered; null: it was locked already
    size_t       size_   = 0;
    const char * host_   = nullptr;
    const char * device_ = nullptr;
};
