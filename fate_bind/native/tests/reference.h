// The rule told again, slowly and with other containers, to hold layer.cpp against.
#pragma once

#include "layer.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

// How many last rows seed: every number is tried.
inline int32_t reference_seed_rows(const std::vector<std::vector<int32_t>> & rows, int32_t k, int32_t n_slots) {
    for (int32_t n = static_cast<int32_t>(rows.size());; --n) {
        std::set<int32_t> used;
        for (auto row = rows.end() - n; row != rows.end(); ++row) {
            used.insert(row->begin(), row->end());
        }
        if (static_cast<int32_t>(used.size()) <= n_slots && (n * k <= FATE_SEED_PAIRS || n * k <= n_slots)) {
            return n;
        }
    }
}

struct reference_layer {
    int32_t                    n_experts, k, n_slots;
    std::map<int32_t, int32_t> slot_of; // expert -> slot
    std::vector<int64_t>       last_use;
    std::vector<float>         score;
    float                      bonus        = 0;
    int64_t                    clock        = 0;
    int64_t                    published_at = 0;
    int64_t                    hits = 0, misses = 0, bypassed = 0, fills = 0, seed_fills = 0, evictions = 0;
    std::set<int32_t>          ahead;   // prefetched for the step at hand
    std::set<int32_t>          waiting; // prefetched and not used yet
    int64_t                    prefetches = 0, useful = 0, wasted = 0;

    reference_layer(int32_t n_experts, int32_t k, int32_t n_slots) :
        n_experts(n_experts),
        k(k),
        n_slots(n_slots),
        last_use(n_experts),
        score(n_experts) {}

    // The slots of what comes in, by expert, in the order in which it comes. Several times a step; most: in all.
    std::vector<std::pair<int32_t, int32_t>> prefetch(const std::vector<float> & chance, float threshold, int32_t most) {
        std::vector<int32_t> likely;
        for (int32_t e = 0; e < n_experts; ++e) {
            if (!(chance[e] < threshold)) {
                likely.push_back(e);
            }
        }
        std::set<int32_t> stays(likely.begin(), likely.end());
        stays.insert(ahead.begin(), ahead.end()); // of earlier plans for this step
        most -= static_cast<int32_t>(ahead.size());
        std::stable_sort(likely.begin(), likely.end(), [&](int32_t a, int32_t b) { return chance[a] > chance[b]; });
        std::vector<std::pair<int32_t, int32_t>> came;
        for (const int32_t expert : likely) {
            const bool is_room =
                static_cast<int32_t>(slot_of.size()) < n_slots ||
                std::any_of(slot_of.begin(), slot_of.end(), [&](const auto & resident) { return !stays.count(resident.first); });
            if (slot_of.count(expert) || static_cast<int32_t>(came.size()) >= most || !is_room) {
                continue;
            }
            came.emplace_back(expert, admit(expert, stays));
            ahead.insert(expert);
            waiting.insert(expert);
            ++prefetches;
        }
        return came;
    }

    int32_t admit(int32_t expert, const std::set<int32_t> & needed) {
        std::set<int32_t> taken;
        for (const auto & [e, s] : slot_of) {
            taken.insert(s);
        }
        int32_t slot = 0;
        while (taken.count(slot)) {
            ++slot;
        }
        if (slot >= n_slots) {
            std::vector<int32_t> candidates;
            for (const auto & [e, s] : slot_of) {
                if (!needed.count(e)) {
                    candidates.push_back(e);
                }
            }
            std::sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) {
                const float key_a = score[a] + (last_use[a] > published_at ? bonus : 0.0f);
                const float key_b = score[b] + (last_use[b] > published_at ? bonus : 0.0f);
                return key_a != key_b ? key_a < key_b : last_use[a] != last_use[b] ? last_use[a] < last_use[b] : a < b;
            });
            slot = slot_of.at(candidates.front());
            slot_of.erase(candidates.front());
            ++evictions;
            wasted += static_cast<int64_t>(waiting.erase(candidates.front()));
        }
        slot_of[expert] = slot;
        ++fills;
        return slot;
    }

    std::vector<int32_t> step(const std::vector<std::vector<int32_t>> & rows) {
        std::vector<int32_t>    slots;
        std::set<int32_t>       needed;
        const std::set<int32_t> ahead = std::move(this->ahead);
        this->ahead.clear();
        if (static_cast<int32_t>(rows.size()) * k <= n_slots) {
            for (const auto & row : rows) {
                needed.insert(row.begin(), row.end());
            }
            needed.insert(ahead.begin(), ahead.end());
            for (const auto & row : rows) {
                std::vector<int32_t> row_slots(k);
                for (int32_t rank = k - 1; rank >= 0; --rank) {
                    const bool hit = slot_of.count(row[rank]) > 0;
                    hit ? ++hits : ++misses;
                    useful += static_cast<int64_t>(waiting.erase(row[rank]));
                    row_slots[rank]     = hit ? slot_of[row[rank]] : admit(row[rank], needed);
                    last_use[row[rank]] = ++clock;
                }
                slots.insert(slots.end(), row_slots.begin(), row_slots.end());
            }
            return slots;
        }
        for (const auto & row : rows) {
            for (int32_t rank = k - 1; rank >= 0; --rank) {
                last_use[row[rank]] = ++clock;
                ++bypassed;
            }
        }
        const size_t n_seed = reference_seed_rows(rows, k, n_slots);
        for (size_t i = rows.size() - n_seed; i < rows.size(); ++i) {
            needed.insert(rows[i].begin(), rows[i].end());
        }
        for (size_t i = rows.size() - n_seed; i < rows.size(); ++i) {
            for (int32_t rank = k - 1; rank >= 0; --rank) {
                if (!slot_of.count(rows[i][rank])) {
                    admit(rows[i][rank], needed);
                    ++seed_fills;
                }
            }
        }
        return slots;
    }
};
