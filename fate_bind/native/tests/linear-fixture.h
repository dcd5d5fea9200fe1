// A linear model of routing with made-up numbers, a run of tokens, and what is said of them.
#pragma once

#include "linear_teller.h"

#include <random>
#include <vector>

static const int32_t N_LAYERS = 3, MAX_EXPERTS = 37, MAX_K = 4, BASIS = 5, RANK = 7; // no multiples of anything
static const int32_t SIZE = N_LAYERS * MAX_EXPERTS;

static std::mt19937 generator(1);

static std::vector<float> numbers(size_t n, float scale = 0.3f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              made(n);
    for (float & number : made) {
        number = normal(generator);
    }
    return made;
}

struct made_up {
    std::vector<int32_t>  n_experts = { 8, MAX_EXPERTS, 16 };
    std::vector<float>    even = std::vector<float>(SIZE, 0.1f), basis = numbers(SIZE * BASIS), center = numbers(BASIS);
    std::vector<float>    squeeze   = numbers(FATE_LINEAR_CONTEXTS * BASIS * RANK);
    std::vector<float>    rate_keep = { 0.5f, 0.7f, 0.8f, 0.9f, 0.95f, 0.97f, 0.98f, 0.99f }, context_keep = { 0.8f, 0.9f };
    std::vector<float>    soon = std::vector<float>(FATE_LINEAR_FOLLOW, 0.03f), later = soon, credit = { 0.3f, 0.2f, 0.15f, 0.1f, 0.1f };
    std::vector<int32_t>  early_of = { 2, 4, 6, 7 }, ngrams = { 2, 4, 8 };
    std::vector<float>    weights[2] = { numbers(N_LAYERS * FATE_LINEAR_FEATURES), numbers(N_LAYERS * FATE_LINEAR_FEATURES) };
    std::vector<float>    fold[2] = { numbers(RANK * SIZE), numbers(RANK * SIZE) }, constant[2] = { numbers(SIZE), numbers(SIZE) };
    std::vector<float>    bonus = numbers(N_LAYERS);
    std::vector<int64_t>  keys = { 3, 4, 5 }, pair_keys = { 1, 3, 2, 4, 3, 5 };
    std::vector<float>    n    = { 4, 2, 6, 3, 8, 1 };
    std::vector<uint16_t> sums = std::vector<uint16_t>(3 * 2 * (SIZE + BASIS), fate_to_half(1.5f));

    fate_linear_model model(int32_t capacity = 6, bool has_scores = true) {
        fate_linear_model m = {};
        m.n_layers          = N_LAYERS;
        m.max_experts       = MAX_EXPERTS;
        m.max_k             = MAX_K;
        m.rank_basis        = BASIS;
        m.rank              = RANK;
        m.n_experts         = n_experts.data();
        m.even_rates        = even.data();
        m.basis             = basis.data();
        m.center            = center.data();
        m.squeeze           = squeeze.data();
        m.rate_keep         = rate_keep.data();
        m.context_keep      = context_keep.data();
        m.soon              = soon.data();
        m.later             = later.data();
        m.credit            = credit.data();
        m.early_of          = early_of.data();
        m.early_tokens      = 24;
        m.early_end         = 384;
        m.ngrams            = ngrams.data();
        m.n_history         = 70;
        m.learn             = 1;
        m.tokens            = { capacity, 3, keys.data(), n.data(), sums.data() };
        m.pairs             = { capacity, 3, pair_keys.data(), n.data(), sums.data() };
        m.now               = { weights[0].data(), fold[0].data(), constant[0].data(), bonus.data() };
        if (has_scores) {
            m.keep = { weights[1].data(), fold[1].data(), constant[1].data(), bonus.data() };
        }
        return m;
    }
};

[[maybe_unused]] static std::vector<int32_t> route(const made_up & made) {
    std::vector<int32_t> ids(N_LAYERS * MAX_K, -1);
    for (int32_t layer = 0; layer < N_LAYERS; ++layer) {
        const int32_t first = static_cast<int32_t>(generator() % made.n_experts[layer]);
        for (int32_t i = 0; i < MAX_K && generator() % 16 != 0; ++i) {
            ids[layer * MAX_K + i] = (first + i) % made.n_experts[layer];
        }
    }
    return ids;
}

struct answer {
    std::vector<float> chances = std::vector<float>(SIZE), scores = std::vector<float>(SIZE), bonus = std::vector<float>(N_LAYERS);

    bool operator==(const answer & other) const { return chances == other.chances && scores == other.scores && bonus == other.bonus; }
};

[[maybe_unused]] static answer ask(fate_linear & linear) {
    answer got;
    linear.chances(got.chances.data());
    if (linear.has_scores()) {
        linear.scores(got.scores.data(), got.bonus.data());
    }
    return got;
}

// One of the tokens that a run is made of: several sequences, with repeats.
struct made_token {
    int32_t token, sequence, position;
    bool    is_told; // before it runs
};

[[maybe_unused]] static made_token token_at(int32_t t, int32_t n) {
    const int32_t token = t % 11 == 0 ? -1 : t / 3 % 2 ? t % 7 : static_cast<int32_t>(generator() % 20);
    return { token, t < n / 2 ? t / 40 % 2 : t, t % 400, t % 5 != 0 }; // at last more sequences than are kept
}

// The step that a token is.
class made_step {
public:
    made_step(const std::vector<int32_t> & ids, const made_token & at) : ids_(ids), at_(at) {}

    fate_step view() const {
        fate_step step = {};
        step.n_tokens  = 1;
        step.n_layers  = N_LAYERS;
        step.k         = MAX_K;
        step.ids       = ids_.data();
        step.tokens    = &at_.token;
        step.sequences = &at_.sequence;
        return step;
    }

private:
    const std::vector<int32_t> & ids_;
    const made_token &           at_;
};
