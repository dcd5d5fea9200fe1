// The host's side of a ring: threads that bring what the GPU orders. They make no CUDA call.
#pragma once

#include "poller.h"
#include "ring.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

// A tensor of a layer, in the model's memory.
struct fate_courier_tensor {
    const char * data;
    uint64_t     expert_bytes;
};

class fate_courier {
public:
    // layers[index among all layers]; empty where there is nothing to bring. box and data outlive it.
    fate_courier(fate_ring_box & box, char * data, std::vector<std::vector<fate_courier_tensor>> layers, int n_threads);

    void wake(); // a step begins: orders may come

private:
    bool bring();
    bool accept();
    void copy(uint32_t chunk);

    fate_ring_box &                               box_;
    char *                                        data_;
    std::vector<std::vector<fate_courier_tensor>> layers_;

    // the order at hand; changes only when all its chunks were taken
    std::mutex                               accept_mutex_;
    std::atomic<uint32_t>                    n_accepted_{ 0 };
    uint32_t                                 first_   = 0;
    const std::vector<fate_courier_tensor> * tensors_ = nullptr;
    uint32_t                                 units_   = 0; // of an expert, all tensors
    std::vector<int32_t>                     experts_;
    std::atomic<uint32_t>                    end_{ 0 };    // chunk behind the order
    std::atomic<uint32_t>                    next_{ 0 };   // chunk to be brought by a thread

    std::vector<std::unique_ptr<fate_poller>> pollers_;    // last: they use the others
};
