#include "layer.h"

#include <algorithm>

fate_layer::fate_layer(int32_t n_experts, int32_t k, int32_t n_slots, int64_t expert_bytes) :
    k_(k),
    expert_bytes_(expert_bytes),
    slot_of_(n_experts),
    expert_of_(n_slots),
    last_use_(n_experts),
    score_(n_experts),
    counters_(FATE_N_COUNTERS),
    is_waiting_(n_experts),
    is_ahead_(n_experts),
    is_needed_(n_experts) {
    table_.n_experts = n_experts;
    table_.n_slots   = n_slots;
    table_.slot_of   = slot_of_.data();
    table_.expert_of = expert_of_.data();
    table_.last_use  = last_use_.data();
    table_.score     = score_.data();
    reset();
}

void fate_layer::reset() {
    std::fill(slot_of_.begin(), slot_of_.end(), -1);
    std::fill(expert_of_.begin(), expert_of_.end(), -1);
    std::fill(last_use_.begin(), last_use_.end(), 0);
    std::fill(counters_.begin(), counters_.end(), 0);
    std::fill(is_waiting_.begin(), is_waiting_.end(), 0);
    forget_ahead();
    table_.clock = 0;
    began_       = 0;
    n_free_      = table_.n_slots;
    n_seed_rows_ = 0;
    forget_scores();
}

void fate_layer::begin_step() {
    began_ = table_.clock;
    forget_ahead();
}

void fate_layer::forget_ahead() {
    for (const int32_t expert : ahead_) {
        is_ahead_[expert] = 0;
    }
    ahead_.clear();
}

void fate_layer::publish(const float * scores, float bonus, bool behind) {
    std::copy(scores, scores + table_.n_experts, score_.begin());
    table_.bonus        = bonus;
    table_.published_at = behind ? began_ : table_.clock;
}

void fate_layer::forget_scores() {
    std::fill(score_.begin(), score_.end(), 0.0f);
    table_.bonus        = 0.0f;
    table_.published_at = table_.clock;
}

void fate_layer::need(const fate_ids & ids) {
    needed_.clear();
    missing_.clear();
    for (int32_t row = 0; row < ids.n_rows; ++row) {
        for (int32_t rank = ids.k - 1; rank >= 0; --rank) {
            const int32_t expert = ids.at(row, rank);
            if (is_needed_[expert]) {
                continue;
            }
            is_needed_[expert] = 1;
            needed_.push_back(expert);
            if (slot_of_[expert] < 0) {
                missing_.push_back(expert);
            }
        }
    }
}

void fate_layer::choose(bool callback, fate_layer_io & io) {
    answer_.clear();
    n_answered_ = 0;
    if (!callback || missing_.empty()) {
        return;
    }
    const int32_t n = std::max<int32_t>(0, static_cast<int32_t>(missing_.size()) - n_free_);
    answer_.resize(n);
    if (!io.ask(needed_, missing_, last_use_.data(), n, answer_.data())) {
        answer_.clear();
    } else if (!valid_answer()) {
        answer_.clear();
        io.reject();
    }
}

bool fate_layer::valid_answer() const {
    return fate_rule_valid(answer_.data(), static_cast<int32_t>(answer_.size()), [this](int32_t expert) {
        return expert >= 0 && expert < table_.n_experts && slot_of_[expert] >= 0 && !is_needed_[expert];
    });
}

void fate_layer::admit(int32_t expert, fate_layer_io & io) {
    int32_t slot = -1;
    if (n_free_ > 0) {
        slot = fate_rule_free_slot(table_);
    } else {
        slot = n_answered_ < answer_.size() ? slot_of_[answer_[n_answered_++]] : fate_rule_victim(table_, is_needed_.data());
    }
    put(expert, slot, io);
}

// Into a slot that is free or whose expert goes.
void fate_layer::put(int32_t expert, int32_t slot, fate_layer_io & io) {
    if (expert_of_[slot] < 0) {
        --n_free_;
    } else {
        const int32_t victim = expert_of_[slot];
        io.evict(victim);
        ++counters_[FATE_COUNTER_EVICTIONS];
        counters_[FATE_COUNTER_PREFETCH_WASTED] += is_waiting_[victim];
        is_waiting_[victim] = 0;
    }
    fate_rule_place(table_, expert, slot);
    io.fill(expert, slot);
    ++counters_[FATE_COUNTER_FILLS];
    counters_[FATE_COUNTER_BYTES] += expert_bytes_;
}

void fate_layer::prefetch(const float * chance, float threshold, int32_t most, fate_layer_io & io) {
    fate_prefetch plan[FATE_PREFETCH_MAX];
    const int32_t left = most - static_cast<int32_t>(ahead_.size());
    const int32_t n    = fate_prefetch_plan(table_, chance, is_ahead_.data(), threshold, left, plan);
    for (int32_t i = 0; i < n; ++i) {
        put(plan[i].expert, plan[i].slot, io);
        is_waiting_[plan[i].expert] = 1;
        is_ahead_[plan[i].expert]   = 1;
        ahead_.push_back(plan[i].expert);
        ++counters_[FATE_COUNTER_PREFETCHES];
    }
}

void fate_layer::release_needed() {
    for (const int32_t expert : needed_) {
        is_needed_[expert] = 0;
    }
    for (const int32_t expert : ahead_) {
        is_needed_[expert] = 0;
    }
    forget_ahead();
}

void fate_layer::resolve(const fate_ids & ids, bool callback, fate_layer_io & io, int32_t * slots, uint8_t * hits) {
    need(ids);
    for (const int32_t expert : ahead_) {
        is_needed_[expert] = 1;
    }
    choose(callback, io);

    for (int32_t row = 0; row < ids.n_rows; ++row) {
        bool all_resident = true;
        for (int32_t rank = ids.k - 1; rank >= 0; --rank) {
            const int32_t expert = ids.at(row, rank);
            const bool    hit    = slot_of_[expert] >= 0;
            if (!hit) {
                admit(expert, io);
                all_resident = false;
            }
            ++counters_[hit ? FATE_COUNTER_HITS : FATE_COUNTER_MISSES];
            counters_[FATE_COUNTER_PREFETCH_USEFUL] += is_waiting_[expert];
            counters_[FATE_COUNTER_PREFETCH_HIDDEN] += is_waiting_[expert] * expert_bytes_;
            is_waiting_[expert]       = 0;
            hits[row * ids.k + rank]  = hit;
            slots[row * ids.k + rank] = slot_of_[expert];
            fate_rule_use(table_, expert);
        }
        counters_[FATE_COUNTER_ROWS_ALL_RESIDENT] += all_resident;
    }
    counters_[FATE_COUNTER_ROWS] += ids.n_rows;
    counters_[FATE_COUNTER_ROUTED] += static_cast<int64_t>(ids.n_rows) * ids.k;

    release_needed();
}

void fate_layer::bypass(const fate_ids & ids) {
    for (int32_t row = 0; row < ids.n_rows; ++row) {
        for (int32_t rank = ids.k - 1; rank >= 0; --rank) {
            fate_rule_use(table_, ids.at(row, rank));
        }
    }
    counters_[FATE_COUNTER_BYPASSED] += static_cast<int64_t>(ids.n_rows) * ids.k;
    counters_[FATE_COUNTER_ROUTED] += static_cast<int64_t>(ids.n_rows) * ids.k;

    n_seed_rows_ = fate_seed_rows(ids, table_.n_experts, table_.n_slots);
    seed_ids_.resize(static_cast<size_t>(n_seed_rows_) * ids.k);
    for (int32_t row = 0; row < n_seed_rows_; ++row) {
        for (int32_t rank = 0; rank < ids.k; ++rank) {
            seed_ids_[row * ids.k + rank] = ids.at(ids.n_rows - n_seed_rows_ + row, rank);
        }
    }
}

void fate_layer::seed(bool callback, fate_layer_io & io) {
    if (n_seed_rows_ == 0) {
        return;
    }
    const fate_ids ids = { reinterpret_cast<const char *>(seed_ids_.data()), static_cast<int64_t>(k_ * sizeof(int32_t)), n_seed_rows_, k_ };
    n_seed_rows_       = 0;

    need(ids);
    choose(callback, io);
    for (const int32_t expert : missing_) {
        admit(expert, io);
        ++counters_[FATE_COUNTER_SEED_FILLS];
    }
    release_needed();
}

int32_t fate_seed_rows(const fate_ids & ids, int32_t n_experts, int32_t n_slots) {
    const int32_t        most = std::min(ids.n_rows, std::max(FATE_SEED_PAIRS, n_slots) / ids.k);
    std::vector<uint8_t> is_used(n_experts);
    int32_t              n_used = 0;
    for (int32_t n = 0; n < most; ++n) {
        for (int32_t rank = 0; rank < ids.k; ++rank) {
            uint8_t & used = is_used[ids.at(ids.n_rows - 1 - n, rank)];
            n_used += !used;
            used = 1;
        }
        if (n_used > n_slots) {
            return n;
        }
    }
    return most;
}

int32_t fate_first_inconsistent_slot(const std::vector<int32_t> & slot_of, const std::vector<int32_t> & expert_of) {
    const int32_t n_experts  = static_cast<int32_t>(slot_of.size());
    const int32_t n_slots    = static_cast<int32_t>(expert_of.size());
    int32_t       n_resident = 0;
    for (int32_t slot = 0; slot < n_slots; ++slot) {
        const int32_t expert = expert_of[slot];
        if (expert < -1 || expert >= n_experts || (expert >= 0 && slot_of[expert] != slot)) {
            return slot;
        }
        n_resident += expert >= 0;
    }
    for (const int32_t slot : slot_of) {
        n_resident -= slot >= 0;
    }
    return n_resident == 0 ? -1 : n_slots;
}

int32_t fate_layer::first_inconsistent_slot() const {
    const int32_t bad = fate_first_inconsistent_slot(slot_of_, expert_of_);
    return bad < 0 && std::count(expert_of_.begin(), expert_of_.end(), -1) != n_free_ ? table_.n_slots : bad;
}
