// What a linear model of routing makes of one expert: once, for the host's loops, the CUDA engine and the tests. No ggml, no allocation.
//
// Everybody does the same operations in the same order, none fused, with logs and exponentials of our own: the same bits come of it everywhere. On the host
// whoever calls it is compiled with -ffp-contract=off.
#pragma once

#include "fate.h"
#include "rule.h"

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#    define FATE_LINEAR_RULE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#    define FATE_LINEAR_RULE inline __attribute__((always_inline))
#else
#    define FATE_LINEAR_RULE inline
#endif

static const int32_t FATE_LINEAR_HEADS         = 2;
static const int32_t FATE_LINEAR_REPEAT_TOKENS = FATE_LINEAR_FOLLOW + 1; // of a repeat that are looked at, its first included
static const int32_t FATE_LINEAR_MIDDLE        = 4,
                     FATE_LINEAR_SLOW          = 6; // the rates whose mean stands for an expert's base rate: by 16 and by 64 tokens

FATE_LINEAR_RULE float fate_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

FATE_LINEAR_RULE uint32_t fate_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// Never fused with what is done with the result.
FATE_LINEAR_RULE float fate_times(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
#    if defined(__clang__)
#        pragma clang fp contract(off)
#    endif
    return a * b;
#endif
}

FATE_LINEAR_RULE float fate_plus(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

FATE_LINEAR_RULE float fate_over(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// Of a positive number that is not tiny; off by 1e-6 of it at most. The number is split into 2^n and what is near 1.
FATE_LINEAR_RULE float fate_fast_log(float value) {
    const uint32_t bits     = fate_to_bits(value);
    const int32_t  exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23; // 2^-0.5 and up: 0
    const float    t        = fate_plus(fate_of_bits(bits - (static_cast<uint32_t>(exponent) << 23)), -1.0f);
    float          p        = 0.11896102f;
    p                       = fate_plus(fate_times(p, t), -0.18667853f);
    p                       = fate_plus(fate_times(p, t), 0.2049633f);
    p                       = fate_plus(fate_times(p, t), -0.24909744f);
    p                       = fate_plus(fate_times(p, t), 0.33314509f);
    p                       = fate_plus(fate_times(p, t), -0.50001113f);
    p                       = fate_plus(fate_times(p, t), 1.00000097f);
    return fate_plus(fate_times(p, t), fate_times(static_cast<float>(exponent), 0.69314718f));
}

FATE_LINEAR_RULE float fate_fast_exp(float value) {
    float t           = fate_times(value, 1.44269504f);
    t                 = t < -126.0f ? -126.0f : t;
    t                 = t > 126.0f ? 126.0f : t;
    // adding so large a number rounds to a whole one
    const float whole = fate_plus(fate_plus(t, 12582912.0f), -12582912.0f);
    const float f     = fate_plus(t, -whole);
    float       p     = 0.00132765f;
    p                 = fate_plus(fate_times(p, f), 0.00967554f);
    p                 = fate_plus(fate_times(p, f), 0.05550713f);
    p                 = fate_plus(fate_times(p, f), 0.2402212f);
    p                 = fate_plus(fate_times(p, f), 0.69314697f);
    p                 = fate_plus(fate_times(p, f), 1.00000007f);
    return fate_times(p, fate_of_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23));
}

// Of log-odds.
FATE_LINEAR_RULE float fate_chance_of(float log_odds) {
    return fate_over(1.0f, fate_plus(1.0f, fate_fast_exp(-log_odds)));
}

// Of a half that is 0 or more, and finite.
FATE_LINEAR_RULE float fate_of_count(uint16_t half) {
    return fate_times(fate_of_bits(static_cast<uint32_t>(half) << 13), 0x1p112f);
}

// What two features add to a score, the second one made of the first.
FATE_LINEAR_RULE float fate_with(float score, float a, float x, float b, float y) {
    return fate_plus(score, fate_plus(fate_times(a, x), fate_times(b, y)));
}

FATE_LINEAR_RULE float fate_log_of_rate(float rate) {
    return fate_fast_log(fate_plus(rate, 0.02f));
}

FATE_LINEAR_RULE float fate_log_of_share(float share, bool later) {
    return later ? fate_fast_log(fate_plus(share, 0.01f)) : fate_fast_log(fate_over(fate_plus(share, 0.01f), fate_plus(1.01f, -share)));
}

FATE_LINEAR_RULE float fate_base_rate(float middle, float slow) {
    return fate_times(0.5f, fate_plus(middle, slow));
}

// What a token's, a pair's counts back off to, in occurrences.
FATE_LINEAR_RULE float fate_strength(bool later, bool pair) {
    return later ? 4.0f : pair ? 1.0f : 2.0f;
}

// The share of occurrences at which an expert was used; inverse: of n + strength.
FATE_LINEAR_RULE float fate_share(uint16_t sum, float strength, float before, float inverse) {
    return fate_times(fate_plus(fate_of_count(sum), fate_times(strength, before)), inverse);
}

// A rate and an age after one more token.
FATE_LINEAR_RULE float fate_next_rate(float rate, float keep, bool is_used) {
    const float kept = fate_times(rate, keep);
    return is_used ? fate_plus(kept, fate_plus(1.0f, -keep)) : kept;
}

FATE_LINEAR_RULE float fate_next_age(float age, bool is_used) {
    const float grown = fate_plus(age, 1.0f);
    return is_used ? 1.0f : grown < FATE_LINEAR_MAX_AGE ? grown : static_cast<float>(FATE_LINEAR_MAX_AGE);
}

// A weight as a token has it that is so early in its sequence.
FATE_LINEAR_RULE float fate_weight(const float * weights, int32_t feature, const int32_t * early_of, float early) {
    float weight = weights[feature];
    for (int32_t i = 0; i < FATE_LINEAR_EARLY; ++i) {
        if (feature == FATE_LINEAR_LOG_RATE + early_of[i]) {
            weight = fate_plus(weight, fate_times(early, weights[FATE_LINEAR_EARLY_LOG + i]));
        }
    }
    return weight;
}

// What a use adds at the i-th token from the repeat of a context on; level: of the longest context that repeats. weights: of the layer.
FATE_LINEAR_RULE float fate_repeat_value(const float * weights, int32_t level, int32_t i, const float * soon, const float * later) {
    float sums[3];
    for (int32_t when = 0; when < 3; ++when) {
        sums[when] = 0.0f;
        for (int32_t n = 0; n <= level; ++n) {
            sums[when] = fate_plus(sums[when], weights[FATE_LINEAR_REPEAT + when * FATE_LINEAR_NGRAMS + n]);
        }
    }
    return i == 0 ? sums[0] : fate_plus(fate_times(sums[1], soon[i - 1]), fate_times(sums[2], later[i - 1]));
}

// What the squeezed context adds; dot: of whole numbers.
FATE_LINEAR_RULE float fate_with_dot(float score, float unit, float scale, int32_t dot) {
    return fate_plus(score, fate_times(fate_times(unit, scale), static_cast<float>(dot)));
}

// What a token is told by, besides the model and what is known of each expert: a view of the memory of whoever evaluates. Arrays of layers are those of one of them.
struct fate_linear_sight {
    const int16_t *  context;    // [stride], the squeezed context in whole numbers,
    float            unit;       // that they are to be multiplied by
    int32_t          stride;
    float            n[2][2];    // occurrences that the sums are of
    const uint16_t * sums[2][2]; // [now, later][token, pair], each [max_experts] halves; null: none
    int32_t          n_used;     // tokens from the repeat of the context on, 0: there is none
    int32_t          max_k;
    const uint16_t * used;       // [n_used][max_k], UINT16_MAX: not run
};

// One layer of one head alike.
struct fate_linear_fitted {
    const float *   weights;  // [FATE_LINEAR_FEATURES], fate_weight() of each
    const float *   repeats;  // [n_used], fate_repeat_value() of each
    const float *   constant; // [max_experts]
    const int16_t * fold;     // [max_experts][stride]
    const float *   scale;    // [max_experts]
};

// The score of an expert, as log-odds, by each of N heads. rates[FATE_LINEAR_RATES].
template <int N>
FATE_LINEAR_RULE void fate_linear_scores(const fate_linear_fitted * heads, const fate_linear_sight & told, int32_t expert,
                                         const float * rates, float age, float * scores) {
    for (int h = 0; h < N; ++h) {
        const int16_t * column = heads[h].fold + static_cast<int64_t>(expert) * told.stride;
        int32_t         dot    = 0;
        for (int32_t i = 0; i < told.stride; ++i) {
            dot += column[i] * told.context[i];
        }
        scores[h] = fate_with_dot(heads[h].constant[expert], told.unit, heads[h].scale[expert], dot);
    }
    for (int32_t i = 0; i < told.n_used; ++i) {
        for (int32_t j = 0; j < told.max_k; ++j) {
            if (told.used[i * told.max_k + j] == expert) {
                for (int h = 0; h < N; ++h) {
                    scores[h] = fate_plus(scores[h], heads[h].repeats[i]);
                }
            }
        }
    }
    for (int32_t r = 0; r < FATE_LINEAR_RATES; ++r) {
        const float log = fate_log_of_rate(rates[r]);
        for (int h = 0; h < N; ++h) {
            const float * w = heads[h].weights;
            scores[h]       = fate_with(scores[h], w[FATE_LINEAR_RATE + r], rates[r], w[FATE_LINEAR_LOG_RATE + r], log);
        }
    }
    const float log_age = fate_fast_log(age);
    for (int h = 0; h < N; ++h) {
        scores[h] = fate_with(scores[h], 0.0f, age, heads[h].weights[FATE_LINEAR_LOG_AGE], log_age);
    }
    const float base = fate_base_rate(rates[FATE_LINEAR_MIDDLE], rates[FATE_LINEAR_SLOW]);
    for (int later = 0; later < 2; ++later) {
        float share = base;
        for (int pair = 0; pair < 2; ++pair) { // what was not seen backs off wholly
            if (told.sums[later][pair]) {
                const float strength = fate_strength(later != 0, pair != 0);
                share =
                    fate_share(told.sums[later][pair][expert], strength, share, fate_over(1.0f, fate_plus(told.n[later][pair], strength)));
            }
            const float   log  = fate_log_of_share(share, later != 0);
            const int32_t name = (later ? FATE_LINEAR_TOKEN_LATER : FATE_LINEAR_TOKEN_NOW) + pair;
            for (int h = 0; h < N; ++h) {
                scores[h] = fate_with(scores[h], 0.0f, share, heads[h].weights[name], log);
            }
        }
    }
}

// What the host says of one token to whoever evaluates it: pointers into the memory of fate_linear, until it is told or asked anything else.
struct fate_linear_told {
    const int16_t *  context; // as in fate_linear_sight
    float            unit;
    float            early;
    float            n[2][2];
    const uint16_t * sums[2][2];                      // each [n_layers][max_experts]
    int32_t          level;                           // of the repeat
    int32_t          n_used;
    const uint16_t * used[FATE_LINEAR_REPEAT_TOKENS]; // each [n_layers][max_k]

    // What is known of each expert; null: whoever evaluates knows it, up to the token before if it is to advance by what that used.
    const float * rates; // [n_layers][FATE_LINEAR_RATES][max_experts]
    const float * age;   // [n_layers][max_experts]
    bool          advances;
};
