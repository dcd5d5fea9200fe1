#include "linear.h"

#include "status.h"

#include <algorithm>
#include <cmath>

static void expect_true(bool is_right, const char * what, int64_t value, const char * expected) {
    if (!is_right) {
        throw fate_error(FATE_STATUS_INVALID,
                         fate_format("linear model: %s %lld: expected %s", what, static_cast<long long>(value), expected));
    }
}

static const fate_linear_model & checked(const fate_linear_model & m) {
    expect_true(m.n_layers >= 1, "n_layers", m.n_layers, "1 or more");
    expect_true(m.max_experts >= 1 && m.max_experts < UINT16_MAX, "max_experts", m.max_experts, "1 to 65534");
    expect_true(static_cast<int64_t>(m.n_layers) * m.max_experts < 1 << 24, "experts", static_cast<int64_t>(m.n_layers) * m.max_experts,
                "fewer than 2^24");
    expect_true(m.max_k >= 1 && m.max_k <= m.max_experts, "max_k", m.max_k, "1 to max_experts");
    expect_true(m.rank_basis >= 1 && m.rank_basis <= fate_linear_matrix::MOST_ROWS, "rank_basis", m.rank_basis,
                "1 to fate_linear_matrix::MOST_ROWS");
    expect_true(m.rank >= 1 && m.rank <= fate_linear_matrix::MOST_ROWS, "rank", m.rank, "1 to fate_linear_matrix::MOST_ROWS");
    expect_true(m.n_history > FATE_LINEAR_FOLLOW, "n_history", m.n_history, "more than FATE_LINEAR_FOLLOW");
    expect_true(m.early_tokens > 0, "early_tokens", static_cast<int64_t>(m.early_tokens), "a number above 0");
    for (const void * array :
         { static_cast<const void *>(m.n_experts), static_cast<const void *>(m.even_rates), static_cast<const void *>(m.basis),
           static_cast<const void *>(m.center), static_cast<const void *>(m.squeeze), static_cast<const void *>(m.rate_keep),
           static_cast<const void *>(m.context_keep), static_cast<const void *>(m.soon), static_cast<const void *>(m.later),
           static_cast<const void *>(m.credit), static_cast<const void *>(m.early_of), static_cast<const void *>(m.ngrams) }) {
        expect_true(array != nullptr, "array", 0, "one that is there");
    }
    for (int32_t layer = 0; layer < m.n_layers; ++layer) {
        expect_true(m.n_experts[layer] >= 1 && m.n_experts[layer] <= m.max_experts, "n_experts", m.n_experts[layer], "1 to max_experts");
    }
    for (int32_t i = 0; i < FATE_LINEAR_EARLY; ++i) {
        expect_true(m.early_of[i] >= 0 && m.early_of[i] < FATE_LINEAR_RATES, "early_of", m.early_of[i], "one of the rates");
    }
    for (int32_t i = 0; i < FATE_LINEAR_NGRAMS; ++i) {
        expect_true(m.ngrams[i] > (i > 0 ? m.ngrams[i - 1] : 0) && m.ngrams[i] <= FATE_LINEAR_MOST_GRAM, "ngrams", m.ngrams[i],
                    "rising lengths up to FATE_LINEAR_MOST_GRAM");
    }
    for (const fate_linear_table * table : { &m.tokens, &m.pairs }) {
        expect_true(table->capacity >= 1, "capacity", table->capacity, "1 or more");
        expect_true(table->n_rows == 0 || (table->n_rows > 0 && table->keys && table->n && table->sums), "n_rows", table->n_rows,
                    "0, or arrays");
    }
    for (const fate_linear_head * head : { &m.now, &m.keep }) {
        const bool is_asked = head->weights || head == &m.now;
        expect_true(!is_asked || (head->weights && head->fold && head->constant && head->bonus), "head", head == &m.keep, "all its arrays");
    }
    return m;
}

fate_linear::fate_linear(const fate_linear_model & model) :
    model_(checked(model)),
    math_(*fate_linear_math_of(0)),
    n_heads_(model.keep.weights ? 2 : 1),
    constant_(n_heads_ * size()),
    rates_(size() * FATE_LINEAR_RATES),
    age_(size()),
    last_(model.rank_basis),
    decayed_(static_cast<size_t>(FATE_LINEAR_DECAYED) * model.rank_basis),
    tokens_(static_cast<int32_t>(size()) + model.rank_basis, model.tokens.capacity),
    pairs_(static_cast<int32_t>(size()), model.pairs.capacity),
    seen_(FATE_LINEAR_NGRAMS, fate_linear_contexts(model.n_history)),
    history_used_(model.n_history * width()),
    history_sums_(static_cast<size_t>(model.n_history) * model.rank_basis),
    history_next_(model.n_history),
    scores_(constant_.size()),
    context_(static_cast<size_t>(FATE_LINEAR_CONTEXTS) * model.rank_basis),
    squeezed_(model.rank),
    scratch_(3 * static_cast<size_t>(model.max_experts)),
    uses_(size()),
    total_(model.rank_basis) {
    columns_.reserve(FATE_LINEAR_LATER * width());
    due_.ids.resize(width());
    sequences_.reserve(FATE_LINEAR_MAX_SEQUENCES);
    for (size_t piece = 0; piece < FATE_LINEAR_CONTEXTS; ++piece) {
        squeeze_.push_back({ { model.squeeze + piece * model.rank_basis * model.rank }, model.rank_basis, model.rank });
    }
    std::vector<const float *> folds;
    for (const fate_linear_head * head : { &model.now, &model.keep }) {
        if (head->weights) {
            memcpy(&constant_[folds.size() * size()], head->constant, size() * sizeof(float));
            folds.push_back(head->fold);
        }
    }
    fold_ = fate_linear_matrix(folds, model.rank, static_cast<int32_t>(constant_.size()));
    reset();
}

void fate_linear::reset() {
    due_.is_there  = false;
    const size_t n = model_.max_experts;
    for (int32_t layer = 0; layer < model_.n_layers; ++layer) {
        for (int32_t i = 0; i < FATE_LINEAR_RATES; ++i) {
            memcpy(&rates_[(layer * FATE_LINEAR_RATES + i) * n], model_.even_rates + layer * n, n * sizeof(float));
        }
    }
    std::fill(age_.begin(), age_.end(), static_cast<float>(FATE_LINEAR_MAX_AGE));
    std::fill(last_.begin(), last_.end(), 0.0f);
    std::fill(decayed_.begin(), decayed_.end(), 0.0f);
    restore(tokens_, model_.tokens, static_cast<int32_t>(size()) + model_.rank_basis, false);
    restore(pairs_, model_.pairs, static_cast<int32_t>(size()), true);
    for (fate_linear_contexts & seen : seen_) {
        seen.clear();
    }
    n_seen_ = n_observed_ = 0;
    sequences_.clear();
    expect(FATE_LINEAR_UNKNOWN, 0, FATE_LINEAR_UNKNOWN);
}

void fate_linear::restore(fate_linear_rows & rows, const fate_linear_table & saved, int32_t n_columns, bool is_pairs) {
    rows.clear();
    for (int32_t i = std::max(0, saved.n_rows - saved.capacity); i < saved.n_rows; ++i) {
        const int64_t key =
            is_pairs ? fate_linear_rows::pair_key(static_cast<int32_t>(saved.keys[2 * i]), static_cast<int32_t>(saved.keys[2 * i + 1])) :
                       saved.keys[i];
        const int32_t row = rows.make(key);
        memcpy(rows.sums(row, 0), saved.sums + 2 * static_cast<size_t>(i) * n_columns,
               2 * static_cast<size_t>(n_columns) * sizeof(uint16_t));
        for (int32_t when = 0; when < 2; ++when) {
            rows.n(row, when) = saved.n[2 * static_cast<size_t>(i) + when];
        }
    }
}

fate_linear_sequence * fate_linear::find(int32_t sequence) {
    for (fate_linear_sequence & known : sequences_) {
        if (known.id == sequence) {
            return &known;
        }
    }
    return nullptr;
}

fate_linear_sequence & fate_linear::take(int32_t sequence) {
    fate_linear_sequence * taken = find(sequence);
    if (!taken) {
        if (sequences_.size() < FATE_LINEAR_MAX_SEQUENCES) {
            sequences_.emplace_back();
            taken = &sequences_.back();
        } else {
            taken =
                &*std::min_element(sequences_.begin(), sequences_.end(),
                                   [](const fate_linear_sequence & a, const fate_linear_sequence & b) { return a.seen_at < b.seen_at; });
            *taken = fate_linear_sequence();
        }
        taken->id = sequence;
    }
    taken->seen_at = n_observed_++;
    return *taken;
}

void fate_linear::expect(int32_t token, int32_t sequence, int32_t position) {
    const fate_linear_sequence * known = find(sequence);
    is_evaluated_                      = false;
    token_                             = token;
    sequence_                          = sequence;
    const bool is_early                = position >= 0 && position < model_.early_end;
    early_                             = is_early ? static_cast<float>(std::exp2(-position / model_.early_tokens)) : 0.0f;
    const int32_t n_before             = known ? known->n_tokens : 0;
    before_                            = n_before > 0 ? known->tokens[n_before - 1] : FATE_LINEAR_UNKNOWN;
    match_ = match_level_ = -1;
    std::fill(has_gram_, has_gram_ + FATE_LINEAR_NGRAMS, false);
    if (token == FATE_LINEAR_UNKNOWN) {
        return;
    }
    int32_t context[FATE_LINEAR_MOST_GRAM + 1];
    if (known) {
        memcpy(context, known->tokens, sizeof(known->tokens));
    }
    context[n_before] = token;
    for (int32_t level = 0; level < FATE_LINEAR_NGRAMS; ++level) {
        const int32_t   n    = model_.ngrams[level];
        const int32_t * from = context + n_before + 1 - n;
        if (n_before + 1 < n || std::find(from, from + n, FATE_LINEAR_UNKNOWN) != from + n) {
            break;
        }
        has_gram_[level]    = true;
        gram_[level]        = fate_linear_contexts::hash(from, n);
        const int64_t found = seen_[level].get(gram_[level]);
        if (found >= 0 && found > n_seen_ - model_.n_history) {
            match_       = found;
            match_level_ = level;
        }
    }
}

void fate_linear::check_ids(const int32_t * ids) const {
    for (int32_t layer = 0; layer < model_.n_layers; ++layer) {
        for (int32_t i = 0; i < model_.max_k; ++i) {
            const int32_t id = ids[layer * model_.max_k + i];
            if (id < -1 || id >= model_.n_experts[layer]) {
                throw fate_error(FATE_STATUS_INVALID, fate_format("linear model: expert %d of layer %d: expected -1 to %d", id, layer,
                                                                  model_.n_experts[layer] - 1));
            }
        }
    }
}

void fate_linear::observe(const int32_t * ids, int32_t token, int32_t sequence) {
    note(ids, token, sequence);
    finish();
}

// Takes in all that the next token is told by.
void fate_linear::note(const int32_t * ids, int32_t token, int32_t sequence) {
    check_ids(ids);
    finish();
    if (token != token_ || sequence != sequence_) {
        expect(token, sequence, FATE_LINEAR_UNKNOWN);
    }
    const int32_t n = model_.max_experts, rank = model_.rank_basis;
    std::copy_n(ids, width(), due_.ids.begin());
    due_.is_there     = true;
    due_.token        = token_;
    due_.before       = before_;
    due_.oldest.token = FATE_LINEAR_UNKNOWN;
    std::fill(total_.begin(), total_.end(), 0.0f);
    for (size_t i = 0; i < width(); ++i) {
        if (ids[i] >= 0) {
            const float * row = model_.basis + (i / model_.max_k * n + ids[i]) * rank;
            for (int32_t r = 0; r < rank; ++r) {
                total_[r] += row[r];
            }
        }
    }
    for (int32_t r = 0; r < rank; ++r) {
        total_[r] -= model_.center[r];
        for (int32_t i = 0; i < FATE_LINEAR_DECAYED; ++i) {
            float & decayed = decayed_[static_cast<size_t>(i) * rank + r];
            decayed         = decayed * model_.context_keep[i] + (1 - model_.context_keep[i]) * total_[r];
        }
    }
    last_                       = total_;
    fate_linear_sequence & here = take(sequence);
    if (model_.learn) {
        const size_t at = slot(n_seen_);
        for (size_t i = 0; i < width(); ++i) {
            history_used_[at * width() + i] = used_of(ids[i]);
        }
        learn(here);
    }
    if (here.n_tokens == FATE_LINEAR_MOST_GRAM) {
        memmove(here.tokens, here.tokens + 1, (FATE_LINEAR_MOST_GRAM - 1) * sizeof(int32_t));
        --here.n_tokens;
    }
    here.tokens[here.n_tokens++] = token;
    expect(FATE_LINEAR_UNKNOWN, sequence, FATE_LINEAR_UNKNOWN);
}

// Counts it.
void fate_linear::finish() {
    if (!due_.is_there) {
        return;
    }
    due_.is_there   = false;
    const int32_t n = model_.max_experts;
    math_.decay(rates_.data(), age_.data(), model_.rate_keep, model_.n_layers, n);
    columns_.clear();
    for (size_t i = 0; i < width(); ++i) {
        const int32_t id = due_.ids[i];
        if (id < 0) {
            continue;
        }
        const size_t layer = i / model_.max_k, column = layer * n + id;
        float *      rate = &rates_[layer * FATE_LINEAR_RATES * n + id];
        for (int32_t r = 0; r < FATE_LINEAR_RATES; ++r) {
            rate[r * n] += 1 - model_.rate_keep[r];
        }
        age_[column]  = 1.0f;
        uses_[column] = 1.0;
        columns_.push_back(static_cast<uint32_t>(column));
    }
    if (model_.learn && due_.token != FATE_LINEAR_UNKNOWN) {
        count(due_.token, due_.before, 0, history_sum(n_seen_ - 1), 1.0f);
    }
    if (due_.oldest.token != FATE_LINEAR_UNKNOWN) {
        learn_later(due_.oldest);
    }
    for (uint32_t column : columns_) {
        uses_[column] = 0.0;
    }
}

void fate_linear::step(const fate_step & step, bool defers) {
    expect_true(step.n_layers == model_.n_layers, "n_layers of a step", step.n_layers, "the model's");
    expect_true(step.k == model_.max_k, "k of a step", step.k, "the model's max_k");
    const int32_t first = std::max(0, step.n_tokens - FATE_LINEAR_MOST_ROWS);
    for (int32_t i = first; i < step.n_tokens; ++i) {
        check_ids(step.ids + i * width());
    }
    for (int32_t i = first; i < step.n_tokens; ++i) {
        note(step.ids + i * width(), step.tokens[i], step.sequences[i]);
    }
    if (!defers) {
        finish();
    }
}

void fate_linear::learn(fate_linear_sequence & here) {
    const int64_t position = n_seen_++;
    memcpy(history_sum(position), total_.data(), total_.size() * sizeof(float));
    history_next_[slot(position)] = -1;
    if (here.last > position - model_.n_history && here.last >= 0) {
        history_next_[slot(here.last)] = position;
    }
    here.last = position;
    for (int32_t level = 0; level < FATE_LINEAR_NGRAMS; ++level) {
        if (has_gram_[level]) {
            seen_[level].put(gram_[level], position);
        }
    }
    here.pending[here.n_pending++] = { token_, before_, position };
    if (here.n_pending > FATE_LINEAR_LATER) {
        due_.oldest = here.pending[0];
        memmove(here.pending, here.pending + 1, FATE_LINEAR_LATER * sizeof(here.pending[0]));
        --here.n_pending;
    }
}

void fate_linear::learn_later(const fate_linear_sequence::occurrence & of) {
    int64_t after[FATE_LINEAR_LATER];
    if (following(of.position, FATE_LINEAR_LATER, after) < FATE_LINEAR_LATER) {
        return;
    }
    for (uint32_t column : columns_) {
        uses_[column] = 0.0;
    }
    columns_.clear();
    std::fill(total_.begin(), total_.end(), 0.0f);
    float weight = 0.0f;
    for (int32_t i = 0; i < FATE_LINEAR_LATER; ++i) {
        const uint16_t * used   = &history_used_[slot(after[i]) * width()];
        const float      credit = model_.credit[i];
        weight += credit;
        for (size_t first = 0; first < size(); first += model_.max_experts) {
            for (int32_t j = 0; j < model_.max_k; ++j, ++used) {
                if (*used == UINT16_MAX) {
                    continue;
                }
                double & uses = uses_[first + *used];
                if (uses == 0.0) {
                    columns_.push_back(static_cast<uint32_t>(first + *used));
                }
                uses += static_cast<double>(credit);
            }
        }
        const float * sum = history_sum(after[i]);
        for (size_t r = 0; r < total_.size(); ++r) {
            total_[r] += credit * sum[r];
        }
    }
    count(of.token, of.before, 1, total_.data(), weight);
}

// Adds uses_ of columns_, of tokens the total too, at (0) or after (1) an occurrence. Only the former makes rows.
void fate_linear::count(int32_t token, int32_t before, int32_t when, const float * total, float weight) {
    for (fate_linear_rows * rows : { &tokens_, &pairs_ }) {
        const int64_t key = rows == &tokens_ ? token : fate_linear_rows::pair_key(before, token);
        const int32_t row = when == 0 ? rows->occur(key) : rows->get(key);
        if (row < 0) {
            continue;
        }
        uint16_t * sums = rows->sums(row, when);
        for (uint32_t column : columns_) {
            sums[column] = fate_to_half(fate_of_half(sums[column]) + static_cast<float>(uses_[column]));
        }
        if (rows == &tokens_) {
            for (int32_t r = 0; r < model_.rank_basis; ++r) {
                uint16_t & sum = sums[size() + r];
                sum            = fate_to_half(fate_of_half(sum) + total[r]);
            }
        }
        rows->count(row, when, weight);
    }
}

// Writes up to n positions of the tokens after one in its sequence; returns how many are still known.
int32_t fate_linear::following(int64_t position, int32_t n, int64_t * found) const {
    for (int32_t i = 0; i < n; ++i) {
        position = history_next_[slot(position)];
        if (position <= n_seen_ - model_.n_history || position < 0) {
            return i;
        }
        found[i] = position;
    }
    return n;
}
