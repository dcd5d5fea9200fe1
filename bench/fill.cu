// The fill kernel against cudaMemcpyAsync, at the size of one expert of Qwen3-30B-A3B in Q4_K: fill [FILE], a model file to read from, all over.
//   nvcc -O3 -arch=sm_90 -Ifate_bind/native -IBUILD fate_bind/native/status.cpp bench/fill.cu
#include "cuda_check.h"
#include "cuda_kernels.cuh"

#include <fcntl.h>
#include <unistd.h>
#include <sys/mman.h>

#include <cstring>
#include <vector>

static const int32_t N_EXPERTS = 128, N_SLOTS = 16, N_LAUNCHES = 200;
static const size_t  TENSOR = 884736, N_TENSORS = 3, EXPERT = N_TENSORS * TENSOR;

template <typename T> static T * device(size_t n, int byte) {
    T * p = nullptr;
    FATE_CUDA(cudaMalloc(&p, n * sizeof(T)));
    FATE_CUDA(cudaMemset(p, byte, n * sizeof(T)));
    return p;
}

// Host memory to read from, page-locked, and its size.
static const char * open_source(const char * path, size_t & n) {
    n = EXPERT * N_EXPERTS;
    if (!path) {
        char * p;
        FATE_CUDA(cudaHostAlloc(reinterpret_cast<void **>(&p), n, cudaHostAllocMapped));
        memset(p, 1, n);
        return p;
    }
    const int file = open(path, O_RDONLY);
    n              = static_cast<size_t>(lseek(file, 0, SEEK_END)) / 4096 * 4096;
    void * p       = mmap(nullptr, n, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    FATE_CUDA(cudaHostRegister(p, n, cudaHostRegisterReadOnly | cudaHostRegisterMapped));
    return static_cast<const char *>(p);
}

int main(int argc, char ** argv) {
    size_t          n_source;
    const char *    source = open_source(argc > 1 ? argv[1] : nullptr, n_source);
    char *          slots  = device<char>(EXPERT * N_EXPERTS, 0);
    fate_cuda_layer layer;
    memset(&layer, 0, sizeof(layer));
    layer.n_experts = N_EXPERTS;
    layer.n_slots   = N_SLOTS;
    layer.n_tensors = N_TENSORS;
    layer.is_wide   = true;
    layer.slot_of   = device<int32_t>(N_EXPERTS, 0xff);
    layer.expert_of = device<int32_t>(N_SLOTS, 0xff);
    layer.last_use  = device<int64_t>(N_EXPERTS, 0);
    layer.score     = device<float>(N_EXPERTS, 0);
    layer.head      = device<fate_cuda_head>(1, 0);
    layer.counters  = device<int64_t>(FATE_N_COUNTERS, 0);
    for (size_t t = 0; t < N_TENSORS; ++t) {
        fate_cuda_tensor & to = layer.tensors[t];
        to.source             = source + t * N_EXPERTS * TENSOR;
        to.slots              = slots + t * N_SLOTS * TENSOR;
        to.expert_bytes       = TENSOR;
        to.width              = 16;
        to.n_units            = TENSOR / 16;
    }
    std::vector<int32_t> ids(2 * N_EXPERTS);
    for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int32_t>(i) % N_EXPERTS;
    }
    int32_t * device_ids = device<int32_t>(ids.size(), 0);
    int32_t * out        = device<int32_t>(N_EXPERTS, 0);
    FATE_CUDA(cudaMemcpy(device_ids, ids.data(), ids.size() * sizeof(int32_t), cudaMemcpyHostToDevice));
    cudaStream_t stream;
    cudaEvent_t  begin, end;
    FATE_CUDA(cudaStreamCreate(&stream));
    FATE_CUDA(cudaEventCreate(&begin));
    FATE_CUDA(cudaEventCreate(&end));

    // another place in the source for each launch
    const auto place = [&](int i) {
        const size_t spread = n_source - EXPERT * N_EXPERTS;
        return spread ? i * size_t(2654435761) * 4096 % spread / 4096 * 4096 : 0;
    };
    const auto timed = [&](auto && f) {
        float ms = 0;
        for (int i = 0; i < 8; ++i) {
            f(i);
        }
        FATE_CUDA(cudaEventRecord(begin, stream));
        for (int i = 0; i < N_LAUNCHES; ++i) {
            f(i);
        }
        FATE_CUDA(cudaEventRecord(end, stream));
        FATE_CUDA(cudaEventSynchronize(end));
        FATE_CUDA(cudaEventElapsedTime(&ms, begin, end));
        return ms * 1e3 / N_LAUNCHES;
    };
    for (int round = 0; round < 2; ++round) {
        for (const size_t piece : { TENSOR, EXPERT, EXPERT * 8 }) {
            const double us = timed([&](int i) {
                FATE_CUDA(cudaMemcpyAsync(slots, source + place(i) + (i % 12) * piece, piece, cudaMemcpyHostToDevice, stream));
            });
            printf("cudaMemcpyAsync %8zu bytes: %8.2f us, %6.2f GB/s\n", piece, us, piece / us / 1e3);
        }
        for (const int32_t k : { 1, 2, 3, 4, 8 }) {
            for (const int n_blocks : { 4, 8, 12, 16 }) {
                layer.k             = k;
                fate_cuda_call call = {};
                call.n_rows         = 1;
                call.stride         = k * 4;
                call.out            = out;
                const double us     = timed([&](int i) {
                    call.ids = reinterpret_cast<const char *>(device_ids + i * k % N_EXPERTS);
                    for (size_t t = 0; t < N_TENSORS; ++t) {
                        layer.tensors[t].source = source + place(i) + t * N_EXPERTS * TENSOR;
                    }
                    fate_bring<false><<<n_blocks, FATE_CUDA_THREADS, fate_bring_bytes(N_EXPERTS), stream>>>(layer, call);
                });
                FATE_CUDA(cudaGetLastError());
                printf("kernel, %d misses, %2d blocks: %8.2f us, %6.2f GB/s\n", k, n_blocks, us, k * EXPERT / us / 1e3);
            }
        }
    }
    for (size_t t = 0; t < N_TENSORS; ++t) {
        layer.tensors[t].n_units = 1;
    }
    for (const int32_t k : { 1, 4, 8 }) {
        layer.k             = k;
        fate_cuda_call call = {};
        call.n_rows         = 1;
        call.stride         = k * 4;
        call.out            = out;
        const double us     = timed([&](int i) {
            call.ids = reinterpret_cast<const char *>(device_ids + i * k % N_EXPERTS);
            fate_bring<false><<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(N_EXPERTS), stream>>>(layer, call);
        });
        printf("kernel, %d misses of next to no bytes: %.2f us\n", k, us);
        const double hit_us = timed([&](int) {
            call.ids = reinterpret_cast<const char *>(device_ids);
            fate_bring<false><<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(N_EXPERTS), stream>>>(layer, call);
        });
        printf("kernel, %d hits: %.2f us\n", k, hit_us);
    }
    std::vector<int64_t> counters(FATE_N_COUNTERS);
    FATE_CUDA(cudaMemcpy(counters.data(), layer.counters, counters.size() * 8, cudaMemcpyDeviceToHost));
    printf("hits %lld of %lld\n", (long long) counters[FATE_COUNTER_HITS],
           (long long) (counters[FATE_COUNTER_HITS] + counters[FATE_COUNTER_MISSES]));
    return 0;
}
