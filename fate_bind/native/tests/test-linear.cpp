// The linear model of routing with made-up numbers: its loops against plain ones, its memory, and what it may read and change. That it says what Python says is
// tested from there.
#include "check.h"
#include "linear.h"

#include <cmath>
#include <random>

static const int32_t N_LAYERS = 3, MAX_EXPERTS = 37, MAX_K = 4, BASIS = 5, RANK = 7; // no multiples of anything
static const int32_t SIZE = N_LAYERS * MAX_EXPERTS;

static std::mt19937 generator(1);

static std::vector<float> numbers(size_t n, float scale = 0.3f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              made(n);
    for (float & number : made) {
        number = normal(generator);
    }
    return made;
}

struct made_up {
    std::vector<int32_t>  n_experts = { 8, MAX_EXPERTS, 16 };
    std::vector<float>    even = std::vector<float>(SIZE, 0.1f), basis = numbers(SIZE * BASIS), center = numbers(BASIS);
    std::vector<float>    squeeze   = numbers(FATE_LINEAR_CONTEXTS * BASIS * RANK);
    std::vector<float>    rate_keep = { 0.5f, 0.7f, 0.8f, 0.9f, 0.95f, 0.97f, 0.98f, 0.99f }, context_keep = { 0.8f, 0.9f };
    std::vector<float>    soon = std::vector<float>(FATE_LINEAR_FOLLOW, 0.03f), later = soon, credit = { 0.3f, 0.2f, 0.15f, 0.1f, 0.1f };
    std::vector<int32_t>  early_of = { 2, 4, 6, 7 }, ngrams = { 2, 4, 8 };
    std::vector<float>    weights[2] = { numbers(N_LAYERS * FATE_LINEAR_FEATURES), numbers(N_LAYERS * FATE_LINEAR_FEATURES) };
    std::vector<float>    fold[2] = { numbers(RANK * SIZE), numbers(RANK * SIZE) }, constant[2] = { numbers(SIZE), numbers(SIZE) };
    std::vector<float>    bonus = numbers(N_LAYERS);
    std::vector<int64_t>  keys = { 3, 4, 5 }, pair_keys = { 1, 3, 2, 4, 3, 5 };
    std::vector<float>    n    = { 4, 2, 6, 3, 8, 1 };
    std::vector<uint16_t> sums = std::vector<uint16_t>(3 * 2 * (SIZE + BASIS), fate_to_half(1.5f));

    fate_linear_model model(int32_t capacity = 6, bool has_scores = true) {
        fate_linear_model m = {};
        m.n_layers          = N_LAYERS;
        m.max_experts       = MAX_EXPERTS;
        m.max_k             = MAX_K;
        m.rank_basis        = BASIS;
        m.rank              = RANK;
        m.n_experts         = n_experts.data();
        m.even_rates        = even.data();
        m.basis             = basis.data();
        m.center            = center.data();
        m.squeeze           = squeeze.data();
        m.rate_keep         = rate_keep.data();
        m.context_keep      = context_keep.data();
        m.soon              = soon.data();
        m.later             = later.data();
        m.credit            = credit.data();
        m.early_of          = early_of.data();
        m.early_tokens      = 24;
        m.early_end         = 384;
        m.ngrams            = ngrams.data();
        m.n_history         = 70;
        m.learn             = 1;
        m.tokens            = { capacity, 3, keys.data(), n.data(), sums.data() };
        m.pairs             = { capacity, 3, pair_keys.data(), n.data(), sums.data() };
        m.now               = { weights[0].data(), fold[0].data(), constant[0].data(), bonus.data() };
        if (has_scores) {
            m.keep = { weights[1].data(), fold[1].data(), constant[1].data(), bonus.data() };
        }
        return m;
    }
};

static std::vector<int32_t> route(const made_up & made) {
    std::vector<int32_t> ids(N_LAYERS * MAX_K, -1);
    for (int32_t layer = 0; layer < N_LAYERS; ++layer) {
        const int32_t first = static_cast<int32_t>(generator() % made.n_experts[layer]);
        for (int32_t i = 0; i < MAX_K && generator() % 16 != 0; ++i) {
            ids[layer * MAX_K + i] = (first + i) % made.n_experts[layer];
        }
    }
    return ids;
}

struct answer {
    std::vector<float> chances = std::vector<float>(SIZE), scores = std::vector<float>(SIZE), bonus = std::vector<float>(N_LAYERS);

    bool operator==(const answer & other) const { return chances == other.chances && scores == other.scores && bonus == other.bonus; }
};

static answer ask(fate_linear & linear) {
    answer got;
    linear.chances(got.chances.data());
    if (linear.has_scores()) {
        linear.scores(got.scores.data(), got.bonus.data());
    }
    return got;
}

// Follows n tokens of several sequences, with repeats; returns all answers.
static std::vector<answer> follow(fate_linear & linear, const made_up & made, int32_t n, uint32_t seed, bool warms = false) {
    generator.seed(seed);
    std::vector<answer> answers;
    for (int32_t t = 0; t < n; ++t) {
        const int32_t token    = t % 11 == 0 ? -1 : t / 3 % 2 ? t % 7 : static_cast<int32_t>(generator() % 20);
        const int32_t sequence = t < n / 2 ? t / 40 % 2 : t; // at last more than are kept
        if (t % 5 != 0) {
            linear.expect(token, sequence, t % 400);
            answers.push_back(ask(linear));
        }
        if (warms) {
            linear.warm();
        }
        linear.observe(route(made).data(), token, sequence);
    }
    return answers;
}

static void test_loops(const fate_linear_math & math) {
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
    int32_t n_kinds = 0;
    while (const fate_linear_math * math = fate_linear_math_of(n_kinds)) {
        test_loops(*math);
        ++n_kinds;
    }
    CHECK(n_kinds > 0);
    test_halves();
    test_rows();
    test_contexts();
    test_model();
    test_steps_and_errors();
    return check_result("test-linear");
}
