// The decision rule and a layer's walk: known cases, then random steps against the reference. A seed as argument.
#include "check.h"
#include "layer.h"
#include "reference.h"

#include <cstdlib>
#include <random>

// Plays the pool: what lies in each slot, by the fills it saw.
struct fake_io : fate_layer_io {
    std::map<int32_t, int32_t> expert_in; // slot -> expert
    std::vector<int32_t>       victims;   // the answer of ask(), if not empty
    int                        n_asked    = 0;
    int                        n_rejected = 0;

    bool ask(const std::vector<int32_t> &, const std::vector<int32_t> &, const int64_t *, int32_t n, int32_t * out) override {
        ++n_asked;
        for (int32_t i = 0; i < n && i < static_cast<int32_t>(victims.size()); ++i) {
            out[i] = victims[i];
        }
        return true;
    }

    void reject() override { ++n_rejected; }

    void evict(int32_t expert) override {
        for (auto it = expert_in.begin(); it != expert_in.end(); ++it) {
            if (it->second == expert) {
                expert_in.erase(it);
                return;
            }
        }
        CHECK(!"evicted an expert that was not there");
    }

    void fill(int32_t expert, int32_t slot) override {
        CHECK(expert_in.count(slot) == 0);
        expert_in[slot] = expert;
    }
};

// ids of rows, strided.
struct strided_rows {
    std::vector<int32_t> flat;
    fate_ids             ids;

    strided_rows(const std::vector<std::vector<int32_t>> & rows, int32_t k) {
        for (const auto & row : rows) {
            flat.insert(flat.end(), row.begin(), row.end());
            flat.push_back(-7);
        }
        ids = { reinterpret_cast<const char *>(flat.data()), static_cast<int64_t>((k + 1) * sizeof(int32_t)),
                static_cast<int32_t>(rows.size()), k };
    }
};

// Resolves rows and checks that every slot holds its expert.
static std::vector<int32_t> resolve(fate_layer & layer, fake_io & io, const std::vector<std::vector<int32_t>> & rows,
                                    bool callback = false) {
    const int32_t        k = layer.k();
    const strided_rows   given(rows, k);
    const fate_ids &     ids = given.ids;
    std::vector<int32_t> slots;
    if (ids.n_rows * k <= layer.table().n_slots) {
        slots.resize(rows.size() * k);
        std::vector<uint8_t> hits(slots.size());
        layer.resolve(ids, callback, io, slots.data(), hits.data());
        for (size_t row = 0; row < rows.size(); ++row) {
            for (int32_t rank = 0; rank < k; ++rank) {
                CHECK(io.expert_in.at(slots[row * k + rank]) == rows[row][rank]);
            }
        }
    } else {
        layer.bypass(ids);
        layer.seed(callback, io);
    }
    CHECK(layer.first_inconsistent_slot() == -1);
    return slots;
}

static void test_worst_rank_is_the_older_use() {
    fate_layer layer(8, 2, 3, 10);
    fake_io    io;
    resolve(layer, io,
            {
                { 0, 1 }
    }); // 1 is used before 0
    resolve(layer, io,
            {
                { 2, 0 }
    });
    resolve(layer, io,
            {
                { 3, 2 }
    }); // evicts 1
    CHECK(layer.table().slot_of[1] == -1);
    CHECK(layer.table().slot_of[0] >= 0);
    CHECK(layer.counters()[FATE_COUNTER_EVICTIONS] == 1);
}

static void test_used_experts_are_no_victims() {
    fate_layer         layer(8, 2, 2, 10);
    fake_io            io;
    std::vector<float> scores(8, 0.0f);
    resolve(layer, io,
            {
                { 0, 1 }
    });
    scores[0] = -5.0f; // the lowest score, but in use below
    layer.publish(scores.data(), 0.0f, false);
    resolve(layer, io,
            {
                { 0, 2 }
    });
    CHECK(layer.table().slot_of[0] >= 0);
    CHECK(layer.table().slot_of[1] == -1);
}

static void test_bonus_only_after_publication() {
    fate_layer         layer(8, 1, 2, 10);
    fake_io            io;
    std::vector<float> scores(8, 0.0f);
    resolve(layer, io, { { 0 } });
    resolve(layer, io, { { 1 } });
    scores[0] = 0.5f;
    layer.publish(scores.data(), 1.0f, false);
    resolve(layer, io, { { 1 } }); // 1: 0 + bonus, 0: 0.5
    resolve(layer, io, { { 2 } });
    CHECK(layer.table().slot_of[0] == -1);
    CHECK(layer.table().slot_of[1] >= 0);
}

static void test_scores_that_have_not_seen_the_step_give_its_uses_the_bonus() {
    for (const bool behind : { false, true }) {
        fate_layer         layer(8, 1, 2, 10);
        fake_io            io;
        std::vector<float> scores(8, 0.0f);
        scores[0] = 0.5f;
        resolve(layer, io, { { 0 } });
        layer.begin_step();
        resolve(layer, io, { { 1 } });
        layer.publish(scores.data(), 1.0f, behind);
        resolve(layer, io, { { 2 } });
        CHECK((layer.table().slot_of[1] >= 0) == behind); // 1: 0, or 0 + bonus; 0: 0.5
        CHECK((layer.table().slot_of[0] >= 0) != behind);
    }
}

static void test_repeated_expert_of_a_batch_is_a_miss_once() {
    fate_layer layer(8, 2, 6, 10);
    fake_io    io;
    resolve(layer, io,
            {
                { 0, 1 },
                { 0, 2 },
                { 1, 0 }
    });
    CHECK(layer.counters()[FATE_COUNTER_MISSES] == 3);
    CHECK(layer.counters()[FATE_COUNTER_HITS] == 3);
    CHECK(layer.counters()[FATE_COUNTER_ROWS] == 3);
    CHECK(layer.counters()[FATE_COUNTER_ROWS_ALL_RESIDENT] == 1);
    CHECK(layer.counters()[FATE_COUNTER_BYTES] == 30);
}

static void test_answers_are_checked_again() {
    for (const std::vector<int32_t> & answer : { std::vector<int32_t>{ 3 }, { -1 }, { 99 }, { 5 } }) { // needed, nonsense, nonsense, absent
        fate_layer layer(8, 2, 2, 10);
        fake_io    io;
        resolve(layer, io,
                {
                    { 0, 3 }
        });
        io.victims = answer;
        resolve(layer, io,
                {
                    { 1, 3 }
        },
                true);
        CHECK(io.n_asked == 1);
        CHECK(io.n_rejected == 1);
        CHECK(layer.table().slot_of[0] == -1);
    }
    fate_layer layer(8, 3, 3, 10);
    fake_io    io;
    resolve(layer, io,
            {
                { 0, 1, 2 }
    });
    io.victims = { 1, 1 }; // twice the same
    resolve(layer, io,
            {
                { 3, 4, 2 }
    },
            true);
    CHECK(io.n_rejected == 1);
}

static void test_good_answers_are_taken() {
    fate_layer layer(8, 2, 3, 10);
    fake_io    io;
    resolve(layer, io,
            {
                { 0, 1 }
    });
    resolve(layer, io,
            {
                { 2, 1 }
    });
    io.victims = { 2 }; // the rule would take 0
    resolve(layer, io,
            {
                { 3, 1 }
    },
            true);
    CHECK(io.n_rejected == 0);
    CHECK(layer.table().slot_of[2] == -1);
    CHECK(layer.table().slot_of[0] >= 0);
}

static std::vector<std::vector<int32_t>> random_rows(std::mt19937 & random, size_t n, int32_t k, int32_t n_experts) {
    const int32_t                     some = k + static_cast<int32_t>(random() % (n_experts - k + 1)); // few: rows repeat experts
    std::vector<std::vector<int32_t>> rows(n);
    for (auto & row : rows) {
        for (int32_t i = 0; i < k; ++i) {
            int32_t expert = static_cast<int32_t>(random() % some);
            while (random() % 50 != 0 && std::count(row.begin(), row.end(), expert)) { // rarely twice in a row, as grovemoe does
                expert = static_cast<int32_t>(random() % some);
            }
            row.push_back(expert);
        }
    }
    return rows;
}

static void test_as_many_rows_seed_as_fit(uint32_t seed) {
    const std::vector<std::vector<int32_t>> known = {
        { 4, 5 },
        { 0, 1 },
        { 2, 1 },
        { 1, 0 }
    };
    const int32_t n_rows_of[] = { 1, 3, 3, 4 };
    for (int32_t n_slots = 2; n_slots <= 5; ++n_slots) {
        CHECK(fate_seed_rows(strided_rows(known, 2).ids, 6, n_slots) == n_rows_of[n_slots - 2]);
    }
    const std::vector<std::vector<int32_t>> same(500, { 1, 0, 2 });
    CHECK(fate_seed_rows(strided_rows(same, 3).ids, 1500, 3) == 341); // 341 x 3 <= FATE_SEED_PAIRS
    CHECK(fate_seed_rows(strided_rows(same, 3).ids, 1500, 1200) == 400);

    std::mt19937 random(seed);
    int          n_more = 0;
    for (int round = 0; round < 300; ++round) {
        const int32_t n_experts = 2 + static_cast<int32_t>(random() % (round % 10 ? 30 : 1500));
        const int32_t k         = 1 + static_cast<int32_t>(random() % std::min(n_experts, 6));
        const int32_t n_slots   = k + static_cast<int32_t>(random() % (n_experts - k + 1));
        const auto    rows      = random_rows(random, random() % (round % 5 ? 30 : 400), k, n_experts);
        const int32_t n         = fate_seed_rows(strided_rows(rows, k).ids, n_experts, n_slots);
        const int32_t n_fit     = std::min(static_cast<int32_t>(rows.size()), n_slots / k);
        CHECK(n == reference_seed_rows(rows, k, n_slots));
        CHECK(n >= n_fit);
        n_more += n > n_fit;
    }
    CHECK(n_more > 100);
}

static void test_the_likeliest_come_in_ahead() {
    fate_layer layer(8, 1, 4, 10);
    fake_io    io;
    for (const int32_t expert : { 0, 1, 2 }) {
        resolve(layer, io, { { expert } });
    }
    const std::vector<float> chance = { 0.0f, 0.9f, 0.0f, 0.7f, 0.8f, 0.8f, 0.4f, 0.0f };
    std::vector<uint8_t>     is_ahead(8);
    fate_prefetch            plan[FATE_PREFETCH_MAX];
    CHECK(fate_prefetch_plan(layer.table(), chance.data(), is_ahead.data(), 0.5f, 8, plan) == 3);
    CHECK(plan[0].expert == 4 && plan[0].slot == 3 && plan[0].victim == -1); // free
    CHECK(plan[1].expert == 5 && plan[1].slot == 0 && plan[1].victim == 0);  // equal chances by id; the oldest goes
    CHECK(plan[2].expert == 3 && plan[2].slot == 2 && plan[2].victim == 2);  // 1 is as likely: it stays
    CHECK(layer.table().slot_of[4] == -1);                                   // a plan changes nothing
    layer.begin_step();
    layer.prefetch(chance.data(), 0.5f, 3, io);
    for (int32_t i = 0; i < 3; ++i) {
        CHECK(io.expert_in.at(plan[i].slot) == plan[i].expert);
    }
    CHECK(layer.first_inconsistent_slot() == -1);
    CHECK(layer.counters()[FATE_COUNTER_PREFETCHES] == 3);
    CHECK(layer.counters()[FATE_COUNTER_FILLS] == 6);
    CHECK(layer.counters()[FATE_COUNTER_EVICTIONS] == 2);
    CHECK(layer.counters()[FATE_COUNTER_BYTES] == 60);
}

// 3 and 4 were never used, so that they would be the first to go.
static void test_what_came_in_for_a_token_stays_for_that_token() {
    fate_layer layer(8, 1, 3, 10);
    fake_io    io;
    resolve(layer, io, { { 0 } });
    const std::vector<float> chance = { 0.0f, 0.0f, 0.0f, 1.0f, 1.0f, 0.0f, 0.0f, 0.0f };
    layer.begin_step();
    layer.prefetch(chance.data(), 0.5f, 2, io);
    resolve(layer, io, { { 1 } });
    CHECK(layer.table().slot_of[0] == -1);
    CHECK(layer.table().slot_of[3] >= 0 && layer.table().slot_of[4] >= 0);
    layer.begin_step();
    resolve(layer, io, { { 4 } }); // useful
    resolve(layer, io, { { 2 } }); // for 3, which is wasted
    CHECK(layer.table().slot_of[3] == -1);
    CHECK(layer.counters()[FATE_COUNTER_PREFETCHES] == 2);
    CHECK(layer.counters()[FATE_COUNTER_PREFETCH_USEFUL] == 1);
    CHECK(layer.counters()[FATE_COUNTER_PREFETCH_WASTED] == 1);
    layer.reset();
    CHECK(layer.counters()[FATE_COUNTER_PREFETCHES] == 0);
}

static void test_a_later_plan_adds_to_an_earlier_one() {
    fate_layer layer(8, 1, 4, 10);
    fake_io    io;
    for (const int32_t expert : { 0, 1, 2, 3 }) {
        resolve(layer, io, { { expert } });
    }
    layer.begin_step();
    const std::vector<float> first  = { 0.0f, 0.0f, 0.0f, 0.0f, 0.9f, 0.0f, 0.0f, 0.0f };
    const std::vector<float> second = { 0.9f, 0.0f, 0.0f, 0.0f, 0.0f, 0.8f, 0.7f, 0.0f };
    layer.prefetch(first.data(), 0.5f, 3, io);
    CHECK(layer.table().slot_of[4] == 0 && layer.table().slot_of[0] == -1); // the oldest went
    layer.prefetch(second.data(), 0.5f, 3, io);
    CHECK(layer.table().slot_of[4] == 0);                                   // no longer likely, but on its way
    CHECK(layer.table().slot_of[0] == 1 && layer.table().slot_of[5] == 2);  // what went comes again, elsewhere
    CHECK(layer.table().slot_of[6] == -1);                                  // three in all
    CHECK(layer.counters()[FATE_COUNTER_PREFETCHES] == 3);
    resolve(layer, io, { { 7 } });
    CHECK(layer.table().slot_of[7] == 3); // the only one that was not brought for this step
    CHECK(layer.first_inconsistent_slot() == -1);
}

static void test_the_tokens_own_experts_find_room() {
    CHECK(fate_prefetch_most(8, 4, 4) == 0);
    CHECK(fate_prefetch_most(8, 3, 4) == 0);
    CHECK(fate_prefetch_most(8, 5, 4) == 1);
    CHECK(fate_prefetch_most(8, 64, 4) == 8);
    CHECK(fate_prefetch_most(99, 64, 4) == FATE_PREFETCH_MAX);
}

static void test_random_steps(uint32_t seed) {
    std::mt19937 random(seed);
    int64_t      n_useful = 0, n_wasted = 0;
    for (int round = 0; round < 200; ++round) {
        const int32_t   n_experts = 2 + static_cast<int32_t>(random() % 30);
        const int32_t   k         = 1 + static_cast<int32_t>(random() % std::min(n_experts, 6));
        const int32_t   few       = static_cast<int32_t>(random() % 4); // 0, 1: so many slots beyond k
        const int32_t   n_slots   = std::min(n_experts, k + (few < 2 ? few : static_cast<int32_t>(random() % (n_experts - k + 1))));
        fate_layer      layer(n_experts, k, n_slots, 1);
        reference_layer expected(n_experts, k, n_slots);
        fake_io         io;
        for (int step = 0; step < 40; ++step) {
            const size_t  n_rows = 1 + (random() % 4 == 0 ? random() % (random() % 4 == 0 ? 40 : 9) : 0);
            const auto    rows   = random_rows(random, n_rows, k, n_experts);
            const int64_t began  = expected.clock;
            layer.begin_step();
            if (n_rows == 1 && random() % 2) {
                const float   threshold = random() % 8 ? 0.75f : 0.0f;
                const int32_t most      = fate_prefetch_most(1 + static_cast<int32_t>(random() % 20), n_slots, k);
                for (uint32_t n_plans = 1 + random() % 3; n_plans > 0; --n_plans) {
                    std::vector<float> chance(n_experts);
                    for (float & c : chance) {
                        c = static_cast<float>(random() % 5) / 4.0f; // ties matter
                    }
                    layer.prefetch(chance.data(), threshold, most, io);
                    for (const auto & [expert, slot] : expected.prefetch(chance, threshold, most)) {
                        CHECK(layer.table().slot_of[expert] == slot);
                        CHECK(io.expert_in.at(slot) == expert);
                    }
                    CHECK(layer.first_inconsistent_slot() == -1);
                }
                CHECK(layer.counters()[FATE_COUNTER_PREFETCHES] == expected.prefetches);
            }
            CHECK(resolve(layer, io, rows) == expected.step(rows));
            if (random() % 3 == 0) {
                const bool behind = random() % 2;
                for (float & score : expected.score) {
                    score = static_cast<float>(random() % 4); // ties matter
                }
                expected.bonus        = static_cast<float>(random() % 3);
                expected.published_at = behind ? began : expected.clock;
                layer.publish(expected.score.data(), expected.bonus, behind);
            }
        }
        const auto & counters = layer.counters();
        CHECK(counters[FATE_COUNTER_HITS] == expected.hits);
        CHECK(counters[FATE_COUNTER_MISSES] == expected.misses);
        CHECK(counters[FATE_COUNTER_BYPASSED] == expected.bypassed);
        CHECK(counters[FATE_COUNTER_FILLS] == expected.fills);
        CHECK(counters[FATE_COUNTER_SEED_FILLS] == expected.seed_fills);
        CHECK(counters[FATE_COUNTER_EVICTIONS] == expected.evictions);
        CHECK(counters[FATE_COUNTER_PREFETCH_USEFUL] == expected.useful);
        CHECK(counters[FATE_COUNTER_PREFETCH_WASTED] == expected.wasted);
        CHECK(counters[FATE_COUNTER_PREFETCH_LATE] == 0);
        CHECK(counters[FATE_COUNTER_PREFETCHES] == expected.useful + expected.wasted + static_cast<int64_t>(expected.waiting.size()));
        CHECK(counters[FATE_COUNTER_FILLS] ==
              counters[FATE_COUNTER_MISSES] + counters[FATE_COUNTER_SEED_FILLS] + counters[FATE_COUNTER_PREFETCHES]);
        CHECK(n_slots > k || counters[FATE_COUNTER_PREFETCHES] == 0);
        n_useful += expected.useful;
        n_wasted += expected.wasted;
        CHECK(counters[FATE_COUNTER_ROUTED] ==
              counters[FATE_COUNTER_HITS] + counters[FATE_COUNTER_MISSES] + counters[FATE_COUNTER_BYPASSED]);
    }
    CHECK(n_useful > 100);
    CHECK(n_wasted > 100);
}

int main(int argc, char ** argv) {
    test_worst_rank_is_the_older_use();
    test_used_experts_are_no_victims();
    test_bonus_only_after_publication();
    test_scores_that_have_not_seen_the_step_give_its_uses_the_bonus();
    test_repeated_expert_of_a_batch_is_a_miss_once();
    test_answers_are_checked_again();
    test_good_answers_are_taken();
    test_the_likeliest_come_in_ahead();
    test_what_came_in_for_a_token_stays_for_that_token();
    test_a_later_plan_adds_to_an_earlier_one();
    test_the_tokens_own_experts_find_room();
    const uint32_t seed = argc > 1 ? static_cast<uint32_t>(atoi(argv[1])) : 1;
    test_as_many_rows_seed_as_fit(seed);
    test_random_steps(seed);
    return check_result("test-layer");
}
