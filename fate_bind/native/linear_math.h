// The loops of a linear model of routing that take time: over experts that lie side by side, for this processor or for any. No allocation.
#pragma once

#include "linear_rule.h"

// One layer as the heads see it.
struct fate_linear_layer {
    int32_t          n_experts;
    const float *    rates;                      // [FATE_LINEAR_RATES][n_experts]
    const float *    age;                        // [n_experts]
    const uint16_t * sums[2][2];                 // [now, later][token, pair], each [n_experts] halves; null: none
    float            n[2][2];                    // occurrences that they are sums of, above 0
    int32_t          n_heads;
    const float *    weights[FATE_LINEAR_HEADS]; // [FATE_LINEAR_FEATURES], the early ones not read: they are in the log rates
    float *          scores[FATE_LINEAR_HEADS];  // [n_experts], added to
    float *          scratch;                    // [3][n_experts]
};

struct fate_linear_math {
    // Writes n numbers as whole ones whose sizes sum up to most_sum at most, and returns what they are to be multiplied by.
    float (*whole)(const float * numbers, int32_t n, int32_t most_sum, int16_t * whole);
    // sums[n_columns] += factors[n_rows] x columns[n_columns][n_rows] x scale[n_columns] x unit; factors are such that no product overflows
    void (*add_dots)(const int16_t * columns, const int16_t * factors, int32_t n_rows, int32_t n_columns, const float * scale, float unit,
                     float * sums);
    // rates[n_layers][FATE_LINEAR_RATES][n_experts] *= keep[FATE_LINEAR_RATES]; age[n_layers][n_experts] grows by 1 up to the maximum
    void (*decay)(float * rates, float * age, const float * keep, int32_t n_layers, int32_t n_experts);
    void (*score)(const fate_linear_layer & layer);
    void (*chances)(const float * log_odds, int32_t n, float * chances);
};

// The i-th of those that this processor can run, the fastest first, what all can run last; null: there are no more.
const fate_linear_math * fate_linear_math_of(int32_t i);

// IEEE's 16 bits; to the nearest, ties to even.
inline float fate_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    if ((half & 0x7c00) == 0x7c00) { // infinite, or not a number
        return fate_of_bits(sign | 0x7f800000 | static_cast<uint32_t>(half & 0x3ff) << 13);
    }
    return fate_of_bits(sign | fate_to_bits(fate_of_bits(static_cast<uint32_t>(half & 0x7fff) << 13) * 0x1p112f));
}

inline uint16_t fate_to_half(float value) {
    const uint32_t bits = fate_to_bits(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t size = bits & 0x7fffffff;
    if (size > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (size >= 0x477ff000) { // rounds to more than the largest half
        return sign | 0x7c00;
    }
    if (size < 0x38800000) { // below the normal halves: adding 0.5 leaves the bits of one, rounded
        return static_cast<uint16_t>(sign | (fate_to_bits(fate_of_bits(size) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
