// A question put to the hardware: does the bulk copy engine of a multiprocessor (sm_90) read host memory faster than its threads do?
//   nvcc -O3 -arch=sm_90 -Ifate_bind/native -IBUILD fate_bind/native/status.cpp bench/fill_bulk.cu
#include "cuda_check.h"

#include <cstdint>
#include <cstdio>
#include <cstring>

static const size_t EXPERT = 3 * 884736, N_EXPERTS = 128;

static __device__ __forceinline__ uint32_t shared_address(const void * p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <int CHUNK, int STAGES, int LAG> static __global__ void bulk(const char * from, char * to, int n_chunks) {
    extern __shared__ __align__(128) char buffer[];
    __shared__ uint64_t                   barriers[STAGES];
    if (threadIdx.x != 0) {
        return;
    }
    for (int s = 0; s < STAGES; ++s) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[s])) : "memory");
    }
    asm volatile("fence.proxy.async;" ::: "memory");
    const int n = (n_chunks - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    for (int i = 0; i < n + LAG; ++i) {
        if (i < n) {
            const int      s   = i % STAGES;
            const uint32_t bar = shared_address(&barriers[s]);
            const size_t   at  = (blockIdx.x + static_cast<size_t>(i) * gridDim.x) * CHUNK;
            if (i >= STAGES) {
                asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(STAGES - LAG - 1) : "memory");
            }
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(CHUNK) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             shared_address(buffer + s * CHUNK)),
                         "l"(from + at), "r"(CHUNK), "r"(bar)
                         : "memory");
        }
        const int j = i - LAG;
        if (j >= 0 && j < n) {
            const int      s      = j % STAGES;
            const uint32_t parity = j / STAGES % 2;
            const size_t   at     = (blockIdx.x + static_cast<size_t>(j) * gridDim.x) * CHUNK;
            uint32_t       done   = 0;
            while (!done) {
                asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                             : "=r"(done)
                             : "r"(shared_address(&barriers[s])), "r"(parity)
                             : "memory");
            }
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + at),
                         "r"(shared_address(buffer + s * CHUNK)), "r"(CHUNK)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// The same bytes by threads, 4 loads in flight.
static __global__ void threads(const uint4 * from, uint4 * to, uint32_t n) {
    const uint32_t stride = gridDim.x * blockDim.x;
    uint32_t       at     = blockIdx.x * blockDim.x + threadIdx.x;
    uint4          window[4];
    for (int i = 0; i < 4; ++i) {
        if (at + i * stride < n) {
            window[i] = __ldcs(from + at + i * stride);
        }
    }
    for (; at < n; at += 4 * stride) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t here = at + i * stride;
            if (here < n) {
                to[here] = window[i];
            }
            if (here + 4 * stride < n) {
                window[i] = __ldcs(from + here + 4 * stride);
            }
        }
    }
}

template <typename F> static double timed(cudaStream_t stream, F && f) {
    cudaEvent_t begin, end;
    float       ms = 0;
    FATE_CUDA(cudaEventCreate(&begin));
    FATE_CUDA(cudaEventCreate(&end));
    for (int i = 0; i < 8; ++i) {
        f(i);
    }
    FATE_CUDA(cudaEventRecord(begin, stream));
    for (int i = 0; i < 200; ++i) {
        f(i);
    }
    FATE_CUDA(cudaEventRecord(end, stream));
    FATE_CUDA(cudaEventSynchronize(end));
    FATE_CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms * 1e3 / 200;
}

template <int CHUNK, int STAGES, int LAG> static void try_bulk(const char * from, char * to, cudaStream_t stream) {
    FATE_CUDA(cudaFuncSetAttribute(bulk<CHUNK, STAGES, LAG>, cudaFuncAttributeMaxDynamicSharedMemorySize, CHUNK * STAGES));
    for (const int n_blocks : { 4, 8, 16 }) {
        printf("bulk, %2d blocks x %d x %5d:", n_blocks, LAG, CHUNK);
        for (const size_t k : { 1, 2, 3, 4, 8 }) {
            FATE_CUDA(cudaMemset(to, 0, k * EXPERT));
            bulk<CHUNK, STAGES, LAG><<<n_blocks, 32, CHUNK * STAGES, stream>>>(from, to, static_cast<int>(k * EXPERT / CHUNK));
            FATE_CUDA(cudaStreamSynchronize(stream));
            char last[16];
            FATE_CUDA(cudaMemcpy(last, to + k * EXPERT - 16, 16, cudaMemcpyDeviceToHost));
            const bool   right = memcmp(last, from + k * EXPERT - 16, 16) == 0;
            const double us    = timed(stream, [&](int i) {
                bulk<CHUNK, STAGES, LAG>
                    <<<n_blocks, 32, CHUNK * STAGES, stream>>>(from + (i % 12) * 8 * EXPERT, to, static_cast<int>(k * EXPERT / CHUNK));
            });
            FATE_CUDA(cudaGetLastError());
            printf("  %zu: %6.1f us %5.2f GB/s%s", k, us, k * EXPERT / us / 1e3, right ? "" : " WRONG");
        }
        printf("\n");
    }
}

int main() {
    char *       from;
    char *       to;
    cudaStream_t stream;
    FATE_CUDA(cudaHostAlloc(reinterpret_cast<void **>(&from), N_EXPERTS * EXPERT, cudaHostAllocMapped));
    for (size_t i = 0; i < N_EXPERTS * EXPERT; i += 8) {
        memcpy(from + i, &i, 8);
    }
    FATE_CUDA(cudaMalloc(&to, 8 * EXPERT));
    FATE_CUDA(cudaStreamCreate(&stream));
    for (const int n_blocks : { 8, 16 }) {
        for (const int n_threads : { 256, 512, 1024 }) {
            printf("threads, %2d blocks of %4d:    ", n_blocks, n_threads);
            for (const size_t k : { 1, 2, 3, 4, 8 }) {
                const double us = timed(stream, [&](int i) {
                    threads<<<n_blocks, n_threads, 0, stream>>>(reinterpret_cast<const uint4 *>(from + (i % 12) * 8 * EXPERT),
                                                                reinterpret_cast<uint4 *>(to), static_cast<uint32_t>(k * EXPERT / 16));
                });
                FATE_CUDA(cudaGetLastError());
                printf("  %zu: %6.1f us %5.2f GB/s", k, us, k * EXPERT / us / 1e3);
            }
            printf("\n");
        }
    }
    try_bulk<4096, 16, 12>(from, to, stream);
    try_bulk<8192, 8, 6>(from, to, stream);
    try_bulk<8192, 16, 12>(from, to, stream);
    try_bulk<16384, 8, 6>(from, to, stream);
    printf("one empty round: %.2f us\n", timed(stream, [&](int) { threads<<<8, 1024, 0, stream>>>(nullptr, nullptr, 0); }));
    return 0;
}
