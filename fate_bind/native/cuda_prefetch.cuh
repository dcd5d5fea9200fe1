// Experts brought in beside the running step: planned layer by layer, copied in pieces that are claimed one by one, taken over by the layer's own op.
//
// Kernels on other streams, or on branches of the step's graph, plan and copy while it runs; nothing waits for a kernel that may not have begun. A layer's op
// closes its gate, so that from then on nobody plans for it. Of what is planned it cancels whatever nobody has begun, which then never was; the rest enters its
// tables. It copies the unclaimed pieces of those that it needs itself, and waits only for pieces that somebody has claimed, who therefore is running.
#pragma once

#include "cuda_copy.cuh"
#include "cuda_lookahead.cuh"

static const uint32_t FATE_PIECE_UNITS = 4096; // 64 KiB where units are wide
static const uint32_t FATE_PAUSE_NS    = 200;

static_assert(FATE_PIECE_UNITS % FATE_CUDA_THREADS == 0 && FATE_PIECE_UNITS % FATE_BESIDE_THREADS == 0,
              "every thread copies as many units");

// What an op knows of the plan; shared memory.
struct fate_cuda_ahead {
    int32_t       n;
    fate_prefetch entries[FATE_PREFETCH_MAX];
    bool          is_kept[FATE_PREFETCH_MAX];   // not cancelled
    bool          is_needed[FATE_PREFETCH_MAX]; // by the op, and kept
    bool          is_open[FATE_PREFETCH_MAX];   // not complete, and the op waits for it
    bool          is_late[FATE_PREFETCH_MAX];   // needed, and not complete
    uint32_t      n_done[FATE_PREFETCH_MAX];    // pieces that were there when the op came
    uint32_t      piece;
};

static __host__ __device__ inline uint32_t fate_n_pieces(const fate_cuda_tensor & tensor) {
    return (tensor.n_units + FATE_CUDA_LINE_UNITS - 1 + FATE_PIECE_UNITS - 1) / FATE_PIECE_UNITS;
}

// A block of so many threads copies one piece of an expert into its slot.
template <int THREADS> static __device__ void fate_copy_piece(const fate_cuda_layer & layer, const fate_prefetch & entry, uint32_t piece) {
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
    const int                n_each = FATE_PIECE_UNITS / THREADS;
    const int                n_load = n_each < 16 ? n_each : 16; // in flight at once
#if defined(FATE_LATE_FILLS)
    for (int i = 0; i < n_each; ++i) {
        const uint32_t unit = first + i * THREADS;
        for (uint32_t b = 0; unit < tensor.n_units && b < tensor.width; ++b) {
            to[static_cast<uint64_t>(unit) * tensor.width + b] = static_cast<char>(0xff);
        }
    }
    __syncthreads();
    for (int i = 0; i < 20; ++i) { // longer than an op without the wait takes
        __nanosleep(20000);
    }
#endif
    for (int done = 0; wide && done < n_each; done += n_load) {
        uint4 data[n_load];
#pragma unroll
        for (int i = 0; i < n_load; ++i) {
            const uint32_t unit = first + (done + i) * THREADS;
            if (unit < tensor.n_units) {
                data[i] = __ldcs(reinterpret_cast<const uint4 *>(from) + unit);
            }
        }
#pragma unroll
        for (int i = 0; i < n_load; ++i) {
            const uint32_t unit = first + (done + i) * THREADS;
            if (unit < tensor.n_units) {
                reinterpret_cast<uint4 *>(to)[unit] = data[i];
            }
        }
    }
    for (int i = 0; !wide && i < n_each; ++i) {
        const uint32_t unit = first + i * THREADS;
        if (unit < tensor.n_units && tensor.width == 4) {
            reinterpret_cast<uint32_t *>(to)[unit] = reinterpret_cast<const uint32_t *>(from)[unit];
        } else if (unit < tensor.n_units) {
            to[unit] = from[unit];
        }
    }
}

// Bytes of so many pieces of an expert, of its first ones.
static __device__ int64_t fate_bytes_of(const fate_cuda_layer & layer, uint32_t n_pieces) {
    int64_t bytes = 0;
    for (int t = 0; t < layer.n_tensors && n_pieces > 0; ++t) {
        const fate_cuda_tensor & tensor = layer.tensors[t];
        const uint32_t           n      = min(n_pieces, fate_n_pieces(tensor));
        bytes += min(static_cast<int64_t>(n) * FATE_PIECE_UNITS * tensor.width, static_cast<int64_t>(tensor.expert_bytes));
        n_pieces -= n;
    }
    return bytes;
}

// Whether a block that copies beside the step goes on with the layer it is at: nothing new is planned, and no other block of its launch has left.
static __device__ __forceinline__ bool fate_goes_on(const fate_cuda_layer & layer, uint32_t n_posts, const uint32_t * is_left) {
    const uint32_t now  = fate_look(*layer.n_posts);
    const uint32_t left = is_left ? fate_look(*is_left) : 0;
    return now == n_posts && left == 0;
}

// Copies what nobody has claimed of an entry. YIELDS: demand misses go first, and it leaves when it is not to go on. All threads of the block call it; scratch:
// shared.
template <bool YIELDS, int THREADS>
static __device__ void fate_copy_unclaimed(const fate_cuda_layer & layer, const fate_prefetch & entry, int at, uint32_t n_posts,
                                           const uint32_t * is_left, uint32_t & scratch) {
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) {
            bool goes_on = true;
            while (YIELDS) {
                const uint32_t n_demands = fate_look(*layer.n_demands);
                goes_on                  = fate_goes_on(layer, n_posts, is_left);
                if (!goes_on || n_demands == 0) {
                    break;
                }
                __nanosleep(FATE_PAUSE_NS);
            }
            scratch = goes_on ? atomicAdd(&layer.plan->claimed[at], 1) : FATE_CANCELLED;
        }
        __syncthreads();
        const uint32_t piece = scratch;
        if (piece >= layer.n_pieces) { // or cancelled
            return;
        }
        if (piece == 0 && threadIdx.x == 0) {
            fate_mark(layer, FATE_TIME_BEGUN + at);
        }
        if (layer.ns_per_expert > 0) { // the bytes come when a slower link would have brought them
            const float    ns    = layer.ns_per_expert * static_cast<float>(gridDim.x) / static_cast<float>(layer.n_pieces);
            const uint64_t began = fate_now_ns();
            while (static_cast<float>(fate_now_ns() - began) < ns) {
            }
        }
        fate_copy_piece<THREADS>(layer, entry, piece);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            if (!layer.times) {
                atomicAdd(&layer.plan->done[at], 1);
            } else if (atomicAdd(&layer.plan->done[at], 1) + 1 == layer.n_pieces) {
                fate_mark(layer, FATE_TIME_COMPLETE + at);
            }
        }
    }
}

// A use of an expert that was prefetched, or its end: whether it was still waiting for it.
static __device__ __forceinline__ bool fate_end_waiting(const fate_cuda_layer & layer, int32_t expert) {
    return atomicExch(&layer.waiting[expert], 0) != 0;
}

//
// beside the step
//

// What a block that copies finds to do; shared memory.
struct fate_cuda_chores {
    uint32_t n_posts;
    int32_t  copies; // the first layer, whose op has not come, that has something to copy, INT_MAX: none
    int32_t  rests;  // alike, of those whose op has come
    int32_t  n;      // entries of the layer that is copied for, as one thread found them
    uint32_t n_told; // views of the layer that has just told
    bool     is_over;
};

static __device__ void fate_find_chores(const fate_cuda_layer * layers, int32_t n_layers, const fate_cuda_sight * sight,
                                        fate_cuda_chores & found) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t n_posts = fate_look(*layers[0].n_posts);
        found                  = { n_posts, INT_MAX, INT_MAX, 0, sight ? fate_look(sight->n_told) : 0, false };
        __threadfence();
    }
    __syncthreads();
    const int32_t n = n_layers * FATE_PREFETCH_MAX;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += static_cast<int32_t>(blockDim.x)) {
        const int32_t          layer = i / FATE_PREFETCH_MAX;
        const int32_t          at    = i % FATE_PREFETCH_MAX;
        const fate_cuda_plan & plan  = *layers[layer].plan;
        const uint32_t         state = fate_look(plan.state);
        if (at < fate_n_entries(state)) {
            __threadfence();
            if (fate_look(plan.claimed[at]) < layers[layer].n_pieces) {
                atomicMin(state & FATE_PLAN_CLOSED ? &found.rests : &found.copies, layer);
            }
        }
    }
    __syncthreads();
}

// Copies what is planned, in the order of the layers, until nothing is left: what is planned meanwhile too. from: the layer that is telling of others, by
// blocks that have all started, -1: none. Behind a layer that tells, the first block that finds nothing left has all leave: whoever comes behind a later layer
// copies with all its blocks what would else be left to one that is late.
static __global__ void __launch_bounds__(FATE_BESIDE_THREADS) fate_fetch(const fate_cuda_layer * layers, int32_t n_layers, int32_t from) {
    __shared__ fate_cuda_chores s_found;
    __shared__ uint32_t         s_scratch;
    __shared__ fate_prefetch    s_entry;
    if (from < 0) { // behind whoever planned
        fate_pdl_wait();
    }
    fate_cuda_sight * sight   = from < 0 ? nullptr : layers[from].sight;
    uint32_t *        is_left = sight ? &sight->is_left : nullptr;
    uint32_t          n_views = 0;
    if (sight && !sight->is_wanted) { // in this step nothing is told
        return;
    }
    for (int v = 0; sight && v < FATE_LOOKAHEAD_LAYERS; ++v) {
        n_views += sight->views[v].target >= 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0 && layers[0].times && layers[0].times[FATE_TIME_WATCHED] == 0) {
        fate_mark(layers[0], FATE_TIME_WATCHED);
    }
    while (true) {
        fate_find_chores(layers, n_layers, sight, s_found);
        const int32_t at_layer = s_found.copies != INT_MAX ? s_found.copies : s_found.rests;
        if (threadIdx.x == 0 && at_layer != INT_MAX) { // a plan may grow meanwhile
            const uint32_t state = fate_look(layers[at_layer].plan->state);
            s_found.is_over      = is_left && fate_look(*is_left);
            s_found.n            = fate_n_entries(state);
            __threadfence();
        } else if (threadIdx.x == 0) {
            s_found.is_over = s_found.n_told == n_views;
            while (!s_found.is_over && fate_look(sight->n_told) == s_found.n_told && fate_goes_on(layers[0], s_found.n_posts, is_left)) {
                __nanosleep(FATE_PAUSE_NS); // a block that is running is about to plan
            }
            if (s_found.is_over && is_left) {
                atomicExch(is_left, 1);
            }
        }
        __syncthreads();
        if (s_found.is_over) {
            if (threadIdx.x == 0) {
                fate_mark(layers[0], FATE_TIME_LEFT);
            }
            return;
        }
        if (at_layer == INT_MAX) {
            continue;
        }
        const fate_cuda_layer & layer = layers[at_layer];
        for (int at = 0; at < s_found.n; ++at) {
            __syncthreads();
            if (threadIdx.x == 0) {
                s_entry = fate_entry(*layer.plan, at);
            }
            fate_copy_unclaimed<true, FATE_BESIDE_THREADS>(layer, s_entry, at, s_found.n_posts, is_left, s_scratch);
        }
    }
}

// Between steps, one thread: what no op of the layer took over enters its tables if it was begun; its gate opens. looks: the step to come is of one token whose
// output is wanted.
static __device__ void fate_settle(const fate_cuda_layer & layer, bool looks) {
    fate_cuda_plan & plan = *layer.plan;
    const int32_t    n    = plan.is_taken ? 0 : fate_n_entries(plan.state);
    for (int32_t at = 0; at < n; ++at) {
        if (plan.claimed[at] == 0 || plan.claimed[at] >= FATE_CANCELLED) {
            continue;
        }
        const fate_prefetch entry = plan.entries[at];
        if (entry.victim >= 0) { // which a later entry may have brought again
            layer.slot_of[entry.victim] = -1;
            fate_add(&layer.counters[FATE_COUNTER_EVICTIONS], 1);
            fate_add(&layer.counters[FATE_COUNTER_PREFETCH_WASTED], fate_end_waiting(layer, entry.victim));
        }
        layer.slot_of[entry.expert] = entry.slot;
        layer.expert_of[entry.slot] = entry.expert;
        layer.waiting[entry.expert] = 1;
        fate_add(&layer.counters[FATE_COUNTER_FILLS], 1);
        fate_add(&layer.counters[FATE_COUNTER_PREFETCHES], 1);
    }
    plan.state    = 0;
    plan.is_taken = 0;
    plan.quiet    = FATE_QUIET_UNKNOWN;
    if (layer.sight) {
        layer.sight->is_wanted = looks;
        layer.sight->is_shown  = 0;
        layer.sight->n_told    = 0;
        layer.sight->is_left   = 0;
        for (fate_cuda_view & view : layer.sight->views) {
            view.arrived = 0;
        }
    }
}

//
// in the layer's op
//

// Thread 0: from here on nobody plans. Returns how many entries there are.
static __device__ int32_t fate_close(fate_cuda_plan & plan) {
    uint32_t state = atomicOr(&plan.state, FATE_PLAN_CLOSED);
    while (state & FATE_PLAN_PLANNING) { // by a block that is running
        state = fate_look(plan.state);
    }
    if (fate_n_entries(state) > 0) {
        __threadfence();
    }
    return fate_n_entries(state);
}

// Reads what is planned, before the op has its ids, and cancels what nobody has begun, alike in every block: claims only grow, so that whoever looks later finds
// the same.
static __device__ void fate_read_plan(const fate_cuda_layer & layer, fate_cuda_ahead & ahead) {
    const int at = threadIdx.x;
    if (at >= ahead.n) {
        return;
    }
    fate_cuda_plan & plan    = *layer.plan;
    const uint32_t   claimed = layer.is_awaited ? 1 : atomicCAS(&plan.claimed[at], 0, FATE_CANCELLED);
    ahead.entries[at]        = fate_entry(plan, at);
    ahead.is_kept[at]        = claimed != 0 && claimed < FATE_CANCELLED;
    ahead.n_done[at]         = fate_look(plan.done[at]);
}

// Decides what becomes of it, alike in every block but for what is late, by which nothing is decided. first[expert]: INT_MAX where the op does not need it;
// slot_of becomes what it is with what is kept. The block synchronises before and after.
static __device__ void fate_take(const fate_cuda_layer & layer, fate_cuda_ahead & ahead, const int32_t * first, int32_t * slot_of) {
    const int at = threadIdx.x;
    if (at >= FATE_PREFETCH_MAX) {
        return;
    }
    static_assert(FATE_PREFETCH_MAX == 16, "half a warp");
    const unsigned half    = 0xffff;
    fate_prefetch  entry   = { 0, -1, -1 };
    bool           is_kept = false;
    if (at < ahead.n) { // as this thread read it
        entry   = ahead.entries[at];
        is_kept = ahead.is_kept[at];
        if (is_kept && ahead.n_done[at] < layer.n_pieces) {
            ahead.n_done[at] = fate_look(layer.plan->done[at]);
        }
    }
    // an expert that went may have come again by a later entry
    if (is_kept && entry.victim >= 0) {
        slot_of[entry.victim] = -1;
    }
    __syncwarp(half);
    if (is_kept) {
        slot_of[entry.expert] = entry.slot;
    }
    __syncwarp(half);
    if (at < ahead.n) {
        const bool is_needed = is_kept && first[entry.expert] != INT_MAX;
        const bool is_open   = is_kept && ahead.n_done[at] < layer.n_pieces;
        ahead.is_needed[at]  = is_needed;
        ahead.is_open[at]    = is_open && (is_needed || layer.is_awaited);
        ahead.is_late[at]    = is_open && is_needed && !layer.is_awaited;
    }
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

static __device__ __forceinline__ bool fate_any_open(const fate_cuda_ahead & ahead) {
    bool any = false;
    for (int at = 0; at < ahead.n; ++at) {
        any = any || ahead.is_open[at];
    }
    return any;
}

// All threads: whether nothing is to be copied or waited for, as the first block found it, so that all say the same: what is complete stays so.
static __device__ bool fate_is_quiet(const fate_cuda_layer & layer, fate_cuda_ahead & ahead, bool misses) {
    if (threadIdx.x == 0) {
        const uint32_t own   = misses || fate_any_open(ahead) ? FATE_QUIET_NO : FATE_QUIET_YES;
        const uint32_t found = atomicCAS(&layer.plan->quiet, FATE_QUIET_UNKNOWN, own);
        ahead.piece          = found == FATE_QUIET_UNKNOWN ? own : found;
    }
    __syncthreads();
    const bool is_quiet = ahead.piece == FATE_QUIET_YES;
    if (is_quiet && threadIdx.x < FATE_PREFETCH_MAX) { // what was late when this block looked no longer is
        ahead.is_open[threadIdx.x] = false;
        ahead.is_late[threadIdx.x] = false;
    }
    __syncthreads();
    return is_quiet;
}

// Copies what the op waits for and nobody has claimed.
static __device__ void fate_copy_open(const fate_cuda_layer & layer, fate_cuda_ahead & ahead) {
    for (int at = 0; at < ahead.n; ++at) {
        if (ahead.is_open[at]) {
            fate_copy_unclaimed<false, FATE_CUDA_THREADS>(layer, ahead.entries[at], at, 0, nullptr, ahead.piece);
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
            while (ahead.is_open[i] && fate_look(plan.done[i]) < layer.n_pieces) {
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
    const bool is_kept = at < ahead.n && ahead.is_kept[at];
    if (is_kept) {
        const fate_prefetch entry = ahead.entries[at];
        fate_add(&layer.counters[FATE_COUNTER_PREFETCHES], 1);
        fate_add(&layer.counters[FATE_COUNTER_FILLS], 1);
        if (entry.victim >= 0) { // which may have come again by a later entry
            layer.slot_of[entry.victim] = -1;
            fate_add(&layer.counters[FATE_COUNTER_EVICTIONS], 1);
            fate_add(&layer.counters[FATE_COUNTER_PREFETCH_WASTED], fate_end_waiting(layer, entry.victim));
            if (layer.step) {
                layer.evictions[n_evicted] = entry.victim;
            }
        }
    }
    __syncthreads();
    if (is_kept) {
        const fate_prefetch entry   = ahead.entries[at];
        layer.expert_of[entry.slot] = entry.expert;
        layer.slot_of[entry.expert] = entry.slot;
        if (layer.step) {
            layer.fills[n_before] = entry.expert;
        }
        if (!ahead.is_needed[at]) {
            layer.waiting[entry.expert] = 1;
        } else {
            fate_add(&layer.counters[ahead.is_late[at] ? FATE_COUNTER_PREFETCH_LATE : FATE_COUNTER_PREFETCH_USEFUL], 1);
            if (ahead.is_late[at]) { // of those useful the host reckons it
                fate_add(&layer.counters[FATE_COUNTER_PREFETCH_HIDDEN], fate_bytes_of(layer, ahead.n_done[at]));
            }
        }
    }
    if (at == 0) {
        plan.is_taken = 1;
    }
    return n_all;
}
