// What a router in 8 bits makes of an input: ranks and chances, on the host.
#include "check.h"
#include "lookahead.h"

#include <algorithm>
#include <random>
#include <vector>

struct router {
    std::vector<int8_t> weights;
    std::vector<float>  scale;
    fate_gate           gate = {};
};

static router packed(const std::vector<std::vector<float>> & rows, int32_t k) {
    router        r;
    const int32_t n_embd = static_cast<int32_t>(rows[0].size());
    const int32_t stride = fate_gate_stride(n_embd);
    r.weights.assign(rows.size() * stride, 99);
    for (size_t e = 0; e < rows.size(); ++e) {
        r.scale.push_back(fate_gate_pack(rows[e].data(), n_embd, &r.weights[e * stride]));
    }
    r.gate = { r.weights.data(),
               r.scale.data(),
               stride,
               n_embd,
               static_cast<int32_t>(rows.size()),
               k,
               nullptr,
               nullptr,
               nullptr,
               false,
               false,
               0,
               0 };
    return r;
}

static std::vector<float> chances(const fate_gate & gate, const std::vector<float> & x) {
    std::vector<float> selection(gate.n_experts), chance(gate.n_experts);
    fate_gate_chances(gate, x.data(), selection.data(), chance.data());
    return chance;
}

static void test_rows_are_packed() {
    int8_t      packed[16];
    const float row[] = { 2.0f, -1.0f, 0.0f, 0.009f };
    const float scale = fate_gate_pack(row, 4, packed);
    CHECK(scale == 2.0f / 127.0f);
    CHECK(packed[0] == 127 && packed[1] == -64 && packed[2] == 0 && packed[3] == 1); // halves go to the even one
    CHECK(std::all_of(packed + 4, packed + 16, [](int8_t one) { return one == 0; }));
    const float nothing[] = { 0.0f, 0.0f };
    CHECK(fate_gate_pack(nothing, 2, packed) == 1.0f && packed[0] == 0);
    CHECK(fate_gate_stride(16) == 16 && fate_gate_stride(17) == 32);
}

// A channel that the earlier norm makes small and the later one does not.
static void test_norms_of_both_layers_count() {
    router r = packed(
        {
            { 1,    0.2f },
            { 0.9f, 1    }
    },
        1);
    const std::vector<float> x       = { 1.0f, 0.001f };
    const float              ratio[] = { 1.0f, 1000.0f };
    CHECK(chances(r.gate, x)[0] == 1.0f);
    r.gate.ratio = ratio;
    CHECK(chances(r.gate, x)[1] == 1.0f);
}

static void test_as_many_as_a_token_uses_have_a_half() {
    CHECK(fate_rank_chance(0, 4) == 1.0f && fate_rank_chance(3, 4) > 0.5f && fate_rank_chance(4, 4) < 0.5f);
    CHECK(fate_rank_chance(FATE_LOOKAHEAD_MOST, 4) == 0.0f);
    CHECK(fate_rank_chance(FATE_LOOKAHEAD_MOST - 1, 60) > 0.5f);
    for (int32_t k = 1; k < 12; ++k) {
        for (int32_t rank = 1; rank < FATE_LOOKAHEAD_MOST; ++rank) {
            CHECK(fate_rank_chance(rank, k) < fate_rank_chance(rank - 1, k) && fate_rank_chance(rank, k) > 0.0f);
        }
    }
}

static void test_biases_and_the_sigmoid_are_the_models() {
    router r = packed(
        {
            { 1,  0 },
            { 0,  1 },
            { 1,  0 },
            { -1, 0 }
    },
        1);
    const std::vector<float> x = { 3.0f, 2.0f };
    CHECK(chances(r.gate, x)[0] == 1.0f); // of equals the first
    CHECK(chances(r.gate, x)[2] == fate_rank_chance(1, 1));
    const float bias[] = { 0.0f, 1.5f, 0.0f, 0.0f };
    r.gate.bias        = bias;
    CHECK(chances(r.gate, x)[1] == 1.0f);
    r.gate.bias             = nullptr;
    r.gate.is_sigmoid       = true; // 0.953, 0.881, 0.953, 0.047
    const float selection[] = { 0.0f, 0.08f, 0.0f, 0.0f };
    r.gate.selection_bias   = selection;
    CHECK(chances(r.gate, x)[1] == 1.0f);
    r.gate.is_sigmoid = false; // 3, 2.08, 3, -3
    CHECK(chances(r.gate, x)[0] == 1.0f);
}

// Experts are selected from the groups whose best two sum to the most.
static void test_groups_come_first() {
    router r = packed(
        {
            { 5 },
            { -5 },
            { 3 },
            { 3 },
            { 2 },
            { 4 },
        },
        2);
    const std::vector<float> x = { 1.0f };
    CHECK(chances(r.gate, x)[0] == 1.0f && chances(r.gate, x)[5] == fate_rank_chance(1, 2));
    r.gate.n_groups      = 3; // 0, 6, 6
    r.gate.n_groups_used = 1; // of equals the first
    CHECK(chances(r.gate, x) == std::vector<float>({ 0, 0, 1.0f, fate_rank_chance(1, 2), 0, 0 }));
    r.gate.n_groups_used = 2;
    CHECK(chances(r.gate, x)[0] == 0 && chances(r.gate, x)[5] == 1.0f && chances(r.gate, x)[3] == fate_rank_chance(2, 2));
    r.gate.n_groups_used = 1;
    r.gate.is_softmax    = true; // e^5 is more than 2 e^3 and than e^4 + e^2
    CHECK(chances(r.gate, x) == std::vector<float>({ 1.0f, fate_rank_chance(1, 2), 0, 0, 0, 0 }));
    r.gate.is_softmax     = false;
    const float bias[]    = { 0, 7, 0, 0, 0, 0 }; // 7, 6, 6
    r.gate.selection_bias = bias;
    CHECK(chances(r.gate, x)[0] == 1.0f && chances(r.gate, x)[1] == fate_rank_chance(1, 2));
    r.gate.n_groups = 6; // one each: the best
    CHECK(chances(r.gate, x) == std::vector<float>({ 1.0f, 0, 0, 0, 0, 0 }));
}

// Eight bits name nearly what all bits do.
static void test_ranks_survive() {
    std::mt19937                    random(1);
    std::normal_distribution<float> normal;
    const int32_t                   n_experts = 64, n_embd = 300, k = 8;
    int32_t                         n_same = 0;
    for (int round = 0; round < 20; ++round) {
        std::vector<std::vector<float>> rows(n_experts, std::vector<float>(n_embd));
        std::vector<float>              x(n_embd), exact(n_experts);
        for (float & one : x) {
            one = normal(random);
        }
        for (int32_t e = 0; e < n_experts; ++e) {
            for (int32_t i = 0; i < n_embd; ++i) {
                rows[e][i] = normal(random);
                exact[e] += rows[e][i] * x[i];
            }
        }
        std::vector<float> sorted = exact;
        std::sort(sorted.rbegin(), sorted.rend());
        const router             r      = packed(rows, k);
        const std::vector<float> chance = chances(r.gate, x);
        for (int32_t e = 0; e < n_experts; ++e) {
            n_same += exact[e] >= sorted[k - 1] && chance[e] >= 0.5f;
        }
    }
    CHECK(n_same >= 20 * k - 4);
}

int main() {
    test_rows_are_packed();
    test_norms_of_both_layers_count();
    test_as_many_as_a_token_uses_have_a_half();
    test_biases_and_the_sigmoid_are_the_models();
    test_groups_come_first();
    test_ranks_survive();
    return check_result("test-lookahead");
}
