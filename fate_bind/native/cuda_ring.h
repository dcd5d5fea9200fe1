// The ring of one GPU: its pinned memory and the threads that fill it.
#pragma once

#include "courier.h"
#include "cuda_launch.h"
#include "device.h"
#include "ring.h"

#include <memory>
#include <thread>
#include <vector>

class fate_cuda_ring {
public:
    // On the current device. Destroy it when no kernel runs any more that may order.
    explicit fate_cuda_ring(const std::vector<fate_device_layer> & layers) {
        box_.allocate(sizeof(fate_ring_box));
        data_.allocate(bytes());
        desk_.allocate(1);
        fate_ring_clear(box());
        fate_ring_desk desk = {};
        FATE_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void **>(&desk.box), box_.data, 0));
        FATE_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void **>(const_cast<char **>(&desk.data)), data_.data, 0));
        fate_cuda_upload(desk_.data, &desk, sizeof(desk));

        std::vector<std::vector<fate_courier_tensor>> sources;
        for (const fate_device_layer & layer : layers) {
            sources.resize(std::max(sources.size(), static_cast<size_t>(layer.index) + 1));
            for (const fate_device_tensor & t : layer.tensors) {
                sources[layer.index].push_back({ static_cast<const char *>(t.source), t.expert_bytes });
            }
        }
        const int n_threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 4, 1, MAX_THREADS);
        courier_            = std::make_unique<fate_courier>(box(), data_.data, std::move(sources), n_threads);
    }

    static size_t bytes() { return static_cast<size_t>(FATE_RING_CHUNKS) * FATE_RING_CHUNK; }

    fate_ring_desk * desk() const { return desk_.data; }

    void wake() { courier_->wake(); }

private:
    static const int MAX_THREADS = 4; // one copies some 10 GB/s

    fate_ring_box & box() const { return *reinterpret_cast<fate_ring_box *>(box_.data); }

    pinned_buffer                 box_;
    pinned_buffer                 data_;
    device_array<fate_ring_desk>  desk_;
    std::unique_ptr<fate_courier> courier_; // ends first
};
