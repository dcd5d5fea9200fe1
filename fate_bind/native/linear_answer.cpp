// What a linear model of routing answers, and its C surface.
#include "linear.h"

#include "status.h"

#include <algorithm>

static const float TOKEN_STRENGTH = 2.0f; // of what a token's sum of contexts backs off to, which is nothing

void fate_linear::evaluate() {
    if (is_evaluated_) {
        return;
    }
    finish();
    const size_t n = model_.max_experts;
    scores_        = constant_;
    make_context();
    fold_.add(math_, squeezed_.data(), scores_.data());
    if (match_ >= 0) {
        add_repeat();
    }
    const bool               is_known = token_ != FATE_LINEAR_UNKNOWN;
    const fate_linear_rows * rows[]   = { &tokens_, &pairs_ };
    const int32_t at[] = { is_known ? tokens_.get(token_) : -1, is_known ? pairs_.get(fate_linear_rows::pair_key(before_, token_)) : -1 };
    const fate_linear_head * heads[] = { &model_.now, &model_.keep };
    float                    weights[FATE_LINEAR_HEADS][FATE_LINEAR_FEATURES];
    fate_linear_layer        layer = {};
    layer.n_experts                = model_.max_experts;
    layer.n_heads                  = n_heads_;
    layer.scratch                  = scratch_.data();
    for (int32_t l = 0; l < model_.n_layers; ++l) {
        layer.rates = &rates_[l * FATE_LINEAR_RATES * n];
        layer.age   = &age_[l * n];
        for (int32_t later = 0; later < 2; ++later) {
            for (int32_t pair = 0; pair < 2; ++pair) {
                const bool is_seen      = at[pair] >= 0 && rows[pair]->n(at[pair], later) > 0;
                layer.sums[later][pair] = is_seen ? rows[pair]->sums(at[pair], later) + l * n : nullptr;
                layer.n[later][pair]    = is_seen ? rows[pair]->n(at[pair], later) : 0.0f;
            }
        }
        for (int32_t h = 0; h < n_heads_; ++h) {
            const float * fitted = heads[h]->weights + l * FATE_LINEAR_FEATURES;
            memcpy(weights[h], fitted, sizeof(weights[h]));
            for (int32_t i = 0; i < FATE_LINEAR_EARLY; ++i) {
                const int32_t feature = FATE_LINEAR_LOG_RATE + model_.early_of[i];
                weights[h][feature]   = fate_weight(fitted, feature, model_.early_of, early_);
            }
            layer.weights[h] = weights[h];
            layer.scores[h]  = &scores_[h * size() + l * n];
        }
        math_.score(layer);
    }
    is_evaluated_ = true;
}

static void touch(const void * from, size_t n_bytes) {
    const volatile char * bytes = static_cast<const char *>(from);
    for (size_t i = 0; i < n_bytes; i += 64) {
        (void) bytes[i];
    }
}

void fate_linear::warm(bool is_only_told) {
    if (is_only_told) {
        make_context();
        return;
    }
    is_evaluated_ = false;
    evaluate();
    const auto touch_rows = [&](int32_t token, int32_t before, int32_t when) {
        const int32_t token_row = tokens_.get(token);
        const int32_t pair_row  = pairs_.get(fate_linear_rows::pair_key(before, token));
        if (token_row >= 0) {
            touch(tokens_.sums(token_row, when), (size() + model_.rank_basis) * sizeof(uint16_t));
        }
        if (pair_row >= 0) {
            touch(pairs_.sums(pair_row, when), size() * sizeof(uint16_t));
        }
    };
    if (!model_.learn || token_ == FATE_LINEAR_UNKNOWN) {
        return;
    }
    touch_rows(token_, before_, 0);
    const fate_linear_sequence * here = find(sequence_);
    if (here && here->n_pending == FATE_LINEAR_LATER &&
        here->pending[0].token != FATE_LINEAR_UNKNOWN) { // the one that is learned from next
        int64_t       after[FATE_LINEAR_LATER];
        const int32_t n = following(here->pending[0].position, FATE_LINEAR_LATER, after);
        touch_rows(here->pending[0].token, here->pending[0].before, 1);
        for (int32_t i = 0; i < n; ++i) {
            touch(&history_used_[slot(after[i]) * width()], width() * sizeof(uint16_t));
            touch(history_sum(after[i]), model_.rank_basis * sizeof(float));
        }
    }
}

// Makes the squeezed context of its pieces; those of which nothing is known are zeros and are left out.
void fate_linear::make_context() {
    const int32_t rank                      = model_.rank_basis;
    const size_t  n                         = rank;
    bool          has[FATE_LINEAR_CONTEXTS] = { false, false, true, match_ >= 0, false, true, true };
    const int32_t at                        = token_ == FATE_LINEAR_UNKNOWN ? -1 : tokens_.get(token_);
    for (int32_t when = 0; when < 2 && at >= 0; ++when) {
        const uint16_t * sums  = tokens_.sums(at, when) + size();
        const float      share = 1.0f / (tokens_.n(at, when) + TOKEN_STRENGTH);
        has[when]              = tokens_.n(at, when) > 0;
        for (size_t r = 0; r < n; ++r) {
            context_[when * n + r] = fate_of_half(sums[r]) * share;
        }
    }
    memcpy(&context_[2 * n], last_.data(), n * sizeof(float));
    if (match_ >= 0) {
        int64_t       after[FATE_LINEAR_FOLLOW];
        const int32_t n_after = following(match_, FATE_LINEAR_FOLLOW, after);
        has[4]                = n_after > 0;
        memcpy(&context_[3 * n], history_sum(match_), n * sizeof(float));
        std::fill(&context_[4 * n], &context_[4 * n] + n, 0.0f);
        for (int32_t i = 0; i < n_after; ++i) {
            const float * sum = history_sum(after[i]);
            for (size_t r = 0; r < n; ++r) {
                context_[4 * n + r] += model_.soon[i] * sum[r];
            }
        }
    }
    memcpy(&context_[5 * n], decayed_.data(), decayed_.size() * sizeof(float));
    std::fill(squeezed_.begin(), squeezed_.end(), 0.0f);
    for (size_t piece = 0; piece < FATE_LINEAR_CONTEXTS; ++piece) {
        if (has[piece]) {
            squeeze_[piece].add(math_, &context_[piece * n], squeezed_.data());
        }
    }
}

// Adds what was used at, and after, the last occurrence of the context.
void fate_linear::add_repeat() {
    const fate_linear_head * heads[] = { &model_.now, &model_.keep };
    int64_t                  after[FATE_LINEAR_REPEAT_TOKENS];
    const int32_t            n_after = repeated(after);
    for (int32_t h = 0; h < n_heads_; ++h) {
        float * scores = &scores_[h * size()];
        for (int32_t l = 0; l < model_.n_layers; ++l, scores += model_.max_experts) {
            const float * weights = heads[h]->weights + l * FATE_LINEAR_FEATURES;
            for (int32_t i = 0; i < n_after; ++i) {
                const uint16_t * used  = &history_used_[slot(after[i]) * width() + static_cast<size_t>(l) * model_.max_k];
                const float      value = fate_repeat_value(weights, match_level_, i, model_.soon, model_.later);
                for (int32_t j = 0; j < model_.max_k; ++j) {
                    if (used[j] != UINT16_MAX) {
                        scores[used[j]] += value;
                    }
                }
            }
        }
    }
}

// The positions from the last occurrence of the context on; returns how many, 0: there was none.
int32_t fate_linear::repeated(int64_t * after) const {
    if (match_ < 0) {
        return 0;
    }
    after[0] = match_;
    return 1 + following(match_, FATE_LINEAR_FOLLOW, after + 1);
}

// Whether what is due changes what the token at hand is told by.
bool fate_linear::is_due_first() const {
    if (!due_.is_there || !model_.learn || token_ == FATE_LINEAR_UNKNOWN) {
        return false;
    }
    if (token_ == due_.token || token_ == due_.oldest.token) {
        return true;
    }
    const auto drops = [](const fate_linear_rows & rows, int64_t occurs, int64_t asked) {
        const int32_t dropped = rows.dropped_by(occurs);
        return dropped >= 0 && dropped == rows.get(asked);
    };
    return due_.token != FATE_LINEAR_UNKNOWN &&
           (drops(tokens_, due_.token, token_) ||
            drops(pairs_, fate_linear_rows::pair_key(due_.before, due_.token), fate_linear_rows::pair_key(before_, token_)));
}

fate_linear_told fate_linear::tell() {
    if (is_due_first()) {
        finish();
    }
    make_context();
    fate_linear_told told           = {};
    told.unit                       = fold_.make_whole(math_, squeezed_.data());
    told.context                    = fold_.whole().data();
    told.early                      = early_;
    const fate_linear_rows * rows[] = { &tokens_, &pairs_ };
    for (int32_t pair = 0; pair < 2 && token_ != FATE_LINEAR_UNKNOWN; ++pair) {
        const int32_t at = rows[pair]->get(pair ? fate_linear_rows::pair_key(before_, token_) : token_);
        for (int32_t later = 0; later < 2 && at >= 0; ++later) {
            told.n[later][pair]    = rows[pair]->n(at, later);
            told.sums[later][pair] = told.n[later][pair] > 0 ? rows[pair]->sums(at, later) : nullptr;
        }
    }
    int64_t after[FATE_LINEAR_REPEAT_TOKENS];
    told.level  = match_level_;
    told.n_used = repeated(after);
    for (int32_t i = 0; i < told.n_used; ++i) {
        told.used[i] = &history_used_[slot(after[i]) * width()];
    }
    return told;
}

void fate_linear::tell_all(fate_linear_told & told) {
    finish();
    told.rates    = rates_.data();
    told.age      = age_.data();
    told.advances = false;
}

void fate_linear::chances(float * out) {
    evaluate();
    math_.chances(scores_.data(), static_cast<int32_t>(size()), out);
    for (int32_t l = 0; l < model_.n_layers; ++l) {
        float * row = out + static_cast<size_t>(l) * model_.max_experts;
        std::fill(row + model_.n_experts[l], row + model_.max_experts, 0.0f);
    }
}

void fate_linear::scores(float * out, float * bonus) {
    if (!has_scores()) {
        throw fate_error(FATE_STATUS_INVALID, "linear model: it has no head for scores");
    }
    evaluate();
    memcpy(out, &scores_[size()], size() * sizeof(float));
    memcpy(bonus, model_.keep.bonus, model_.n_layers * sizeof(float));
}

int32_t fate_linear_open(const fate_linear_model * model, fate_linear ** linear) {
    return fate_guard(FATE_STATUS_INVALID, [&] { *linear = new fate_linear(*model); });
}

void fate_linear_close(fate_linear * linear) {
    delete linear;
}

int32_t fate_linear_reset(fate_linear * linear) {
    return fate_guard(FATE_STATUS_INVALID, [&] { linear->reset(); });
}

int32_t fate_linear_observe(fate_linear * linear, const int32_t * ids, int32_t token, int32_t sequence) {
    return fate_guard(FATE_STATUS_INVALID, [&] { linear->observe(ids, token, sequence); });
}

int32_t fate_linear_step(fate_linear * linear, const fate_step * step) {
    return fate_guard(FATE_STATUS_INVALID, [&] { linear->step(*step); });
}

int32_t fate_linear_expect(fate_linear * linear, int32_t token, int32_t sequence, int32_t position) {
    return fate_guard(FATE_STATUS_INVALID, [&] { linear->expect(token, sequence, position); });
}

int32_t fate_linear_get(fate_linear * linear, float * chances, float * scores, float * bonus) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (chances) {
            linear->chances(chances);
        }
        if (scores || bonus) {
            if (!scores || !bonus) {
                throw fate_error(FATE_STATUS_INVALID, "scores without a bonus: expected both or neither");
            }
            linear->scores(scores, bonus);
        }
    });
}
