// What the kernels know of a layer and of an op, and the small things that they share.
#pragma once

#include "fate.h"
#include "mailbox.h"
#include "ring.h"
#include "rule.h"

#include "cuda_api.h"

static const int FATE_CUDA_THREADS     = 1024;
static const int FATE_CUDA_MAX_EXPERTS = FATE_MAILBOX_EXPERTS; // also bounds the pairs of a pool op: tokens x k <= slots < experts
static const int FATE_CUDA_MAX_TENSORS = 11;
static const int FATE_CUDA_FILL_BLOCKS = 8;                    // enough for the link, few enough to leave the multiprocessors to others
static const int FATE_CUDA_LOADS       = 4;                    // in flight a thread
// Of a block beside the step. It takes room in which upstream's chained kernels overlap: eight blocks of 1024 threads that stay cost a token 4 to 5 % when
// they do nothing, of 256 threads less than 1 % (bench/beside.cu).
static const int FATE_BESIDE_THREADS   = 256;
static const int FATE_LOOK_THREADS     = 256;

// Entries of an array in shared memory by expert or slot: few experts need little of it, and the launch finds room beside others.
static inline __host__ __device__ int32_t fate_cap(int32_t n_experts) {
    return (n_experts + 31) / 32 * 32;
}

struct fate_cuda_tensor {
    const char * source;
    char *       slots;
    char *       staging;
    uint64_t     expert_bytes;
    uint32_t     n_units; // of width bytes, an expert
    uint32_t     n_tail;  // further units that staging takes along
    uint32_t     width;   // 16, 4 or 1
};

// What changes from step to step in a layer, besides the arrays.
struct fate_cuda_head {
    int64_t  clock;
    int64_t  published_at;
    float    bonus;
    uint32_t arrived;
};

// Records of a step, all layers: what the host needs to rebuild it.
struct fate_cuda_step {
    int32_t path;
    int32_t n_rows;
    int32_t n_fills;
    int32_t n_evictions;
};

struct fate_cuda_plan;  // cuda_plan.cuh
struct fate_cuda_sight; // cuda_lookahead.cuh

struct fate_cuda_layer {
    int32_t index; // among all layers
    int32_t n_experts;
    int32_t n_slots;
    int32_t k;
    int32_t n_tensors;
    bool    is_wide;       // every tensor's width is 16
    float   ns_per_expert; // that a missing one takes at least, as on a slower link; 0: as long as it takes

    int32_t *        slot_of;
    int32_t *        expert_of;
    int64_t *        last_use;
    float *          score;
    fate_cuda_head * head;
    int64_t *        counters;    // [FATE_N_COUNTERS]; routed and bytes follow from the others
    fate_desk *      desk;        // callback mode: where the host is asked
    fate_ring_desk * ring;        // where experts come from if not straight from the source

    fate_cuda_plan *  plan;       // null: nothing is prefetched
    fate_cuda_sight * sight;      // null: its input tells of no other layer
    int32_t *         waiting;    // [n_experts], 1: prefetched and not used yet
    uint32_t *        n_demands;  // blocks of this engine on the device that copy what an op waits for
    uint32_t *        n_posts;    // grows when there is something new to copy
    uint32_t          n_pieces;   // of an expert
    bool              is_awaited; // the op itself carries out what is planned, all of it

    int64_t *        times;       // [FATE_N_TIMES], null: not kept
    fate_cuda_step * step;        // null: not recorded
    int32_t *        fills;
    int32_t *        evictions;
    int32_t *        foretold; // [FATE_LOOKAHEAD_LAYERS][FATE_LOOKAHEAD_MOST], by the farthest layer first; null: not recorded
    float *          foretold_chance;

    fate_cuda_tensor tensors[FATE_CUDA_MAX_TENSORS];
};

// One op.
struct fate_cuda_call {
    const char * ids; // row r, rank i at r*stride + 4*i, best rank first
    int64_t      stride;
    int32_t      n_rows;
    int32_t *    out;     // [n_rows][k]: slots on the pool path, ids on the staged path

    const float * input;  // what the layer's router read; null where that is of no use

    const char * weights; // null: unknown
    int64_t      weights_nb1;
    int64_t      weights_nb2;

    // [n_tokens][record_k] of this layer, null: not recorded
    int32_t   record_k;
    int32_t * record_ids;
    float *   record_weights;
    uint8_t * record_hits;
};

static __device__ __forceinline__ void fate_pdl_launch_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

static __device__ __forceinline__ void fate_pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

static __device__ __forceinline__ uint64_t fate_now_ns() {
#if defined(__HIP__)
    return fate_hip_clock() * 10;
#else
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
#endif
}

// One thread: now is when it happened.
static __device__ __forceinline__ void fate_mark(const fate_cuda_layer & layer, int what) {
    if (layer.times) {
        layer.times[what] = static_cast<int64_t>(fate_now_ns());
    }
}

// Sums of wide counters: the type that atomics know.
static __device__ __forceinline__ void fate_add(int64_t * to, int64_t n) {
    atomicAdd(reinterpret_cast<unsigned long long *>(to), static_cast<unsigned long long>(n));
}

static __device__ __forceinline__ void fate_max(int64_t * to, int64_t value) {
#if defined(__HIP__) // which knows it from some version on
    unsigned long long * word = reinterpret_cast<unsigned long long *>(to);
    unsigned long long   seen = static_cast<unsigned long long>(*const_cast<volatile int64_t *>(to));
    while (static_cast<int64_t>(seen) < value) {
        const unsigned long long found = atomicCAS(word, seen, static_cast<unsigned long long>(value));
        if (found == seen) {
            return;
        }
        seen = found;
    }
#else
    atomicMax(reinterpret_cast<long long *>(to), static_cast<long long>(value));
#endif
}

// How many threads before this one have the flag, and in all. All threads of the block call it; scratch[33].
static __device__ int fate_rank_of(bool flag, int * scratch, int & total) {
    const unsigned mask = __ballot_sync(0xffffffff, flag);
    const int      lane = threadIdx.x % 32;
    const int      warp = threadIdx.x / 32;
    __syncthreads();
    if (lane == 0) {
        scratch[warp] = __popc(mask);
    }
    __syncthreads();
    if (warp == 0) {
        const int n   = scratch[lane];
        int       sum = n;
        for (int d = 1; d < 32; d *= 2) {
            const int other = __shfl_up_sync(0xffffffff, sum, d);
            sum += lane >= d ? other : 0;
        }
        scratch[lane] = sum - n;
        if (lane == 31) {
            scratch[32] = sum;
        }
    }
    __syncthreads();
    total = scratch[32];
    return scratch[warp] + __popc(mask & ((1u << lane) - 1));
}

static __device__ __forceinline__ int32_t fate_id(const fate_cuda_call & call, int row, int rank) {
    return *reinterpret_cast<const int32_t *>(call.ids + row * call.stride + rank * 4);
}

static __device__ __forceinline__ void fate_note(const fate_cuda_layer & layer, const fate_cuda_call & call, int row, int rank,
                                                 int32_t expert, bool hit) {
    if (!layer.step) {
        return;
    }
    const int64_t at     = static_cast<int64_t>(row) * call.record_k + rank;
    call.record_ids[at]  = expert;
    call.record_hits[at] = hit;
    if (call.weights && call.record_weights) {
        call.record_weights[at] = *reinterpret_cast<const float *>(call.weights + rank * call.weights_nb1 + row * call.weights_nb2);
    }
}
