// Layers that tell of later ones on the GPU: where steps wait, against the host's layers and routers, all alike; beside the step, on streams and on branches
// of a captured graph, and with both in a row in either order, by the bytes that the ops' experts have when the step ends. Numbers are small and whole, so that
// sums are the same in any order.
#include "check.h"
#include "cuda-fixture.h"
#include "cuda_bulk.h"
#include "cuda_launch.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

static const int32_t WANTED    = 6;
static const float   THRESHOLD = 0.5f;

// before: what is planned is copied before the next op; behind: when all ops have run
enum order { AWAITED, BESIDE, RUSHED, BRANCHED, BEFORE, BEHIND, FORETOLD, N_ORDERS };

static int64_t seen[N_ORDERS][FATE_N_COUNTERS];

// Time in which something can be brought.
static __global__ void pass(uint64_t ns) {
    const uint64_t began = fate_now_ns();
    while (fate_now_ns() - began < ns) {
    }
}

template <typename T> static T * uploaded(const std::vector<T> & from) {
    T * p = device<T>(from.size());
    fate_cuda_upload(p, from.data(), from.size() * sizeof(T));
    return p;
}

struct shape {
    int32_t n_layers, n_experts, k, n_slots, n_embd;
    size_t  expert_bytes;
    bool    is_sigmoid, has_bias, has_selection_bias;
    int32_t n_groups, n_groups_used;
};

// A router on both sides.
struct both {
    std::vector<int8_t> weights;
    std::vector<float>  scale, bias, selection_bias, ratio;
    fate_gate           host, device;
};

static both router(const shape & s, std::mt19937 & random) {
    const auto whole = [&](size_t count, int from, int to) {
        std::vector<float> made(count);
        for (float & one : made) {
            one = static_cast<float>(from + static_cast<int>(random() % (to - from + 1)));
        }
        return made;
    };
    both          b;
    const int32_t stride = fate_gate_stride(s.n_embd);
    b.weights.resize(static_cast<size_t>(s.n_experts) * stride);
    for (int32_t e = 0; e < s.n_experts; ++e) {
        for (int32_t i = 0; i < s.n_embd; ++i) {
            b.weights[static_cast<size_t>(e) * stride + i] = static_cast<int8_t>(random() % 255 - 127);
        }
    }
    b.scale          = whole(s.n_experts, 1, 2);
    b.bias           = whole(s.n_experts, -300, 300);
    b.selection_bias = whole(s.n_experts, -1, 1);
    b.ratio          = whole(s.n_embd, 1, 3);
    b.host           = { b.weights.data(),
                         b.scale.data(),
                         stride,
                         s.n_embd,
                         s.n_experts,
                         s.k,
                         s.has_bias ? b.bias.data() : nullptr,
                         s.has_selection_bias ? b.selection_bias.data() : nullptr,
                         s.has_bias ? b.ratio.data() : nullptr,
                         s.is_sigmoid,
                         !s.is_sigmoid,
                         s.n_groups,
                         s.n_groups_used };
    b.device         = b.host;
    b.device.weights = uploaded(b.weights);
    b.device.scale   = uploaded(b.scale);
    b.device.bias    = s.has_bias ? uploaded(b.bias) : nullptr;
    b.device.ratio   = s.has_bias ? uploaded(b.ratio) : nullptr;
    if (s.has_selection_bias) {
        b.device.selection_bias = uploaded(b.selection_bias);
    }
    return b;
}

static void run(const shape & s, order how, int n_steps, uint32_t seed) {
    const bool                     awaited    = how == AWAITED || how == FORETOLD;
    const size_t                   look_bytes = fate_tables_bytes(s.n_experts) + fate_input_bytes(s.n_embd);
    const bool                     chained    = fate_cuda_chains(0, reinterpret_cast<const void *>(fate_bring<false, false, false, true>));
    const bool                     early      = chained && fate_cuda_starts_early();
    std::mt19937                   random(seed);
    std::vector<fate_cuda_layer>   layers(s.n_layers);
    std::vector<fate_cuda_sight>   sights(s.n_layers);
    std::vector<std::vector<both>> gates(s.n_layers);
    fate_cuda_plan *               plans  = device<fate_cuda_plan>(s.n_layers);
    uint32_t *                     words  = device<uint32_t>(2);
    fate_cuda_sight *              there  = device<fate_cuda_sight>(s.n_layers);
    int64_t *                      end    = device<int64_t>(1);
    const int32_t                  n_told = 5;
    std::vector<int32_t>           told_ids(static_cast<size_t>(n_steps) * n_told);
    std::vector<float>             told(told_ids.size());
    for (int step = 0; step < n_steps; ++step) {
        for (int32_t i = 0; i < n_told; ++i) {
            told_ids[step * n_told + i] = i == 3 ? -1 : (step * 7 + i * 3) % s.n_experts;
            told[step * n_told + i]     = 1.0f - 0.15f * static_cast<float>(i);
        }
    }
    const int32_t * told_ids_there = uploaded(told_ids);
    const float *   told_there     = uploaded(told);

    std::vector<char *>                      sources(s.n_layers), slots(s.n_layers);
    std::vector<std::unique_ptr<fate_layer>> twin(s.n_layers);
    std::vector<int32_t *>                   ids(s.n_layers), out(s.n_layers);
    std::vector<uint8_t *>                   hit(s.n_layers);
    std::vector<float *>                     input(s.n_layers);
    for (int32_t l = 0; l < s.n_layers; ++l) {
        fate_cuda_layer & layer = layers[l];
        layer                   = cold_layer(s.n_experts, s.k, s.n_slots);
        layer.n_tensors         = 1;
        layer.plan              = plans + l;
        layer.sight             = there + l;
        layer.waiting           = device<int32_t>(s.n_experts);
        layer.n_demands         = words;
        layer.n_posts           = words + 1;
        layer.is_awaited        = awaited;
        layer.foretold          = device<int32_t>(FATE_LOOKAHEAD_LAYERS * FATE_LOOKAHEAD_MOST);
        layer.foretold_chance   = device<float>(FATE_LOOKAHEAD_LAYERS * FATE_LOOKAHEAD_MOST);
        sources[l]              = mapped<char>(s.expert_bytes * s.n_experts);
        for (size_t i = 0; i < s.expert_bytes * s.n_experts; ++i) {
            sources[l][i] = static_cast<char>(random());
        }
        slots[l]                = device<char>(s.expert_bytes * s.n_slots);
        fate_cuda_tensor & to   = layer.tensors[0];
        to.source               = sources[l];
        to.slots                = slots[l];
        to.expert_bytes         = s.expert_bytes;
        to.width                = 16;
        to.n_units              = static_cast<uint32_t>(s.expert_bytes / 16);
        layer.n_pieces          = fate_n_pieces(to);
        twin[l]                 = std::make_unique<fate_layer>(s.n_experts, s.k, s.n_slots, 1);
        ids[l]                  = device<int32_t>(s.k);
        out[l]                  = device<int32_t>(s.k);
        hit[l]                  = device<uint8_t>(s.k);
        input[l]                = device<float>(s.n_embd);
        fate_cuda_sight & sight = sights[l];
        memset(&sight, 0, sizeof(sight));
        sight.input  = device<float>(s.n_embd);
        sight.n_embd = s.n_embd;
        for (int v = 0; v < FATE_LOOKAHEAD_LAYERS; ++v) {
            fate_cuda_view & view = sight.views[v];
            gates[l].push_back(router(s, random));
            view.target    = l + v + 1 < s.n_layers ? l + v + 1 : -1;
            view.distance  = v + 1;
            view.gate      = gates[l][v].device;
            view.selection = device<float>(s.n_experts);
            if (how == FORETOLD && v == 1) {
                view.gate.n_embd = 0;
            }
            if (how == FORETOLD) {
                view.ids        = told_ids_there;
                view.chances    = told_there;
                view.end        = end;
                view.n_tokens   = n_steps;
                view.n_foretold = n_told;
                view.stride     = n_told;
            }
        }
    }
    const fate_cuda_layer * layers_there = uploaded(layers);
    fate_cuda_upload(there, sights.data(), sights.size() * sizeof(fate_cuda_sight));
    cudaStream_t main, side, looker, planner;
    for (cudaStream_t * stream : { &main, &side, &looker, &planner }) {
        FATE_CUDA(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
    }
    fate_cuda_event is_shown, is_told;
    is_shown.create();
    is_told.create();
    int32_t *              index = device<int32_t>(s.n_layers);
    float *                start = mapped<float>(s.n_experts); // what is expected at the token's start, in every layer
    std::vector<int32_t *> record_ids;
    for (int32_t l = 0; l < s.n_layers; ++l) {
        record_ids.push_back(device<int32_t>(s.k));
    }

    for (int step = 0; step < n_steps; ++step) {
        const bool                        looks = step % 9 != 8;
        std::vector<std::vector<float>>   x(s.n_layers);
        std::vector<std::vector<int32_t>> rows(s.n_layers);
        std::vector<float>                scratch(s.n_experts), chance(s.n_experts);
        for (int32_t l = 0; l < s.n_layers; ++l) {
            for (int32_t i = 0; i < s.n_embd; ++i) {
                x[l].push_back(static_cast<float>(static_cast<int>(random() % 7) - 3));
            }
            // mostly what the layer before tells
            std::vector<int32_t> all(s.n_experts);
            for (int32_t e = 0; e < s.n_experts; ++e) {
                all[e] = e;
            }
            std::shuffle(all.begin(), all.end(), random);
            if (l > 0 && random() % 4) {
                fate_gate_chances(gates[l - 1][0].host, x[l - 1].data(), scratch.data(), chance.data());
                std::stable_sort(all.begin(), all.end(), [&](int32_t a, int32_t b) { return chance[a] > chance[b]; });
                std::swap(all[random() % s.k], all[s.k + random() % s.k]);
            }
            rows[l].assign(all.begin(), all.begin() + s.k);
            fate_cuda_upload(ids[l], rows[l].data(), s.k * sizeof(int32_t));
            fate_cuda_upload(input[l], x[l].data(), s.n_embd * sizeof(float));
        }
        const int64_t behind = step + 1;
        fate_cuda_upload(end, &behind, sizeof(behind));
        fate_cuda_opening begin = {};
        begin.begins            = true;
        begin.looks             = looks;
        fate_open<<<s.n_layers, FATE_BESIDE_THREADS, 0, main>>>(layers_there, index, begin);
        FATE_CUDA(cudaStreamSynchronize(main));
        const auto n_chunks = [&](int32_t l) {
            unsigned n = 0;
            for (const fate_cuda_view & view : sights[l].views) {
                n += fate_n_chunks(view);
            }
            return n;
        };
        const auto look = [&](int32_t l, cudaStream_t on) {
            fate_look_on<<<n_chunks(l), FATE_LOOK_THREADS, look_bytes, on>>>(layers_there, l, THRESHOLD, WANTED);
            FATE_CUDA(cudaGetLastError());
        };
        const auto fetch = [&](int32_t l, cudaStream_t on) {
            fate_fetch<<<FATE_CUDA_FILL_BLOCKS, FATE_BESIDE_THREADS, 0, on>>>(layers_there, s.n_layers, l);
            FATE_CUDA(cudaGetLastError());
        };
        for (int32_t e = 0; e < s.n_experts; ++e) {
            start[e] = random() % 3 ? 0.1f : 0.9f;
        }
        if (how == BRANCHED) {
            FATE_CUDA(cudaStreamBeginCapture(main, cudaStreamCaptureModeRelaxed));
        }
        cudaGraphNode_t last     = nullptr; // that copies
        const int       plans_at = how == RUSHED ? static_cast<int>(random() % (2 * s.n_layers)) : -1;
        for (int32_t l = 0; l < s.n_layers; ++l) {
            fate_cuda_call call = {};
            call.ids            = reinterpret_cast<const char *>(ids[l]);
            call.stride         = s.k * 4;
            call.n_rows         = 1;
            call.out            = out[l];
            call.record_k       = s.k;
            call.record_ids     = record_ids[l];
            call.record_hits    = hit[l];
            call.input          = input[l];
            if (l == plans_at) {
                fate_cuda_opening plan = {};
                plan.plans             = true;
                plan.chances           = start;
                plan.stride            = s.n_experts;
                plan.threshold         = THRESHOLD;
                plan.wanted            = WANTED;
                fate_open<<<s.n_layers, FATE_BESIDE_THREADS, fate_tables_bytes(s.n_experts), planner>>>(layers_there, index, plan);
            }
            fate_cuda_launch(fate_bring<false, false, false, true>, FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(s.n_experts),
                             main, chained && (how == RUSHED || how == BRANCHED), layers[l], call);
            FATE_CUDA(cudaGetLastError());
            if (n_chunks(l) == 0) {
                continue;
            }
            if (awaited || how == BEFORE) {
                look(l, main);
            }
            if (how == BEFORE) {
                fetch(l, main);
            }
            if (how == BESIDE || how == RUSHED) {
                FATE_CUDA(cudaEventRecord(is_shown.handle, main));
                FATE_CUDA(cudaStreamWaitEvent(looker, is_shown.handle, 0));
                look(l, looker);
                FATE_CUDA(cudaEventRecord(is_told.handle, looker));
                FATE_CUDA(cudaStreamWaitEvent(side, is_told.handle, 0));
                fetch(l, side);
            }
            if (how == BRANCHED) {
                const cudaGraphNode_t * after   = nullptr;
                size_t                  n_after = 0;
                const cudaGraph_t       graph   = fate_cuda_captured(main, &after, &n_after);
                const cudaGraphNode_t   first[] = { fate_cuda_branch(graph, after, n_after, early ? n_after : 0, fate_look_on, n_chunks(l),
                                                                     FATE_LOOK_THREADS, look_bytes, layers_there, l, THRESHOLD, WANTED),
                                                    last };
                last = fate_cuda_branch(graph, first, last ? 2 : 1, early ? 1 : 0, fate_fetch, FATE_CUDA_FILL_BLOCKS, FATE_BESIDE_THREADS,
                                        0, layers_there, s.n_layers, l);
                pass<<<1, 1, 0, main>>>(static_cast<uint64_t>(random() % 40000));
                FATE_CUDA(cudaGetLastError());
            }
            if (how == BESIDE) { // time in which something can be brought
                for (volatile uint32_t spin = random() % 60000; spin > 0; spin = spin - 1) {
                }
            }
        }
        if (how == BRANCHED) {
            cudaGraph_t     graph;
            cudaGraphExec_t exec;
            FATE_CUDA(cudaStreamEndCapture(main, &graph));
            FATE_CUDA(cudaGraphInstantiate(&exec, graph, 0));
            FATE_CUDA(cudaGraphLaunch(exec, main));
            FATE_CUDA(cudaStreamSynchronize(main));
            FATE_CUDA(cudaGraphExecDestroy(exec));
            FATE_CUDA(cudaGraphDestroy(graph));
        }
        for (int32_t l = 0; how == BEHIND && l < s.n_layers; ++l) {
            if (n_chunks(l) > 0) {
                look(l, main);
                fetch(l, main);
            }
        }
        for (int32_t l = 0; l < s.n_layers; ++l) {
            const std::vector<int32_t> got = host(out[l], s.k, main);
            for (int32_t i = 0; i < s.k; ++i) {
                CHECK(got[i] >= 0 && got[i] < s.n_slots);
                const std::vector<char> held = host(slots[l] + got[i] * s.expert_bytes, s.expert_bytes, main);
                CHECK(memcmp(held.data(), sources[l] + rows[l][i] * s.expert_bytes, s.expert_bytes) == 0);
            }
        }
        FATE_CUDA(cudaDeviceSynchronize());
        for (int32_t l = 0; l < s.n_layers; ++l) {
            twin[l]->begin_step();
        }
        for (int32_t l = 0; l < s.n_layers; ++l) {
            const fate_ids             twin_ids = { reinterpret_cast<const char *>(rows[l].data()), s.k * 4, 1, s.k };
            std::vector<int32_t>       twin_slots(s.k);
            std::vector<uint8_t>       twin_hits(s.k);
            list_io                    io;
            const std::vector<int32_t> slot_of   = host(layers[l].slot_of, s.n_experts, main);
            const std::vector<int32_t> expert_of = host(layers[l].expert_of, s.n_slots, main);
            const std::vector<char>    held      = host(slots[l], s.expert_bytes * s.n_slots, main);
            const std::vector<int64_t> c         = host(layers[l].counters, FATE_N_COUNTERS, main);
            CHECK(fate_first_inconsistent_slot(slot_of, expert_of) == -1);
            for (int32_t slot = 0; slot < s.n_slots; ++slot) {
                CHECK(expert_of[slot] < 0 ||
                      memcmp(held.data() + slot * s.expert_bytes, sources[l] + expert_of[slot] * s.expert_bytes, s.expert_bytes) == 0);
            }
            CHECK(c[FATE_COUNTER_FILLS] == c[FATE_COUNTER_MISSES] - c[FATE_COUNTER_PREFETCH_LATE] + c[FATE_COUNTER_PREFETCHES]);
            for (int i = 0; step + 1 == n_steps && i < FATE_N_COUNTERS; ++i) {
                seen[how][i] += c[i];
            }
            if (!awaited) {
                continue;
            }
            for (int v = FATE_LOOKAHEAD_LAYERS - 1; v >= 0 && looks; --v) { // the farthest first
                if (l - v - 1 < 0) {
                    continue;
                }
                std::fill(chance.begin(), chance.end(), 0.0f);
                if (how == FORETOLD) {
                    for (int32_t i = 0; i < n_told; ++i) {
                        if (told_ids[step * n_told + i] >= 0) {
                            chance[told_ids[step * n_told + i]] = told[step * n_told + i];
                        }
                    }
                } else {
                    fate_gate_chances(gates[l - v - 1][v].host, x[l - v - 1].data(), scratch.data(), chance.data());
                }
                twin[l]->prefetch(chance.data(), THRESHOLD, fate_prefetch_most(WANTED, s.n_slots, s.k), io);
            }
            twin[l]->resolve(twin_ids, false, io, twin_slots.data(), twin_hits.data());
            const fate_table & table = twin[l]->table();
            CHECK(slot_of == std::vector<int32_t>(table.slot_of, table.slot_of + s.n_experts));
            CHECK(host(out[l], s.k, main) == twin_slots && host(hit[l], s.k, main) == twin_hits);
            for (int i = 0; i < FATE_N_COUNTERS; ++i) {
                CHECK(c[i] == twin[l]->counters()[i] || i == FATE_COUNTER_BYTES || i == FATE_COUNTER_ROUTED ||
                      i == FATE_COUNTER_PREFETCH_HIDDEN);
            }
        }
    }
    for (int32_t l = 0; l < s.n_layers; ++l) {
        FATE_CUDA(cudaFreeHost(sources[l]));
        FATE_CUDA(cudaFree(slots[l]));
    }
}

int main() {
    const shape shapes[] = {
        { 5, 32,  4, 12, 64,   3072,   false, false, false, 0, 0 },
        { 4, 128, 8, 40, 100,  9216,   true,  true,  true,  8, 4 },
        { 3, 40,  6, 13, 70,   65536,  false, true,  false, 5, 3 },
        { 6, 64,  4, 9,  2048, 270336, false, true,  false, 8, 2 },
        { 8, 32,  4, 8,  256,  55296,  false, false, false, 0, 0 },
        { 4, 300, 2, 90, 1111, 4096,   true,  false, true,  0, 0 },
    };
    try {
        uint32_t seed = 1;
        for (const shape & s : shapes) {
            for (int how = 0; how < N_ORDERS; ++how) {
                run(s, static_cast<order>(how), how == RUSHED ? 400 : 60, seed++);
            }
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    static const char * names[] = { "awaited", "beside", "rushed", "branched", "before", "behind", "foretold" };
    for (int how = 0; how < N_ORDERS; ++how) {
        print_prefetches(names[how], seen[how]);
    }
    CHECK(seen[AWAITED][FATE_COUNTER_PREFETCH_USEFUL] > 100 && seen[AWAITED][FATE_COUNTER_PREFETCH_CANCELLED] == 0);
    CHECK(seen[BESIDE][FATE_COUNTER_PREFETCH_USEFUL] > 0);
    CHECK(seen[RUSHED][FATE_COUNTER_PREFETCH_USEFUL] > 0 && seen[RUSHED][FATE_COUNTER_PREFETCH_CANCELLED] > 0);
    CHECK(seen[BRANCHED][FATE_COUNTER_PREFETCH_USEFUL] > 0 && seen[BRANCHED][FATE_COUNTER_PREFETCH_CANCELLED] > 0);
    CHECK(seen[BEFORE][FATE_COUNTER_PREFETCH_USEFUL] > 100 && seen[BEFORE][FATE_COUNTER_PREFETCH_CANCELLED] == 0);
    CHECK(seen[BEFORE][FATE_COUNTER_PREFETCH_LATE] == 0);
    CHECK(seen[BEHIND][FATE_COUNTER_PREFETCHES] == 0);
    CHECK(seen[FORETOLD][FATE_COUNTER_PREFETCHES] > 100);
    return check_result("test-cuda-lookahead");
}
