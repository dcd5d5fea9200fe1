#include "cuda_bulk.h"

#include "cuda_kernels.cuh"

fate_cuda_bulk::fate_cuda_bulk(int ordinal, const std::vector<fate_cuda_layer> & layers, const std::vector<fate_device_layer> & given,
                               const int32_t * slot_of, size_t stride) :
    layers_(layers),
    given_(given),
    slot_of_(slot_of),
    stride_(stride) {
    FATE_CUDA(cudaDeviceGetAttribute(&n_blocks_, cudaDevAttrMultiProcessorCount, ordinal));
    chains_ = fate_cuda_chains(ordinal, reinterpret_cast<const void *>(fate_batch_open));
    before_.allocate(layers.size() * stride);
    touched_.allocate(layers.size() * stride);
    clocks_.allocate(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        batches_.push_back({ before_.data + i * stride, touched_.data + i * stride, clocks_.data + i });
        parts_.emplace_back(layers[i].n_tensors);
        for (int32_t t = 0; t < layers[i].n_tensors; ++t) {
            part & p           = parts_[i][t];
            p.layer            = layers[i];
            p.layer.n_tensors  = 1;
            p.layer.tensors[0] = layers[i].tensors[t];
            p.layer.is_wide    = layers[i].tensors[t].width == 16;
            p.filled.create();
        }
    }
    reached_.create();
    tables_.allocate(layers.size() * stride * sizeof(int32_t));
    FATE_CUDA(cudaStreamCreateWithFlags(&engine_, cudaStreamNonBlocking)); // last: nothing may throw behind it
}

fate_cuda_bulk::~fate_cuda_bulk() {
    cudaStreamDestroy(engine_);
}

// Tables of a layer change in its own ops alone and where prefetch settles, and not before they are looked at here.
void fate_cuda_bulk::fetch(cudaStream_t stream) {
    FATE_CUDA(cudaMemcpyAsync(tables_.data, slot_of_, layers_.size() * stride_ * sizeof(int32_t), cudaMemcpyDeviceToHost, stream));
    FATE_CUDA(cudaStreamSynchronize(stream));
    for (auto & layer : parts_) {
        for (part & p : layer) {
            p.is_ordered = false;
            p.is_used    = false;
        }
    }
    ahead_      = -1;
    is_fetched_ = true;
}

void fate_cuda_bulk::begin(bool is_bulk, cudaStream_t stream) {
    join(stream);
    is_fetched_ = false;
    if (!is_bulk) {
        return;
    }
    fetch(stream);
    FATE_CUDA(cudaEventRecord(reached_.handle, stream));
    for (size_t t = 0; t < parts_[0].size(); ++t) {
        order(0, t);
    }
}

#if defined(FATE_LATE_FILLS)
static __global__ void fate_sleep() {
    for (int i = 0; i < 20; ++i) {
        __nanosleep(100000);
    }
}
#endif

// The copies of one order, given to the engine together: one by one they leave it idle in between (44 against 52 GB/s for pieces of 0.9 MB on PCIe 5).
void fate_cuda_bulk::copy() {
    if (to_.empty()) {
        return;
    }
#if defined(FATE_LATE_FILLS)
    for (size_t i = 0; i < to_.size(); ++i) {
        FATE_CUDA(cudaMemsetAsync(to_[i], 0xff, alone_[i], engine_));
    }
    fate_cuda_launch(fate_sleep, 1, 1, 0, engine_, chains_);
#endif
#if CUDART_VERSION >= 13000
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder       = cudaMemcpySrcAccessOrderStream;
    size_t first                    = 0;
    FATE_CUDA(cudaMemcpyBatchAsync(to_.data(), from_.data(), size_.data(), to_.size(), &attributes, &first, 1, engine_));
#else
    for (size_t i = 0; i < to_.size(); ++i) {
        FATE_CUDA(cudaMemcpyAsync(to_[i], from_[i], size_[i], cudaMemcpyHostToDevice, engine_));
    }
#endif
}

// Has the engine bring the experts without a slot of one tensor, behind the event `reached`.
void fate_cuda_bulk::order(size_t layer, size_t tensor) {
    const fate_device_tensor & t = given_[layer].tensors[tensor];
    part &                     p = parts_[layer][tensor];
    if (!t.is_part || p.is_ordered) {
        return;
    }
    to_.clear(); // of an order that failed
    from_.clear();
    size_.clear();
#if defined(FATE_LATE_FILLS)
    alone_.clear();
#endif
    ahead_                    = static_cast<int64_t>(layer);
    const int32_t * slot_of   = reinterpret_cast<const int32_t *>(tables_.data) + layer * stride_;
    const int32_t   n_experts = layers_[layer].n_experts;
    const char *    source    = static_cast<const char *>(t.source);
    char *          staging   = static_cast<char *>(t.staging);
    FATE_CUDA(cudaStreamWaitEvent(engine_, reached_.handle, 0));
    for (int32_t first = 0; first < n_experts; ++first) {
        if (slot_of[first] >= 0) {
            continue;
        }
        int32_t end = first + 1;
        while (end < n_experts && slot_of[end] < 0) {
            ++end;
        }
        const size_t at = first * t.expert_bytes;
        to_.push_back(staging + at);
        from_.push_back(source + at);
        size_.push_back((end - first) * t.expert_bytes + (end < n_experts ? t.tail_bytes : 0));
#if defined(FATE_LATE_FILLS)
        alone_.push_back((end - first) * t.expert_bytes);
#endif
        if (end == n_experts && t.tail_bytes > 0) { // behind the last expert there is nothing to read
            FATE_CUDA(cudaMemsetAsync(staging + end * t.expert_bytes, 0, t.tail_bytes, engine_));
        }
        first = end;
    }
    copy();
    FATE_CUDA(cudaEventRecord(p.filled.handle, engine_));
    p.is_ordered = true;
    is_busy_     = true;
}

void fate_cuda_bulk::launch(size_t layer, const fate_cuda_call & call, cudaStream_t stream) {
    const fate_cuda_layer & l     = layers_[layer];
    const fate_cuda_batch & batch = batches_[layer];
    if (!is_fetched_) {
        fetch(stream);
    }
    if (ahead_ >= 0 && ahead_ != static_cast<int64_t>(layer)) { // ordered for a layer that did not come
        join(stream);
        for (part & p : parts_[ahead_]) {
            p.is_ordered = false;
        }
    }
    // everything before this layer has read its staging tensors
    FATE_CUDA(cudaEventRecord(reached_.handle, stream));
    for (size_t t = 0; t < parts_[layer].size(); ++t) {
        order(layer, t);
    }
    ahead_ = -1;

    const int n_pairs = call.n_rows * l.k;
    fate_cuda_launch(fate_batch_open, 1, 256, 0, stream, chains_, l, batch, call.n_rows);
    fate_cuda_launch(fate_batch_note, (n_pairs + 255) / 256, 256, 0, stream, chains_, l, call, batch);
    fate_cuda_layer decides = l;
    decides.n_tensors       = 0; // the copies follow, tensor by tensor
    fate_cuda_launch(l.desk ? fate_bring<true, true> : fate_bring<true>, 1, FATE_CUDA_THREADS, fate_bring_bytes(l.n_experts), stream,
                     chains_, decides, fate_seeds_of(l, call));
    for (size_t t = 0; t < parts_[layer].size(); ++t) {
        if (!given_[layer].tensors[t].is_part) {
            fate_cuda_launch(fate_batch_stage, 1, FATE_CUDA_THREADS, 0, stream, chains_, parts_[layer][t].layer, batch, true);
            fate_cuda_launch(fate_batch_seed, 1, FATE_CUDA_THREADS, 0, stream, chains_, parts_[layer][t].layer, batch);
        }
    }
}

void fate_cuda_bulk::launch_part(size_t layer, size_t tensor, bool next_is_bulk, cudaStream_t stream) {
    // the products of this layer's earlier parts are enqueued: what they have read makes room for the next layer's
    if (next_is_bulk) {
        FATE_CUDA(cudaEventRecord(reached_.handle, stream));
        for (size_t t = 0; t < parts_[layer].size(); ++t) {
            for (size_t u = 0; parts_[layer][t].is_used && u < parts_[layer + 1].size(); ++u) {
                if (given_[layer + 1].tensors[u].staging == given_[layer].tensors[t].staging) {
                    order(layer + 1, u);
                }
            }
        }
    }
    part & p  = parts_[layer][tensor];
    p.is_used = true;
    fate_cuda_launch(fate_batch_stage, n_blocks_, FATE_CUDA_THREADS, 0, stream, chains_, p.layer, batches_[layer], false);
#if !defined(FATE_FAULT_NOT_AWAITED)
    FATE_CUDA(cudaStreamWaitEvent(stream, p.filled.handle, 0));
#endif
    fate_cuda_launch(fate_batch_seed, n_blocks_, FATE_CUDA_THREADS, 0, stream, chains_, p.layer, batches_[layer]);
}

void fate_cuda_bulk::join(cudaStream_t stream) {
    if (!is_busy_) {
        return;
    }
    FATE_CUDA(cudaEventRecord(reached_.handle, engine_));
    FATE_CUDA(cudaStreamWaitEvent(stream, reached_.handle, 0));
    is_busy_ = false;
}
