// The kernels against the host's layer: same tables, slots, counters and bytes after every step of random traces; experts straight from pinned memory
// and through the ring.
#include "check.h"
#include "cuda-fixture.h"
#include "cuda_ring.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

struct shape {
    int32_t             n_experts, k, n_slots;
    std::vector<size_t> expert_bytes; // of each tensor
    size_t              tail;
};

// How often a batch seeded from more rows than n_slots / k, and what ended them before its first row.
static struct {
    int more, by_slots, by_pairs;
} n_seedings;

static void run(const shape & s, bool through_ring, int n_steps, uint32_t seed) {
    std::mt19937    random(seed);
    const int32_t   max_rows = FATE_SEED_PAIRS / s.k + 40;
    fate_cuda_layer layer    = cold_layer(s.n_experts, s.k, s.n_slots);
    layer.n_tensors          = static_cast<int32_t>(s.expert_bytes.size());

    std::vector<char *> sources, slots, staging;
    for (size_t t = 0; t < s.expert_bytes.size(); ++t) {
        const size_t n = s.expert_bytes[t];
        char *       source;
        FATE_CUDA(cudaHostAlloc(reinterpret_cast<void **>(&source), n * s.n_experts + s.tail, cudaHostAllocMapped));
        for (size_t i = 0; i < n * s.n_experts; ++i) {
            source[i] = static_cast<char>(random());
        }
        sources.push_back(source);
        slots.push_back(device<char>(n * s.n_slots));
        staging.push_back(device<char>(n * s.n_experts + s.tail));
        fate_cuda_tensor & to = layer.tensors[t];
        to.source             = through_ring ? nullptr : source;
        to.slots              = slots.back();
        to.staging            = staging.back();
        to.expert_bytes       = n;
        to.width              = n % 16 == 0 ? 16 : n % 4 == 0 ? 4 : 1;
        to.n_units            = static_cast<uint32_t>(n / to.width);
        to.n_tail             = static_cast<uint32_t>(s.tail / to.width);
        layer.is_wide         = layer.is_wide && to.width == 16;
    }

    std::unique_ptr<fate_cuda_ring> ring;
    if (through_ring) {
        fate_device_layer from = { 0, s.n_experts, s.k, s.n_slots, {} };
        for (size_t t = 0; t < s.expert_bytes.size(); ++t) {
            from.tensors.push_back({ sources[t], slots[t], staging[t], s.expert_bytes[t], s.tail });
        }
        ring       = std::make_unique<fate_cuda_ring>(std::vector<fate_device_layer>{ from });
        layer.ring = ring->desk();
        ring->wake();
    }

    fate_layer        twin(s.n_experts, s.k, s.n_slots, 1);
    fate_cuda_layer * layers = device<fate_cuda_layer>(1);
    int32_t *         index  = device<int32_t>(1);
    float *           scores;
    int32_t *         ids    = device<int32_t>(max_rows * (s.k + 3));
    int32_t *         out    = device<int32_t>(max_rows * s.k);
    int32_t *         rec    = device<int32_t>(max_rows * s.k);
    float *           weight = device<float>(max_rows * s.k);
    uint8_t *         hit    = device<uint8_t>(max_rows * s.k);
    FATE_CUDA(cudaHostAlloc(reinterpret_cast<void **>(&scores), (s.n_experts + 1) * sizeof(float), cudaHostAllocMapped));
    fate_cuda_upload(layers, &layer, sizeof(layer));

    std::vector<int32_t> all(s.n_experts);
    for (int32_t e = 0; e < s.n_experts; ++e) {
        all[e] = e;
    }
    for (int step = 0; step < n_steps; ++step) {
        const bool    is_batch = step % 7 == 5;
        const bool    is_large = is_batch && random() % 2;
        const int32_t n_rows =
            is_large ? max_rows - static_cast<int32_t>(random() % 80) : 1 + static_cast<int32_t>(random() % (is_batch ? 40 : 3));
        const int32_t        stride = s.k + 3;
        std::vector<int32_t> rows(n_rows * stride, -7);
        // a working set that moves; a batch's may be small, so that many rows use the same experts
        const int32_t some = is_batch ? s.k + static_cast<int32_t>(random() % (s.n_experts - s.k + 1)) : std::max(s.k, s.n_experts / 3);
        for (int32_t row = 0; row < n_rows; ++row) {
            for (int32_t i = 0; i < s.k; ++i) {
                const int32_t j = i + static_cast<int32_t>(random() % (some - i));
                std::swap(all[i], all[j]);
                rows[row * stride + i] = all[random() % 50 != 0 ? i : 0]; // rarely twice in a row, as grovemoe does
            }
        }
        if (step % 11 == 10) {
            std::shuffle(all.begin(), all.end(), random);
        }
        fate_cuda_upload(ids, rows.data(), rows.size() * sizeof(int32_t));
        const fate_ids       twin_ids = { reinterpret_cast<const char *>(rows.data()), stride * 4, n_rows, s.k };
        const bool           pooled   = n_rows * s.k <= s.n_slots;
        std::vector<int32_t> twin_slots(n_rows * s.k);
        twin.begin_step();
        std::vector<uint8_t> twin_hits(n_rows * s.k);
        list_io              io;

        fate_cuda_call call = {};
        call.ids            = reinterpret_cast<const char *>(ids);
        call.stride         = stride * 4;
        call.n_rows         = n_rows;
        call.out            = out;
        call.record_k       = s.k;
        call.record_ids     = rec;
        call.record_hits    = hit;
        call.record_weights = weight;
        if (pooled) {
            const auto bring = through_ring ? fate_bring<false, false, true> : fate_bring<false>;
            bring<<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(s.n_experts)>>>(layer, call);
            twin.resolve(twin_ids, false, io, twin_slots.data(), twin_hits.data());
        } else {
            if (through_ring) {
                fate_stage_absent<<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS>>>(layer, call);
                FATE_CUDA(cudaGetLastError());
            }
            fate_stage<<<20, FATE_CUDA_THREADS>>>(through_ring ? fate_staged_from_ring(layer) : layer, call);
            FATE_CUDA(cudaGetLastError());
            // the staged experts, and what a kernel reads past them
            for (size_t t = 0; t < sources.size(); ++t) {
                const size_t            n    = s.expert_bytes[t];
                const std::vector<char> held = host(staging[t], n * s.n_experts + s.tail);
                std::vector<uint8_t>    touched(s.n_experts);
                for (int32_t i = 0; i < n_rows * s.k; ++i) {
                    touched[rows[i / s.k * stride + i % s.k]] = 1;
                }
                for (int32_t e = 0; e < s.n_experts; ++e) {
                    // through the ring what follows is zero where it is not another touched expert's
                    const size_t past = through_ring ? 0 : std::min(s.tail, n * (s.n_experts - 1 - e));
                    CHECK(!touched[e] || memcmp(held.data() + e * n, sources[t] + e * n, n + past) == 0);
                    for (size_t i = (e + 1) * n; through_ring && touched[e] && i < (e + 1) * n + s.tail; ++i) {
                        const size_t owner = i / n;
                        CHECK(held[i] == (owner < touched.size() && touched[owner] ? sources[t][i] : 0));
                    }
                }
                CHECK(std::all_of(held.end() - static_cast<std::ptrdiff_t>(s.tail), held.end(), [](char c) { return c == 0; }));
            }
            fate_bring<true><<<20, FATE_CUDA_THREADS, fate_bring_bytes(s.n_experts)>>>(layer, fate_seeds_of(layer, call));
            const int32_t n_seed_rows = fate_seed_rows(twin_ids, s.n_experts, s.n_slots);
            n_seedings.more += n_seed_rows > s.n_slots / s.k;
            if (n_seed_rows < n_rows) {
                ++(n_seed_rows < FATE_SEED_PAIRS / s.k ? n_seedings.by_slots : n_seedings.by_pairs);
            }
            twin.bypass(twin_ids);
            twin.seed(false, io);
        }
        FATE_CUDA(cudaGetLastError());
        FATE_CUDA(cudaDeviceSynchronize());

        const fate_table & table = twin.table();
        CHECK(host(layer.slot_of, s.n_experts) == std::vector<int32_t>(table.slot_of, table.slot_of + s.n_experts));
        CHECK(host(layer.expert_of, s.n_slots) == std::vector<int32_t>(table.expert_of, table.expert_of + s.n_slots));
        CHECK(host(layer.last_use, s.n_experts) == std::vector<int64_t>(table.last_use, table.last_use + s.n_experts));
        const fate_cuda_head head = host(layer.head, 1)[0];
        CHECK(head.clock == table.clock && head.arrived == 0);
        CHECK(head.published_at == table.published_at && head.bonus == table.bonus);
        const fate_cuda_step recorded = host(layer.step, 1)[0];
        CHECK(recorded.path == (pooled ? FATE_PATH_POOL : FATE_PATH_STAGED) && recorded.n_rows == n_rows);
        CHECK(host(layer.fills, recorded.n_fills) == io.fills);
        CHECK(host(layer.evictions, recorded.n_evictions) == io.evictions);
        const std::vector<int32_t> got   = host(out, n_rows * s.k);
        const std::vector<int32_t> noted = host(rec, n_rows * s.k);
        const std::vector<uint8_t> hits  = host(hit, n_rows * s.k);
        for (int32_t i = 0; i < n_rows * s.k; ++i) {
            const int32_t expert = rows[i / s.k * stride + i % s.k];
            CHECK(got[i] == (pooled ? twin_slots[i] : expert) && noted[i] == expert && hits[i] == (pooled && twin_hits[i]));
        }
        const std::vector<int64_t>   counted = host(layer.counters, FATE_N_COUNTERS);
        const std::vector<int64_t> & want    = twin.counters();
        for (const int c : { FATE_COUNTER_HITS, FATE_COUNTER_MISSES, FATE_COUNTER_FILLS, FATE_COUNTER_SEED_FILLS, FATE_COUNTER_EVICTIONS,
                             FATE_COUNTER_ROWS, FATE_COUNTER_ROWS_ALL_RESIDENT }) {
            CHECK(counted[c] == want[c]);
        }
        CHECK(counted[FATE_COUNTER_STAGED] == want[FATE_COUNTER_BYPASSED]);
        for (size_t t = 0; t < sources.size(); ++t) {
            const size_t            n    = s.expert_bytes[t];
            const std::vector<char> held = host(slots[t], n * s.n_slots);
            for (int32_t slot = 0; slot < s.n_slots; ++slot) {
                CHECK(table.expert_of[slot] < 0 || memcmp(held.data() + slot * n, sources[t] + table.expert_of[slot] * n, n) == 0);
            }
        }

        if (step % 5 == 4) {
            for (int32_t e = 0; e < s.n_experts; ++e) {
                scores[e] = static_cast<float>(random() % 4);
            }
            scores[s.n_experts] = static_cast<float>(random() % 3);
            const bool behind   = step % 2;
            fate_open<<<1, FATE_BESIDE_THREADS>>>(layers, index, publishing(scores, s.n_experts, behind));
            twin.publish(scores, scores[s.n_experts], behind);
            FATE_CUDA(cudaDeviceSynchronize());
        }
    }
    for (size_t t = 0; t < sources.size(); ++t) {
        FATE_CUDA(cudaFreeHost(sources[t]));
        FATE_CUDA(cudaFree(slots[t]));
        FATE_CUDA(cudaFree(staging[t]));
    }
}

int main() {
    const shape shapes[] = {
        { 32,   4, 4,   { 1536, 1536, 2048 },    0   },
        { 32,   4, 16,  { 1536, 1530, 2048, 4 }, 512 },
        { 8,    2, 7,   { 17, 68, 64 },          512 },
        { 128,  8, 16,  { 27648, 27648, 40320 }, 0   },
        { 128,  8, 64,  { 9216, 9216 },          512 },
        { 128,  8, 127, { 4096 },                0   },
        { 256,  8, 100, { 1024, 36 },            0   },
        { 1024, 8, 700, { 256 },                 512 },
        { 1000, 1, 2,   { 112 },                 0   },
        { 16,   4, 8,   { 3000000, 700001 },     512 },
    };
    try {
        uint32_t seed = 1;
        for (const shape & s : shapes) {
            for (const bool through_ring : { false, true }) {
                run(s, through_ring, steps(s.n_experts > 200 || s.expert_bytes[0] > 100000 ? 60 : 150), seed);
            }
            ++seed;
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    CHECK(takes_few_steps() || (n_seedings.more > 10 && n_seedings.by_slots > 10 && n_seedings.by_pairs > 10));
    return check_result("test-cuda");
}
