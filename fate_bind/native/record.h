// One step's routing, collected while its graph runs. No ggml.
#pragma once

#include "fate.h"
#include "lookahead.h"

#include <vector>

class fate_record {
public:
    // Starts a step of n_tokens tokens; arrays may be null (embeddings instead of tokens). outputs marks the tokens that the last layer may be cut to.
    void begin(int32_t n_tokens, int32_t n_layers, int32_t k, bool weights, const int32_t * tokens, const int32_t * positions,
               const int32_t * const * sequences, const int8_t * outputs);

    // The token of a layer's row when the layer sees n_rows of the step's tokens, -1 if it cannot be told.
    int32_t token_of_row(int32_t row, int32_t n_rows) const;

    int32_t n_tokens() const { return n_tokens_; }

    bool has_output() const { return !output_tokens_.empty(); }

    void set_row(int32_t token, int32_t layer, uint8_t path);

    int32_t * ids(int32_t token, int32_t layer) { return &ids_[index(token, layer)]; }

    // Tells what layers before told of a layer: horizons from the farthest to the nearest, none: nothing.
    void set_horizons(const std::vector<int32_t> & horizons) { horizons_ = horizons; }

    // Of a step that is to have it, [n_horizons][FATE_LOOKAHEAD_MOST].
    int32_t * ahead_ids(int32_t token, int32_t layer) { return &ahead_ids_[ahead_index(token, layer)]; }

    float * ahead_chances(int32_t token, int32_t layer) { return &ahead_chances_[ahead_index(token, layer)]; }

    bool has_ahead() const { return !ahead_ids_.empty(); }

    float * weights(int32_t token, int32_t layer) { return weights_.empty() ? nullptr : &weights_[index(token, layer)]; }

    uint8_t * hits(int32_t token, int32_t layer) { return &hits_[index(token, layer)]; }

    void add_fill(int32_t layer, int32_t expert);
    void add_eviction(int32_t layer, int32_t expert);

    fate_step view() const;

private:
    size_t index(int32_t token, int32_t layer) const { return (static_cast<size_t>(token) * n_layers_ + layer) * k_; }

    size_t ahead_index(int32_t token, int32_t layer) const {
        return (static_cast<size_t>(token) * n_layers_ + layer) * horizons_.size() * FATE_LOOKAHEAD_MOST;
    }

    int32_t              n_tokens_ = 0;
    int32_t              n_layers_ = 0;
    int32_t              k_        = 0;
    std::vector<int32_t> ids_;
    std::vector<float>   weights_;
    std::vector<uint8_t> hits_;
    std::vector<uint8_t> path_;
    std::vector<int32_t> tokens_;
    std::vector<int32_t> positions_;
    std::vector<int32_t> sequences_;
    std::vector<int32_t> output_tokens_;
    std::vector<int32_t> fills_;
    std::vector<int32_t> evictions_;
    std::vector<int32_t> horizons_;
    std::vector<int32_t> ahead_ids_;
    std::vector<float>   ahead_chances_;
};
