#include "linear_math.h"

#include <cstring>

// Each loop is written once and compiled for several processors: as part of functions that are allowed more instructions.
#if defined(__GNUC__)
#    define FATE_INLINE static inline __attribute__((always_inline))
#    define FATE_ALONE  __restrict__
#else
#    define FATE_INLINE static inline
#    define FATE_ALONE
#endif

FATE_INLINE float whole(const float * numbers, int32_t n, int32_t most_sum, int16_t * whole) {
    const float * FATE_ALONE from = numbers;
    int16_t * FATE_ALONE     to   = whole;
    uint32_t                 most = 0; // sizes are ordered as their bits are, and the largest of whole numbers is found side by side
    for (int32_t i = 0; i < n; ++i) {
        const uint32_t size = fate_to_bits(from[i]) & 0x7fffffff;
        most                = size > most ? size : most;
    }
    if (fate_of_bits(most) < 1e-30f) {
        memset(whole, 0, n * sizeof(int16_t));
        return 0.0f;
    }
    float factor = INT16_MAX / fate_of_bits(most);
    for (int32_t again = 0;; ++again) {
        int32_t sum = 0;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t rounded = static_cast<int32_t>((from[i] * factor + 12582912.0f) - 12582912.0f);
            sum += rounded < 0 ? -rounded : rounded;
            to[i] = static_cast<int16_t>(rounded);
        }
        if (sum <= most_sum || again > 0) {
            return 1.0f / factor;
        }
        factor *= static_cast<float>(most_sum - 2 * n) / static_cast<float>(sum + n); // what rounding may add is left room for
    }
}

FATE_INLINE void add_dots(const int16_t * columns, const int16_t * factors, int32_t n_rows, int32_t n_columns, const float * scale,
                          float unit, float * sums) {
    float * FATE_ALONE to = sums;
    for (int32_t j = 0; j < n_columns; ++j) {
        const int16_t * FATE_ALONE a   = columns + static_cast<int64_t>(j) * n_rows;
        const int16_t * FATE_ALONE b   = factors;
        int32_t                    sum = 0;
        for (int32_t i = 0; i < n_rows; ++i) {
            sum += a[i] * b[i];
        }
        to[j] = fate_with_dot(to[j], unit, scale[j], sum);
    }
}

FATE_INLINE void decay(float * rates, float * age, const float * keep, int32_t n_layers, int32_t n_experts) {
    for (int32_t i = 0; i < n_layers * FATE_LINEAR_RATES; ++i) {
        float * FATE_ALONE rate  = rates + static_cast<int64_t>(i) * n_experts;
        const float        share = keep[i % FATE_LINEAR_RATES];
        for (int32_t e = 0; e < n_experts; ++e) {
            rate[e] = fate_next_rate(rate[e], share, false);
        }
    }
    for (int32_t i = 0; i < n_layers * n_experts; ++i) {
        age[i] = fate_next_age(age[i], false);
    }
}

// Adds two features of each expert, the second one made of the first.
template <int N, typename F>
FATE_INLINE void add(const fate_linear_layer & layer, const float * feature, int32_t first, int32_t second, F && of) {
    const float * FATE_ALONE x  = feature;
    float * FATE_ALONE       s0 = layer.scores[0];
    float * FATE_ALONE       s1 = layer.scores[N - 1];
    const float              a0 = first < 0 ? 0.0f : layer.weights[0][first], b0 = layer.weights[0][second];
    const float              a1 = first < 0 ? 0.0f : layer.weights[N - 1][first], b1 = layer.weights[N - 1][second];
    for (int32_t e = 0; e < layer.n_experts; ++e) {
        const float y = of(x[e]);
        s0[e]         = fate_with(s0[e], a0, x[e], b0, y);
        if (N > 1) {
            s1[e] = fate_with(s1[e], a1, x[e], b1, y);
        }
    }
}

template <int N> FATE_INLINE void score_heads(const fate_linear_layer & layer) {
    const int32_t n = layer.n_experts;
    for (int32_t h = 0; h < FATE_LINEAR_RATES; ++h) {
        add<N>(layer, layer.rates + h * n, FATE_LINEAR_RATE + h, FATE_LINEAR_LOG_RATE + h, [](float x) { return fate_log_of_rate(x); });
    }
    add<N>(layer, layer.age, -1, FATE_LINEAR_LOG_AGE, [](float x) { return fate_fast_log(x); });
    float * FATE_ALONE       base   = layer.scratch;
    const float * FATE_ALONE middle = layer.rates + FATE_LINEAR_MIDDLE * n;
    const float * FATE_ALONE slow   = layer.rates + FATE_LINEAR_SLOW * n;
    for (int32_t e = 0; e < n; ++e) {
        base[e] = fate_base_rate(middle[e], slow[e]);
    }
    for (int32_t later = 0; later < 2; ++later) {
        const float * share = base;
        for (int32_t pair = 0; pair < 2; ++pair) { // what was not seen backs off wholly
            if (layer.sums[later][pair]) {
                const uint16_t * FATE_ALONE sums     = layer.sums[later][pair];
                const float * FATE_ALONE    before   = share;
                float * FATE_ALONE          made     = layer.scratch + (1 + pair) * n;
                const float                 strength = fate_strength(later != 0, pair != 0);
                const float                 inverse  = 1.0f / (layer.n[later][pair] + strength);
                for (int32_t e = 0; e < n; ++e) {
                    made[e] = fate_share(sums[e], strength, before[e], inverse);
                }
                share = made;
            }
            const int32_t second = (later ? FATE_LINEAR_TOKEN_LATER : FATE_LINEAR_TOKEN_NOW) + pair;
            if (later) {
                add<N>(layer, share, -1, second, [](float x) { return fate_log_of_share(x, true); });
            } else {
                add<N>(layer, share, -1, second, [](float x) { return fate_log_of_share(x, false); });
            }
        }
    }
}

FATE_INLINE void score(const fate_linear_layer & layer) {
    if (layer.n_heads > 1) {
        score_heads<2>(layer);
    } else {
        score_heads<1>(layer);
    }
}

FATE_INLINE void chances(const float * log_odds, int32_t n, float * chances) {
    const float * FATE_ALONE from = log_odds;
    float * FATE_ALONE       to   = chances;
    for (int32_t i = 0; i < n; ++i) {
        to[i] = fate_chance_of(from[i]);
    }
}

#define FATE_LINEAR_MATH(name, attribute)                                                                                       \
    attribute static float whole_##name(const float * a, int32_t b, int32_t c, int16_t * d) {                                   \
        return whole(a, b, c, d);                                                                                               \
    }                                                                                                                           \
    attribute static void add_dots_##name(const int16_t * a, const int16_t * b, int32_t c, int32_t d, const float * e, float f, \
                                          float * g) {                                                                          \
        add_dots(a, b, c, d, e, f, g);                                                                                          \
    }                                                                                                                           \
    attribute static void decay_##name(float * a, float * b, const float * c, int32_t d, int32_t e) {                           \
        decay(a, b, c, d, e);                                                                                                   \
    }                                                                                                                           \
    attribute static void score_##name(const fate_linear_layer & a) {                                                           \
        score(a);                                                                                                               \
    }                                                                                                                           \
    attribute static void chances_##name(const float * a, int32_t b, float * c) {                                               \
        chances(a, b, c);                                                                                                       \
    }                                                                                                                           \
    static const fate_linear_math math_##name = { whole_##name, add_dots_##name, decay_##name, score_##name, chances_##name };

FATE_LINEAR_MATH(plain, )
#if defined(__GNUC__) && defined(__x86_64__)
FATE_LINEAR_MATH(avx2, __attribute__((target("avx2,fma"))))
#    if !defined(__clang__) // which does not know how to be told of the width
FATE_LINEAR_MATH(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#    endif
#endif

const fate_linear_math * fate_linear_math_of(int32_t i) {
#if defined(__GNUC__) && defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#    if !defined(__clang__)
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && i-- == 0) {
        return &math_avx512;
    }
#    endif
    if (has_avx2 && i-- == 0) {
        return &math_avx2;
    }
#endif
    return i == 0 ? &math_plain : nullptr;
}
