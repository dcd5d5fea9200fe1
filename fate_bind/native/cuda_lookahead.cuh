// What a layer's input tells of later layers: the op puts the input aside, blocks behind it or beside it apply the routers of those layers to it, and the
// last that does so for a layer plans for it.
#pragma once

#include "cuda_plan.cuh"
#include "lookahead.h"

static const int FATE_CHUNK     = FATE_LOOK_THREADS / 32; // experts that a block scores, a warp each
static const int FATE_ROW_LOADS = 8;                      // of a lane, before the input is there

// One later layer as an earlier one sees it.
struct fate_cuda_view {
    int32_t   target;    // among the layers of the device, -1: none
    int32_t   distance;
    fate_gate gate;      // n_embd 0: unknown, for benchmarks that foretell
    float *   selection; // [n_experts], what the gate selects by

    // for benchmarks, in place of what the gate says: [n_tokens][..][n_foretold], rows by stride, the next token's at *end; null: the gate counts
    const int32_t * ids;
    const float *   chances;
    const int64_t * end;
    int32_t         n_tokens;
    int32_t         n_foretold;
    int64_t         stride;

    uint32_t arrived; // chunks of the step at hand
};

// What a layer sees; in device memory.
struct fate_cuda_sight {
    fate_cuda_view views[FATE_LOOKAHEAD_LAYERS];
    float *        input;     // [n_embd], a copy
    int32_t        n_embd;
    uint32_t       is_wanted; // the step at hand is of one token whose output is wanted
    uint32_t       is_shown;  // the input is there
    uint32_t       n_told;    // views of which it is planned what is to come in
    uint32_t       is_left;   // by a block of those that copy behind the layer
};

static __host__ __device__ inline uint32_t fate_n_chunks(const fate_cuda_view & view) {
    return view.target < 0 ? 0 : view.gate.n_embd > 0 ? (view.gate.n_experts + FATE_CHUNK - 1) / FATE_CHUNK : 1;
}

// In the op, one block: puts the input aside.
static __device__ void fate_show(const fate_cuda_layer & layer, const fate_cuda_call & call) {
    fate_cuda_sight & sight = *layer.sight;
    if (!sight.is_wanted) {
        return;
    }
    for (int i = threadIdx.x; i < sight.n_embd; i += blockDim.x) {
        sight.input[i] = call.input[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicExch(&sight.is_shown, 1);
    }
}

// Shared memory for an input: lane by lane, so that the lanes of a warp find theirs in banks of their own.
static inline __host__ __device__ size_t fate_input_bytes(int32_t n_embd) {
    return (n_embd + 32 * FATE_GATE_ALIGN - 1) / (32 * FATE_GATE_ALIGN) * (32 * FATE_GATE_ALIGN) * sizeof(float);
}

static __device__ __forceinline__ int fate_input_place(int i) {
    return (i / (32 * FATE_GATE_ALIGN) * FATE_GATE_ALIGN + i % FATE_GATE_ALIGN) * 32 + i / FATE_GATE_ALIGN % 32;
}

// A warp: an expert's row, as much of it as its lanes keep.
struct fate_cuda_row {
    int4 packed[FATE_ROW_LOADS];
};

static const __device__ __forceinline__ int4 * fate_row_of(const fate_gate & gate, int32_t expert) {
    static_assert(FATE_GATE_ALIGN == sizeof(int4), "a lane loads so many numbers at once");
    return reinterpret_cast<const int4 *>(gate.weights + static_cast<int64_t>(expert) * gate.stride);
}

static __device__ __forceinline__ void fate_read_row(const fate_gate & gate, int32_t expert, fate_cuda_row & row) {
#pragma unroll
    for (int i = 0; i < FATE_ROW_LOADS; ++i) {
        const int at  = i * 32 + static_cast<int>(threadIdx.x % 32);
        row.packed[i] = at < gate.stride / FATE_GATE_ALIGN ? __ldcs(fate_row_of(gate, expert) + at) : make_int4(0, 0, 0, 0);
    }
}

// x: of a lane's numbers, 32 floats apart.
static __device__ __forceinline__ float fate_dot(const int4 & packed, const float * x) {
    const int words[4] = { packed.x, packed.y, packed.z, packed.w };
    float     sum      = 0.0f;
#pragma unroll
    for (int i = 0; i < FATE_GATE_ALIGN; ++i) {
        sum += static_cast<float>(static_cast<int8_t>(words[i / 4] >> (i % 4 * 8))) * x[i * 32];
    }
    return sum;
}

// A warp: the sum over an expert's row; input: as fate_input_place has it.
static __device__ float fate_gate_sum(const fate_gate & gate, const float * input, int32_t expert, const fate_cuda_row & row) {
    const int lane = threadIdx.x % 32;
    const int n    = gate.stride / FATE_GATE_ALIGN;
    float     sum  = 0.0f;
#pragma unroll
    for (int i = 0; i < FATE_ROW_LOADS; ++i) {
        if (i * 32 + lane < n) {
            sum += fate_dot(row.packed[i], input + i * FATE_GATE_ALIGN * 32 + lane);
        }
    }
    for (int at = FATE_ROW_LOADS * 32 + lane; at < n; at += 32) {
        sum += fate_dot(__ldcs(fate_row_of(gate, expert) + at), input + at / 32 * FATE_GATE_ALIGN * 32 + lane);
    }
    for (int d = 16; d > 0; d /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, d);
    }
    return sum;
}

// Notes what is told of a layer, for the record. at: of the view.
static __device__ __forceinline__ void fate_tell(const fate_cuda_layer & target, int at, int32_t rank, int32_t expert, float chance) {
    if (target.foretold && rank < FATE_LOOKAHEAD_MOST && chance > 0.0f) {
        const int32_t to           = (FATE_LOOKAHEAD_LAYERS - 1 - at) * FATE_LOOKAHEAD_MOST + rank;
        target.foretold[to]        = expert;
        target.foretold_chance[to] = chance;
    }
}

// What is foretold in place of the gate's, of every expert.
static __device__ void fate_given_chances(const fate_cuda_layer & target, const fate_cuda_view & view, int at, float * chance) {
    const int n_threads = blockDim.x;
    for (int32_t e = threadIdx.x; e < target.n_experts; e += n_threads) {
        chance[e] = 0.0f;
    }
    __syncthreads();
    const int64_t row = (__ldcg(view.end) - 1) % view.n_tokens * view.stride;
    for (int32_t i = threadIdx.x; i < view.n_foretold; i += n_threads) {
        const int32_t id = view.ids[row + i];
        if (id >= 0 && id < target.n_experts) {
            chance[id] = view.chances[row + i];
            fate_tell(target, at, i, id, view.chances[row + i]);
        }
    }
    __syncthreads();
}

// By the rank of what the gate selects by, of every expert. selection: scratch.
static __device__ void fate_gate_chances_of(const fate_cuda_layer & target, const fate_cuda_view & view, int at, float * selection,
                                            float * chance) {
    const int n_threads = blockDim.x;
    for (int32_t e = threadIdx.x; e < target.n_experts; e += n_threads) {
        selection[e] = __ldcg(view.selection + e);
    }
    __syncthreads();
    if (view.gate.n_groups > 0) { // fewer than experts
        for (int32_t group = threadIdx.x; group < view.gate.n_groups; group += n_threads) {
            chance[group] = fate_gate_group(view.gate, selection, group);
        }
        __syncthreads();
        for (int32_t e = threadIdx.x; e < target.n_experts; e += n_threads) {
            selection[e] = fate_gate_is_open(view.gate, chance, e) ? selection[e] : -INFINITY;
        }
        __syncthreads();
    }
    for (int32_t e = threadIdx.x; e < target.n_experts; e += n_threads) {
        int32_t rank;
        chance[e] = fate_gate_chance(selection, target.n_experts, e, target.k, rank);
        fate_tell(target, at, rank, e, chance[e]);
    }
    __syncthreads();
}

// One block a chunk of each view, behind the op that shows its input, or beside it when all of the op's blocks have started. What does not hang on the input is
// read before it is there. The last block of a view plans for the layer that is seen.
static __global__ void __launch_bounds__(FATE_LOOK_THREADS) fate_look_on(const fate_cuda_layer * layers, int32_t from, float threshold,
                                                                         int32_t wanted) {
    extern __shared__ int64_t     s_look[]; // tables, then the input
    __shared__ fate_cuda_planning s;
    if (!layers[from].is_awaited) {         // where it is, the op of the layer that is seen must not come near before the plan is made
        fate_pdl_launch_next();
    }
    fate_cuda_sight & sight = *layers[from].sight;
    if (!fate_look(sight.is_wanted)) {
        return;
    }
    const int tid   = threadIdx.x;
    uint32_t  chunk = blockIdx.x;
    int       at    = 0;
    for (; chunk >= fate_n_chunks(sight.views[at]); ++at) {
        chunk -= fate_n_chunks(sight.views[at]);
    }
    fate_cuda_view &        view   = sight.views[at];
    const fate_cuda_layer & target = layers[view.target];
    const fate_cuda_tables  t      = fate_tables_in(s_look, target.n_experts);
    float * const           input  = reinterpret_cast<float *>(reinterpret_cast<char *>(s_look) + fate_tables_bytes(target.n_experts));
    const int32_t           expert = static_cast<int32_t>(chunk) * FATE_CHUNK + tid / 32;
    const bool              scores = view.gate.n_embd > 0 && expert < view.gate.n_experts;
    fate_cuda_row           row;
    if (scores) {
        fate_read_row(view.gate, expert, row);
    }
    fate_read_tables(target, t);
    if (tid == 0) {
        while (!fate_look(sight.is_shown)) { // by a block of the op that is running: where it is wanted every op that has an input shows it
        }
        __threadfence();
    }
    __syncthreads();
    if (view.gate.n_embd > 0) {
        const int n = view.gate.n_embd;
        for (int i = tid; i < static_cast<int>(fate_input_bytes(n) / sizeof(float)); i += FATE_LOOK_THREADS) {
            const float x              = i < n ? __ldcg(sight.input + i) : 0.0f;
            input[fate_input_place(i)] = view.gate.ratio && i < n ? x * view.gate.ratio[i] : x;
        }
        __syncthreads();
    }
    if (scores) {
        const float sum = fate_gate_sum(view.gate, input, expert, row);
        if (tid % 32 == 0) {
            view.selection[expert] = fate_gate_selection(view.gate, expert, sum);
        }
    }
    __syncthreads();
    if (tid == 0) {
        __threadfence();
        s.is_last = atomicAdd(&view.arrived, 1) + 1 == fate_n_chunks(view);
        __threadfence();
    }
    __syncthreads();
    if (!s.is_last) {
        return;
    }
    if (view.ids) {
        fate_given_chances(target, view, at, t.chance);
    } else {
        fate_gate_chances_of(target, view, at, t.selection, t.chance);
    }
    fate_plan_layer(target, view.distance, threshold, wanted, s, t);
    if (tid == 0) {
        __threadfence();
        atomicAdd(&sight.n_told, 1);
    }
}
