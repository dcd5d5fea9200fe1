// What runs beside a captured graph costs it: nvcc -O3 -std=c++17
// -arch=native bench/beside.cu -o beside && ./beside
//
// The graph stands for a token: 960 kernels that read VRAM, one after another,
// chained as llama.cpp chains them (programmatic dependent launch) or not.
// Beside it, of some blocks: a kernel that stays until the graph's last kernel
// says so; a kernel on a branch behind every 20th, for so long; one that copies
// pieces of 64 KB from host memory, or the copy engine. Printed: the ratio of a
// graph's time to that of the graph alone, medians, and how fast the copies are
// alone.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <cuda_runtime.h>

#define CHECK(call)                                                        \
    do {                                                                   \
        const cudaError_t error = (call);                                  \
        if (error != cudaSuccess) {                                        \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
            exit(1);                                                       \
        }                                                                  \
    } while (0)

static const int      N_KERNELS    = 960;
static const int      N_PER_BRANCH = 20;
static const size_t   N_BYTES      = size_t(1) << 30;
static const size_t   EACH         = 1 << 20; // bytes that a kernel reads
static const int      PIECE_UNITS  = 4096;
static const uint32_t N_PIECES     = 1900;    // copied beside a graph: about its time at 50 GB/s
static const int      N_GRAPHS     = 20;      // of a median

static __device__ uint64_t now_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__global__ void work(const uint4 * data, size_t n, uint32_t * out, uint32_t * over, int is_last) {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
#endif
    uint32_t sum = 0;
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        const uint4 x = __ldcs(data + i);
        sum += x.x ^ x.y ^ x.z ^ x.w;
    }
    if (sum == 12345) {
        *out = sum;
    }
    if (is_last && blockIdx.x == 0 && threadIdx.x == 0) {
        atomicAdd(over, 1);
    }
}

__global__ void __launch_bounds__(1024) stay(const uint32_t * over, uint32_t until) {
    __shared__ uint32_t s_over;
    do {
        __syncthreads();
        if (threadIdx.x == 0) {
            __nanosleep(200);
            s_over = *const_cast<const volatile uint32_t *>(over);
        }
        __syncthreads();
    } while (s_over < until);
}

__global__ void __launch_bounds__(1024) pass(uint64_t ns) {
    const uint64_t began = now_ns();
    while (now_ns() - began < ns) {
        __nanosleep(100);
    }
}

template <int THREADS, int LOADS> __global__ void __launch_bounds__(THREADS) copy(const uint4 * from, uint4 * to, uint32_t * claimed) {
    __shared__ uint32_t s_piece;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) {
            s_piece = atomicAdd(claimed, 1);
        }
        __syncthreads();
        const size_t first = size_t(s_piece) * PIECE_UNITS + threadIdx.x;
        if (s_piece >= N_PIECES) {
            return;
        }
        for (int done = 0; done < PIECE_UNITS / THREADS; done += LOADS) {
            uint4 data[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                data[i] = __ldcs(from + first + (done + i) * THREADS);
            }
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                to[first + (done + i) * THREADS] = data[i];
            }
        }
        __threadfence();
    }
}

static float median(std::vector<float> all) {
    std::sort(all.begin(), all.end());
    return all[all.size() / 2];
}

int main() {
    uint4 *    data;
    uint32_t * words;
    char *     host;
    uint4 *    to;
    CHECK(cudaMalloc(&data, N_BYTES));
    CHECK(cudaMemset(data, 1, N_BYTES));
    CHECK(cudaMalloc(&words, 1 << 20));
    CHECK(cudaMemset(words, 0, 1 << 20));
    CHECK(cudaHostAlloc(&host, size_t(N_PIECES) * PIECE_UNITS * sizeof(uint4), 0));
    memset(host, 3, size_t(N_PIECES) * PIECE_UNITS * sizeof(uint4));
    CHECK(cudaMalloc(&to, size_t(N_PIECES) * PIECE_UNITS * sizeof(uint4)));
    uint32_t *    claimed = words;
    uint32_t *    over    = words + (1 << 17);
    uint32_t *    out     = words + (1 << 17) + 64;
    const uint4 * from    = reinterpret_cast<const uint4 *>(host);
    int           low, high;
    CHECK(cudaDeviceGetStreamPriorityRange(&low, &high));
    cudaStream_t main_stream, side;
    CHECK(cudaStreamCreateWithFlags(&main_stream, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithPriority(&side, cudaStreamNonBlocking, high));
    cudaEvent_t began, ended, forked, joined;
    for (cudaEvent_t * event : { &began, &ended, &forked, &joined }) {
        CHECK(cudaEventCreate(event));
    }

    // n_blocks 0: no branches
    const auto capture = [&](bool chained, int n_blocks, int n_threads, uint64_t ns) {
        cudaGraph_t     graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(main_stream, cudaStreamCaptureModeRelaxed));
        for (int i = 0; i < N_KERNELS; ++i) {
            cudaLaunchAttribute attribute;
            attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
            attribute.val.programmaticStreamSerializationAllowed = 1;
            cudaLaunchConfig_t config                            = {};
            config.gridDim                                       = dim3(264);
            config.blockDim                                      = dim3(256);
            config.stream                                        = main_stream;
            config.attrs                                         = &attribute;
            config.numAttrs                                      = chained;
            const uint4 * at                                     = data + (size_t(i) * EACH % N_BYTES) / 16;
            CHECK(cudaLaunchKernelEx(&config, work, at, EACH / 16, out, over, int(i == N_KERNELS - 1)));
            if (n_blocks > 0 && i % N_PER_BRANCH == 3) {
                CHECK(cudaEventRecord(forked, main_stream));
                CHECK(cudaStreamWaitEvent(side, forked, 0));
                pass<<<n_blocks, n_threads, 0, side>>>(ns);
                CHECK(cudaEventRecord(joined, side));
            }
        }
        if (n_blocks > 0) {
            CHECK(cudaStreamWaitEvent(main_stream, joined, 0));
        }
        CHECK(cudaStreamEndCapture(main_stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        CHECK(cudaGraphDestroy(graph));
        return exec;
    };
    // beside: told how many graphs will have ended with this one
    const auto time = [&](cudaGraphExec_t exec, const std::function<void(uint32_t)> & beside) {
        std::vector<float> us;
        uint32_t           n_graphs = 0;
        CHECK(cudaMemcpy(&n_graphs, over, sizeof(n_graphs), cudaMemcpyDeviceToHost));
        for (int i = 0; i < N_GRAPHS; ++i) {
            CHECK(cudaMemset(claimed, 0, sizeof(*claimed)));
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaEventRecord(began, main_stream));
            beside(++n_graphs);
            CHECK(cudaGetLastError());
            CHECK(cudaGraphLaunch(exec, main_stream));
            CHECK(cudaEventRecord(ended, main_stream));
            CHECK(cudaDeviceSynchronize());
            float ms;
            CHECK(cudaEventElapsedTime(&ms, began, ended));
            us.push_back(1000 * ms);
        }
        return median(us);
    };
    const auto nothing = [](uint32_t) {
    };

    struct copier {
        const char *          name;
        std::function<void()> launch;
    };

    const copier copiers[] = {
        { "8 x 1024, 4 loads", [&] { copy<1024, 4><<<8, 1024, 0, side>>>(from, to, claimed); }                                              },
        { "8 x 256, 4 loads",  [&] { copy<256, 4><<<8, 256, 0, side>>>(from, to, claimed); }                                                },
        { "8 x 256, 8 loads",  [&] { copy<256, 8><<<8, 256, 0, side>>>(from, to, claimed); }                                                },
        { "8 x 256, 16 loads", [&] { copy<256, 16><<<8, 256, 0, side>>>(from, to, claimed); }                                               },
        { "the copy engine",   [&] { CHECK(cudaMemcpyAsync(to, from, size_t(N_PIECES) * PIECE_UNITS * 16, cudaMemcpyHostToDevice, side)); } },
    };
    for (int chained = 1; chained >= 0; --chained) {
        printf("%s\n", chained ? "chained" : "not chained");
        const cudaGraphExec_t plain = capture(chained, 0, 0, 0);
        time(plain, nothing);
        for (const int n_threads : { 32, 256, 512, 1024 }) {
            const float alone = time(plain, nothing);
            const float us    = time(plain, [&](uint32_t until) { stay<<<8, n_threads, 0, side>>>(over, until); });
            printf("  stays, 8 x %d: %.4f\n", n_threads, us / alone);
        }
        for (const int n_threads : { 256, 1024 }) {
            for (const uint64_t ns : { 0, 5000, 20000 }) {
                const cudaGraphExec_t branched = capture(chained, 8, n_threads, ns);
                const float           alone    = time(plain, nothing);
                const float           us       = time(branched, nothing);
                printf("  %d branches, 8 x %d, %d us: %.4f\n", N_KERNELS / N_PER_BRANCH, n_threads, int(ns / 1000), us / alone);
                CHECK(cudaGraphExecDestroy(branched));
            }
        }
        for (const copier & one : copiers) {
            const float        alone = time(plain, nothing);
            const float        us    = time(plain, [&](uint32_t) { one.launch(); });
            std::vector<float> by_itself;
            for (int i = 0; i < 5; ++i) {
                CHECK(cudaMemset(claimed, 0, sizeof(*claimed)));
                CHECK(cudaDeviceSynchronize());
                CHECK(cudaEventRecord(began, side));
                one.launch();
                CHECK(cudaEventRecord(ended, side));
                CHECK(cudaDeviceSynchronize());
                float ms;
                CHECK(cudaEventElapsedTime(&ms, began, ended));
                by_itself.push_back(ms);
            }
            printf("  copies, %s: %.4f; alone %.1f GB/s\n", one.name, us / alone, N_PIECES * PIECE_UNITS * 16.0 / median(by_itself) / 1e6);
        }
        CHECK(cudaGraphExecDestroy(plain));
    }
    return 0;
}
