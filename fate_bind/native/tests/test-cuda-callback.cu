// Callback mode's kernels against the host's layer in callback mode: a policy that answers, refuses, lies or is late; decode is a replayed graph.
#include "check.h"
#include "cuda_callback.h"
#include "cuda_kernels.cuh"
#include "cuda_ring.h"
#include "layer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

struct shape {
    int32_t n_experts, k, n_slots, n_rows;
    size_t  expert_bytes;
};

enum behaviour { ANSWERS, REFUSES, LIES, IS_LATE };

static const int32_t INDEX      = 5; // of the layer
static const int64_t TIMEOUT_NS = 30 * 1000 * 1000;
static const auto    LATE       = std::chrono::milliseconds(90);

static bool is_in(const int32_t * experts, int32_t n, int32_t expert) {
    return std::find(experts, experts + n, expert) != experts + n;
}

// A function of what is told and of who is resident: kernel and twin must ask the same to get the same.
static void name_victims(const fate_table & table, const fate_miss & miss, int32_t * victims) {
    std::vector<std::pair<uint64_t, int32_t>> order;
    for (int32_t e = 0; e < table.n_experts; ++e) {
        if (table.slot_of[e] >= 0 && !is_in(miss.needed, miss.n_needed, e)) {
            const uint64_t mix = static_cast<uint64_t>(miss.last_use[e]) * 2654435761u + static_cast<uint64_t>(e) * 40503u +
                                 static_cast<uint64_t>(miss.missing[0]);
            order.push_back({ mix % 65521, e });
        }
    }
    std::sort(order.begin(), order.end());
    for (int32_t i = 0; i < miss.n_victims; ++i) {
        victims[i] = order.at(i).second;
    }
}

struct policy : fate_asker {
    explicit policy(const fate_table & twin) : table(twin) {}

    const fate_table &     table; // of the twin, which goes second: who is resident
    std::atomic<behaviour> next{ ANSWERS };
    std::atomic<int>       n_asked{ 0 }, n_rejects{ 0 };
    std::vector<int32_t>   needed, missing; // as told last

    bool ask(const fate_miss & miss, int32_t * victims) override {
        const behaviour now = next;
        needed.assign(miss.needed, miss.needed + miss.n_needed);
        missing.assign(miss.missing, miss.missing + miss.n_missing);
        CHECK(miss.layer == INDEX);
        ++n_asked;
        name_victims(table, miss, victims);
        if (now == LIES && miss.n_victims > 0) {
            victims[miss.n_victims - 1] = miss.needed[0];
        }
        if (now == IS_LATE) {
            std::this_thread::sleep_for(LATE);
        }
        return now != REFUSES;
    }

    void reject() override { ++n_rejects; }

    void wait() override {}
};

struct twin_io : fate_layer_io {
    twin_io(const policy & p, int n_asked_before, bool timed_out) : p_(p), before_(n_asked_before), timed_out_(timed_out) {}

    bool ask(const std::vector<int32_t> & needed, const std::vector<int32_t> & missing, const int64_t * last_use, int32_t n,
             int32_t * victims) override {
        ++n_asks;
        if (p_.n_asked != before_) {
            CHECK(p_.n_asked == before_ + 1 && p_.needed == needed && p_.missing == missing);
        } else {
            CHECK(timed_out_);
        }
        const fate_miss miss = {
            INDEX, static_cast<int32_t>(needed.size()), needed.data(), static_cast<int32_t>(missing.size()), missing.data(), last_use, n
        };
        name_victims(p_.table, miss, victims);
        if (p_.next == LIES && n > 0) {
            victims[n - 1] = needed[0];
        }
        return !timed_out_ && p_.next != REFUSES;
    }

    void reject() override { ++n_rejects; }

    void evict(int32_t expert) override { evictions.push_back(expert); }

    void fill(int32_t expert, int32_t) override { fills.push_back(expert); }

    std::vector<int32_t> fills, evictions;
    int                  n_asks    = 0;
    int                  n_rejects = 0;

private:
    const policy & p_;
    int            before_;
    bool           timed_out_;
};

template <typename T> static std::vector<T> host(const device_array<T> & a, size_t n) {
    std::vector<T> out(n);
    FATE_CUDA(cudaMemcpy(out.data(), a.data, n * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
}

template <typename T> static void make(device_array<T> & a, size_t n, int byte = 0) {
    a.allocate(n);
    FATE_CUDA(cudaMemset(a.data, byte, n * sizeof(T)));
    FATE_CUDA(cudaStreamSynchronize(nullptr)); // which the test's stream does not wait for
}

static void run(const shape & s, bool through_ring, int n_steps, uint32_t seed) {
    const int32_t n_more   = 40;
    const int32_t max_rows = s.n_slots / s.k + n_more; // of a prompt
    const int32_t stride   = s.k + 1;
    std::mt19937  random(seed);

    device_array<int32_t>        slot_of, expert_of, fills, evictions, ids, out, noted;
    device_array<int64_t>        last_use, counters;
    device_array<float>          score;
    device_array<fate_cuda_head> head;
    device_array<fate_cuda_step> recorded;
    device_array<uint8_t>        hits;
    device_array<char>           slots, staging;
    pinned_buffer                source;
    make(slot_of, s.n_experts, 0xff);
    make(expert_of, s.n_slots, 0xff);
    make(last_use, s.n_experts);
    make(score, s.n_experts);
    make(head, 1);
    make(counters, FATE_N_COUNTERS);
    make(recorded, 1);
    make(fills, s.n_experts);
    make(evictions, s.n_experts);
    make(ids, max_rows * stride);
    make(out, max_rows * s.k);
    make(noted, max_rows * s.k);
    make(hits, max_rows * s.k);
    make(slots, s.n_slots * s.expert_bytes);
    make(staging, s.n_experts * s.expert_bytes);
    source.allocate(s.n_experts * s.expert_bytes);
    for (size_t i = 0; i < s.n_experts * s.expert_bytes; ++i) {
        source.data[i] = static_cast<char>(random());
    }

    fate_layer         twin(s.n_experts, s.k, s.n_slots, 1);
    const fate_table & table = twin.table();
    policy             p(table);
    fate_cuda_callback callback(p, TIMEOUT_NS);

    fate_cuda_layer layer;
    memset(&layer, 0, sizeof(layer));
    layer.index      = INDEX;
    layer.n_experts  = s.n_experts;
    layer.n_slots    = s.n_slots;
    layer.k          = s.k;
    layer.n_tensors  = 1;
    layer.is_wide    = true;
    layer.slot_of    = slot_of.data;
    layer.expert_of  = expert_of.data;
    layer.last_use   = last_use.data;
    layer.score      = score.data;
    layer.head       = head.data;
    layer.counters   = counters.data;
    layer.desk       = callback.desk();
    layer.step       = recorded.data;
    layer.fills      = fills.data;
    layer.evictions  = evictions.data;
    layer.tensors[0] = { source.data, slots.data, staging.data, s.expert_bytes, static_cast<uint32_t>(s.expert_bytes / 16), 0, 16 };

    std::unique_ptr<fate_cuda_ring> ring;
    if (through_ring) {
        fate_device_layer from = { INDEX, s.n_experts, s.k, s.n_slots, {} };
        from.tensors.push_back({ source.data, slots.data, staging.data, s.expert_bytes, 0 });
        ring                    = std::make_unique<fate_cuda_ring>(std::vector<fate_device_layer>{ from });
        layer.ring              = ring->desk();
        layer.tensors[0].source = nullptr;
        ring->wake();
    }

    fate_cuda_call call = {};
    call.ids            = reinterpret_cast<const char *>(ids.data);
    call.stride         = stride * 4;
    call.n_rows         = s.n_rows;
    call.out            = out.data;
    call.record_k       = s.k;
    call.record_ids     = noted.data;
    call.record_hits    = hits.data;

    cudaStream_t    stream;
    cudaGraph_t     graph;
    cudaGraphExec_t decode;
    FATE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    FATE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    const auto bring = through_ring ? fate_bring<false, true, true> : fate_bring<false, true>;
    bring<<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(s.n_experts), stream>>>(layer, call);
    FATE_CUDA(cudaStreamEndCapture(stream, &graph));
    FATE_CUDA(cudaGraphInstantiate(&decode, graph, 0));

    std::vector<int32_t> all(s.n_experts);
    for (int32_t e = 0; e < s.n_experts; ++e) {
        all[e] = e;
    }
    int     n_by_behaviour[4] = {};
    int64_t waited_ns         = 0; // for answers in time
    for (int step = 0; step < n_steps; ++step) {
        const bool           pooled = step % 9 != 7;
        const int32_t        n_rows = pooled ? s.n_rows : s.n_slots / s.k + 1 + static_cast<int32_t>(random() % n_more);
        std::vector<int32_t> rows(n_rows * stride, -7);
        for (int32_t row = 0; row < n_rows; ++row) {
            const int32_t some = std::max(s.k, s.n_slots + 4); // a working set that moves
            for (int32_t i = 0; i < s.k; ++i) {
                const int32_t j = i + static_cast<int32_t>(random() % (std::min(some, s.n_experts) - i));
                std::swap(all[i], all[j]);
                rows[row * stride + i] = all[i];
            }
        }
        if (step % 13 == 12) {
            std::shuffle(all.begin(), all.end(), random);
        }
        fate_cuda_upload(ids.data, rows.data(), rows.size() * sizeof(int32_t));

        p.next                        = step % 10 == 4 ? REFUSES : step % 10 == 6 ? LIES : step % 20 == 13 ? IS_LATE : ANSWERS;
        const int              n_told = p.n_asked;
        const int              n_lies = p.n_rejects;
        const fate_device_asks before = callback.get_asks();
        callback.wake();
        if (pooled) {
            FATE_CUDA(cudaGraphLaunch(decode, stream));
        } else {
            call.n_rows = n_rows;
            if (through_ring) {
                fate_stage_absent<<<FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, 0, stream>>>(layer, call);
            }
            fate_stage<<<20, FATE_CUDA_THREADS, 0, stream>>>(through_ring ? fate_staged_from_ring(layer) : layer, call);
            fate_bring<true, true><<<20, FATE_CUDA_THREADS, fate_bring_bytes(s.n_experts), stream>>>(layer, fate_seeds_of(layer, call));
            FATE_CUDA(cudaGetLastError());
        }
        FATE_CUDA(cudaStreamSynchronize(stream));
        const bool is_left_late = p.next == IS_LATE && pooled; // the next step finds the policy still busy
        if (!is_left_late) {
            callback.rest();
        }
        const fate_device_asks asks = callback.get_asks();

        const fate_ids       twin_ids = { reinterpret_cast<const char *>(rows.data()), stride * 4, n_rows, s.k };
        std::vector<int32_t> twin_slots(n_rows * s.k);
        std::vector<uint8_t> twin_hits(n_rows * s.k);
        const bool           timed_out = asks.n_timeouts > before.n_timeouts;
        twin_io              io(p, n_told, timed_out);
        if (pooled) {
            twin.resolve(twin_ids, true, io, twin_slots.data(), twin_hits.data());
        } else {
            twin.bypass(twin_ids);
            twin.seed(true, io);
        }
        CHECK(asks.n - before.n == io.n_asks); // a layer without a miss asks nobody
        CHECK(timed_out == (p.next == IS_LATE && io.n_asks > 0) || step % 20 == 14);
        CHECK(timed_out || p.n_rejects - n_lies == io.n_rejects);
        CHECK(io.n_asks > 0 || asks.waited_ns == before.waited_ns);
        n_by_behaviour[p.next] += io.n_asks;
        waited_ns += timed_out ? 0 : asks.waited_ns - before.waited_ns;

        CHECK(host(slot_of, s.n_experts) == std::vector<int32_t>(table.slot_of, table.slot_of + s.n_experts));
        CHECK(host(expert_of, s.n_slots) == std::vector<int32_t>(table.expert_of, table.expert_of + s.n_slots));
        CHECK(host(last_use, s.n_experts) == std::vector<int64_t>(table.last_use, table.last_use + s.n_experts));
        const fate_cuda_head h = host(head, 1)[0];
        CHECK(h.clock == table.clock && h.arrived == 0);
        const fate_cuda_step r = host(recorded, 1)[0];
        CHECK(r.path == (pooled ? FATE_PATH_POOL : FATE_PATH_STAGED) && r.n_rows == n_rows);
        CHECK(host(fills, r.n_fills) == io.fills);
        CHECK(host(evictions, r.n_evictions) == io.evictions);
        const std::vector<int32_t> got     = host(out, n_rows * s.k);
        const std::vector<uint8_t> was_hit = host(hits, n_rows * s.k);
        for (int32_t i = 0; i < n_rows * s.k; ++i) {
            CHECK(got[i] == (pooled ? twin_slots[i] : rows[i / s.k * stride + i % s.k]) && was_hit[i] == (pooled && twin_hits[i]));
        }
        const std::vector<int64_t>   counted = host(counters, FATE_N_COUNTERS);
        const std::vector<int64_t> & want    = twin.counters();
        for (const int c : { FATE_COUNTER_HITS, FATE_COUNTER_MISSES, FATE_COUNTER_FILLS, FATE_COUNTER_SEED_FILLS, FATE_COUNTER_EVICTIONS,
                             FATE_COUNTER_ROWS, FATE_COUNTER_ROWS_ALL_RESIDENT }) {
            CHECK(counted[c] == want[c]);
        }
        const std::vector<char> held = host(slots, s.n_slots * s.expert_bytes);
        for (int32_t slot = 0; slot < s.n_slots; ++slot) {
            CHECK(table.expert_of[slot] < 0 ||
                  memcmp(held.data() + slot * s.expert_bytes, source.data + table.expert_of[slot] * s.expert_bytes, s.expert_bytes) == 0);
        }
        const fate_desk desk = [&] {
            fate_desk d;
            FATE_CUDA(cudaMemcpy(&d, callback.desk(), sizeof(d), cudaMemcpyDeviceToHost));
            return d;
        }();
        CHECK(desk.tickets == 0 && desk.verdict == FATE_VERDICT_NONE);
    }
    callback.rest();
    for (const int n : n_by_behaviour) {
        CHECK(n > 0 || takes_few_steps());
    }
    const fate_device_asks asks = callback.get_asks();
    printf("%4d experts, %3d slots, top %d, %d rows: %lld asked, %lld too late, %.1f us each in time\n", s.n_experts, s.n_slots, s.k,
           s.n_rows, static_cast<long long>(asks.n), static_cast<long long>(asks.n_timeouts),
           static_cast<double>(waited_ns) / 1e3 / static_cast<double>(asks.n - asks.n_timeouts));
    FATE_CUDA(cudaGraphExecDestroy(decode));
    FATE_CUDA(cudaGraphDestroy(graph));
    FATE_CUDA(cudaStreamDestroy(stream));
}

int main() {
    const shape shapes[] = {
        { 32,   4, 4,   1, 1536  },
        { 32,   4, 16,  3, 1536  },
        { 8,    2, 7,   2, 64    },
        { 128,  8, 16,  1, 40320 },
        { 128,  8, 64,  5, 4096  },
        { 1024, 8, 700, 8, 256   },
    };
    try {
        uint32_t seed = 1;
        for (const shape & s : shapes) {
            run(s, seed % 2 == 0, steps(200), seed);
            ++seed;
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    return check_result("test-cuda-callback");
}
