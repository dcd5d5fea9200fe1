#include "cuda_prefetch.h"

#include "cuda_prefetch.cuh"

#include <algorithm>
#include <cstring>

fate_cuda_prefetch::fate_cuda_prefetch(int ordinal, size_t n_layers, size_t max_experts, int32_t wanted, float threshold) :
    n_layers_(n_layers),
    max_experts_(max_experts),
    wanted_(wanted),
    threshold_(threshold) {
    plans_.allocate(n_layers * sizeof(fate_cuda_plan));
    waiting_.allocate(n_layers * max_experts);
    n_demands_.allocate(1);
    for (int i = 0; i < 2; ++i) {
        is_planned_[i].create();
    }
    settled_.create();
    ended_.create();
    int n_processors = 0;
    FATE_CUDA(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, ordinal));
    n_blocks_ = std::max(1, std::min(FATE_CUDA_FILL_BLOCKS, n_processors / 4)); // ops find room beside it
    FATE_CUDA(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking));        // last: nothing may throw behind it
}

fate_cuda_prefetch::~fate_cuda_prefetch() {
    cudaStreamDestroy(side_);
}

void fate_cuda_prefetch::bind(fate_cuda_layer & layer, size_t at) const {
    layer.plan      = reinterpret_cast<fate_cuda_plan *>(plans_.data) + at;
    layer.waiting   = waiting_.data + at * max_experts_;
    layer.n_demands = n_demands_.data;
    layer.n_pieces  = 0;
    for (int32_t t = 0; t < layer.n_tensors; ++t) {
        layer.n_pieces += fate_n_pieces(layer.tensors[t]);
    }
}

void fate_cuda_prefetch::reset(cudaStream_t stream) {
    FATE_CUDA(cudaStreamSynchronize(side_));
    is_busy_ = false;
    FATE_CUDA(cudaMemsetAsync(plans_.data, 0, n_layers_ * sizeof(fate_cuda_plan), stream));
    FATE_CUDA(cudaMemsetAsync(waiting_.data, 0, n_layers_ * max_experts_ * sizeof(int32_t), stream));
    FATE_CUDA(cudaMemsetAsync(n_demands_.data, 0, sizeof(uint32_t), stream));
}

void fate_cuda_prefetch::begin(const fate_cuda_layer * layers, cudaStream_t stream) {
    if (is_busy_) {
        FATE_CUDA(cudaEventRecord(ended_.handle, side_));
        FATE_CUDA(cudaStreamWaitEvent(stream, ended_.handle, 0));
        is_busy_ = false;
    }
    fate_settle<<<static_cast<unsigned>((n_layers_ + 31) / 32), 32, 0, stream>>>(layers, static_cast<int32_t>(n_layers_));
    FATE_CUDA(cudaGetLastError());
    FATE_CUDA(cudaEventRecord(settled_.handle, stream));
}

void fate_cuda_prefetch::launch(const fate_cuda_layer * layers, const int32_t * index, const float * chance, size_t n_all, int32_t stride,
                                bool waits, cudaStream_t stream) {
    const int    which = static_cast<int>(n_launched_++ % 2);
    const size_t bytes = n_all * stride * sizeof(float);
    if (!chances_[which].data) {
        chances_[which].allocate(bytes);
    }
    if (n_launched_ > 2) {
        FATE_CUDA(cudaEventSynchronize(is_planned_[which].handle)); // long done: two launches ago
    }
    memcpy(chances_[which].data, chance, bytes);
    is_busy_              = !waits; // before anything that can fail half-way
    const cudaStream_t on = waits ? stream : side_;
    if (!waits) {
        FATE_CUDA(cudaStreamWaitEvent(side_, settled_.handle, 0));
    }
    fate_plan<<<static_cast<unsigned>(n_layers_), FATE_CUDA_THREADS, 0, on>>>(
        layers, index, reinterpret_cast<float *>(chances_[which].data), stride, threshold_, wanted_);
    FATE_CUDA(cudaGetLastError());
    FATE_CUDA(cudaEventRecord(is_planned_[which].handle, on));
    fate_fetch<<<n_blocks_, FATE_CUDA_THREADS, 0, on>>>(layers, static_cast<int32_t>(n_layers_));
    FATE_CUDA(cudaGetLastError());
}
