#include "pin.h"

#include "cuda_check.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

static const size_t FREE_RAM = size_t(2) << 30; // not to be locked

static std::mutex                                     pins_mutex;
static std::map<std::pair<const char *, size_t>, int> pins; // range -> how many hold it

static std::string gib(size_t n) {
    return fate_format("%.2f GiB", static_cast<double>(n) / (1 << 30));
}

static std::string limit_hint() {
    struct rlimit limit;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
        return "";
    }
    return fate_format("; the page-lock limit is %.0f MiB, raise it with `ulimit -l unlimited`",
                       static_cast<double>(limit.rlim_cur) / (1 << 20));
}

static bool is_locked(const void * p, const char ** device) {
    cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, p) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    *device = static_cast<const char *>(attributes.devicePointer);
    return attributes.FATE_MEMORY_TYPE == cudaMemoryTypeHost && attributes.devicePointer;
}

static void lock(const char * begin, size_t size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t ram  = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page;
    if (size + FREE_RAM > ram) {
        throw fate_error(FATE_STATUS_MEMORY, "the experts' " + gib(size) + " cannot be page-locked in " + gib(ram) + " of RAM (" +
                                                 gib(FREE_RAM) + " are to stay free)");
    }
    void *      memory = const_cast<char *>(begin);
    cudaError_t error  = cudaHostRegister(memory, size, cudaHostRegisterPortable | cudaHostRegisterMapped | cudaHostRegisterReadOnly);
    if (error == cudaErrorNotSupported || error == cudaErrorInvalidValue) { // a driver without the read-only flag
        cudaGetLastError();
        error = cudaHostRegister(memory, size, cudaHostRegisterPortable | cudaHostRegisterMapped);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw fate_error(FATE_STATUS_MEMORY, "the driver refused to page-lock the experts' " + gib(size) + " (" +
                                                 cudaGetErrorString(error) + ")" + limit_hint());
    }
}

static void unlock(const char * begin) {
    cudaHostUnregister(const_cast<char *>(begin));
    cudaGetLastError(); // the model may have gone before us
}

fate_pin::fate_pin(const void * data, size_t size) : host_(static_cast<const char *>(data)) {
    const char *                last = host_ + size - 1;
    const char *                device_last;
    std::lock_guard<std::mutex> guard(pins_mutex);

    const uintptr_t page  = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(data) / page * page;
    const uintptr_t end   = (reinterpret_cast<uintptr_t>(data) + size + page - 1) / page * page;
    const auto      range = std::make_pair(reinterpret_cast<const char *>(first), static_cast<size_t>(end - first));
    const auto      held  = pins.find(range);
    const bool      mine  = held != pins.end() || !(is_locked(host_, &device_) && is_locked(last, &device_last));
    if (mine && held == pins.end()) {
        lock(range.first, range.second);
    }
    if (!is_locked(host_, &device_) || !is_locked(last, &device_last) || device_last != device_ + (size - 1)) {
        if (mine && held == pins.end()) {
            unlock(range.first);
        }
        throw fate_error(FATE_STATUS_MEMORY, "the experts' memory was page-locked, but the GPU has no address for it");
    }
    if (mine) {
        ++pins[range];
        begin_ = range.first;
        size_  = range.second;
    }
}

fate_pin::fate_pin(fate_pin && other) noexcept :
    begin_(std::exchange(other.begin_, nullptr)),
    size_(other.size_),
    host_(other.host_),
    device_(other.device_) {}

fate_pin::~fate_pin() {
    if (!begin_) {
        return;
    }
    std::lock_guard<std::mutex> guard(pins_mutex);
    const auto                  held = pins.find(std::make_pair(begin_, size_));
    if (held != pins.end() && --held->second == 0) {
        unlock(begin_);
        pins.erase(held);
    }
}

const void * fate_pin::on_device(const void * p) const {
    return device_ + (static_cast<const char *>(p) - host_);
}
