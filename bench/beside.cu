// What a kernel that stays beside a captured graph costs it: nvcc -O3
// -std=c++17 -arch=native bench/beside.cu -o beside && ./beside
//
// The graph stands for a token: 960 kernels that read VRAM, one after another,
// chained as llama.cpp chains them (programmatic dependent launch) or not.
// Beside it stays a kernel of some blocks until the graph's last kernel says
// so: asleep, watching a word, or as many as prefetch watches, with fences or
// without, in a stream of high, the same or low priority. Printed: microseconds
// a graph, medians, and the ratio to the graph alone, measured right before.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

static const int    N_KERNELS = 960;
static const size_t N_BYTES   = size_t(1) << 30;
static const size_t EACH      = 1 << 20; // bytes that a kernel reads
static const int    N_WORDS   = 48;

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

enum kind { ASLEEP, WORD, WORD_FENCED, WORDS, WORDS_FENCED, N_KINDS };

__global__ void __launch_bounds__(1024) stay(const uint32_t * over, uint32_t until, const uint32_t * words, uint32_t * out, int what,
                                             int pause) {
    __shared__ uint32_t s_over;
    uint32_t            seen = 0;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) {
            if (what == ASLEEP) {
                for (int i = 0; i < 20; ++i) {
                    __nanosleep(1000);
                }
            }
            s_over = *const_cast<const volatile uint32_t *>(over);
            if (what == WORD_FENCED || what == WORDS_FENCED) {
                __threadfence();
            }
        }
        if (what >= WORDS && threadIdx.x < N_WORDS) {
            for (int i = 0; i < 4; ++i) {
                seen += const_cast<const volatile uint32_t *>(words)[threadIdx.x * 64 + i];
            }
            if (what == WORDS_FENCED) {
                __threadfence();
            }
        }
        __syncthreads();
        if (s_over >= until) {
            break;
        }
        if (threadIdx.x == 0 && what != ASLEEP) {
            __nanosleep(pause);
        }
    }
    if (seen == 12345) {
        *out = seen;
    }
}

int main() {
    uint4 *    data;
    uint32_t * words;
    CHECK(cudaMalloc(&data, N_BYTES));
    CHECK(cudaMemset(data, 1, N_BYTES));
    CHECK(cudaMalloc(&words, 1 << 20));
    CHECK(cudaMemset(words, 0, 1 << 20));
    uint32_t * over = words + (1 << 17);
    uint32_t * out  = words + (1 << 17) + 64;
    int        low, high;
    CHECK(cudaDeviceGetStreamPriorityRange(&low, &high));
    cudaStream_t main_stream, side[3];
    CHECK(cudaStreamCreateWithFlags(&main_stream, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithPriority(&side[0], cudaStreamNonBlocking, high));
    CHECK(cudaStreamCreateWithPriority(&side[1], cudaStreamNonBlocking, 0));
    CHECK(cudaStreamCreateWithPriority(&side[2], cudaStreamNonBlocking, low));
    cudaEvent_t began, ended;
    CHECK(cudaEventCreate(&began));
    CHECK(cudaEventCreate(&ended));
    for (int chained = 1; chained >= 0; --chained) {
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
            const uint4 * from                                   = data + (size_t(i) * EACH % N_BYTES) / 16;
            CHECK(cudaLaunchKernelEx(&config, work, from, EACH / 16, out, over, int(i == N_KERNELS - 1)));
        }
        CHECK(cudaStreamEndCapture(main_stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        uint32_t   n_graphs = 0;
        const auto time     = [&](int n_blocks, int n_threads, int what, int pause, cudaStream_t on) {
            std::vector<float> us;
            CHECK(cudaMemcpy(&n_graphs, over, sizeof(n_graphs), cudaMemcpyDeviceToHost));
            for (int i = 0; i < 24; ++i) {
                CHECK(cudaEventRecord(began, main_stream));
                ++n_graphs;
                if (n_blocks > 0) {
                    stay<<<n_blocks, n_threads, 0, on>>>(over, n_graphs, words, out, what, pause);
                }
                CHECK(cudaGraphLaunch(exec, main_stream));
                CHECK(cudaEventRecord(ended, main_stream));
                CHECK(cudaDeviceSynchronize());
                float ms;
                CHECK(cudaEventElapsedTime(&ms, began, ended));
                us.push_back(1000 * ms);
            }
            std::sort(us.begin(), us.end());
            return us[us.size() / 2];
        };
        static const char * kinds[]      = { "asleep", "a word", "a word, fenced", "48 x 4 words", "48 x 4 words, fenced" };
        static const char * priorities[] = { "high", "same", "low" };
        printf("%s\n", chained ? "chained" : "not chained");
        time(0, 0, 0, 0, nullptr);
        for (int what = 0; what < N_KINDS; ++what) {
            for (const int n_blocks : { 1, 2, 8 }) {
                for (int p = 0; p < (what == WORDS_FENCED || what == ASLEEP ? 3 : 1); ++p) {
                    const float alone  = time(0, 0, 0, 0, nullptr);
                    const float beside = time(n_blocks, 1024, what, 200, side[p]);
                    printf("  %d x 1024, %-22s %-5s priority: %7.1f us alone, %7.1f "
                           "beside: %.3f\n",
                           n_blocks, kinds[what], priorities[p], alone, beside, beside / alone);
                }
            }
        }
        for (const int n_threads : { 32, 256, 512 }) {
            const float alone  = time(0, 0, 0, 0, nullptr);
            const float beside = time(8, n_threads, WORD, 200, side[0]);
            printf("  8 x %d, a word, high priority: %.3f\n", n_threads, beside / alone);
        }
        for (const int pause : { 20, 1000, 5000 }) {
            const float alone  = time(0, 0, 0, 0, nullptr);
            const float beside = time(8, 1024, WORDS_FENCED, pause, side[0]);
            printf("  8 x 1024, 48 x 4 words, fenced, every %d ns: %.3f\n", pause, beside / alone);
        }
    }
    return 0;
}
