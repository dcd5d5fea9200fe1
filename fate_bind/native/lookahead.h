// What the router of a later layer makes of that which an earlier layer's router reads: once, for the CUDA engine, the host twin and the tests.
// No ggml, no allocation.
//
// The hidden state changes little from layer to layer, so that a later router, given an earlier one's input, names most of the experts that it will choose.
// Its weights are kept in 8 bits a number: read beside the step, they take a part of its memory bandwidth. Experts are ranked by what the model selects them by; their chance is made of the rank alone: at least a half for as many as a token uses.
#pragma once

#include "rule.h"

#include <cmath>
#include <cstdint>

static const int32_t FATE_LOOKAHEAD_LAYERS   = 2;  // that a layer's input tells of
static const int32_t FATE_LOOKAHEAD_FARTHEST = 8;  // of these, where a benchmark tells in place of the input
static const int32_t FATE_LOOKAHEAD_MOST     = 16; // experts of a layer that are named
static const int32_t FATE_GATE_ALIGN         = 16; // rows are filled up with zeros to a multiple of so many

// A later layer's router as an earlier layer sees it. A view: pointers are of the memory of whoever evaluates it.
struct fate_gate {
    const int8_t * weights; // [n_experts][stride]
    const float *  scale;   // [n_experts], that a row's numbers are to be multiplied by
    int32_t        stride;
    int32_t        n_embd;  // 0: unknown
    int32_t        n_experts;
    int32_t        k;
    const float *  bias;           // of the logits, null: none
    const float *  selection_bias; // of what is selected by, null: none
    const float *
            ratio; // [n_embd], that the input is multiplied by: the later layer's norm weights over the earlier one's; null: taken as it is
    bool    is_sigmoid; // selected by the sigmoid of the logits
    bool    is_softmax; // by their softmax, which ranks as they do; but groups are ranked by sums
    int32_t n_groups;   // of neighbours, of which only the best n_groups_used are selected from; 0: no groups
    int32_t n_groups_used;
};

inline int32_t fate_gate_stride(int32_t n_embd) {
    return (n_embd + FATE_GATE_ALIGN - 1) / FATE_GATE_ALIGN * FATE_GATE_ALIGN;
}

// Writes a row of n_embd numbers in 8 bits each, and zeros up to the stride; returns its scale.
inline float fate_gate_pack(const float * row, int32_t n_embd, int8_t * packed) {
    float most = 0.0f;
    for (int32_t i = 0; i < n_embd; ++i) {
        const float size = std::fabs(row[i]);
        most             = size > most ? size : most;
    }
    const float scale   = most > 0.0f ? most / 127.0f : 1.0f;
    const float rounder = 12582912.0f; // 1.5 * 2^23: what is added to it has no fraction left, and compilers know how to do several at once
    for (int32_t i = 0; i < n_embd; ++i) {
        packed[i] = static_cast<int8_t>(static_cast<int32_t>((row[i] / scale + rounder) - rounder));
    }
    for (int32_t i = n_embd; i < fate_gate_stride(n_embd); ++i) {
        packed[i] = 0;
    }
    return scale;
}

// What the model selects an expert by, of the sum over its row.
FATE_HOST_DEVICE inline float fate_gate_selection(const fate_gate & gate, int32_t expert, float sum) {
    const float logit  = sum * gate.scale[expert];
    const float biased = gate.bias ? logit + gate.bias[expert] : logit;
    const float value  = gate.is_sigmoid ? 1.0f / (1.0f + expf(-biased)) : biased;
    return gate.selection_bias ? value + gate.selection_bias[expert] : value;
}

// What a group is ranked by: the sum of its best two.
FATE_HOST_DEVICE inline float fate_gate_group(const fate_gate & gate, const float * selection, int32_t group) {
    float most = -INFINITY;
    for (int32_t e = 0; gate.is_softmax && e < gate.n_experts; ++e) {
        most = fmaxf(most, selection[e]);
    }
    const int32_t n     = gate.n_experts / gate.n_groups;
    float         one   = -INFINITY;
    float         other = -INFINITY;
    for (int32_t i = group * n; i < (group + 1) * n; ++i) {
        const float value = gate.is_softmax ? expf(selection[i] - most) : selection[i];
        other             = fmaxf(other, fminf(one, value));
        one               = fmaxf(one, value);
    }
    return n > 1 ? one + other : one;
}

// Whether the expert's group is one of the best; groups[n_groups]: what they are ranked by.
FATE_HOST_DEVICE inline bool fate_gate_is_open(const fate_gate & gate, const float * groups, int32_t expert) {
    const int32_t own    = expert / (gate.n_experts / gate.n_groups);
    int32_t       before = 0;
    for (int32_t group = 0; group < gate.n_groups; ++group) {
        before += groups[group] > groups[own] || (groups[group] == groups[own] && group < own);
    }
    return before < gate.n_groups_used;
}

// The chance of the expert of a rank, 0 the first, when a token uses k: falls with the rank, and is a half or more for the first k.
FATE_HOST_DEVICE inline float fate_rank_chance(int32_t rank, int32_t k) {
    if (rank >= FATE_LOOKAHEAD_MOST) {
        return 0.0f;
    }
    return rank < k ? 1.0f - 0.5f * static_cast<float>(rank) / static_cast<float>(k) :
                      0.5f * static_cast<float>(k) / static_cast<float>(rank + 1);
}

// The chance of an expert of all that are ranked by selection[n_experts]; rank: its own.
FATE_HOST_DEVICE inline float fate_gate_chance(const float * selection, int32_t n_experts, int32_t expert, int32_t k, int32_t & rank) {
    rank = 0;
    for (int32_t other = 0; other < n_experts; ++other) {
        rank += selection[other] > selection[expert] || (selection[other] == selection[expert] && other < expert);
    }
    return selection[expert] > -INFINITY ? fate_rank_chance(rank, k) : 0.0f;
}

// chance[n_experts] of an input x[n_embd]; selection: scratch [n_experts].
inline void fate_gate_chances(const fate_gate & gate, const float * x, float * selection, float * chance) {
    for (int32_t e = 0; e < gate.n_experts; ++e) {
        const int8_t * row = gate.weights + static_cast<int64_t>(e) * gate.stride;
        float          sum = 0.0f;
        for (int32_t i = 0; i < gate.n_embd; ++i) {
            sum += static_cast<float>(row[i]) * (gate.ratio ? x[i] * gate.ratio[i] : x[i]);
        }
        selection[e] = fate_gate_selection(gate, e, sum);
    }
    for (int32_t group = 0; group < gate.n_groups; ++group) { // fewer than experts
        chance[group] = fate_gate_group(gate, selection, group);
    }
    for (int32_t e = 0; gate.n_groups > 0 && e < gate.n_experts; ++e) {
        selection[e] = fate_gate_is_open(gate, chance, e) ? selection[e] : -INFINITY;
    }
    for (int32_t e = 0; e < gate.n_experts; ++e) {
        int32_t rank;
        chance[e] = fate_gate_chance(selection, gate.n_experts, e, gate.k, rank);
    }
}
