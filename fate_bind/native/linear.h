// A linear model of routing that follows a run token by token: what each expert's chance is to be used by the token about to run, and what it is worth to keep
// it after that. The features, and what each is for, are in fate_policy/features.py, which says the same more slowly. No ggml, no CUDA.
#pragma once

#include "linear_matrix.h"
#include "linear_memory.h"

struct fate_linear {
public:
    // The struct is copied, its arrays must live on.
    explicit fate_linear(const fate_linear_model & model);

    void reset();
    void expect(int32_t token, int32_t sequence, int32_t position);
    // ids[n_layers][max_k], best first, -1: not run; distinct within a layer
    void observe(const int32_t * ids, int32_t token, int32_t sequence);
    // defers: what tell() can do without is left to finish(), or to whatever needs it first.
    void step(const fate_step & step, bool defers = false);
    void finish();

    bool has_scores() const { return n_heads_ > 1; }

    // Reads what the answers to the next token take, and what learning from it changes; where it is only told, what the context is made with. Changes nothing.
    // Waiting for a GPU leaves the caches cold, and until it is done there is time.
    void warm(bool is_only_told);

    // Of the token that is expected. Both are made by the first question.
    void chances(float * out);
    void scores(float * out, float * bonus); // has_scores() only

    // Instead of answers, what somebody else takes to make them who keeps what is known of each expert.
    fate_linear_told tell();
    // Adds what is known of each expert.
    void tell_all(fate_linear_told & told);

    // Tokens taken in.
    int64_t n_observed() const { return n_observed_; }

    const fate_linear_model &  model() const { return model_; }
    int32_t                    n_heads() const { return n_heads_; }
    const fate_linear_matrix & fold() const { return fold_; }         // columns [heads][n_layers][max_experts]
    const std::vector<float> & constant() const { return constant_; } // of these

private:
    void                   check_ids(const int32_t * ids) const;
    void                   restore(fate_linear_rows & rows, const fate_linear_table & saved, int32_t n_columns, bool is_pairs);
    fate_linear_sequence * find(int32_t sequence);
    fate_linear_sequence & take(int32_t sequence);
    void                   note(const int32_t * ids, int32_t token, int32_t sequence);
    bool                   is_due_first() const;
    void                   learn(fate_linear_sequence & here);
    void                   learn_later(const fate_linear_sequence::occurrence & of);
    void                   count(int32_t token, int32_t before, int32_t when, const float * total, float weight);
    void                   evaluate();
    void                   make_context();
    void                   add_repeat();
    int32_t                repeated(int64_t * after) const;
    int32_t                following(int64_t position, int32_t n, int64_t * found) const;

    size_t   size() const { return static_cast<size_t>(model_.n_layers) * model_.max_experts; }
    size_t   width() const { return static_cast<size_t>(model_.n_layers) * model_.max_k; }
    size_t   slot(int64_t position) const { return static_cast<size_t>(position % model_.n_history); }
    float *  history_sum(int64_t position) { return &history_sums_[slot(position) * model_.rank_basis]; }
    uint16_t used_of(int32_t id) const { return id < 0 ? UINT16_MAX : static_cast<uint16_t>(id); }

    fate_linear_model               model_;
    const fate_linear_math &        math_;
    int32_t                         n_heads_;
    std::vector<fate_linear_matrix> squeeze_; // of each piece of the context
    fate_linear_matrix              fold_;
    std::vector<float>              constant_;

    std::vector<float>                rates_; // [n_layers][FATE_LINEAR_RATES][max_experts]
    std::vector<float>                age_;
    std::vector<float>                last_;  // what the newest token routed, summed up
    std::vector<float>                decayed_;
    fate_linear_rows                  tokens_;
    fate_linear_rows                  pairs_;
    std::vector<fate_linear_contexts> seen_;
    fate_array<uint16_t>              history_used_; // [n_history][n_layers][max_k], UINT16_MAX: not run
    fate_array<float>                 history_sums_; // [n_history][rank_basis]
    fate_array<int64_t>               history_next_;
    int64_t                           n_seen_ = 0;
    std::vector<fate_linear_sequence> sequences_;
    int64_t                           n_observed_ = 0;

    // of the token observed last, what finish() is to do
    struct {
        bool                             is_there = false;
        std::vector<int32_t>             ids;         // [n_layers][max_k]
        int32_t                          token = FATE_LINEAR_UNKNOWN, before = FATE_LINEAR_UNKNOWN;
        fate_linear_sequence::occurrence oldest = {}; // that is learned from, FATE_LINEAR_UNKNOWN: none
    } due_;

    // the token told
    int32_t token_    = FATE_LINEAR_UNKNOWN;
    int32_t sequence_ = 0;
    int32_t before_   = FATE_LINEAR_UNKNOWN;
    float   early_    = 0.0f;
    bool    has_gram_[FATE_LINEAR_NGRAMS];
    int64_t gram_[FATE_LINEAR_NGRAMS];
    int64_t match_       = -1;
    int32_t match_level_ = -1;

    bool                  is_evaluated_ = false;
    std::vector<float>    scores_; // [heads][n_layers][max_experts], log-odds
    std::vector<float>    context_;
    std::vector<float>    squeezed_;
    std::vector<float>    scratch_;
    std::vector<uint32_t> columns_; // used by what is counted at the moment,
    std::vector<double>   uses_;    // and how much, by column; 0 elsewhere
    std::vector<float>    total_;
};
