#include "record.h"

void fate_record::begin(int32_t n_tokens, int32_t n_layers, int32_t k, bool weights, const int32_t * tokens, const int32_t * positions,
                        const int32_t * const * sequences, const int8_t * outputs) {
    n_tokens_ = n_tokens;
    n_layers_ = n_layers;
    k_        = k;

    const size_t n_rows = static_cast<size_t>(n_tokens) * n_layers;
    ids_.assign(n_rows * k, -1);
    weights_.assign(weights ? n_rows * k : 0, 0.0f);
    hits_.assign(n_rows * k, 0);
    path_.assign(n_rows, FATE_PATH_NOT_RUN);
    ahead_ids_.assign(n_rows * horizons_.size() * FATE_LOOKAHEAD_MOST, -1);
    ahead_chances_.assign(ahead_ids_.size(), 0.0f);
    fills_.clear();
    evictions_.clear();
    output_tokens_.clear();
    tokens_.resize(n_tokens);
    positions_.resize(n_tokens);
    sequences_.resize(n_tokens);
    for (int32_t i = 0; i < n_tokens; ++i) {
        tokens_[i]    = tokens ? tokens[i] : -1;
        positions_[i] = positions ? positions[i] : -1;
        sequences_[i] = sequences && sequences[i] ? sequences[i][0] : 0;
        if (outputs && outputs[i]) {
            output_tokens_.push_back(i);
        }
    }
}

int32_t fate_record::token_of_row(int32_t row, int32_t n_rows) const {
    if (n_rows == n_tokens_) {
        return row;
    }
    return n_rows == static_cast<int32_t>(output_tokens_.size()) ? output_tokens_[row] : -1;
}

void fate_record::set_row(int32_t token, int32_t layer, uint8_t path) {
    path_[static_cast<size_t>(token) * n_layers_ + layer] = path;
}

void fate_record::add_fill(int32_t layer, int32_t expert) {
    fills_.push_back(layer);
    fills_.push_back(expert);
}

void fate_record::add_eviction(int32_t layer, int32_t expert) {
    evictions_.push_back(layer);
    evictions_.push_back(expert);
}

fate_step fate_record::view() const {
    fate_step step{};
    step.n_tokens    = n_tokens_;
    step.n_layers    = n_layers_;
    step.k           = k_;
    step.ids         = ids_.data();
    step.weights     = weights_.empty() ? nullptr : weights_.data();
    step.hits        = hits_.data();
    step.path        = path_.data();
    step.tokens      = tokens_.data();
    step.positions   = positions_.data();
    step.sequences   = sequences_.data();
    step.n_fills     = static_cast<int32_t>(fills_.size() / 2);
    step.fills       = fills_.data();
    step.n_evictions = static_cast<int32_t>(evictions_.size() / 2);
    step.evictions   = evictions_.data();
    if (!horizons_.empty()) {
        step.n_horizons    = static_cast<int32_t>(horizons_.size());
        step.horizons      = horizons_.data();
        step.n_ahead       = FATE_LOOKAHEAD_MOST;
        step.ahead_ids     = ahead_ids_.data();
        step.ahead_chances = ahead_chances_.data();
    }
    return step;
}
