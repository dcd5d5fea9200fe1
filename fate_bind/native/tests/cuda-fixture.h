// What the tests of the kernels share: arrays on the device, a layer's tables there, and a twin that tells what it moved.
#pragma once

#include "cuda_check.h"
#include "cuda_kernels.cuh"
#include "layer.h"

#include <cstdio>
#include <cstring>
#include <vector>

struct list_io : fate_layer_io {
    bool ask(const std::vector<int32_t> &, const std::vector<int32_t> &, const int64_t *, int32_t, int32_t *) override { return false; }
    void reject() override {}
    void evict(int32_t expert) override { evictions.push_back(expert); }
    void fill(int32_t expert, int32_t) override { fills.push_back(expert); }

    std::vector<int32_t> fills, evictions;
};

template <typename T> static T * device(size_t n, int byte = 0) {
    T * p = nullptr;
    FATE_CUDA(cudaMalloc(&p, n * sizeof(T)));
    FATE_CUDA(cudaMemset(p, byte, n * sizeof(T)));
    FATE_CUDA(cudaStreamSynchronize(nullptr)); // which the streams of the tests do not wait for
    return p;
}

// In host memory that the device reads.
template <typename T> static T * mapped(size_t n) {
    T * p = nullptr;
    FATE_CUDA(cudaHostAlloc(reinterpret_cast<void **>(&p), n * sizeof(T), cudaHostAllocMapped));
    return p;
}

// Behind what is enqueued on the stream.
template <typename T> static std::vector<T> host(const T * p, size_t n, cudaStream_t stream = nullptr) {
    std::vector<T> out(n);
    FATE_CUDA(cudaMemcpyAsync(out.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost, stream));
    FATE_CUDA(cudaStreamSynchronize(stream));
    return out;
}

// scores[n_experts], then the bonus.
[[maybe_unused]] static fate_cuda_opening publishing(const float * scores, int32_t n_experts, bool behind) {
    fate_cuda_opening opening = {};
    opening.publishes         = true;
    opening.behind            = behind;
    opening.scores            = scores;
    opening.bonus             = scores + n_experts;
    opening.stride            = n_experts;
    return opening;
}

[[maybe_unused]] static void print_prefetches(const char * name, const int64_t * counters) {
    printf("%10s: %lld prefetches, %lld useful, %lld late, %lld wasted, %lld cancelled\n", name,
           static_cast<long long>(counters[FATE_COUNTER_PREFETCHES]), static_cast<long long>(counters[FATE_COUNTER_PREFETCH_USEFUL]),
           static_cast<long long>(counters[FATE_COUNTER_PREFETCH_LATE]), static_cast<long long>(counters[FATE_COUNTER_PREFETCH_WASTED]),
           static_cast<long long>(counters[FATE_COUNTER_PREFETCH_CANCELLED]));
}

// A cold layer that is recorded, without its tensors.
static fate_cuda_layer cold_layer(int32_t n_experts, int32_t k, int32_t n_slots) {
    fate_cuda_layer layer;
    memset(&layer, 0, sizeof(layer));
    layer.n_experts = n_experts;
    layer.n_slots   = n_slots;
    layer.k         = k;
    layer.slot_of   = device<int32_t>(n_experts, 0xff);
    layer.expert_of = device<int32_t>(n_slots, 0xff);
    layer.last_use  = device<int64_t>(n_experts);
    layer.score     = device<float>(n_experts);
    layer.head      = device<fate_cuda_head>(1);
    layer.counters  = device<int64_t>(FATE_N_COUNTERS);
    layer.step      = device<fate_cuda_step>(1);
    layer.fills     = device<int32_t>(n_experts);
    layer.evictions = device<int32_t>(n_experts);
    layer.is_wide   = true;
    return layer;
}
