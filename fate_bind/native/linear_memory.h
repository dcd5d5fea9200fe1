// What a linear model of routing remembers: sums by token and by pair of tokens, places of contexts, sequences. Memory is taken once.
#pragma once

#include "linear_math.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

// An array of n zeros, whose pages are all there: to get one at a token that needs it costs as much as the rest of the token.
template <typename T> class fate_array {
public:
    explicit fate_array(size_t n) : numbers_(new T[n]()) {}

    T &       operator[](size_t i) { return numbers_[i]; }
    const T & operator[](size_t i) const { return numbers_[i]; }

private:
    std::unique_ptr<T[]> numbers_;
};

// Sums of rows of numbers for each key, at (0) and after (1) its occurrences. Sums are halves and are halved at FATE_LINEAR_MAX_COUNT occurrences, so that they
// stay exact.
class fate_linear_rows {
public:
    fate_linear_rows(int32_t n_columns, int32_t capacity) :
        n_columns_(n_columns),
        capacity_(capacity),
        mask_(buckets(capacity) - 1),
        sums_(2 * static_cast<size_t>(capacity) * n_columns),
        n_(2 * static_cast<size_t>(capacity)),
        keys_(capacity),
        newer_(static_cast<size_t>(capacity) + 1),
        older_(static_cast<size_t>(capacity) + 1),
        next_(capacity),
        first_(mask_ + 1) {
        clear();
    }

    void clear() {
        n_rows_           = 0;
        newer_[capacity_] = older_[capacity_] = capacity_;
        std::fill(first_.begin(), first_.end(), -1);
    }

    static int64_t pair_key(int32_t before, int32_t token) {
        return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(before)) << 32 | static_cast<uint32_t>(token));
    }

    // The row of a key, -1 if there is none.
    int32_t get(int64_t key) const {
        int32_t row = first_[bucket(key)];
        while (row >= 0 && keys_[row] != key) {
            row = next_[row];
        }
        return row;
    }

    uint16_t *       sums(int32_t row, int32_t when) { return &sums_[(2 * static_cast<size_t>(row) + when) * n_columns_]; }
    const uint16_t * sums(int32_t row, int32_t when) const { return &sums_[(2 * static_cast<size_t>(row) + when) * n_columns_]; }
    float &          n(int32_t row, int32_t when) { return n_[2 * static_cast<size_t>(row) + when]; }
    float            n(int32_t row, int32_t when) const { return n_[2 * static_cast<size_t>(row) + when]; }

    // The row of a key that occurs, which makes it the most recent; of a key that is new the least recent makes room.
    int32_t occur(int64_t key) {
        const int32_t row = get(key);
        if (row < 0) {
            return make(key);
        }
        unlink(row);
        link(row);
        return row;
    }

    // The row that makes room if a key occurs, -1: none does.
    int32_t dropped_by(int64_t key) const { return n_rows_ < capacity_ || get(key) >= 0 ? -1 : newer_[capacity_]; }

    // A row of zeros for a key that has none.
    int32_t make(int64_t key) {
        int32_t row = n_rows_;
        if (n_rows_ < capacity_) {
            ++n_rows_;
        } else {
            row = newer_[capacity_];
            unlink(row);
            int32_t * at = &first_[bucket(keys_[row])];
            while (*at != row) {
                at = &next_[*at];
            }
            *at = next_[row];
        }
        memset(sums(row, 0), 0, 2 * static_cast<size_t>(n_columns_) * sizeof(uint16_t));
        n(row, 0) = n(row, 1) = 0.0f;
        keys_[row]            = key;
        int32_t & first       = first_[bucket(key)];
        next_[row]            = first;
        first                 = row;
        link(row);
        return row;
    }

    void count(int32_t row, int32_t when, float weight) {
        n(row, when) += weight;
        if (n(row, when) >= FATE_LINEAR_MAX_COUNT) {
            uint16_t * row_sums = sums(row, when);
            for (int32_t i = 0; i < n_columns_; ++i) {
                row_sums[i] = fate_to_half(fate_of_half(row_sums[i]) * 0.5f);
            }
            n(row, when) *= 0.5f;
        }
    }

private:
    static size_t buckets(int32_t capacity) {
        size_t n = 16;
        while (n < 2 * static_cast<size_t>(capacity)) {
            n *= 2;
        }
        return n;
    }

    size_t bucket(int64_t key) const { return (static_cast<uint64_t>(key) * 0x9e3779b97f4a7c15u >> 24) & mask_; }

    void unlink(int32_t row) {
        newer_[older_[row]] = newer_[row];
        older_[newer_[row]] = older_[row];
    }

    void link(int32_t row) { // as the most recent
        older_[row]               = older_[capacity_];
        newer_[row]               = capacity_;
        newer_[older_[capacity_]] = row;
        older_[capacity_]         = row;
    }

    int32_t              n_columns_;
    int32_t              capacity_;
    size_t               mask_;
    int32_t              n_rows_ = 0;
    fate_array<uint16_t> sums_;  // [capacity][2][n_columns]
    fate_array<float>    n_;     // [capacity][2]
    fate_array<int64_t>  keys_;
    std::vector<int32_t> newer_; // by age, a ring whose last place stands for both ends
    std::vector<int32_t> older_;
    std::vector<int32_t> next_;  // of the same bucket
    std::vector<int32_t> first_;
};

// Where contexts were last seen, by their hash, which is Python's for the same tuple: in a full bucket, where the oldest makes room, both lose the same ones.
class fate_linear_contexts {
public:
    explicit fate_linear_contexts(int32_t n_positions) : entries_(static_cast<size_t>(n_positions < 2 ? 1 : n_positions / 2) * WAYS) {}

    void clear() { std::fill(entries_.begin(), entries_.end(), entry()); }

    static int64_t hash(const int32_t * tokens, int32_t n) {
        uint64_t sum = 2870177450012600261u;
        for (int32_t i = 0; i < n; ++i) {
            sum += static_cast<uint64_t>(static_cast<int64_t>(tokens[i])) * 14029467366897019727u;
            sum = (sum << 31 | sum >> 33) * 11400714785074694791u;
        }
        sum += static_cast<uint64_t>(n) ^ (2870177450012600261u ^ 3527539u);
        return sum == UINT64_MAX ? 1546275796 : static_cast<int64_t>(sum);
    }

    // The position, -1 if there is none.
    int64_t get(int64_t hash) const {
        const entry * bucket = &entries_[first(hash)];
        for (int32_t way = 0; way < WAYS; ++way) {
            if (bucket[way].hash == hash) {
                return bucket[way].position;
            }
        }
        return -1;
    }

    void put(int64_t hash, int64_t position) {
        entry * bucket = &entries_[first(hash)];
        entry * to     = bucket;
        for (entry * at = bucket; at < bucket + WAYS; ++at) {
            if (at->hash == hash) {
                to = at;
                break;
            }
            to = at->position < to->position ? at : to;
        }
        *to = { hash, position };
    }

private:
    static const int32_t WAYS = 4;

    struct entry {
        int64_t hash     = 0;
        int64_t position = -1;
    };

    size_t first(int64_t hash) const {
        const int64_t n      = static_cast<int64_t>(entries_.size()) / WAYS;
        const int64_t bucket = hash % n;
        return static_cast<size_t>(bucket < 0 ? bucket + n : bucket) * WAYS;
    }

    std::vector<entry> entries_;
};

// What is known of the newest tokens of a sequence.
struct fate_linear_sequence {
    struct occurrence {
        int32_t token;
        int32_t before; // the token before it
        int64_t position;
    };

    int32_t    id                             = 0;
    int64_t    seen_at                        = -1; // 0 and up; the least recent sequence makes room
    int32_t    n_tokens                       = 0;
    int32_t    tokens[FATE_LINEAR_MOST_GRAM]  = {}; // oldest first
    int64_t    last                           = -1; // position of the newest, -1: none was learned
    int32_t    n_pending                      = 0;
    occurrence pending[FATE_LINEAR_LATER + 1] = {}; // oldest first, of which the tokens after are not all seen
};
