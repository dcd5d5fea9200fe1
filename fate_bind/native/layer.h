// One layer's decisions on the host: walks the ids of an op, names victims, keeps the counters. No ggml; copies and Python are behind fate_layer_io.
#pragma once

#include "fate.h"
#include "prefetch.h"
#include "rule.h"

#include <cstdint>
#include <vector>

// What a decision causes.
class fate_layer_io {
public:
    virtual ~fate_layer_io() = default;

    // Callback mode: fill victims[n] with distinct resident experts that are not needed; false: the rule decides. Also called with n == 0.
    virtual bool ask(const std::vector<int32_t> & needed, const std::vector<int32_t> & missing, const int64_t * last_use, int32_t n,
                     int32_t * victims) = 0;

    virtual void reject() = 0; // the answer was none: the rule decides

    virtual void evict(int32_t expert)              = 0;
    virtual void fill(int32_t expert, int32_t slot) = 0;
};

// ids of an op: row r, rank i at data + r*stride + i*sizeof(int32_t), best rank first.
struct fate_ids {
    const char * data;
    int64_t      stride; // bytes
    int32_t      n_rows;
    int32_t      k;

    int32_t at(int32_t row, int32_t rank) const {
        return *reinterpret_cast<const int32_t *>(data + row * stride + static_cast<int64_t>(rank) * static_cast<int64_t>(sizeof(int32_t)));
    }
};

// How many of the op's last rows seed n_slots slots; see FATE_SEED_PAIRS. Never fewer than min(n_rows, n_slots / k).
int32_t fate_seed_rows(const fate_ids & ids, int32_t n_experts, int32_t n_slots);

// Invariant 3: the slot of the first fault, n_slots if only counts disagree, -1 if there is none.
int32_t fate_first_inconsistent_slot(const std::vector<int32_t> & slot_of, const std::vector<int32_t> & expert_of);

class fate_layer {
public:
    fate_layer(int32_t n_experts, int32_t k, int32_t n_slots, int64_t expert_bytes);

    // A call of the pool path: rows x k <= n_slots. Writes slots[n_rows][k] and hits[n_rows][k].
    void resolve(const fate_ids & ids, bool callback, fate_layer_io & io, int32_t * slots, uint8_t * hits);

    // Brings in, before the step of one token, what chance[n_experts] makes likely; most: of fate_prefetch_most(), in all calls for one step.
    void prefetch(const float * chance, float threshold, int32_t most, fate_layer_io & io);

    // A call of the bypass path: counts, notes the uses, keeps the rows that seed() admits from.
    void bypass(const fate_ids & ids);
    // Admits what bypass() kept, oldest row first.
    void seed(bool callback, fate_layer_io & io);

    void begin_step();
    // behind: the scores' maker has not seen the step at hand, so that its uses have the bonus.
    void publish(const float * scores, float bonus, bool behind);
    void forget_scores(); // back to LRU
    void reset();         // cold, counters at zero

    // Invariant 3; the position of the first fault or -1.
    int32_t first_inconsistent_slot() const;

    const fate_table & table() const { return table_; }

    const std::vector<int64_t> & counters() const { return counters_; }

    int32_t k() const { return k_; }

private:
    fate_layer(const fate_layer &)             = delete;
    fate_layer & operator=(const fate_layer &) = delete;

    void need(const fate_ids & ids);
    // Victims for the missing experts that find no free slot, in order.
    void choose(bool callback, fate_layer_io & io);
    bool valid_answer() const;
    void admit(int32_t expert, fate_layer_io & io);
    void put(int32_t expert, int32_t slot, fate_layer_io & io);
    void release_needed();
    void forget_ahead();

    int32_t k_;
    int64_t expert_bytes_;

    std::vector<int32_t> slot_of_;
    std::vector<int32_t> expert_of_;
    std::vector<int64_t> last_use_;
    std::vector<float>   score_;
    fate_table           table_;
    int64_t              began_; // clock at the beginning of the step

    std::vector<int64_t> counters_;
    std::vector<uint8_t> is_waiting_; // prefetched and not used yet
    std::vector<int32_t> ahead_;      // prefetched for the step at hand
    std::vector<uint8_t> is_ahead_;
    std::vector<int32_t> seed_ids_;   // rows kept by bypass()
    int32_t              n_seed_rows_ = 0;

    // scratch of one op
    std::vector<uint8_t> is_needed_;
    std::vector<int32_t> needed_;
    std::vector<int32_t> missing_;
    std::vector<int32_t> answer_;
    size_t               n_answered_ = 0;
    int32_t              n_free_     = 0;
};
