// Bytes as a script of steps, publications and lying callbacks for one layer. For libFuzzer, or alone: fuzz-layer SEED SECONDS.
#include "layer.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

struct script {
    const uint8_t * data;
    size_t          size;

    uint8_t next() {
        if (size == 0) {
            return 0;
        }
        --size;
        return *data++;
    }
};

struct fuzz_io : fate_layer_io {
    script &             input;
    std::vector<int32_t> expert_in;

    fuzz_io(script & input, int32_t n_slots) : input(input), expert_in(n_slots, -1) {}

    bool ask(const std::vector<int32_t> &, const std::vector<int32_t> &, const int64_t *, int32_t n, int32_t * victims) override {
        for (int32_t i = 0; i < n; ++i) {
            victims[i] = static_cast<int8_t>(input.next());
        }
        return input.next() % 4 != 0;
    }

    void reject() override {}

    void evict(int32_t expert) override {
        for (int32_t & e : expert_in) {
            if (e == expert) {
                e = -1;
                return;
            }
        }
        abort();
    }

    void fill(int32_t expert, int32_t slot) override {
        if (expert_in[slot] != -1) {
            abort();
        }
        expert_in[slot] = expert;
    }
};

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    script        input     = { data, size };
    const int32_t n_experts = 2 + input.next() % 40;
    const int32_t k         = 1 + input.next() % (n_experts < 8 ? n_experts : 8);
    const int32_t n_slots   = k + input.next() % (n_experts - k + 1);
    fate_layer    layer(n_experts, k, n_slots, 3);
    fuzz_io       io(input, n_slots);
    const float   nasty[] = { 0.0f,
                              -0.0f,
                              1.0f,
                              -1.0f,
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::denorm_min(),
                              std::numeric_limits<float>::max() };

    while (input.size > 0) {
        const uint8_t what = input.next();
        if (what % 8 == 0) {
            std::vector<float> scores(n_experts);
            for (float & score : scores) {
                score = nasty[input.next() % 8];
            }
            layer.publish(scores.data(), nasty[input.next() % 8], what & 8);
        } else if (what % 64 == 1) {
            layer.reset();
            io.expert_in.assign(n_slots, -1);
        } else {
            const int32_t        n_rows = what % 16 == 2 ? input.next() % 32 : 1;
            const int32_t        some   = 1 + input.next() % n_experts; // few: rows repeat experts
            std::vector<int32_t> flat(static_cast<size_t>(n_rows) * k);
            for (int32_t & expert : flat) {
                expert = input.next() % some;
            }
            const fate_ids ids      = { reinterpret_cast<const char *>(flat.data()), static_cast<int64_t>(k * sizeof(int32_t)), n_rows, k };
            const bool     callback = what & 128;
            layer.begin_step();
            std::vector<int32_t> ahead;
            if (n_rows == 1 && !callback && what % 4 == 3) {
                const float   threshold = static_cast<float>(input.next() % 8) / 7.0f;
                const int32_t most      = fate_prefetch_most(input.next() % 24, n_slots, k);
                for (int plan = input.next() % 3; plan >= 0; --plan) {
                    std::vector<float> chance(n_experts);
                    for (float & c : chance) {
                        c = static_cast<float>(input.next() % 8) / 7.0f;
                    }
                    const auto before  = io.expert_in;
                    const auto earlier = ahead;
                    layer.prefetch(chance.data(), threshold, most, io);
                    for (int32_t slot = 0; slot < n_slots; ++slot) {
                        if (io.expert_in[slot] == before[slot]) {
                            continue;
                        }
                        ahead.push_back(io.expert_in[slot]);
                        if (chance[io.expert_in[slot]] < threshold || (before[slot] >= 0 && chance[before[slot]] >= threshold) ||
                            std::find(earlier.begin(), earlier.end(), before[slot]) != earlier.end()) {
                            abort();
                        }
                    }
                    if (static_cast<int32_t>(ahead.size()) > most || layer.first_inconsistent_slot() != -1) {
                        abort();
                    }
                }
            }
            if (n_rows * k <= n_slots) {
                std::vector<int32_t> slots(flat.size());
                std::vector<uint8_t> hits(flat.size());
                layer.resolve(ids, callback, io, slots.data(), hits.data());
                for (size_t i = 0; i < flat.size(); ++i) {
                    if (io.expert_in[slots[i]] != flat[i]) {
                        abort();
                    }
                }
                for (const int32_t expert : ahead) {
                    if (layer.table().slot_of[expert] < 0) {
                        abort();
                    }
                }
            } else {
                layer.bypass(ids);
                layer.seed(callback, io);
                for (size_t i = flat.size() - static_cast<size_t>(n_slots / k) * k; i < flat.size(); ++i) {
                    if (layer.table().slot_of[flat[i]] < 0) {
                        abort();
                    }
                }
            }
        }
        if (layer.first_inconsistent_slot() != -1) {
            abort();
        }
    }
    return 0;
}

#if !defined(FATE_LIBFUZZER)
int main(int argc, char ** argv) {
    std::mt19937 random(argc > 1 ? static_cast<uint32_t>(atoi(argv[1])) : 1);
    const auto   end =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<int>(1000 * (argc > 2 ? atof(argv[2]) : 2.0)));
    int64_t count = 0;
    while (std::chrono::steady_clock::now() < end) {
        std::vector<uint8_t> data(random() % 600);
        for (uint8_t & byte : data) {
            byte = static_cast<uint8_t>(random());
        }
        LLVMFuzzerTestOneInput(data.data(), data.size());
        ++count;
    }
    printf("fuzz-layer: %lld inputs\n", static_cast<long long>(count));
    return count > 0 ? 0 : 1;
}
#endif
