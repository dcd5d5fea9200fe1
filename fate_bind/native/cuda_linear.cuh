// A linear model of routing evaluated on the device: what is known of each expert is kept there, what else a token is told by comes from the host.
#pragma once

#include "linear_rule.h"

#include "cuda_layer.cuh"

// The model. Layers by index among all; arrays on the device.
struct fate_cuda_linear {
    int32_t         n_heads; // now, keep
    int32_t         n_layers;
    int32_t         max_experts;
    int32_t         max_k;
    int32_t         stride;
    const float *   weights;  // [n_heads][n_layers][FATE_LINEAR_FEATURES]
    const float *   constant; // [n_heads][n_layers][max_experts]
    const int16_t * fold;     // [n_heads][n_layers][max_experts][stride]
    const float *   scale;    // [n_heads][n_layers][max_experts]
    const float *   bonus;    // [n_layers]
    const float *   soon;     // [FATE_LINEAR_FOLLOW]
    const float *   later;    // alike
    float *         rates;    // [n_layers][FATE_LINEAR_RATES][max_experts], what is known of the experts,
    float *         age;      // [n_layers][max_experts]
    float           rate_keep[FATE_LINEAR_RATES];
    int32_t         early_of[FATE_LINEAR_EARLY];
};

// A token. A layer's page: the context, what was used at the repeat, then the sums that there are, each from a multiple of 16 bytes on; mapped host memory.
struct fate_cuda_told {
    const uint4 *   pages;         // by layer of the device; null: nothing is told
    uint32_t        page_units;    // of 16 bytes, each
    uint32_t        used_at;       // in a page, in bytes
    uint32_t        sums_at[2][2]; // alike, 0: none
    float           n[2][2];
    float           unit;
    float           early;
    int32_t         level;
    int32_t         n_used;
    const float *   rates;    // all layers', that what is known is to be taken from, mapped host memory; null: it is known
    const float *   age;
    bool            advances; // by what the step before used:
    const int32_t * ids;      // [layer of the device][ids_stride]
    int32_t         ids_stride;
};

// Shared memory of a block that evaluates, before the page.
struct alignas(16) fate_cuda_fitted {
    float weights[FATE_LINEAR_HEADS][FATE_LINEAR_FEATURES];
    float repeats[FATE_LINEAR_HEADS][FATE_LINEAR_REPEAT_TOKENS];
};

// Takes a layer on by what the step before used, and evaluates it for the token told. at: of the layer on the device; ids: of what it used, null: it did not
// run. memory: shared, of 16 bytes a unit. scores, chances: [n_experts], null where they are of no use. All threads of the block call it.
template <int N>
static __device__ void fate_evaluate(const fate_cuda_linear & model, const fate_cuda_told & told, int32_t at, int32_t index,
                                     int32_t n_experts, int32_t k, const int32_t * ids, void * memory, float * scores, float * chances) {
    fate_cuda_fitted & fitted = *static_cast<fate_cuda_fitted *>(memory);
    uint4 *            page   = reinterpret_cast<uint4 *>(&fitted + 1);
    const char *       bytes  = reinterpret_cast<const char *>(page);
    const int32_t      tid    = static_cast<int32_t>(threadIdx.x);
    const int32_t      n      = static_cast<int32_t>(blockDim.x);
    for (uint32_t i = threadIdx.x; i < told.page_units; i += blockDim.x) { // all that comes from the host at once
        page[i] = told.pages[static_cast<size_t>(at) * told.page_units + i];
    }
    const auto weights_of = [&](int32_t head) {
        return model.weights + (static_cast<int64_t>(head) * model.n_layers + index) * FATE_LINEAR_FEATURES;
    };
    for (int32_t i = tid; i < N * FATE_LINEAR_FEATURES; i += n) {
        const int32_t head = i / FATE_LINEAR_FEATURES;
        fitted.weights[head][i % FATE_LINEAR_FEATURES] =
            fate_weight(weights_of(head), i % FATE_LINEAR_FEATURES, model.early_of, told.early);
    }
    for (int32_t i = tid; i < N * told.n_used; i += n) {
        const int32_t head                    = i / told.n_used;
        fitted.repeats[head][i % told.n_used] = fate_repeat_value(weights_of(head), told.level, i % told.n_used, model.soon, model.later);
    }
    __syncthreads();
    fate_linear_sight sight;
    sight.context = reinterpret_cast<const int16_t *>(page);
    sight.unit    = told.unit;
    sight.stride  = model.stride;
    sight.n_used  = told.n_used;
    sight.max_k   = model.max_k;
    sight.used    = reinterpret_cast<const uint16_t *>(bytes + told.used_at);
    for (int later = 0; later < 2; ++later) {
        for (int pair = 0; pair < 2; ++pair) {
            const uint32_t from     = told.sums_at[later][pair];
            sight.n[later][pair]    = told.n[later][pair];
            sight.sums[later][pair] = from ? reinterpret_cast<const uint16_t *>(bytes + from) : nullptr;
        }
    }
    fate_linear_fitted heads[N];
    for (int h = 0; h < N; ++h) {
        const int64_t row = (static_cast<int64_t>(h) * model.n_layers + index) * model.max_experts;
        heads[h] = { fitted.weights[h], fitted.repeats[h], model.constant + row, model.fold + row * model.stride, model.scale + row };
    }
    const int64_t row = static_cast<int64_t>(index) * model.max_experts;
    for (int32_t e = tid; e < n_experts; e += n) {
        bool is_used = false;
        for (int32_t i = 0; ids && i < k; ++i) {
            is_used |= ids[i] == e;
        }
        const float * from_age   = told.rates ? told.age : model.age;
        const float * from_rates = told.rates ? told.rates : model.rates;
        float         age        = from_age[row + e];
        float         rates[FATE_LINEAR_RATES];
        for (int r = 0; r < FATE_LINEAR_RATES; ++r) {
            rates[r] = from_rates[row * FATE_LINEAR_RATES + static_cast<int64_t>(r) * model.max_experts + e];
        }
        if (told.advances) {
            age = fate_next_age(age, is_used);
            for (int r = 0; r < FATE_LINEAR_RATES; ++r) {
                rates[r] = fate_next_rate(rates[r], model.rate_keep[r], is_used);
            }
        }
        if (told.advances || told.rates) {
            model.age[row + e] = age;
            for (int r = 0; r < FATE_LINEAR_RATES; ++r) {
                model.rates[row * FATE_LINEAR_RATES + static_cast<int64_t>(r) * model.max_experts + e] = rates[r];
            }
        }
        if (!scores && !chances) {
            continue;
        }
        float score[N];
        fate_linear_scores<N>(heads, sight, e, rates, age, score);
        if (chances) {
            chances[e] = fate_chance_of(score[0]);
        }
        if (scores) {
            scores[e] = score[N - 1];
        }
    }
}
