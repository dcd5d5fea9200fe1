// What runs on the GPU: the decision, the copies, the tables. One launch a layer; nothing here waits for the host or for another block, but for the
// answer to a miss in callback mode, for what comes through the ring, and for pieces that a prefetch has begun.
//
// Every block of a launch takes the same decision from the same tables and copies its share; the last block to have read the tables changes them when
// it has copied.
// In the all-hit case only block 0 goes on, and changes nothing that the others look at.
#pragma once

#include "cuda_copy.cuh"
#include "cuda_linear.cuh"
#include "cuda_mailbox.cuh"
#include "cuda_prefetch.cuh"
#include "cuda_ring.cuh"

#include <climits>

//
// resolve and fill
//

// Shared memory of fate_bring.
static inline size_t fate_bring_bytes(int32_t n_experts) {
    return fate_cap(n_experts) * (sizeof(int64_t) + 7 * sizeof(int32_t));
}

static_assert(FATE_SEED_PAIRS <= FATE_CUDA_THREADS, "a thread for each pair of the rows that may seed");
static_assert(FATE_CUDA_MAX_EXPERTS <= FATE_SEED_PAIRS, "slots are never more");

// The call of the rows that may seed after a staged op.
static inline fate_cuda_call fate_seeds_of(const fate_cuda_layer & layer, const fate_cuda_call & staged) {
    const int32_t  most  = FATE_SEED_PAIRS / layer.k;
    fate_cuda_call seeds = staged;
    seeds.n_rows         = staged.n_rows < most ? staged.n_rows : most;
    seeds.ids            = staged.ids + (staged.n_rows - seeds.n_rows) * staged.stride;
    return seeds;
}

// The first of the call's rows that seed, as fate_seed_rows() counts them. last[n_experts]: all -1; becomes the expert's last pair.
static __device__ int fate_first_seed_row(const fate_cuda_layer & layer, int32_t expert, bool is_pair, int32_t * last, int * scratch) {
    const int tid = threadIdx.x;
    if (is_pair) {
        atomicMax(&last[expert], tid);
    }
    __syncthreads();
    int        n_used;
    const int  n_before    = fate_rank_of(is_pair && last[expert] == tid, scratch, n_used); // experts that no later pair uses
    const bool is_too_many = n_used - n_before > layer.n_slots;
    return __syncthreads_count(is_pair && tid % layer.k == 0 && is_too_many);
}

// Thread pair of block 0, when every expert that the op needs has a slot. may_wait: the expert was prefetched before, and may not have been used yet. n_entered:
// how many came in for the op, and how many went for them.
static __device__ __forceinline__ void fate_hit(const fate_cuda_layer & layer, const fate_cuda_call & call, int pair, int64_t clock,
                                                int32_t expert, int32_t slot, bool may_wait, int2 n_entered) {
    const int n_pairs = call.n_rows * layer.k;
    if (pair < n_pairs) {
        const int row                  = pair / layer.k;
        const int rank                 = layer.k - 1 - pair % layer.k;
        call.out[row * layer.k + rank] = slot;
        fate_max(&layer.last_use[expert], clock + pair + 1);
        fate_note(layer, call, row, rank, expert, true);
        if (may_wait && fate_end_waiting(layer, expert)) {
            fate_add(&layer.counters[FATE_COUNTER_PREFETCH_USEFUL], 1);
        }
    }
    if (pair == 0) {
        layer.head->clock = clock + n_pairs;
        fate_add(&layer.counters[FATE_COUNTER_HITS], n_pairs);
        fate_add(&layer.counters[FATE_COUNTER_ROWS], call.n_rows);
        fate_add(&layer.counters[FATE_COUNTER_ROWS_ALL_RESIDENT], call.n_rows);
        if (layer.step) {
            *layer.step = { FATE_PATH_POOL, call.n_rows, n_entered.x, n_entered.y };
        }
        if (n_entered.x > 0) {
            fate_mark(layer, FATE_TIME_OP_DONE);
        }
    }
}

// SEED false: the pool path's op. SEED true: admits experts of the call's last rows after a staged op, from staging; nothing is used or looked up.
// ASK: callback mode, the host names the victims. RING: experts come through the ring. AHEAD: some were brought in beside the step.
template <bool SEED, bool ASK = false, bool RING = false, bool AHEAD = false>
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_bring(const __grid_constant__ fate_cuda_layer layer,
                                                                       const __grid_constant__ fate_cuda_call  call) {
    extern __shared__ int64_t  s_last_use[];                                              // by slot
    const int32_t              cap         = fate_cap(layer.n_experts);
    float * const              s_key       = reinterpret_cast<float *>(s_last_use + cap); // by slot
    int32_t * const            s_slot_of   = reinterpret_cast<int32_t *>(s_key + cap);
    int32_t * const            s_first     = s_slot_of + cap;                             // the first use in the op, INT_MAX: not needed
    int32_t * const            s_expert_of = s_first + cap;                               // -1: free, -2: needed
    int32_t * const            s_missing   = s_expert_of + cap;
    int32_t * const            s_target    = s_missing + cap;                             // slots for the missing
    int32_t * const            s_before    = s_target + cap;                              // by slot: candidates that go first
    __shared__ int             s_scratch[33];
    __shared__ unsigned        s_arrived;
    __shared__ fate_cuda_ahead s_ahead;

    // on the pool path the tables were last changed before this step's graph: they are read before what runs before has ended
    if constexpr (SEED) {
        fate_pdl_wait();
    } else {
        fate_pdl_launch_next();
    }
    const int     tid       = threadIdx.x;
    const bool    is_expert = tid < layer.n_experts;
    const int64_t clock     = layer.head->clock;
    const int     n_pairs   = call.n_rows * layer.k;
    bool          is_pair   = tid < n_pairs;
    const int     row       = tid / layer.k;
    const int     rank      = layer.k - 1 - tid % layer.k; // uses are ordered by row, then from the worst rank
    int32_t       n_ahead   = 0;
    if constexpr (AHEAD) {
        if (tid == 0) {
            s_ahead.n = fate_close(*layer.plan);
        }
    }
    if (is_expert) {
        s_slot_of[tid] = layer.slot_of[tid];
        s_first[tid]   = INT_MAX;
        if constexpr (SEED) {
            s_missing[tid] = -1;
        } else if constexpr (AHEAD) {
            s_missing[tid] = layer.waiting[tid]; // until it is known who is missing
        }
    }
    __syncthreads();
    if constexpr (AHEAD) {
        fate_read_plan(layer, s_ahead);
    }
    fate_pdl_wait();
    if (!SEED && blockIdx.x == 0 && tid == 0) {
        fate_mark(layer, FATE_TIME_OP_BEGAN);
    }
    if constexpr (AHEAD) {
        n_ahead = s_ahead.n;
        if (call.input && blockIdx.x == gridDim.x - 1) {
            fate_show(layer, call);
        }
    }

    if (!SEED && n_pairs <= 32 && n_ahead == 0) { // one token: every warp looks at all of it, so that a hit passes no barrier
        const int     lane = tid % 32;
        const int32_t id   = lane < n_pairs ? fate_id(call, lane / layer.k, layer.k - 1 - lane % layer.k) : 0;
        const int32_t at   = s_slot_of[id];
        if (!__any_sync(0xffffffff, lane < n_pairs && at < 0)) {
            if (blockIdx.x == 0 && tid < 32) {
                fate_hit(layer, call, tid, clock, id, at, AHEAD && s_missing[id], { 0, 0 });
            }
            return;
        }
    }
    const int32_t expert   = is_pair ? fate_id(call, row, rank) : 0;
    const bool    may_wait = AHEAD && is_pair && s_missing[expert];
    if constexpr (SEED) {
        const int first = fate_first_seed_row(layer, expert, is_pair, s_missing, s_scratch);
        is_pair         = is_pair && row >= first;
    }
    if (n_ahead > 0) {
        if (is_pair) {
            atomicMin(&s_first[expert], tid);
        }
        __syncthreads();
        fate_take(layer, s_ahead, s_first, s_slot_of);
        __syncthreads();
    }
    const int32_t slot   = s_slot_of[expert];
    const bool    misses = __syncthreads_or(is_pair && slot < 0) != 0;
    if (n_ahead == 0 ? !misses : fate_is_quiet(layer, s_ahead, misses)) {
        if (!SEED && blockIdx.x == 0) {
            int2 n_entered = { 0, 0 };
            if (n_ahead > 0) { // the others read what they need from the plan, however far the tables are
                n_entered = fate_enter(layer, s_ahead);
                __syncthreads();
            }
            fate_hit(layer, call, tid, clock, expert, slot, may_wait, n_entered);
        }
        return;
    }

    // who is missing, in order of first use
    int32_t held    = tid < layer.n_slots ? layer.expert_of[tid] : -1;
    bool    is_kept = false; // brought in for this op, needed or not
    if (n_ahead > 0 && tid < layer.n_slots) {
        const int at = fate_ahead_in(s_ahead, tid);
        is_kept      = at >= 0;
        held         = is_kept ? s_ahead.entries[at].expert : held;
    }
#if defined(FATE_FAULT_VICTIM_IN_FLIGHT)
    is_kept = false;
#endif
    fate_rank mine = { 0.0f, 0, held };
    if (held >= 0) {
        fate_table table;
        table.last_use     = layer.last_use;
        table.score        = layer.score;
        table.bonus        = layer.head->bonus;
        table.published_at = layer.head->published_at;
        mine               = fate_rule_rank(table, held);
    }
    if (is_pair) {
        atomicMin(&s_first[expert], tid);
    }
    __syncthreads();
    if (tid < layer.n_slots) {
        s_expert_of[tid] = held >= 0 && (s_first[held] != INT_MAX || is_kept) ? -2 : held;
        s_key[tid]       = mine.key;
        s_last_use[tid]  = mine.last_use;
        s_before[tid]    = 0;
    }
    const bool is_miss = is_pair && slot < 0 && s_first[expert] == tid;
    int        n_missing;
    const int  missing_at = fate_rank_of(is_miss, s_scratch, n_missing);
    if (is_miss) {
        s_missing[missing_at] = expert;
    }

    // where they go: free slots, lowest first, then victims by the rule
    const bool is_free = tid < layer.n_slots && held < 0;
    int        n_free;
    const int  free_at = fate_rank_of(is_free, s_scratch, n_free);
    if (is_free && free_at < n_missing) {
        s_target[free_at] = tid;
    }
    const int n_victims = n_missing > n_free ? n_missing - n_free : 0;
    bool      by_rule   = n_victims > 0;
    if constexpr (ASK) {
        const fate_cuda_miss miss = { s_slot_of, s_first, s_missing, n_missing, n_victims };
        by_rule                   = !fate_ask(layer, miss, is_pair ? expert : -1, s_scratch, s_target + n_free) && by_rule;
    }
    if (by_rule) {
        int width = 1; // threads share a slot's comparisons
        while (width * 2 * layer.n_slots <= FATE_CUDA_THREADS) {
            width *= 2;
        }
        const int candidate = tid / width;
        if (candidate < layer.n_slots && s_expert_of[candidate] >= 0) {
            const fate_rank one    = { s_key[candidate], s_last_use[candidate], s_expert_of[candidate] };
            int             before = 0;
#pragma unroll 4
            for (int other = tid % width; other < layer.n_slots; other += width) {
                const fate_rank two = { s_key[other], s_last_use[other], s_expert_of[other] };
                before += two.expert >= 0 && fate_rule_before(two, one);
            }
            if (before) {
                atomicAdd(&s_before[candidate], before);
            }
        }
        __syncthreads();
        if (tid < layer.n_slots && s_expert_of[tid] >= 0 && s_before[tid] < n_victims) {
            s_target[n_free + s_before[tid]] = tid;
        }
    }
    __syncthreads();

    // the tables are read (what was loaded has decided): the block that says so last changes them, after its copies. No fence: it would hold them up.
    unsigned arrived = 0;
    if (tid == 0) {
        arrived = atomicAdd(&layer.head->arrived, 1);
    }
    const bool demands = AHEAD && (n_missing > 0 || fate_any_open(s_ahead));
    if constexpr (AHEAD) {
        if (tid == 0 && demands) {
            atomicAdd(layer.n_demands, 1);
        }
        fate_copy_open(layer, s_ahead);
    }
    if (!SEED && arrived == 0 && tid == 0) {
        fate_mark(layer, FATE_TIME_OP_COPIES);
    }
    const uint64_t began = layer.ns_per_expert > 0 ? fate_now_ns() : 0;
    if constexpr (RING && !SEED) {
        fate_ring_bring<false>(layer, n_missing, s_missing, s_target);
    } else {
        fate_copy<SEED ? FATE_COPY_SEED : FATE_COPY_FILL>(layer, n_missing, s_missing, s_target, nullptr, nullptr);
    }
    if (tid == 0) {
        s_arrived = arrived;
        while (!SEED && began && static_cast<float>(fate_now_ns() - began) < static_cast<float>(n_missing) * layer.ns_per_expert) {
        }
    }
    __syncthreads();
    if constexpr (AHEAD) {
        if (tid == 0 && demands) {
            atomicSub(layer.n_demands, 1);
        }
    }
    if (s_arrived != gridDim.x - 1) {
        return;
    }
    int2 n_entered = { 0, 0 }; // experts that were kept, and that went for them: before those missing
    if (n_ahead > 0) {
        n_entered = fate_enter(layer, s_ahead);
        __syncthreads();
    }
    if (tid < n_missing) {
        const int32_t to    = s_target[tid];
        const int32_t out   = s_expert_of[to];
        const int32_t enter = s_missing[tid];
        if (out >= 0) {
            layer.slot_of[out] = -1;
            if (layer.waiting && fate_end_waiting(layer, out)) {
                fate_add(&layer.counters[FATE_COUNTER_PREFETCH_WASTED], 1);
            }
        }
        layer.expert_of[to]  = enter;
        layer.slot_of[enter] = to;
        s_slot_of[enter]     = to;
        if (layer.step) {
            layer.fills[n_entered.x + tid] = enter;
            if (tid >= n_free) {
                layer.evictions[n_entered.y + tid - n_free] = out;
            }
        }
    }
    int n_whole = 0;
    int n_late  = 0;
    if constexpr (!SEED) {
        if (tid < call.n_rows) {
            s_before[tid] = 0; // from here on by row: a miss
        }
        n_late            = __syncthreads_count(n_ahead > 0 && is_pair && s_first[expert] == tid && fate_is_late(s_ahead, expert));
        const bool is_hit = !is_miss && !(n_late > 0 && is_pair && s_first[expert] == tid && fate_is_late(s_ahead, expert));
        if (is_pair) {
            if (!is_hit) {
                s_before[row] = 1;
            }
            call.out[row * layer.k + rank] = s_slot_of[expert];
            fate_max(&layer.last_use[expert], clock + tid + 1);
            fate_note(layer, call, row, rank, expert, is_hit);
            if (may_wait && is_hit && fate_end_waiting(layer, expert)) {
                fate_add(&layer.counters[FATE_COUNTER_PREFETCH_USEFUL], 1);
            }
        }
        __syncthreads();
        n_whole = __syncthreads_count(tid < call.n_rows && s_before[tid] == 0);
    }
    if (tid == 0) {
        layer.head->arrived = 0;
        if constexpr (ASK) {
            fate_ask_done(layer);
        }
        fate_add(&layer.counters[FATE_COUNTER_FILLS], n_missing);
        fate_add(&layer.counters[FATE_COUNTER_EVICTIONS], n_victims);
        if (SEED) {
            fate_add(&layer.counters[FATE_COUNTER_SEED_FILLS], n_missing);
        } else {
            fate_mark(layer, FATE_TIME_OP_DONE);
            layer.head->clock = clock + n_pairs;
            fate_add(&layer.counters[FATE_COUNTER_HITS], n_pairs - n_missing - n_late);
            fate_add(&layer.counters[FATE_COUNTER_MISSES], n_missing + n_late);
            fate_add(&layer.counters[FATE_COUNTER_ROWS], call.n_rows);
            fate_add(&layer.counters[FATE_COUNTER_ROWS_ALL_RESIDENT], n_whole);
        }
        if (layer.step) {
            if (!SEED) {
                layer.step->path   = FATE_PATH_POOL;
                layer.step->n_rows = call.n_rows;
            }
            layer.step->n_fills     = n_entered.x + n_missing;
            layer.step->n_evictions = n_entered.y + n_victims;
        }
    }
}

//
// staging
//

// Brings every expert that the call names to its own place in staging, notes the uses, hands the ids on.
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_stage(const __grid_constant__ fate_cuda_layer layer,
                                                                       const __grid_constant__ fate_cuda_call  call) {
    __shared__ uint8_t s_touched[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t s_experts[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t s_slot_of[FATE_CUDA_MAX_EXPERTS];
    __shared__ int     s_scratch[33];

    fate_pdl_wait();
    const int tid = threadIdx.x;
    if (tid < layer.n_experts) {
        s_touched[tid] = 0;
        s_slot_of[tid] = layer.slot_of[tid];
    }
    const int64_t clock = layer.head->clock;
    __syncthreads();
    const int n_pairs = call.n_rows * layer.k;
    for (int i = tid; i < n_pairs; i += FATE_CUDA_THREADS) {
        const int     row    = i / layer.k;
        const int     rank   = layer.k - 1 - i % layer.k;
        const int32_t expert = fate_id(call, row, rank);
        s_touched[expert]    = 1;
        if (blockIdx.x == 0) {
            call.out[row * layer.k + rank] = expert;
            fate_max(&layer.last_use[expert], clock + i + 1);
            fate_note(layer, call, row, rank, expert, false);
        }
    }
    __syncthreads();
    const bool is_touched = tid < layer.n_experts && s_touched[tid];
    int        n_touched;
    const int  at = fate_rank_of(is_touched, s_scratch, n_touched);
    if (is_touched) {
        s_experts[at] = tid;
    }
    __syncthreads();
    if (blockIdx.x == 0 && tid == 0) {
        layer.head->clock = clock + n_pairs;
        fate_add(&layer.counters[FATE_COUNTER_STAGED], n_pairs);
        if (layer.step) {
            *layer.step = { FATE_PATH_STAGED, call.n_rows, 0, 0 };
        }
    }
    fate_copy<FATE_COPY_STAGE>(layer, n_touched, s_experts, nullptr, s_slot_of, s_touched);
}

//
// before a step
//

static const size_t FATE_OPEN_BYTES = (48 << 10) - 2048; // of shared memory, that the launch may ask for

// What is done before a step, or beside it; arrays in mapped host memory, rows by index.
struct fate_cuda_opening {
    bool          begins;    // the step: what prefetch left of the one before is settled
    bool          looks;     // layers tell of others in it
    bool          publishes; // scores[..][stride] and bonus[..], null: zeros; or the linear model's, where a token is told
    bool          behind;    // the uses of the step at hand have the bonus
    bool          plans;     // by chances[..][stride], or the linear model's
    const float * scores;
    const float * bonus;
    const float * chances;
    int32_t       stride;
    float         threshold;
    int32_t       wanted;

    fate_cuda_linear model;
    fate_cuda_told   told;
    size_t           page_at; // in shared memory, what it is evaluated with
};

static_assert(FATE_CUDA_MAX_EXPERTS * (sizeof(fate_rank) + 4 * sizeof(int32_t) + 2) <= FATE_OPEN_BYTES, "what any launch may have");

// One block a layer; shared memory for fate_tables_bytes() where it plans, and for the linear model behind them where a token is told.
static __global__ void __launch_bounds__(FATE_BESIDE_THREADS) fate_open(const fate_cuda_layer * layers, const int32_t * index,
                                                                        const __grid_constant__ fate_cuda_opening opening) {
    extern __shared__ uint4       s_tables[]; // the widest that lies in it
    __shared__ fate_cuda_planning s;
    fate_pdl_wait();
    const fate_cuda_layer & layer = layers[blockIdx.x];
    const int32_t           own   = index[blockIdx.x];
    const int64_t           row   = static_cast<int64_t>(own) * opening.stride;
    const fate_cuda_tables  t     = fate_tables_in(s_tables, layer.n_experts);
    const bool              ran   = layer.step && layer.step->path != FATE_PATH_NOT_RUN;
    __syncthreads(); // before it says otherwise
    if (opening.begins && threadIdx.x == 0) {
        if (layer.plan) {
            fate_settle(layer, opening.looks);
        }
        if (layer.step) { // layers that the step leaves out say so
            *layer.step = {};
        }
    }
    const bool is_told = opening.told.pages != nullptr;
    if (is_told) {
        const int32_t   at = static_cast<int32_t>(blockIdx.x);
        const int32_t * ids =
            ran && opening.told.advances ? opening.told.ids + static_cast<int64_t>(at) * opening.told.ids_stride : nullptr;
        void *  memory  = reinterpret_cast<char *>(s_tables) + opening.page_at;
        float * scores  = opening.publishes ? layer.score : nullptr;
        float * chances = opening.plans ? t.chance : nullptr;
        if (opening.model.n_heads > 1) {
            fate_evaluate<2>(opening.model, opening.told, at, own, layer.n_experts, layer.k, ids, memory, scores, chances);
        } else {
            fate_evaluate<1>(opening.model, opening.told, at, own, layer.n_experts, layer.k, ids, memory, scores, chances);
        }
    }
    for (int32_t e = threadIdx.x; opening.publishes && !is_told && e < layer.n_experts; e += blockDim.x) {
        layer.score[e] = opening.scores ? opening.scores[row + e] : 0.0f;
    }
    if (opening.publishes && threadIdx.x == 0) {
        layer.head->bonus        = is_told ? opening.model.bonus[own] : opening.scores ? opening.bonus[own] : 0.0f;
        layer.head->published_at = layer.head->clock - (opening.behind ? layer.step->n_rows * layer.k : 0);
    }
    if (!opening.plans) {
        return;
    }
    // from the host before the gate is held, for which the layer's op would wait
    for (int32_t e = threadIdx.x; !is_told && e < layer.n_experts; e += blockDim.x) {
        t.chance[e] = opening.chances[row + e];
    }
    __syncthreads(); // the tables are what they are made here
    fate_read_tables(layer, t);
    __syncthreads();
    fate_plan_layer(layer, 0, opening.threshold, opening.wanted, s, t);
}
