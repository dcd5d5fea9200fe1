// What a layer is to bring in beside the running step: planned by one block at a time, behind a gate that the layer's own op closes.
#pragma once

#include "cuda_layer.cuh"
#include "lookahead.h"
#include "prefetch.h"

#include <climits>

static const uint32_t FATE_CANCELLED = 1u << 31;

// A plan's state: whether its layer's op has come, whether a block is planning, how near the nearest layer that told is, 0: none has, and how many
// entries there are.
static const uint32_t FATE_PLAN_CLOSED   = 1;
static const uint32_t FATE_PLAN_PLANNING = 2;
static const uint32_t FATE_PLAN_NEAREST  = 4;
static const uint32_t FATE_PLAN_ENTRY    = 64;

static_assert(FATE_LOOKAHEAD_FARTHEST < FATE_PLAN_ENTRY / FATE_PLAN_NEAREST, "the distance has its bits");

enum fate_quiet : uint32_t { FATE_QUIET_UNKNOWN, FATE_QUIET_YES, FATE_QUIET_NO };

// Of a layer, in device memory; all zeros: nothing is planned.
struct fate_cuda_plan {
    uint32_t      state;
    int32_t       is_taken;                   // the tables have it
    uint32_t      quiet;                      // fate_quiet, of the op's first block: nothing is to be copied or waited for
    fate_prefetch entries[FATE_PREFETCH_MAX];
    uint32_t      claimed[FATE_PREFETCH_MAX]; // pieces, or FATE_CANCELLED
    uint32_t      done[FATE_PREFETCH_MAX];
};

static __device__ __forceinline__ uint32_t fate_look(const uint32_t & word) {
    return *const_cast<const volatile uint32_t *>(&word);
}

static __device__ __forceinline__ fate_prefetch fate_entry(const fate_cuda_plan & plan, int at) {
    return { __ldcg(&plan.entries[at].expert), __ldcg(&plan.entries[at].slot), __ldcg(&plan.entries[at].victim) };
}

// Shared memory of a block that plans.
struct fate_cuda_planning {
    int32_t       expert[FATE_PREFETCH_MAX];
    int32_t       slot[FATE_PREFETCH_MAX];
    fate_prefetch entries[FATE_PREFETCH_MAX]; // planned before
    bool          is_live[FATE_PREFETCH_MAX]; // not cancelled
    bool          is_sure[FATE_PREFETCH_MAX]; // can no longer be
    uint32_t      state;
    int32_t       n_before;
    bool          is_last;
};

// And what grows with the layer.
struct fate_cuda_tables {
    fate_rank * rank;      // by slot
    float *     chance;
    float *     selection; // scratch
    int32_t *   slot_of;
    int32_t *   held;      // by slot
    uint8_t *   goes;      // by slot: 1 free, 2 may be evicted
    uint8_t *   comes;
};

static inline __host__ __device__ size_t fate_tables_bytes(int32_t n_experts) {
    return static_cast<size_t>(fate_cap(n_experts)) * (sizeof(fate_rank) + 4 * sizeof(int32_t) + 2);
}

static __device__ __forceinline__ fate_cuda_tables fate_tables_in(void * shared, int32_t n_experts) {
    const int32_t    cap = fate_cap(n_experts);
    fate_cuda_tables t;
    t.rank      = static_cast<fate_rank *>(shared);
    t.chance    = reinterpret_cast<float *>(t.rank + cap);
    t.selection = t.chance + cap;
    t.slot_of   = reinterpret_cast<int32_t *>(t.selection + cap);
    t.held      = t.slot_of + cap;
    t.goes      = reinterpret_cast<uint8_t *>(t.held + cap);
    t.comes     = t.goes + cap;
    return t;
}

// Reads a layer's tables. They change when the layer's op comes, which closes its plan first: what was read counts while the plan is open.
static __device__ void fate_read_tables(const fate_cuda_layer & layer, const fate_cuda_tables & t) {
    fate_table table;
    table.last_use     = layer.last_use;
    table.score        = layer.score;
    table.bonus        = layer.head->bonus;
    table.published_at = layer.head->published_at;
    for (int32_t at = static_cast<int32_t>(threadIdx.x); at < layer.n_experts; at += static_cast<int32_t>(blockDim.x)) {
        t.slot_of[at] = layer.slot_of[at];
        if (at < layer.n_slots) {
            const int32_t held = layer.expert_of[at];
            t.held[at]         = held;
            if (held >= 0) {
                t.rank[at] = fate_rule_rank(table, held);
            }
        }
    }
}

static __device__ __forceinline__ int32_t fate_n_entries(uint32_t state) {
    return static_cast<int32_t>(state / FATE_PLAN_ENTRY);
}

static __device__ __forceinline__ int32_t fate_nearest(uint32_t state) {
    return static_cast<int32_t>(state % FATE_PLAN_ENTRY / FATE_PLAN_NEAREST);
}

// Thread 0: whether this block may plan; state: as it found the plan. What a nearer layer told stands.
static __device__ bool fate_open_plan(fate_cuda_plan & plan, int32_t distance, uint32_t & state) {
    state = 0; // as it mostly is
    while (true) {
        if (state & FATE_PLAN_CLOSED || (distance > 0 && fate_nearest(state) > 0 && fate_nearest(state) <= distance)) {
            return false;
        }
        if (state & FATE_PLAN_PLANNING) { // by a block that is running
            state = fate_look(plan.state);
            continue;
        }
        const uint32_t found = atomicCAS(&plan.state, state, state | FATE_PLAN_PLANNING);
        if (found == state) {
            __threadfence();
            return true;
        }
        state = found;
    }
}

// A block plans for one layer, whose op may come any time; all threads call it. t: as fate_read_tables() left it, and the chances; written, maybe
// by others. distance: of the layer that tells, 0: the token itself did. What an earlier plan has is kept, but what a layer that tells more does not hold with
// is cancelled unless it was begun or is awaited.
static __device__ void fate_plan_layer(const fate_cuda_layer & layer, int32_t distance, float threshold, int32_t wanted,
                                       fate_cuda_planning & s, const fate_cuda_tables & t) {
    fate_cuda_plan & plan      = *layer.plan;
    const int32_t    tid       = static_cast<int32_t>(threadIdx.x);
    const int32_t    n_threads = static_cast<int32_t>(blockDim.x);
    if (tid == 0) {
        s.n_before = fate_open_plan(plan, distance, s.state) ? fate_n_entries(s.state) : -1;
    }
    __syncthreads();
    const int32_t n_before = s.n_before;
    if (n_before < 0) {
        return;
    }
    bool is_live = false;
    if (tid < n_before) {
        const fate_prefetch entry = fate_entry(plan, tid);
        uint32_t            begun = fate_look(plan.claimed[tid]);
        const bool          holds = t.chance[entry.expert] >= threshold && (entry.victim < 0 || t.chance[entry.victim] < threshold);
        if (begun == 0 && distance > 0 && !layer.is_awaited && !holds) {
            begun = atomicCAS(&plan.claimed[tid], 0, FATE_CANCELLED);
            begun = begun == 0 ? FATE_CANCELLED : begun;
        }
        is_live        = begun < FATE_CANCELLED;
        s.entries[tid] = entry;
        s.is_live[tid] = is_live;
        s.is_sure[tid] = begun > 0 || layer.is_awaited;
    }
    const int32_t n_live = __syncthreads_count(is_live);
    const int32_t room   = fate_prefetch_most(wanted, layer.n_slots, layer.k) - n_live;
    const int32_t most   = min(room, FATE_PREFETCH_MAX - n_before);

    // the tables as they will be; slots are fewer than experts
    int32_t n_come = 0;
    int32_t n_go   = 0;
    for (int32_t first = 0; first < layer.n_experts; first += n_threads) {
        const int32_t at    = first + tid; // an expert, and a slot
        bool          comes = at < layer.n_experts && t.slot_of[at] < 0 && t.chance[at] >= threshold;
        bool          goes  = at < layer.n_slots;
        const int32_t held  = goes ? t.held[at] : 0;
        for (int i = 0; i < n_before; ++i) {
            if (!s.is_live[i]) {
                continue;
            }
            if (s.entries[i].victim == at) {
                comes = s.is_sure[i] && t.chance[at] >= threshold;
            } else if (s.entries[i].expert == at) {
                comes = false;
            }
            goes = goes && s.entries[i].slot != at;
        }
        if (goes && held >= 0) {
            goes = t.chance[held] < threshold;
        }
        if (at < layer.n_experts) {
            t.comes[at] = comes;
            t.goes[at]  = goes ? (held < 0 ? 1 : 2) : 0;
        }
        n_come += __syncthreads_count(comes);
        n_go += __syncthreads_count(goes);
    }
    for (int32_t at = tid; at < layer.n_experts; at += n_threads) {
        if (t.comes[at]) {
            int32_t before = 0;
            for (int32_t e = 0; e < layer.n_experts; ++e) {
                before += t.comes[e] && fate_prefetch_before(t.chance[e], e, t.chance[at], at);
            }
            if (before < most) {
                s.expert[before] = at;
            }
        }
    }
    for (int32_t at = tid; at < layer.n_slots && n_come > 0; at += n_threads) {
        if (t.goes[at]) {
            int32_t before = 0;
            for (int32_t slot = 0; slot < layer.n_slots; ++slot) {
                const bool is_free = t.goes[slot] == 1;
                if (t.goes[slot] && slot != at) {
                    before += t.goes[at] == 1 ? is_free && slot < at : is_free || fate_rule_before(t.rank[slot], t.rank[at]);
                }
            }
            if (before < most) {
                s.slot[before] = at;
            }
        }
    }
    __syncthreads();
    const int32_t n = max(0, min(min(n_come, n_go), most));
    if (tid < n) {
        plan.entries[n_before + tid] = { s.expert[tid], s.slot[tid], t.held[s.slot[tid]] };
        plan.claimed[n_before + tid] = 0;
        plan.done[n_before + tid]    = 0;
    }
    __syncthreads();
    if (tid == 0) {
        const uint32_t nearer =
            distance > 0 ? static_cast<uint32_t>(distance - fate_nearest(s.state)) : 0; // modulo 2^32: it may be less than before
        if (layer.times && layer.times[FATE_TIME_PLANNED] == 0) {
            fate_mark(layer, FATE_TIME_PLANNED);
        }
        __threadfence(); // who finds the entries finds what they are
        atomicAdd(&plan.state, static_cast<uint32_t>(n) * FATE_PLAN_ENTRY + nearer * FATE_PLAN_NEAREST - FATE_PLAN_PLANNING);
        if (n > 0) {
            atomicAdd(layer.n_posts, 1);
        }
    }
}
