// A question put to the driver: what does page-locking a mapped model file cost, in one call, in chunks, by several threads, and beside a loading that copies
// other parts of the file to the GPU? page_lock FILE [GIB]: the first GIB of it (16), which must fit in RAM.
//   nvcc -std=c++17 -O3 -arch=sm_90 -Ifate_bind/native -IBUILD fate_bind/native/status.cpp bench/page_lock.cu
#include "cuda_check.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if !defined(MADV_POPULATE_READ)
#    define MADV_POPULATE_READ 22
#endif

static const size_t   MIB = size_t(1) << 20, GIB = size_t(1) << 30;
static const unsigned FLAGS = cudaHostRegisterPortable | cudaHostRegisterMapped | cudaHostRegisterReadOnly;

static int    file;
static size_t n_bytes;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename F> static double timed(F && f) {
    const double began = now();
    f();
    return now() - began;
}

static char * map(size_t offset, size_t size, int flags = 0) {
    void * p = mmap(nullptr, size, PROT_READ, MAP_SHARED | flags, file, static_cast<off_t>(offset));
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return static_cast<char *>(p);
}

// Chunks in mappings of their own, each taken by some thread, its pages met first or not.
class chunks {
public:
    chunks(size_t size, int n_threads, bool populates) {
        for (size_t at = 0; at < n_bytes; at += size) {
            parts_.push_back({ at, std::min(size, n_bytes - at), nullptr });
        }
        for (int i = 0; i < n_threads; ++i) {
            threads_.emplace_back([this, populates] {
                for (size_t j = next_++; j < parts_.size(); j = next_++) {
                    part & p = parts_[j];
                    p.data   = map(p.offset, p.size);
                    if (populates && madvise(p.data, p.size, MADV_POPULATE_READ) != 0) {
                        perror("MADV_POPULATE_READ");
                    }
                    FATE_CUDA(cudaHostRegister(p.data, p.size, FLAGS));
                }
            });
        }
    }

    void wait() {
        for (std::thread & thread : threads_) {
            thread.join();
        }
        threads_.clear();
    }

    double release() {
        wait();
        return timed([&] {
            for (part & p : parts_) {
                FATE_CUDA(cudaHostUnregister(p.data));
                munmap(p.data, p.size);
            }
            parts_.clear();
        });
    }

private:
    struct part {
        size_t offset;
        size_t size;
        char * data;
    };

    std::vector<part>        parts_;
    std::vector<std::thread> threads_;
    std::atomic<size_t>      next_{ 0 };
};

static void by_chunks(size_t size, int n_threads, bool populates) {
    double       let_go = 0;
    const double locked = timed([&] {
        chunks all(size, n_threads, populates);
        all.wait();
        const double at = now();
        all.release();
        let_go = now() - at;
    });
    printf("chunks of %4zu MiB, %d threads, pages %s: %.3f s, unlocked in %.3f\n", size / MIB, n_threads,
           populates ? "met first" : "not met  ", locked - let_go, let_go);
}

static void whole(const char * how, bool populates_by_mmap, int n_populating) {
    char *       data     = nullptr;
    const double met      = timed([&] {
        data                          = map(0, n_bytes, populates_by_mmap ? MAP_POPULATE : 0);
        const size_t             each = n_bytes / 4096 / std::max(n_populating, 1) * 4096;
        std::vector<std::thread> threads;
        for (int i = 0; i < n_populating; ++i) {
            const size_t size = i + 1 < n_populating ? each : n_bytes - each * i;
            threads.emplace_back([=] { madvise(data + each * i, size, MADV_POPULATE_READ); });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
    });
    const double locked   = timed([&] { FATE_CUDA(cudaHostRegister(data, n_bytes, FLAGS)); });
    const double unlocked = timed([&] { FATE_CUDA(cudaHostUnregister(data)); });
    printf("one call, %-27s: %.3f s to map, %.3f s to lock, unlocked in %.3f\n", how, met, locked, unlocked);
    munmap(data, n_bytes);
}

// As llama.cpp's loading: the file mapped whole and met, parts of it copied to the GPU from memory that is not locked.
static double load(size_t n_copied) {
    return timed([&] {
        char * data = map(0, n_bytes, MAP_POPULATE);
        char * to   = nullptr;
        FATE_CUDA(cudaMalloc(&to, n_copied));
        const size_t piece = 16 * MIB;
        for (size_t at = 0; at < n_copied; at += piece) {
            const size_t n = std::min(piece, n_copied - at);
            FATE_CUDA(cudaMemcpy(to + at, data + (at * 7) % (n_bytes - piece) / 4096 * 4096, n, cudaMemcpyHostToDevice));
        }
        FATE_CUDA(cudaFree(to));
        munmap(data, n_bytes);
    });
}

static void beside_loading(size_t size, int n_threads) {
    const size_t n_copied = std::min<size_t>(2000000000, n_bytes / 2);
    const double began    = now();
    chunks       all(size, n_threads, /*populates =*/true);
    double       locked = 0;
    std::thread  waiting([&] {
        all.wait();
        locked = now() - began;
    });
    const double loaded = load(n_copied);
    waiting.join();
    printf("beside a loading: chunks of %4zu MiB, %d threads: loaded in %.3f s (alone %.3f), locked after %.3f s\n", size / MIB, n_threads,
           loaded, load(n_copied), locked);
    all.release();
}

// Whether a copy may reach across two locks, and whether kernels read at the host's own addresses.
static void across_two_locks() {
    const size_t size = 64 * MIB;
    char *       data = map(0, 2 * size);
    char *       to   = nullptr;
    char *       seen = nullptr;
    FATE_CUDA(cudaMalloc(&to, size));
    FATE_CUDA(cudaHostRegister(data, size, FLAGS));
    FATE_CUDA(cudaHostRegister(data + size, size, FLAGS));
    FATE_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void **>(&seen), data, 0));
    const cudaError_t error = cudaMemcpyAsync(to, data + size / 2, size, cudaMemcpyHostToDevice, nullptr);
    cudaGetLastError();
    FATE_CUDA(cudaDeviceSynchronize());
    printf("a copy across two locks: %s; kernels read at %s\n", cudaGetErrorString(error),
           seen == data ? "the host's address" : "an address of their own");
    FATE_CUDA(cudaHostUnregister(data));
    FATE_CUDA(cudaHostUnregister(data + size));
    FATE_CUDA(cudaFree(to));
    munmap(data, 2 * size);
}

int main(int argc, char ** argv) {
    if (argc < 2 || (file = open(argv[1], O_RDONLY)) < 0) {
        fprintf(stderr, "usage: %s FILE [GIB]\n", argv[0]);
        return 2;
    }
    const size_t size = static_cast<size_t>(lseek(file, 0, SEEK_END));
    n_bytes           = std::min(size, static_cast<size_t>((argc > 2 ? atof(argv[2]) : 16) * GIB)) / 4096 * 4096;
    if (n_bytes < GIB) {
        fprintf(stderr, "%s: %zu bytes: expected at least 1 GiB\n", argv[1], n_bytes);
        return 2;
    }
    const double read    = timed([] { munmap(map(0, n_bytes, MAP_POPULATE), n_bytes); }); // into the page cache
    const double context = timed([] { FATE_CUDA(cudaFree(nullptr)); });
    printf("%.2f GiB, met in %.3f s the first time; a context takes %.3f s\n", static_cast<double>(n_bytes) / GIB, read, context);
    across_two_locks();
    whole("pages not met", false, 0);
    whole("met by mmap, MAP_POPULATE", true, 0);
    whole("met by 8 threads", false, 8);
    for (const bool populates : { false, true }) {
        for (const size_t chunk : { 256 * MIB, GIB }) {
            for (const int n_threads : { 1, 2, 4, 8 }) {
                by_chunks(chunk, n_threads, populates);
            }
        }
    }
    for (const size_t chunk : { 256 * MIB, GIB }) {
        for (const int n_threads : { 1, 2, 4, 8 }) {
            beside_loading(chunk, n_threads);
        }
    }
    return 0;
}
