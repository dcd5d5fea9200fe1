// The decision rule, once, for the CUDA engine, the host twin and the tests. No ggml, no allocation.
//
// Uses of one step in one layer are ordered by row, then from the worst to the best router rank; each advances the layer's clock. The victim is the
// resident expert that the op at hand does not need with the least (key, last use, expert id).
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#    define FATE_HOST_DEVICE __host__ __device__
#else
#    define FATE_HOST_DEVICE
#endif

// Seeding, after an op that went past the pool: the experts of its last rows are admitted, of as many rows as together use no more experts than there are
// slots. These rows are at most so many uses, which a block of the CUDA kernel takes, or as many as there are slots.
static const int32_t FATE_SEED_PAIRS = 1024;

// One layer's tables. A view: the owner decides where the arrays live.
struct fate_table {
    int32_t n_experts;
    int32_t n_slots;

    int32_t * slot_of;   // [n_experts], -1: absent
    int32_t * expert_of; // [n_slots],   -1: free
    int64_t * last_use;  // [n_experts], clock of the last use, 0: never
    int64_t   clock;

    const float * score;        // [n_experts], higher means keep
    int64_t       published_at; // clock at the end of the last step that the scores' maker had seen
    float         bonus;        // added to experts used since then
};

FATE_HOST_DEVICE inline float fate_rule_key(const fate_table & t, int32_t expert) {
    return t.last_use[expert] > t.published_at ? t.score[expert] + t.bonus : t.score[expert];
}

// What victims are ordered by.
struct fate_rank {
    float   key;
    int64_t last_use;
    int32_t expert;
};

FATE_HOST_DEVICE inline fate_rank fate_rule_rank(const fate_table & t, int32_t expert) {
    return { fate_rule_key(t, expert), t.last_use[expert], expert };
}

// True if a goes before b. A strict total order, so that parallel searches agree with serial ones.
FATE_HOST_DEVICE inline bool fate_rule_before(const fate_rank & a, const fate_rank & b) {
    if (a.key != b.key) {
        return a.key < b.key;
    }
    if (a.last_use != b.last_use) {
        return a.last_use < b.last_use;
    }
    return a.expert < b.expert;
}

// The slot of the victim, -1 if every resident expert is needed. needed[n_experts]: 1 for experts of the op at hand.
FATE_HOST_DEVICE inline int32_t fate_rule_victim(const fate_table & t, const uint8_t * needed) {
    int32_t best = -1;
    for (int32_t slot = 0; slot < t.n_slots; ++slot) {
        const int32_t expert = t.expert_of[slot];
        if (expert < 0) {
            continue;
        }
#if !defined(FATE_FAULT_VICTIM_IN_USE)
        if (needed[expert]) {
            continue;
        }
#endif
        if (best < 0 || fate_rule_before(fate_rule_rank(t, expert), fate_rule_rank(t, t.expert_of[best]))) {
            best = slot;
        }
    }
    return best;
}

FATE_HOST_DEVICE inline int32_t fate_rule_free_slot(const fate_table & t) {
    for (int32_t slot = 0; slot < t.n_slots; ++slot) {
        if (t.expert_of[slot] < 0) {
            return slot;
        }
    }
    return -1;
}

FATE_HOST_DEVICE inline void fate_rule_use(fate_table & t, int32_t expert) {
    t.last_use[expert] = ++t.clock;
}

// Puts the expert into the slot; what the slot held is absent afterwards.
FATE_HOST_DEVICE inline void fate_rule_place(fate_table & t, int32_t expert, int32_t slot) {
    if (t.expert_of[slot] >= 0) {
        t.slot_of[t.expert_of[slot]] = -1;
    }
    t.expert_of[slot] = expert;
    t.slot_of[expert] = slot;
}

// Whether a policy's answer can be followed: distinct experts, each of which may go.
template <typename F> bool fate_rule_valid(const int32_t * victims, int32_t n, F && may_go) {
    for (int32_t i = 0; i < n; ++i) {
        for (int32_t j = 0; j < i; ++j) {
            if (victims[j] == victims[i]) {
                return false;
            }
        }
        if (!may_go(victims[i])) {
            return false;
        }
    }
    return true;
}
