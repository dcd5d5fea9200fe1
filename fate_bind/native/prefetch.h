// What a layer brings in before it is asked for, once, for the CUDA engine, the host twin and the tests. No ggml, no allocation.
//
// Absent experts whose chance to be used by the coming token is at least the threshold come in, the likeliest first. They take free slots, then those of
// the first victims by the decision rule, but never that of an expert whose chance is at least the threshold too, whatever its score.
// What was brought in for a token is no victim of that token's op, needed or not: its bytes may still be on their way. Nor is it of a later plan for the
// same token: a layer may plan at the token's start, and again when layers before it tell more.
#pragma once

#include "rule.h"

static const int32_t FATE_PREFETCH_MAX       = 16;   // of a layer and token
static const float   FATE_PREFETCH_THRESHOLD = 0.5f; // where none is given: a router's chances of those it will choose are no less

struct fate_prefetch {
    int32_t expert;
    int32_t slot;
    int32_t victim; // that goes from the slot, -1: it was free
};

// What a configuration means.
inline float fate_prefetch_threshold(float given) {
    return given > 0 ? given : FATE_PREFETCH_THRESHOLD;
}

// How many a layer may bring in, so that the experts of one row find room beside them.
FATE_HOST_DEVICE inline int32_t fate_prefetch_most(int32_t wanted, int32_t n_slots, int32_t k) {
    const int32_t room = n_slots - k;
    const int32_t most = wanted < FATE_PREFETCH_MAX ? wanted : FATE_PREFETCH_MAX;
    return room < most ? (room > 0 ? room : 0) : most;
}

// Whether a goes before b.
FATE_HOST_DEVICE inline bool fate_prefetch_before(float chance_a, int32_t a, float chance_b, int32_t b) {
    return chance_a != chance_b ? chance_a > chance_b : a < b;
}

// Plans for one layer, chance[n_experts]; returns how many, at most `most` <= FATE_PREFETCH_MAX. is_ahead[n_experts]: was brought in for this token already.
// Changes no table.
inline int32_t fate_prefetch_plan(const fate_table & t, const float * chance, const uint8_t * is_ahead, float threshold, int32_t most,
                                  fate_prefetch * plan) {
    int32_t n = 0;
    while (n < most) {
        int32_t best = -1;
        for (int32_t e = 0; e < t.n_experts; ++e) {
            const bool behind = n == 0 || fate_prefetch_before(chance[plan[n - 1].expert], plan[n - 1].expert, chance[e], e);
            if (t.slot_of[e] < 0 && chance[e] >= threshold && behind &&
                (best < 0 || fate_prefetch_before(chance[e], e, chance[best], best))) {
                best = e;
            }
        }
        int32_t slot = -1;
        for (int32_t s = 0; s < t.n_slots; ++s) {
            bool is_taken = false;
            for (int32_t i = 0; i < n; ++i) {
                is_taken = is_taken || plan[i].slot == s;
            }
            if (is_taken || (t.expert_of[s] >= 0 && (chance[t.expert_of[s]] >= threshold || is_ahead[t.expert_of[s]]))) {
                continue;
            }
            if (slot < 0) {
                slot = s;
            } else if (t.expert_of[slot] >= 0 &&
                       (t.expert_of[s] < 0 || fate_rule_before(fate_rule_rank(t, t.expert_of[s]), fate_rule_rank(t, t.expert_of[slot])))) {
                slot = s; // a free slot is the lowest of these
            }
        }
        if (best < 0 || slot < 0) {
            break;
        }
        plan[n++] = { best, slot, t.expert_of[slot] };
    }
    return n;
}
