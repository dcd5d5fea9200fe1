// The linear model of routing with made-up numbers: its loops against plain ones, its memory, and what it may read and change. That it says what Python says is
// tested from there.
#include "check.h"
#include "linear-fixture.h"

#include <cmath>

// Follows n tokens of several sequences, with repeats; returns all answers.
static std::vector<answer> follow(fate_linear & linear, const made_up & made, int32_t n, uint32_t seed, bool warms = false) {
    generator.seed(seed);
    std::vector<answer> answers;
    for (int32_t t = 0; t < n; ++t) {
        const made_token at = token_at(t, n);
        if (at.is_told) {
            linear.expect(at.token, at.sequence, at.position);
            answers.push_back(ask(linear));
        }
        if (warms) {
            linear.warm(t % 2 == 0);
        }
        linear.observe(route(made).data(), at.token, at.sequence);
    }
    return answers;
}

// Somebody else who evaluates what the model tells, expert by expert.
class evaluator {
public:
    answer evaluate(const fate_linear & linear, const fate_linear_told & told, const int32_t * ids) {
        const fate_linear_model & m    = linear.model();
        const fate_linear_head *  of[] = { &m.now, &m.keep };
        const int32_t             n    = linear.n_heads();
        answer                    got;
        if (told.rates) {
            rates_.assign(told.rates, told.rates + SIZE * FATE_LINEAR_RATES);
            age_.assign(told.age, told.age + SIZE);
        }
        for (int32_t l = 0; l < N_LAYERS; ++l) {
            std::vector<uint16_t> used;
            for (int32_t i = 0; i < told.n_used; ++i) {
                used.insert(used.end(), told.used[i] + l * MAX_K, told.used[i] + (l + 1) * MAX_K);
            }
            fate_linear_sight sight = {};
            sight.context           = told.context;
            sight.unit              = told.unit;
            sight.stride            = linear.fold().stride();
            sight.n_used            = told.n_used;
            sight.max_k             = MAX_K;
            sight.used              = used.data();
            for (int32_t i = 0; i < 4; ++i) {
                const uint16_t * sums    = told.sums[i / 2][i % 2];
                sight.n[i / 2][i % 2]    = told.n[i / 2][i % 2];
                sight.sums[i / 2][i % 2] = sums ? sums + l * MAX_EXPERTS : nullptr;
            }
            std::vector<float> weights[FATE_LINEAR_HEADS], repeats[FATE_LINEAR_HEADS];
            fate_linear_fitted heads[FATE_LINEAR_HEADS];
            for (int32_t h = 0; h < n; ++h) {
                const float * fitted = of[h]->weights + l * FATE_LINEAR_FEATURES;
                for (int32_t i = 0; i < FATE_LINEAR_FEATURES; ++i) {
                    weights[h].push_back(fate_weight(fitted, i, m.early_of, told.early));
                }
                for (int32_t i = 0; i < told.n_used; ++i) {
                    repeats[h].push_back(fate_repeat_value(fitted, told.level, i, m.soon, m.later));
                }
                const int32_t row = h * SIZE + l * MAX_EXPERTS;
                heads[h] = { weights[h].data(), repeats[h].data(), &linear.constant()[row], &linear.fold().numbers()[row * sight.stride],
                             &linear.fold().column_scale()[row] };
            }
            for (int32_t e = 0; e < MAX_EXPERTS; ++e) {
                const bool    is_used = std::find(ids + l * MAX_K, ids + (l + 1) * MAX_K, e) != ids + (l + 1) * MAX_K;
                const int32_t at      = l * MAX_EXPERTS + e;
                float         rates[FATE_LINEAR_RATES], score[FATE_LINEAR_HEADS];
                age_[at] = told.advances ? fate_next_age(age_[at], is_used) : age_[at];
                for (int32_t r = 0; r < FATE_LINEAR_RATES; ++r) {
                    float & rate = rates_[(l * FATE_LINEAR_RATES + r) * MAX_EXPERTS + e];
                    rate         = told.advances ? fate_next_rate(rate, m.rate_keep[r], is_used) : rate;
                    rates[r]     = rate;
                }
                n == 2 ? fate_linear_scores<2>(heads, sight, e, rates, age_[at], score) :
                         fate_linear_scores<1>(heads, sight, e, rates, age_[at], score);
                got.chances[at] = e < m.n_experts[l] ? fate_chance_of(score[0]) : 0.0f;
                got.scores[at]  = n == 2 ? score[1] : 0.0f;
            }
        }
        if (n == 2) {
            std::copy_n(m.keep.bonus, N_LAYERS, got.bonus.begin());
        }
        return got;
    }

    void forget() {
        std::fill(rates_.begin(), rates_.end(), 0.5f);
        std::fill(age_.begin(), age_.end(), 2.0f);
    }

private:
    std::vector<float> rates_, age_;
};

// What may come between single tokens that are told.
enum between { NOTHING, BATCHES, FAILURES, N_BETWEEN };

// The same run, each token a step of its own or, at times, three of them: what the model need not know for the telling it learns later.
static std::vector<answer> follow_told(fate_linear & linear, const made_up & made, int32_t n, uint32_t seed, between what,
                                       int32_t & n_advances) {
    generator.seed(seed);
    fate_linear_teller   teller;
    evaluator            evaluates;
    std::vector<answer>  answers;
    std::vector<int32_t> ids(N_LAYERS * MAX_K, -1); // of the step before
    bool                 was_one = false;
    for (int32_t t = 0; t < n; ++t) {
        const made_token at      = token_at(t, n);
        const bool       batched = what == BATCHES && t % 17 < 3; // which the evaluator learns nothing of
        if (what == FAILURES && t % 13 == 0) {
            teller.distrust();
            evaluates.forget();
        }
        if (at.is_told) {
            linear.expect(at.token, at.sequence, at.position);
            const fate_linear_told & told = teller.tell(linear, was_one);
            n_advances += told.advances;
            answers.push_back(evaluates.evaluate(linear, told, ids.data()));
            if (t % 7 == 0) { // again, before it has run
                CHECK(!teller.tell(linear, false).advances &&
                      answers.back() == evaluates.evaluate(linear, teller.tell(linear, false), ids.data()));
            }
        }
        if (t % 3 == 0) {
            linear.finish();
            linear.warm(true);
        }
        const std::vector<int32_t> routed = route(made);
        linear.step(made_step(routed, at).view(), /*defers =*/true);
        was_one = !batched;
        ids     = batched ? std::vector<int32_t>(routed.size(), 1) : routed;
    }
    return answers;
}

static void test_told() {
    made_up made;
    for (const int32_t capacity : { 2, 6, 60 }) { // rows that make room at once, now and then, never
        for (const bool has_scores : { true, false }) {
            for (int what = 0; what < N_BETWEEN; ++what) {
                const fate_linear_model model = made.model(capacity, has_scores);
                fate_linear             one(model), other(model);
                int32_t                 n_advances = 0;
                CHECK(follow(one, made, 900, 7) == follow_told(other, made, 900, 7, static_cast<between>(what), n_advances));
                CHECK(n_advances > 300 && n_advances < 700);
                one.expect(3, 1, 7);
                other.expect(3, 1, 7);
                CHECK(ask(one) == ask(other));
            }
        }
    }
}

// Returns what was said, which is the same for all.
static std::vector<float> test_loops(const fate_linear_math & math) {
    std::vector<float> said;
    generator.seed(1);
    const int32_t            n_rows = 45, n_columns = 11;
    const std::vector<float> left = numbers(n_rows * n_columns), right = numbers(n_rows * n_columns), vector = numbers(n_rows);
    fate_linear_matrix       matrix({ left.data(), right.data() }, n_rows, 2 * n_columns);
    std::vector<float>       products(2 * n_columns, 1.0f);
    matrix.add(math, vector.data(), products.data());
    for (int32_t j = 0; j < 2 * n_columns; ++j) {
        double sum = 1.0;
        for (int32_t i = 0; i < n_rows; ++i) {
            sum += static_cast<double>(vector[i]) * (j < n_columns ? left : right)[i * n_columns + j % n_columns];
        }
        CHECK(std::fabs(products[j] - sum) < 1e-3);
    }
    // the largest sums that there are
    const int32_t            n_most = 4096;
    const std::vector<float> alike(n_most, -1.0f), none(n_most, 0.0f);
    fate_linear_matrix       large({ alike.data() }, n_most, 1);
    std::vector<float>       sum(1);
    large.add(math, alike.data(), sum.data());
    CHECK(std::fabs(sum[0] - n_most) < 0.01f * n_most);
    large.add(math, none.data(), sum.data());
    CHECK(std::fabs(sum[0] - n_most) < 0.01f * n_most);
    said.insert(said.end(), products.begin(), products.end());
    // each feature by itself, against the formula
    const int32_t         n = 37;
    std::vector<float>    rates(FATE_LINEAR_RATES * n), age(n), scratch(3 * n), keep(FATE_LINEAR_RATES, 0.5f);
    std::vector<uint16_t> sums_of(n);
    for (int32_t e = 0; e < n; ++e) {
        age[e]     = 1.0f + 27.0f * e;
        sums_of[e] = fate_to_half(0.05f * e);
        for (int32_t h = 0; h < FATE_LINEAR_RATES; ++h) {
            rates[h * n + e] = e / 40.0f + 0.001f * h;
        }
    }
    for (int32_t feature = 0; feature < FATE_LINEAR_REPEAT; ++feature) {
        std::vector<float> weights(FATE_LINEAR_FEATURES), none(FATE_LINEAR_FEATURES), scores(n), others(n);
        weights[feature]        = 1.0f;
        fate_linear_layer layer = {};
        layer.n_experts         = n;
        layer.rates             = rates.data();
        layer.age               = age.data();
        layer.n_heads           = 2;
        layer.scratch           = scratch.data();
        layer.weights[0]        = weights.data();
        layer.weights[1]        = none.data();
        layer.scores[0]         = scores.data();
        layer.scores[1]         = others.data();
        layer.sums[0][0] = layer.sums[0][1] = layer.sums[1][1] = sums_of.data();
        layer.n[0][0] = layer.n[0][1] = layer.n[1][1] = 2.0f;
        math.score(layer);
        for (int32_t e = 0; e < n; ++e) {
            const double base = (rates[4 * n + e] + rates[6 * n + e]) / 2, sum = fate_of_half(sums_of[e]);
            const double now = (sum + 2 * base) / 4, pair = (sum + now) / 3, pair_later = (sum + 4 * base) / 6;
            double       right = 0;
            switch (feature) {
                case FATE_LINEAR_LOG_AGE:
                    right = std::log(age[e]);
                    break;
                case FATE_LINEAR_TOKEN_NOW:
                    right = std::log(now + 0.01) - std::log(1.01 - now);
                    break;
                case FATE_LINEAR_PAIR_NOW:
                    right = std::log(pair + 0.01) - std::log(1.01 - pair);
                    break;
                case FATE_LINEAR_TOKEN_LATER:
                    right = std::log(base + 0.01);
                    break;
                case FATE_LINEAR_PAIR_LATER:
                    right = std::log(pair_later + 0.01);
                    break;
                default:
                    right = rates[feature % FATE_LINEAR_RATES * n + e];
                    right = feature < FATE_LINEAR_LOG_RATE ? right : std::log(right + 0.02);
            }
            CHECK(std::fabs(scores[e] - right) < 3e-6 * (1 + std::fabs(right)));
            CHECK(others[e] == 0.0f);
        }
        said.insert(said.end(), scores.begin(), scores.end());
    }
    age[1] = FATE_LINEAR_MAX_AGE;
    math.decay(rates.data(), age.data(), keep.data(), 1, n);
    CHECK(rates[3] == 0.5f * (3 / 40.0f) && age[0] == 2.0f && age[1] == FATE_LINEAR_MAX_AGE);
    std::vector<float> odds, chances(2001);
    for (int32_t i = -1000; i <= 1000; ++i) {
        odds.push_back(0.2f * i);
    }
    math.chances(odds.data(), 2001, chances.data());
    for (int32_t i = 0; i < 2001; ++i) {
        CHECK(chances[i] >= 0 && chances[i] <= 1 && std::fabs(chances[i] - 1 / (1 + std::exp(-static_cast<double>(odds[i])))) < 1e-6);
    }
    said.insert(said.end(), chances.begin(), chances.end());
    return said;
}

static void test_halves() {
    int32_t n_wrong = 0;
    for (int32_t i = 0; i < 65536; ++i) {
        const uint16_t half  = static_cast<uint16_t>(i);
        const float    value = fate_of_half(half);
        n_wrong += std::isnan(value) ? !std::isnan(fate_of_half(fate_to_half(value))) : fate_to_half(value) != half;
        if (i % 0x8000 < 0x7bff) { // what lies between two neighbours goes to the nearer, in the middle to the even one
            const float next = fate_of_half(static_cast<uint16_t>(i + 1)), middle = (value + next) / 2;
            n_wrong += fate_to_half(middle) != (i % 2 ? i + 1 : i);
            n_wrong += fate_to_half(std::nextafter(middle, next)) != i + 1;
            n_wrong += fate_to_half(std::nextafter(middle, value)) != i;
        }
    }
    CHECK(n_wrong == 0);
    CHECK(fate_of_half(0x3c00) == 1.0f && fate_of_half(0x0001) == std::ldexp(1.0f, -24) && fate_of_half(0xfbff) == -65504.0f);
    CHECK(fate_to_half(65519.0f) == 0x7bff && fate_to_half(65520.0f) == 0x7c00 && fate_to_half(-1e-9f) == 0x8000);
}

static void test_rows() {
    fate_linear_rows rows(4, 3);
    for (int64_t key : { 7, 8, 9 }) {
        rows.sums(rows.occur(key), 1)[3] = 5;
    }
    rows.occur(7);
    const int32_t made = rows.occur(10); // 8 makes room
    CHECK(rows.get(8) == -1 && rows.get(7) >= 0 && rows.get(9) >= 0 && rows.get(10) == made);
    CHECK(rows.sums(made, 1)[3] == 0 && rows.sums(rows.get(9), 1)[3] == 5);
    rows.sums(made, 0)[0] = fate_to_half(900.0f);
    rows.count(made, 0, 1023.0f);
    CHECK(rows.n(made, 0) == 1023.0f);
    rows.count(made, 0, 1.0f);
    CHECK(rows.n(made, 0) == 512.0f && rows.sums(made, 0)[0] == fate_to_half(450.0f));
    for (int64_t key = 0; key < 1000; ++key) {
        rows.occur(key * 4096);
    }
    CHECK(rows.get(997 * 4096) >= 0 && rows.get(996 * 4096) == -1);
}

static void test_contexts() {
    const int32_t two[] = { 1, 2 }, negative[] = { 3, -5 };
    CHECK(fate_linear_contexts::hash(two, 2) == -3550055125485641917);
    CHECK(fate_linear_contexts::hash(negative, 2) == -3089947874767036032);
    fate_linear_contexts seen(2); // one bucket
    seen.clear();
    for (int64_t hash = 1; hash <= 5; ++hash) {
        seen.put(hash, 10 + hash);
    }
    seen.put(3, 20);
    CHECK(seen.get(1) == -1 && seen.get(2) == 12 && seen.get(3) == 20 && seen.get(5) == 15 && seen.get(6) == -1);
}

static void test_model() {
    made_up                   made;
    fate_linear               linear(made.model());
    const answer              fresh = ask(linear);
    const std::vector<answer> first = follow(linear, made, 900, 5);
    CHECK(ask(linear) == ask(linear));
    CHECK(!(ask(linear) == fresh));
    for (const answer & got : first) {
        for (int32_t i = 0; i < SIZE; ++i) {
            const bool exists = i % MAX_EXPERTS < made.n_experts[i / MAX_EXPERTS];
            CHECK(std::isfinite(got.scores[i]) && (exists ? got.chances[i] > 0 && got.chances[i] < 1 : got.chances[i] == 0));
        }
        CHECK(got.bonus == made.bonus);
    }
    linear.reset();
    CHECK(ask(linear) == fresh);
    CHECK(follow(linear, made, 900, 5) == first);
    linear.reset();
    CHECK(follow(linear, made, 900, 5, /*warms =*/true) == first);

    fate_linear               predicts(made.model(6, false)); // one question alone: the same answer to it
    const std::vector<answer> alone = follow(predicts, made, 900, 5);
    CHECK(!predicts.has_scores() && alone.size() == first.size());
    double most = 0;
    for (size_t t = 0; t < first.size(); ++t) {
        for (int32_t i = 0; i < SIZE; ++i) {
            most = std::fmax(most, std::fabs(alone[t].chances[i] - first[t].chances[i]));
        }
    }
    CHECK(most < 1e-3);

    fate_linear         still(made.model(2)); // fewer rows than were saved
    std::vector<answer> small = follow(still, made, 300, 5);
    CHECK(!(small.back() == first[small.size() - 1]));
}

static void test_steps_and_errors() {
    made_up              made;
    fate_linear          one(made.model()), other(made.model());
    std::vector<int32_t> ids, tokens, sequences;
    for (int32_t t = 0; t < 100; ++t) {
        const std::vector<int32_t> row = route(made);
        ids.insert(ids.end(), row.begin(), row.end());
        tokens.push_back(t % 9);
        sequences.push_back(t % 2);
    }
    fate_step step = {};
    step.n_tokens  = 100;
    step.n_layers  = N_LAYERS;
    step.k         = MAX_K;
    step.ids       = ids.data();
    step.tokens    = tokens.data();
    step.sequences = sequences.data();
    CHECK(fate_linear_step(&one, &step) == FATE_STATUS_OK);
    for (int32_t t = 100 - FATE_LINEAR_MOST_ROWS; t < 100; ++t) {
        CHECK(fate_linear_observe(&other, &ids[t * N_LAYERS * MAX_K], tokens[t], sequences[t]) == FATE_STATUS_OK);
    }
    one.expect(3, 1, 7);
    other.expect(3, 1, 7);
    const answer before = ask(one);
    CHECK(before == ask(other));
    ids[99 * N_LAYERS * MAX_K] = 8; // layer 0 has 8 experts
    CHECK(fate_linear_step(&one, &step) == FATE_STATUS_INVALID);
    CHECK(fate_linear_observe(&one, &ids[99 * N_LAYERS * MAX_K], 1, 1) == FATE_STATUS_INVALID);
    step.n_layers = 2;
    CHECK(fate_linear_step(&one, &step) == FATE_STATUS_INVALID);
    CHECK(ask(one) == before);

    fate_linear *     opened = nullptr;
    fate_linear_model model  = made.model(0);
    CHECK(fate_linear_open(&model, &opened) == FATE_STATUS_INVALID && !opened);
    model           = made.model();
    model.n_history = FATE_LINEAR_FOLLOW;
    CHECK(fate_linear_open(&model, &opened) == FATE_STATUS_INVALID && !opened);
    model = made.model(6, false);
    CHECK(fate_linear_open(&model, &opened) == FATE_STATUS_OK);
    answer got;
    CHECK(fate_linear_get(opened, got.chances.data(), nullptr, nullptr) == FATE_STATUS_OK);
    CHECK(fate_linear_get(opened, nullptr, got.scores.data(), got.bonus.data()) == FATE_STATUS_INVALID);
    CHECK(fate_linear_expect(opened, 1, 0, 0) == FATE_STATUS_OK && fate_linear_reset(opened) == FATE_STATUS_OK);
    fate_linear_close(opened);
    fate_linear_close(nullptr);
}

int main() {
    int32_t            n_kinds = 0;
    std::vector<float> said;
    while (const fate_linear_math * math = fate_linear_math_of(n_kinds)) {
        const std::vector<float> of_this = test_loops(*math);
        CHECK(n_kinds == 0 || of_this == said);
        said = of_this;
        ++n_kinds;
    }
    CHECK(n_kinds > 0);
    test_halves();
    test_rows();
    test_contexts();
    test_model();
    test_told();
    test_steps_and_errors();
    return check_result("test-linear");
}
