// Experts brought in beside the running step: planned layer by layer, copied in pieces that are claimed one by one, taken over by the layer's own op.
//
// Kernels on another stream plan and copy while the step's graph runs; nothing waits for a kernel that may not have begun. A layer's op closes its gate, so
// that from then on nobody plans for it. Of what is planned it cancels whatever nobody has begun, which then never was; the rest enters its tables. It copies
// the unclaimed pieces of those that it needs itself, and waits only for pieces that somebody has claimed, who therefore is running.
#pragma once

#include "cuda_copy.cuh"
#include "prefetch.h"

#include <climits>

static const uint32_t FATE_PIECE_UNITS = 4096; // 64 KiB where units are wide
static const uint32_t FATE_CANCELLED   = 1u << 31;

static_assert(FATE_PIECE_UNITS == 4 * FATE_CUDA_THREADS, "a thread copies four units of a piece");

enum fate_gate : uint32_t { FATE_GATE_OPEN, FATE_GATE_PLANNING, FATE_GATE_PLANNED, FATE_GATE_CLOSED };

// Of a layer, in device memory; all zeros: nothing is planned.
struct fate_cuda_plan {
    uint32_t      gate;
    int32_t       n;
    int32_t       is_taken;                   // the tables have it
    int32_t       n_waiting;                  // prefetched and not used yet
    fate_prefetch entries[FATE_PREFETCH_MAX];
    uint32_t      claimed[FATE_PREFETCH_MAX]; // pieces, or FATE_CANCELLED
    uint32_t      done[FATE_PREFETCH_MAX];
};

// What an op knows of the plan; shared memory.
struct fate_cuda_ahead {
    int32_t       n;
    fate_prefetch entries[FATE_PREFETCH_MAX];
    bool          is_kept[FATE_PREFETCH_MAX];   // not cancelled
    bool          is_needed[FATE_PREFETCH_MAX]; // by the op, and kept
    bool          is_late[FATE_PREFETCH_MAX];   // needed, and not complete
    uint32_t      piece;
};

static __device__ __forceinline__ uint32_t fate_look(const uint32_t & word) {
    return *const_cast<const volatile uint32_t *>(&word);
}

static __host__ __device__ inline uint32_t fate_n_pieces(const fate_cuda_tensor & tensor) {
    return (tensor.n_units + FATE_CUDA_LINE_UNITS - 1 + FATE_PIECE_UNITS - 1) / FATE_PIECE_UNITS;
}

// A block copies one piece of an expert into its slot.
static __device__ void fate_copy_piece(const fate_cuda_layer & layer, const fate_prefetch & entry, uint32_t piece) {
    int t = 0;
    for (; t < layer.n_tensors - 1; ++t) {
        const uint32_t n = fate_n_pieces(layer.tensors[t]);
        if (piece < n) {
            break;
        }
        piece -= n;
    }
    const fate_cuda_tensor & tensor = layer.tensors[t];
    const char *             from   = tensor.source + entry.expert * tensor.expert_bytes;
    char *                   to     = tensor.slots + entry.slot * tensor.expert_bytes;
    const bool               wide   = tensor.width == 16;
    const uint32_t           first  = piece * FATE_PIECE_UNITS + threadIdx.x - (wide ? fate_lead(from) : 0);
#if defined(FATE_LATE_FILLS)
    for (int i = 0; i < 4; ++i) {
        const uint32_t unit = first + i * FATE_CUDA_THREADS;
        for (uint32_t b = 0; unit < tensor.n_units && b < tensor.width; ++b) {
            to[static_cast<uint64_t>(unit) * tensor.width + b] = static_cast<char>(0xff);
        }
    }
    __syncthreads();
    for (int i = 0; i < 20; ++i) { // longer than an op without the wait takes
        __nanosleep(20000);
    }
#endif
    if (wide) {
        uint4 data[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t unit = first + i * FATE_CUDA_THREADS;
            if (unit < tensor.n_units) {
                data[i] = __ldcs(reinterpret_cast<const uint4 *>(from) + unit);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t unit = first + i * FATE_CUDA_THREADS;
            if (unit < tensor.n_units) {
                reinterpret_cast<uint4 *>(to)[unit] = data[i];
            }
        }
        return;
    }
    for (int i = 0; i < 4; ++i) {
        const uint32_t unit = first + i * FATE_CUDA_THREADS;
        if (unit < tensor.n_units && tensor.width == 4) {
            reinterpret_cast<uint32_t *>(to)[unit] = reinterpret_cast<const uint32_t *>(from)[unit];
        } else if (unit < tensor.n_units) {
            to[unit] = from[unit];
        }
    }
}

// Copies what nobody has claimed of an entry. YIELDS: demand misses go first. All threads of the block call it; scratch: shared.
template <bool YIELDS>
static __device__ void fate_copy_unclaimed(const fate_cuda_layer & layer, const fate_prefetch & entry, int at, uint32_t & scratch) {
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) {
            while (YIELDS && fate_look(*layer.n_demands) > 0) {
                __nanosleep(200);
            }
            scratch = atomicAdd(&layer.plan->claimed[at], 1);
        }
        __syncthreads();
        const uint32_t piece = scratch;
        if (piece >= layer.n_pieces) { // or cancelled
            return;
        }
        if (layer.ns_per_expert > 0) { // the bytes come when a slower link would have brought them
            const float    ns    = layer.ns_per_expert * static_cast<float>(gridDim.x) / static_cast<float>(layer.n_pieces);
            const uint64_t began = fate_now_ns();
            while (static_cast<float>(fate_now_ns() - began) < ns) {
            }
        }
        fate_copy_piece(layer, entry, piece);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&layer.plan->done[at], 1);
        }
    }
}

// A use of an expert that was prefetched, or its end: whether it was still waiting for it.
static __device__ __forceinline__ bool fate_end_waiting(const fate_cuda_layer & layer, int32_t expert) {
    if (atomicExch(&layer.waiting[expert], 0) == 0) {
        return false;
    }
    atomicSub(&layer.plan->n_waiting, 1);
    return true;
}

//
// beside the step
//

// One block a layer. chances[..][stride] in mapped host memory, by index.
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_plan(const fate_cuda_layer * layers, const int32_t * index,
                                                                      const float * chances, int32_t stride, float threshold,
                                                                      int32_t wanted) {
    __shared__ float     s_chance[FATE_CUDA_MAX_EXPERTS];
    __shared__ fate_rank s_rank[FATE_CUDA_MAX_EXPERTS]; // by slot
    __shared__ uint8_t   s_goes[FATE_CUDA_MAX_EXPERTS]; // by slot: 1 free, 2 may be evicted
    __shared__ uint8_t   s_comes[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t   s_expert[FATE_PREFETCH_MAX];
    __shared__ int32_t   s_slot[FATE_PREFETCH_MAX];
    __shared__ bool      s_is_ours;

    const fate_cuda_layer & layer = layers[blockIdx.x];
    fate_cuda_plan &        plan  = *layer.plan;
    const int32_t           tid   = static_cast<int32_t>(threadIdx.x);
    // from the host before the gate is held, for which the layer's op would wait
    const float chance            = tid < layer.n_experts ? chances[static_cast<int64_t>(index[blockIdx.x]) * stride + tid] : 0.0f;
    if (tid < layer.n_experts) {
        s_chance[tid] = chance;
    }
    __syncthreads();
    if (tid == 0) {
        s_is_ours = atomicCAS(&plan.gate, FATE_GATE_OPEN, FATE_GATE_PLANNING) == FATE_GATE_OPEN;
        __threadfence();
    }
    __syncthreads();
    if (!s_is_ours) {
        return;
    }
    const int32_t most  = fate_prefetch_most(wanted, layer.n_slots, layer.k);
    const bool    comes = tid < layer.n_experts && chance >= threshold && layer.slot_of[tid] < 0;
    if (tid < layer.n_experts) {
        s_comes[tid] = comes;
    }
    __syncthreads();
    const int32_t held = tid < layer.n_slots ? layer.expert_of[tid] : 0;
    bool          goes = tid < layer.n_slots;
    if (goes && held >= 0) {
        fate_table table;
        table.last_use     = layer.last_use;
        table.score        = layer.score;
        table.bonus        = layer.head->bonus;
        table.published_at = layer.head->published_at;
        s_rank[tid]        = fate_rule_rank(table, held);
        goes               = s_chance[held] < threshold;
    }
    if (tid < layer.n_slots) {
        s_goes[tid] = goes ? (held < 0 ? 1 : 2) : 0;
    }
    const int32_t n_come = __syncthreads_count(comes);
    const int32_t n_go   = __syncthreads_count(goes);
    if (comes) {
        int32_t before = 0;
        for (int32_t e = 0; e < layer.n_experts; ++e) {
            before += s_comes[e] && fate_prefetch_before(s_chance[e], e, chance, tid);
        }
        if (before < most) {
            s_expert[before] = tid;
        }
    }
    if (goes && n_come > 0) {
        int32_t before = 0;
        for (int32_t slot = 0; slot < layer.n_slots; ++slot) {
            const bool is_free = s_goes[slot] == 1;
            if (s_goes[slot] && slot != tid) {
                before += held < 0 ? is_free && slot < tid : is_free || fate_rule_before(s_rank[slot], s_rank[tid]);
            }
        }
        if (before < most) {
            s_slot[before] = tid;
        }
    }
    __syncthreads();
    const int32_t n = min(min(n_come, n_go), most);
    if (tid < n) {
        plan.entries[tid] = { s_expert[tid], s_slot[tid], layer.expert_of[s_slot[tid]] };
        plan.claimed[tid] = 0;
        plan.done[tid]    = 0;
    }
    __syncthreads();
    if (tid == 0) {
        plan.n = n;
        __threadfence();
        atomicExch(&plan.gate, FATE_GATE_PLANNED);
    }
}

// Copies what is planned, in the order of the layers.
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_fetch(const fate_cuda_layer * layers, int32_t n_layers) {
    __shared__ int32_t       s_n;
    __shared__ uint32_t      s_scratch;
    __shared__ fate_prefetch s_entry;
    for (int32_t i = 0; i < n_layers; ++i) {
        const fate_cuda_layer & layer = layers[i];
        __syncthreads();
        if (threadIdx.x == 0) {
            s_n = fate_look(layer.plan->gate) == FATE_GATE_PLANNED ? layer.plan->n : 0;
        }
        __syncthreads();
        for (int at = 0; at < s_n; ++at) {
            __syncthreads();
            if (threadIdx.x == 0) {
                s_entry = layer.plan->entries[at];
            }
            fate_copy_unclaimed<true>(layer, s_entry, at, s_scratch);
        }
    }
}

// Between steps, one thread a layer: what no op took over enters the tables if it was begun; gates open.
static __global__ void fate_settle(const fate_cuda_layer * layers, int32_t n_layers) {
    const int32_t i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n_layers) {
        return;
    }
    const fate_cuda_layer & layer = layers[i];
    fate_cuda_plan &        plan  = *layer.plan;
    const int32_t           n     = plan.gate == FATE_GATE_PLANNED && !plan.is_taken ? plan.n : 0;
    for (int32_t at = 0; at < n; ++at) {
        if (plan.claimed[at] == 0 || plan.claimed[at] >= FATE_CANCELLED) {
            continue;
        }
        const fate_prefetch entry = plan.entries[at];
        if (entry.victim >= 0) {
            layer.slot_of[entry.victim] = -1;
            fate_add(&layer.counters[FATE_COUNTER_EVICTIONS], 1);
            fate_add(&layer.counters[FATE_COUNTER_PREFETCH_WASTED], fate_end_waiting(layer, entry.victim));
        }
        layer.slot_of[entry.expert] = entry.slot;
        layer.expert_of[entry.slot] = entry.expert;
        layer.waiting[entry.expert] = 1;
        atomicAdd(&plan.n_waiting, 1);
        fate_add(&layer.counters[FATE_COUNTER_FILLS], 1);
        fate_add(&layer.counters[FATE_COUNTER_PREFETCHES], 1);
    }
    plan.n        = 0;
    plan.is_taken = 0;
    plan.gate     = FATE_GATE_OPEN;
}

//
// in the layer's op
//

// Thread 0: from here on nobody plans. Returns how many entries there are.
static __device__ int32_t fate_close(fate_cuda_plan & plan) {
    uint32_t gate = atomicCAS(&plan.gate, FATE_GATE_OPEN, FATE_GATE_CLOSED);
    while (gate == FATE_GATE_PLANNING) {
        gate = fate_look(plan.gate);
    }
    __threadfence();
    return gate == FATE_GATE_PLANNED ? *const_cast<volatile int32_t *>(&plan.n) : 0;
}

// Decides what becomes of the plan, alike in every block, but for what is late, by which nothing is decided: claims only grow, so that whoever looks later
// finds the same. first[expert]: INT_MAX where the op does not need it; slot_of becomes what it is with what is kept. The block synchronises before and
// after.
static __device__ void fate_take(const fate_cuda_layer & layer, fate_cuda_ahead & ahead, const int32_t * first, int32_t * slot_of) {
    const int at = threadIdx.x;
    if (at >= ahead.n) {
        return;
    }
    fate_cuda_plan & plan = *layer.plan;
    fate_prefetch    entry;
    entry.expert           = __ldcg(&plan.entries[at].expert);
    entry.slot             = __ldcg(&plan.entries[at].slot);
    entry.victim           = __ldcg(&plan.entries[at].victim);
    const uint32_t claimed = atomicCAS(&plan.claimed[at], 0, FATE_CANCELLED);
    const bool     is_kept = claimed != 0 && claimed < FATE_CANCELLED;
    if (is_kept) {
        if (entry.victim >= 0) {
            slot_of[entry.victim] = -1;
        }
        slot_of[entry.expert] = entry.slot;
    }
    ahead.entries[at]   = entry;
    ahead.is_kept[at]   = is_kept;
    ahead.is_needed[at] = is_kept && first[entry.expert] != INT_MAX;
    ahead.is_late[at]   = ahead.is_needed[at] && fate_look(plan.done[at]) < layer.n_pieces;
    __threadfence(); // of what is complete the bytes are there
}

// The entry in a slot, -1: none.
static __device__ __forceinline__ int fate_ahead_in(const fate_cuda_ahead & ahead, int32_t slot) {
    for (int at = 0; at < ahead.n; ++at) {
        if (ahead.is_kept[at] && ahead.entries[at].slot == slot) {
            return at;
        }
    }
    return -1;
}

static __device__ __forceinline__ bool fate_is_late(const fate_cuda_ahead & ahead, int32_t expert) {
    for (int at = 0; at < ahead.n; ++at) {
        if (ahead.is_late[at] && ahead.entries[at].expert == expert) {
            return true;
        }
    }
    return false;
}

static __device__ __forceinline__ bool fate_any_late(const fate_cuda_ahead & ahead) {
    bool any = false;
    for (int at = 0; at < ahead.n; ++at) {
        any = any || ahead.is_late[at];
    }
    return any;
}

// Copies what the op needs and nobody has claimed.
static __device__ void fate_copy_needed(const fate_cuda_layer & layer, fate_cuda_ahead & ahead) {
    for (int at = 0; at < ahead.n; ++at) {
        if (ahead.is_late[at]) {
            fate_copy_unclaimed<false>(layer, ahead.entries[at], at, ahead.piece);
        }
    }
}

// The last block: waits until what the op needs is complete, then enters the plan into tables, counters and records. Returns how many entered
// and how many experts went for them.
static __device__ int2 fate_enter(const fate_cuda_layer & layer, const fate_cuda_ahead & ahead) {
    const int        at   = threadIdx.x;
    fate_cuda_plan & plan = *layer.plan;
    if (at == 0) {
        const uint64_t began  = fate_now_ns();
        bool           waited = false;
        for (int i = 0; i < ahead.n; ++i) {
            waited = waited || ahead.is_late[i];
#if !defined(FATE_FAULT_NOT_AWAITED)
            while (ahead.is_late[i] && fate_look(plan.done[i]) < layer.n_pieces) {
            }
#endif
        }
        __threadfence();
        fate_add(&layer.counters[FATE_COUNTER_PREFETCH_WAITED_NS], waited ? static_cast<int64_t>(fate_now_ns() - began) : 0);
    }
    if (at < ahead.n && !ahead.is_kept[at]) {
        fate_add(&layer.counters[FATE_COUNTER_PREFETCH_CANCELLED], 1);
    }
    int32_t n_before  = 0;
    int32_t n_evicted = 0;
    int2    n_all     = { 0, 0 };
    for (int i = 0; i < ahead.n; ++i) {
        n_before += i < at && ahead.is_kept[i];
        n_evicted += i < at && ahead.is_kept[i] && ahead.entries[i].victim >= 0;
        n_all.x += ahead.is_kept[i];
        n_all.y += ahead.is_kept[i] && ahead.entries[i].victim >= 0;
    }
    if (at < ahead.n && ahead.is_kept[at]) {
        const fate_prefetch entry = ahead.entries[at];
        fate_add(&layer.counters[FATE_COUNTER_PREFETCHES], 1);
        fate_add(&layer.counters[FATE_COUNTER_FILLS], 1);
        if (entry.victim >= 0) {
            layer.slot_of[entry.victim] = -1;
            fate_add(&layer.counters[FATE_COUNTER_EVICTIONS], 1);
            fate_add(&layer.counters[FATE_COUNTER_PREFETCH_WASTED], fate_end_waiting(layer, entry.victim));
            if (layer.step) {
                layer.evictions[n_evicted] = entry.victim;
            }
        }
        layer.expert_of[entry.slot] = entry.expert;
        layer.slot_of[entry.expert] = entry.slot;
        if (layer.step) {
            layer.fills[n_before] = entry.expert;
        }
        if (!ahead.is_needed[at]) {
            layer.waiting[entry.expert] = 1;
            atomicAdd(&plan.n_waiting, 1);
        } else {
            fate_add(&layer.counters[ahead.is_late[at] ? FATE_COUNTER_PREFETCH_LATE : FATE_COUNTER_PREFETCH_USEFUL], 1);
        }
    }
    if (at == 0) {
        plan.is_taken = 1;
    }
    return n_all;
}
