// Prefetch on the GPU: where a step waits for it, against the host's layer, all alike; beside the step, in every order of the two streams, by the bytes
// that an op's experts have when it ends. A layer plans up to three times for a step.
#include "check.h"
#include "cuda-fixture.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <vector>

struct shape {
    int32_t             n_experts, k, n_slots;
    std::vector<size_t> expert_bytes; // of each tensor
    size_t              skew;         // of the sources, which files do not align
};

// How the copies stand to the op.
enum order { WAITED_FOR, BESIDE, BEFORE, BEHIND, SKIPPED, N_ORDERS };

static int64_t seen[N_ORDERS][FATE_N_COUNTERS];

static const int N_PLANS = 3;

static __global__ void __launch_bounds__(FATE_BESIDE_THREADS) plan_once(const fate_cuda_layer * layers, const float * chances,
                                                                        int32_t distance, float threshold, int32_t wanted) {
    extern __shared__ int64_t     s_plan[];
    __shared__ fate_cuda_planning s;
    const fate_cuda_tables        t = fate_tables_in(s_plan, layers[0].n_experts);
    for (int32_t e = threadIdx.x; e < layers[0].n_experts; e += blockDim.x) {
        t.chance[e] = chances[e];
    }
    fate_read_tables(layers[0], t);
    __syncthreads();
    fate_plan_layer(layers[0], distance, threshold, wanted, s, t);
}

static void run(const shape & s, order how, int n_steps, uint32_t seed) {
    static const int32_t WANTED    = 6;
    static const float   THRESHOLD = 0.5f;

    std::mt19937    random(seed);
    fate_cuda_layer layer = cold_layer(s.n_experts, s.k, s.n_slots);
    layer.n_tensors       = static_cast<int32_t>(s.expert_bytes.size());
    layer.plan            = device<fate_cuda_plan>(1);
    layer.waiting         = device<int32_t>(s.n_experts);
    layer.n_demands       = device<uint32_t>(1);
    layer.n_posts         = device<uint32_t>(1);
    layer.is_awaited      = how == WAITED_FOR;

    std::vector<char *> sources, slots;
    int64_t             expert_bytes = 0;
    for (size_t t = 0; t < s.expert_bytes.size(); ++t) {
        const size_t n      = s.expert_bytes[t];
        char *       source = mapped<char>(n * s.n_experts + s.skew) + s.skew;
        for (size_t i = 0; i < n * s.n_experts; ++i) {
            source[i] = static_cast<char>(random());
        }
        sources.push_back(source);
        slots.push_back(device<char>(n * s.n_slots));
        fate_cuda_tensor & to = layer.tensors[t];
        to.source             = source;
        to.slots              = slots.back();
        to.expert_bytes       = n;
        to.width              = (n | s.skew) % 16 == 0 ? 16 : (n | s.skew) % 4 == 0 ? 4 : 1;
        to.n_units            = static_cast<uint32_t>(n / to.width);
        layer.is_wide         = layer.is_wide && to.width == 16;
        layer.n_pieces += fate_n_pieces(to);
        expert_bytes += static_cast<int64_t>(n);
    }

    fate_layer        twin(s.n_experts, s.k, s.n_slots, 1);
    fate_cuda_layer * layers  = device<fate_cuda_layer>(1);
    int32_t *         index   = device<int32_t>(1);
    int32_t *         ids     = device<int32_t>(s.k);
    int32_t *         out     = device<int32_t>(s.k);
    int32_t *         rec     = device<int32_t>(s.k);
    uint8_t *         hit     = device<uint8_t>(s.k);
    float *           chances = mapped<float>(N_PLANS * s.n_experts);
    float *           scores  = mapped<float>(s.n_experts + 1);
    fate_cuda_upload(layers, &layer, sizeof(layer));
    cudaStream_t main, side;
    FATE_CUDA(cudaStreamCreateWithFlags(&main, cudaStreamNonBlocking));
    FATE_CUDA(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));

    std::vector<int32_t> all(s.n_experts);
    for (int32_t e = 0; e < s.n_experts; ++e) {
        all[e] = e;
    }
    int64_t n_ran  = 0;
    bool    is_due = false; // scores are published where the next step begins
    for (int step = 0; step < n_steps; ++step) {
        std::vector<int32_t> row(s.k);
        const int32_t        some = std::max(s.k, s.n_experts / 2);
        for (int32_t i = 0; i < s.k; ++i) {
            std::swap(all[i], all[i + static_cast<int32_t>(random() % (some - i))]);
            row[i] = all[i];
        }
        if (step % 11 == 10) {
            std::shuffle(all.begin(), all.end(), random);
        }
        // mostly right, sometimes all wrong, all or none
        const int n_plans = 1 + static_cast<int>(random() % N_PLANS);
        for (int plan = 0; plan < n_plans; ++plan) {
            float * chance = chances + plan * s.n_experts;
            for (int32_t e = 0; e < s.n_experts; ++e) {
                chance[e] = static_cast<float>(random() % 8) / (step % 5 == 4 ? 7.0f : 15.0f);
            }
            for (int32_t i = 0; i < s.k && step % 7 != 6; ++i) {
                chance[row[i]] = random() % 4 ? 0.9f : 0.1f;
            }
            if (step % 13 == 12) {
                std::fill(chance, chance + s.n_experts, step % 2 ? 1.0f : 0.0f);
            }
        }
        fate_cuda_upload(ids, row.data(), row.size() * sizeof(int32_t));
        const fate_ids       twin_ids = { reinterpret_cast<const char *>(row.data()), s.k * 4, 1, s.k };
        std::vector<int32_t> twin_slots(s.k);
        std::vector<uint8_t> twin_hits(s.k);
        list_io              io;

        fate_cuda_call call = {};
        call.ids            = reinterpret_cast<const char *>(ids);
        call.stride         = s.k * 4;
        call.n_rows         = 1;
        call.out            = out;
        call.record_k       = s.k;
        call.record_ids     = rec;
        call.record_hits    = hit;
        const bool at_once  = how != BEHIND && step % 3 == 0; // the first plan is made where the step begins
        const auto prefetch = [&](cudaStream_t stream) {
            for (int plan = 0; plan < n_plans; ++plan) {
                if (plan > 0 || !at_once) {
                    plan_once<<<1, FATE_BESIDE_THREADS, fate_tables_bytes(s.n_experts), stream>>>(
                        layers, chances + plan * s.n_experts, plan == 0 ? 0 : N_PLANS - plan, THRESHOLD, WANTED);
                }
                if (plan + 1 == n_plans || random() % 2) {
                    fate_fetch<<<FATE_CUDA_FILL_BLOCKS, FATE_BESIDE_THREADS, 0, stream>>>(layers, 1, -1);
                }
            }
            FATE_CUDA(cudaGetLastError());
        };
        const auto bring = [&] {
            fate_bring<false, false, false, true>
                <<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(s.n_experts), main>>>(layer, call);
            FATE_CUDA(cudaGetLastError());
        };
        fate_cuda_opening begin = publishing(scores, s.n_experts, false);
        begin.begins            = true;
        begin.publishes         = is_due;
        begin.plans             = at_once;
        begin.chances           = at_once ? chances : nullptr;
        begin.threshold         = THRESHOLD;
        begin.wanted            = WANTED;
        is_due                  = false;
        fate_open<<<1, FATE_BESIDE_THREADS, fate_tables_bytes(s.n_experts), main>>>(layers, index, begin);
        FATE_CUDA(cudaStreamSynchronize(main));
        switch (how) {
            case WAITED_FOR:
                twin.begin_step();
                for (int plan = 0; plan < n_plans; ++plan) {
                    twin.prefetch(chances + plan * s.n_experts, THRESHOLD, fate_prefetch_most(WANTED, s.n_slots, s.k), io);
                }
                twin.resolve(twin_ids, false, io, twin_slots.data(), twin_hits.data());
                prefetch(main);
                bring();
                break;
            case BESIDE: // the op comes somewhere within the copies
                prefetch(side);
                for (volatile uint32_t spin = random() % 40000; spin > 0; spin = spin - 1) {
                }
                bring();
                break;
            case BEFORE:
                prefetch(side);
                FATE_CUDA(cudaStreamSynchronize(side));
                bring();
                break;
            case SKIPPED: // now and then the step leaves the layer out
                prefetch(side);
                if (step % 3 == 2) {
                    FATE_CUDA(cudaStreamSynchronize(side));
                    continue;
                }
                bring();
                break;
            default:
                bring();
                FATE_CUDA(cudaStreamSynchronize(main));
                prefetch(side);
                break;
        }
        ++n_ran;

        // what the op's products would read, while the side may go on
        const std::vector<int32_t> got = host(out, s.k, main);
        for (int32_t i = 0; i < s.k; ++i) {
            for (size_t t = 0; t < sources.size(); ++t) {
                const size_t n = s.expert_bytes[t];
                CHECK(got[i] >= 0 && got[i] < s.n_slots);
                const std::vector<char> held = host(slots[t] + got[i] * n, n, main);
                CHECK(memcmp(held.data(), sources[t] + row[i] * n, n) == 0);
            }
        }
        FATE_CUDA(cudaDeviceSynchronize());

        const std::vector<int32_t> slot_of   = host(layer.slot_of, s.n_experts, main);
        const std::vector<int32_t> expert_of = host(layer.expert_of, s.n_slots, main);
        CHECK(fate_first_inconsistent_slot(slot_of, expert_of) == -1);
        for (size_t t = 0; t < sources.size(); ++t) {
            const size_t            n    = s.expert_bytes[t];
            const std::vector<char> held = host(slots[t], n * s.n_slots, main);
            for (int32_t slot = 0; slot < s.n_slots; ++slot) {
                CHECK(expert_of[slot] < 0 || memcmp(held.data() + slot * n, sources[t] + expert_of[slot] * n, n) == 0);
            }
        }
        const std::vector<int64_t> c         = host(layer.counters, FATE_N_COUNTERS, main);
        const fate_cuda_step       recorded  = host(layer.step, 1, main)[0];
        const std::vector<int32_t> waiting   = host(layer.waiting, s.n_experts, main);
        int64_t                    n_waiting = 0;
        for (const int32_t one : waiting) {
            n_waiting += one;
        }
        CHECK(host(layer.n_demands, 1, main)[0] == 0);
        CHECK(host(layer.head, 1, main)[0].arrived == 0);
        CHECK(c[FATE_COUNTER_HITS] + c[FATE_COUNTER_MISSES] == n_ran * s.k);
        CHECK(c[FATE_COUNTER_PREFETCH_HIDDEN] >= 0 && c[FATE_COUNTER_PREFETCH_HIDDEN] <= c[FATE_COUNTER_PREFETCH_LATE] * expert_bytes);
        CHECK(c[FATE_COUNTER_FILLS] == c[FATE_COUNTER_MISSES] - c[FATE_COUNTER_PREFETCH_LATE] + c[FATE_COUNTER_PREFETCHES]);
        CHECK(c[FATE_COUNTER_PREFETCHES] ==
              c[FATE_COUNTER_PREFETCH_USEFUL] + c[FATE_COUNTER_PREFETCH_LATE] + c[FATE_COUNTER_PREFETCH_WASTED] + n_waiting);
        if (how == WAITED_FOR) {
            const fate_table & table = twin.table();
            CHECK(slot_of == std::vector<int32_t>(table.slot_of, table.slot_of + s.n_experts));
            CHECK(expert_of == std::vector<int32_t>(table.expert_of, table.expert_of + s.n_slots));
            CHECK(host(layer.last_use, s.n_experts, main) == std::vector<int64_t>(table.last_use, table.last_use + s.n_experts));
            CHECK(host(layer.fills, recorded.n_fills, main) == io.fills);
            CHECK(host(layer.evictions, recorded.n_evictions, main) == io.evictions);
            CHECK(got == twin_slots && host(hit, s.k, main) == twin_hits && host(rec, s.k, main) == row);
            for (int i = 0; i < FATE_N_COUNTERS; ++i) {
                CHECK(c[i] == twin.counters()[i] || i == FATE_COUNTER_BYTES || i == FATE_COUNTER_ROUTED ||
                      i == FATE_COUNTER_PREFETCH_HIDDEN);
            }
        }
        if (step % 4 == 3) {
            for (int32_t e = 0; e < s.n_experts; ++e) {
                scores[e] = static_cast<float>(random() % 4);
            }
            scores[s.n_experts] = static_cast<float>(random() % 3);
            twin.publish(scores, scores[s.n_experts], step % 8 == 3);
            is_due = step % 8 != 3; // where the next step begins
            if (!is_due) {
                fate_open<<<1, FATE_BESIDE_THREADS, 0, main>>>(layers, index, publishing(scores, s.n_experts, true));
            }
            FATE_CUDA(cudaDeviceSynchronize());
        }
        for (int i = 0; step + 2 == n_steps && i < FATE_N_COUNTERS; ++i) { // of the last step but one: the last may be skipped
            seen[how][i] += c[i];
        }
    }
    for (size_t t = 0; t < sources.size(); ++t) {
        FATE_CUDA(cudaFreeHost(sources[t] - s.skew));
        FATE_CUDA(cudaFree(slots[t]));
    }
}

static bool saw_all(order how) {
    bool all = true;
    for (const int i :
         { FATE_COUNTER_PREFETCH_USEFUL, FATE_COUNTER_PREFETCH_LATE, FATE_COUNTER_PREFETCH_CANCELLED, FATE_COUNTER_PREFETCH_HIDDEN }) {
        all = all && seen[how][i] > 0;
    }
    return all;
}

int main() {
    const shape shapes[] = {
        { 32,   4, 4,   { 1536, 1536, 2048 },     0  },
        { 32,   4, 5,   { 270016, 270016, 4096 }, 32 },
        { 32,   4, 16,  { 1536, 1530, 2048, 4 },  16 },
        { 8,    2, 7,   { 17, 68, 64 },           4  },
        { 128,  8, 16,  { 276480, 276480 },       96 },
        { 128,  8, 64,  { 9216, 65536 },          32 },
        { 1024, 8, 700, { 256 },                  0  },
        { 16,   4, 8,   { 3000000, 700001 },      0  },
    };
    try {
        uint32_t seed = 1;
        for (const shape & s : shapes) {
            for (int how = 0; how < N_ORDERS; ++how) {
                run(s, static_cast<order>(how), steps(s.n_experts > 200 || s.expert_bytes[0] > 100000 ? 60 : 150), seed++);
            }
        }
        // others on the GPU take its time in turns, and little runs beside anything
        const auto began = std::chrono::steady_clock::now();
        while (!takes_few_steps() && !saw_all(BESIDE) && std::chrono::steady_clock::now() - began < std::chrono::seconds(30)) {
            run(shapes[1], BESIDE, 60, seed++);
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    static const char * names[] = { "waited for", "beside", "before", "behind", "skipped" };
    for (int how = 0; how < N_ORDERS; ++how) {
        print_prefetches(names[how], seen[how]);
    }
    if (takes_few_steps()) {
        return check_result("test-cuda-prefetch");
    }
    CHECK(seen[BEFORE][FATE_COUNTER_PREFETCH_USEFUL] > 100 && seen[BEFORE][FATE_COUNTER_PREFETCH_WASTED] > 100);
    CHECK(seen[BEFORE][FATE_COUNTER_PREFETCH_LATE] == 0 && seen[BEFORE][FATE_COUNTER_PREFETCH_CANCELLED] > 0);
    CHECK(seen[SKIPPED][FATE_COUNTER_PREFETCH_USEFUL] > 0);
    CHECK(seen[BEHIND][FATE_COUNTER_PREFETCHES] == 0);
    CHECK(saw_all(BESIDE));
    return check_result("test-cuda-prefetch");
}
