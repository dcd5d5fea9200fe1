// The ring that experts take to a GPU, threads in place of its blocks. Built with the thread sanitizer too.
#include "check.h"
#include "courier.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

struct host_io {
    uint32_t load_acquire(const uint32_t * word) {
        std::this_thread::yield();
        return fate_load_acquire(*word);
    }

    void store_release(uint32_t * word, uint32_t value) { fate_store_release(*word, value); }
};

// One launch: blocks take the chunks of an order as they come.
static std::vector<char> launch(fate_ring_box & box, fate_ring_desk & desk, int n_blocks, uint32_t units, int32_t layer,
                                const std::vector<int32_t> & experts) {
    const int32_t         n        = static_cast<int32_t>(experts.size());
    const uint32_t        n_chunks = fate_ring_chunks(units, n);
    std::vector<char>     got(static_cast<size_t>(n_chunks) * FATE_RING_CHUNK);
    std::atomic<uint32_t> next{ 0 };
    box.layer     = layer;
    box.n_experts = n;
    std::copy(experts.begin(), experts.end(), box.experts);
    fate_store_release(box.posted, ++desk.n_posted);
    std::vector<std::thread> blocks;
    for (int b = 0; b < n_blocks; ++b) {
        blocks.emplace_back([&] {
            host_io io;
            for (uint32_t i = next++; i < n_chunks; i = next++) {
                const uint32_t chunk = desk.first + i;
                fate_ring_await(box, chunk, io);
                memcpy(got.data() + static_cast<size_t>(i) * FATE_RING_CHUNK,
                       desk.data + static_cast<size_t>(fate_ring_place(chunk)) * FATE_RING_CHUNK, FATE_RING_CHUNK);
                fate_ring_give_back(box, chunk, io);
            }
        });
    }
    for (std::thread & block : blocks) {
        block.join();
    }
    desk.first += n_chunks;
    return got;
}

static void run(int n_couriers, int n_blocks, uint32_t seed) {
    std::mt19937                             random(seed);
    const std::vector<std::vector<uint64_t>> sizes = {
        {},
        { 4096, 4096, 6000 },
        { 1 },
        { 700000, 17, 300001 },
        { FATE_RING_CHUNK, 2 * FATE_RING_CHUNK + 16 }
    };
    const int32_t                                 n_experts = 24;
    std::vector<std::vector<std::vector<char>>>   data(sizes.size());
    std::vector<std::vector<fate_courier_tensor>> layers(sizes.size());
    for (size_t l = 0; l < sizes.size(); ++l) {
        for (const uint64_t size : sizes[l]) {
            data[l].emplace_back(size * n_experts);
            for (char & c : data[l].back()) {
                c = static_cast<char>(random());
            }
        }
        for (size_t t = 0; t < sizes[l].size(); ++t) {
            layers[l].push_back({ data[l][t].data(), sizes[l][t] });
        }
    }
    std::vector<char> ring(static_cast<size_t>(FATE_RING_CHUNKS) * FATE_RING_CHUNK);
    fate_ring_box     box{};
    fate_ring_clear(box);
    fate_ring_desk desk{};
    desk.data = ring.data();
    fate_courier courier(box, ring.data(), layers, n_couriers);
    for (int order = 0; order < 12; ++order) {
        const size_t         l = 1 + random() % (sizes.size() - 1);
        std::vector<int32_t> experts;
        for (int32_t i = 1 + static_cast<int32_t>(random() % n_experts); i > 0; --i) {
            experts.push_back(static_cast<int32_t>(random() % n_experts));
        }
        uint32_t units = 0;
        for (const uint64_t size : sizes[l]) {
            units += fate_ring_units(size);
        }
        courier.wake();
        const std::vector<char> got = launch(box, desk, n_blocks, units, static_cast<int32_t>(l), experts);
        const char *            at  = got.data();
        for (const int32_t expert : experts) {
            for (size_t t = 0; t < sizes[l].size(); ++t) {
                CHECK(memcmp(at, data[l][t].data() + static_cast<size_t>(expert) * sizes[l][t], sizes[l][t]) == 0);
                at += static_cast<size_t>(fate_ring_units(sizes[l][t])) * FATE_RING_UNIT;
            }
        }
    }
    CHECK(desk.first > FATE_RING_CHUNKS); // it went around
}

// Orders of one chunk, so that couriers meet at the next one all the time.
static void many(int n_couriers, int n_orders) {
    const uint64_t                                      size = 16384;
    std::vector<char>                                   data(24 * size);
    std::mt19937                                        random(7);
    const std::vector<std::vector<fate_courier_tensor>> layers = { { { data.data(), size } } };
    for (char & c : data) {
        c = static_cast<char>(random());
    }
    std::vector<char> ring(static_cast<size_t>(FATE_RING_CHUNKS) * FATE_RING_CHUNK);
    fate_ring_box     box{};
    fate_ring_clear(box);
    fate_courier courier(box, ring.data(), layers, n_couriers);
    host_io      io;
    int          n_wrong = 0;
    for (int order = 0; order < n_orders; ++order) {
        const int32_t expert = static_cast<int32_t>(random() % 24);
        if (order % 256 == 0) {
            courier.wake();
        }
        box.layer      = 0;
        box.n_experts  = 1;
        box.experts[0] = expert;
        fate_store_release(box.posted, static_cast<uint32_t>(order) + 1);
        const uint32_t chunk = static_cast<uint32_t>(order);
        fate_ring_await(box, chunk, io);
        n_wrong +=
            memcmp(ring.data() + static_cast<size_t>(fate_ring_place(chunk)) * FATE_RING_CHUNK, data.data() + expert * size, size) != 0;
        fate_ring_give_back(box, chunk, io);
    }
    CHECK(n_wrong == 0);
}

int main() {
    many(4, 100000);
    run(1, 1, 1);
    run(1, 8, 2);
    run(4, 3, 3);
    return check_result("test-courier");
}
