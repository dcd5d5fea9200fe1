#include "cuda_prefetch.h"

#include "cuda_prefetch.cuh"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>

static const size_t MEASURED_BYTES = 32 << 20; // at most, unless an expert has more

fate_cuda_prefetch::fate_cuda_prefetch(int ordinal, const fate_device_config & config, size_t max_experts) :
    n_layers_(config.layers.size()),
    max_experts_(max_experts),
    wanted_(config.prefetch_experts),
    threshold_(config.prefetch_threshold),
    eases_(config.prefetch_eases),
    waits_(config.prefetch_waits),
    views_(n_layers_),
    n_chunks_(n_layers_),
    n_tables_(fate_tables_bytes(static_cast<int32_t>(max_experts))) {
    plans_.allocate(n_layers_ * sizeof(fate_cuda_plan));
    waiting_.allocate(n_layers_ * max_experts);
    words_.allocate(2);
    for (fate_cuda_event * event : { &ended_[0], &ended_[1], &shown_, &told_ }) {
        event->create();
    }
    chains_ = fate_cuda_chains(ordinal, reinterpret_cast<const void *>(fate_fetch));
    see(config.layers);
    worth_           = fate_worth(ns_per_expert(config), n_views_ > 0 ? FATE_WORTH_LOOK : FATE_WORTH_PLAN);
    int n_processors = 0;
    FATE_CUDA(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, ordinal));
    n_blocks_ = static_cast<unsigned>(std::max(1, std::min(FATE_CUDA_FILL_BLOCKS, n_processors / 8))); // ops find room beside it
    int least = 0; // of priority; the highest: its blocks do not wait for all of a product
    FATE_CUDA(cudaDeviceGetStreamPriorityRange(&least, &priority_));
    FATE_CUDA(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, priority_));
    const cudaError_t failed =
        cudaStreamCreateWithPriority(&looker_, cudaStreamNonBlocking, priority_); // last: nothing may throw behind it
    if (failed != cudaSuccess) {
        cudaStreamDestroy(side_);
        FATE_CUDA(failed);
    }
}

fate_cuda_prefetch::~fate_cuda_prefetch() {
    cudaStreamDestroy(looker_);
    cudaStreamDestroy(side_);
}

// How long the copy of an expert takes, of those of all layers on average, alone on the link, which is measured with many experts in a row.
double fate_cuda_prefetch::ns_per_expert(const fate_device_config & config) {
    size_t                     total     = 0;
    const fate_device_tensor * largest   = nullptr;
    int32_t                    n_experts = 0; // of its layer
    for (const fate_device_layer & layer : config.layers) {
        for (const fate_device_tensor & t : layer.tensors) {
            total += t.expert_bytes;
            if (!largest || t.expert_bytes > largest->expert_bytes) {
                largest   = &t;
                n_experts = layer.n_experts;
            }
        }
    }
    const size_t       most    = largest->expert_bytes;
    const size_t       n_bytes = std::min(most * static_cast<size_t>(n_experts), std::max(most, MEASURED_BYTES));
    device_array<char> to;
    fate_cuda_event    began, ended;
    to.allocate(n_bytes);
    began.create(true);
    ended.create(true);
    float best = 0;
    for (int i = 0; i < 4; ++i) { // the link may have to wake
        FATE_CUDA(cudaEventRecord(began.handle, cudaStreamPerThread));
        FATE_CUDA(cudaMemcpyAsync(to.data, largest->source, n_bytes, cudaMemcpyHostToDevice, cudaStreamPerThread));
        FATE_CUDA(cudaEventRecord(ended.handle, cudaStreamPerThread));
        FATE_CUDA(cudaEventSynchronize(ended.handle));
        float ms = 0;
        FATE_CUDA(cudaEventElapsedTime(&ms, began.handle, ended.handle));
        best = i < 2 ? ms : std::min(best, ms);
    }
    const double expert_bytes = static_cast<double>(total) / static_cast<double>(n_layers_);
    const double ns           = 1e6 * best * expert_bytes / static_cast<double>(n_bytes);
    return config.throttle > 0 ? std::max(ns, 1e9 * expert_bytes / config.throttle) : ns;
}

// What layers see of others: where it lies on the device.
void fate_cuda_prefetch::see(const std::vector<fate_device_layer> & layers) {
    for (const fate_device_layer & layer : layers) {
        index_.push_back(layer.index);
    }
    std::vector<int8_t> weights;
    std::vector<float>  numbers;
    for (size_t i = 0; i < n_layers_; ++i) {
        const fate_device_layer & layer = layers[i];
        max_embd_                       = std::max(max_embd_, layer.views.empty() ? 0 : layer.n_embd);
        for (const fate_device_view & view : layer.views) {
            n_views_ += view.index >= 0;
            weights.insert(weights.end(), view.weights.begin(), view.weights.end());
            for (const std::vector<float> * part : { &view.scale, &view.bias, &view.selection_bias, &view.ratio }) {
                numbers.insert(numbers.end(), part->begin(), part->end());
            }
        }
    }
    if (n_views_ == 0) {
        return;
    }
    sights_.allocate(n_layers_ * sizeof(fate_cuda_sight));
    inputs_.allocate(n_layers_ * max_embd_);
    weights_.allocate(std::max<size_t>(weights.size(), 1));
    numbers_.allocate(std::max<size_t>(numbers.size(), 1));
    selections_.allocate(n_layers_ * FATE_LOOKAHEAD_LAYERS * max_experts_);
    fate_cuda_upload(weights_.data, weights.data(), weights.size());
    fate_cuda_upload(numbers_.data, numbers.data(), numbers.size() * sizeof(float));
    const int8_t * weight = weights_.data;
    const float *  number = numbers_.data;
    const auto     take   = [&](const std::vector<float> & part) {
        const float * at = part.empty() ? nullptr : number;
        number += part.size();
        return at;
    };
    for (size_t i = 0; i < n_layers_; ++i) {
        fate_cuda_sight & sight = views_[i];
        memset(&sight, 0, sizeof(sight));
        sight.input  = inputs_.data + i * max_embd_;
        sight.n_embd = layers[i].n_embd;
        for (size_t v = 0; v < FATE_LOOKAHEAD_LAYERS; ++v) {
            fate_cuda_view & view = sight.views[v];
            view.target           = -1;
            view.selection        = selections_.data + (i * FATE_LOOKAHEAD_LAYERS + v) * max_experts_;
            if (v >= layers[i].views.size()) {
                continue;
            }
            const fate_device_view & from = layers[i].views[v];
            for (size_t target = 0; target < n_layers_; ++target) {
                view.target = index_[target] == from.index ? static_cast<int32_t>(target) : view.target;
            }
            view.distance            = from.distance;
            view.gate                = from.gate;
            view.gate.weights        = weight;
            view.gate.scale          = take(from.scale);
            view.gate.bias           = take(from.bias);
            view.gate.selection_bias = take(from.selection_bias);
            view.gate.ratio          = take(from.ratio);
            weight += from.weights.size();
            n_chunks_[i] += fate_n_chunks(view);
        }
    }
    fate_cuda_upload(sights_.data, views_.data(), n_layers_ * sizeof(fate_cuda_sight));
    n_look_ = n_tables_ + fate_input_bytes(max_embd_);
    allow(reinterpret_cast<const void *>(fate_look_on), n_look_);
}

// Shared memory that a kernel may be launched with.
void fate_cuda_prefetch::allow(const void * kernel, size_t n_bytes) {
    static std::mutex                 mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    cudaFuncAttributes                now;
    FATE_CUDA(cudaFuncGetAttributes(&now, kernel));
    if (now.maxDynamicSharedSizeBytes < static_cast<int>(n_bytes)) { // another engine may need more
        FATE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(n_bytes)));
    }
}

void fate_cuda_prefetch::foretell(const fate_predictions & predictions, const int64_t * end) {
    foretold_.allocate(predictions.ids.size());
    foretold_chances_.allocate(predictions.chances.size());
    fate_cuda_upload(foretold_.data, predictions.ids.data(), predictions.ids.size() * sizeof(int32_t));
    fate_cuda_upload(foretold_chances_.data, predictions.chances.data(), predictions.chances.size() * sizeof(float));
    for (size_t i = 0; i < n_layers_; ++i) {
        for (fate_cuda_view & view : views_[i].views) {
            const auto horizon = std::find(predictions.horizons.begin(), predictions.horizons.end(), view.distance);
            if (view.target < 0 || horizon == predictions.horizons.end()) {
                continue;
            }
            const size_t at = predictions.at(horizon - predictions.horizons.begin(), index_[view.target]);
            view.ids        = foretold_.data + at;
            view.chances    = foretold_chances_.data + at;
            view.end        = end;
            view.n_tokens   = predictions.n_tokens;
            view.n_foretold = predictions.m;
            view.stride     = static_cast<int64_t>(predictions.n_layers) * predictions.m;
        }
    }
    fate_cuda_upload(sights_.data, views_.data(), n_layers_ * sizeof(fate_cuda_sight));
}

void fate_cuda_prefetch::bind(fate_cuda_layer & layer, size_t at) const {
    layer.plan       = reinterpret_cast<fate_cuda_plan *>(plans_.data) + at;
    layer.sight      = n_chunks_[at] > 0 ? reinterpret_cast<fate_cuda_sight *>(sights_.data) + at : nullptr;
    layer.waiting    = waiting_.data + at * max_experts_;
    layer.n_demands  = words_.data;
    layer.n_posts    = words_.data + 1;
    layer.is_awaited = waits_;
    layer.n_pieces   = 0;
    for (int32_t t = 0; t < layer.n_tensors; ++t) {
        layer.n_pieces += fate_n_pieces(layer.tensors[t]);
    }
}

void fate_cuda_prefetch::reset(cudaStream_t stream) {
    FATE_CUDA(cudaStreamSynchronize(side_));
    FATE_CUDA(cudaStreamSynchronize(looker_));
    is_busy_[0] = is_busy_[1] = false;
    worth_.reset();
    FATE_CUDA(cudaMemsetAsync(plans_.data, 0, n_layers_ * sizeof(fate_cuda_plan), stream));
    FATE_CUDA(cudaMemsetAsync(waiting_.data, 0, n_layers_ * max_experts_ * sizeof(int32_t), stream));
    FATE_CUDA(cudaMemsetAsync(words_.data, 0, 2 * sizeof(uint32_t), stream));
}

bool fate_cuda_prefetch::begin(bool is_told, const fate_worth_seen & seen, cudaStream_t stream) {
    join(stream);
    const int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
    rests_            = !waits_ && !worth_.begin(is_told, seen, now);
    looks_            = is_told && n_views_ > 0 && !rests_;
    return looks_;
}

void fate_cuda_prefetch::join(cudaStream_t stream) {
    for (int i = 0; i < 2; ++i) {
        if (is_busy_[i]) {
            FATE_CUDA(cudaEventRecord(ended_[i].handle, i == 0 ? side_ : looker_));
            FATE_CUDA(cudaStreamWaitEvent(stream, ended_[i].handle, 0));
        }
        is_busy_[i] = false;
    }
}

void fate_cuda_prefetch::look_on(const fate_cuda_layer * layers, size_t from, bool chained, cudaStream_t stream) {
    if (n_chunks_[from] == 0) {
        return;
    }
    const int32_t at   = static_cast<int32_t>(from);
    const auto    look = [&](cudaStream_t on) { // which does not wait by itself: where steps wait, not in the chain
        fate_cuda_launch(fate_look_on, static_cast<int>(n_chunks_[from]), FATE_LOOK_THREADS, n_look_, on, chains_ && !waits_, layers, at,
                         threshold_, wanted_);
    };
    if (waits_) {
        look(stream);
        return;
    }
    const cudaGraphNode_t * after   = nullptr;
    size_t                  n_after = 0;
    unsigned long long      capture = 0;
    if (const cudaGraph_t graph = fate_cuda_captured(stream, &after, &n_after, &capture)) { // replayed in steps that look and in others
        branch(layers, from, graph, capture, after, n_after, chained);
        return;
    }
    if (!looks_) {
        return;
    }
    is_busy_[0] = is_busy_[1] = true; // before anything that can fail half-way
    FATE_CUDA(cudaEventRecord(shown_.handle, stream));
    FATE_CUDA(cudaStreamWaitEvent(looker_, shown_.handle, 0));
    look(looker_);
    FATE_CUDA(cudaEventRecord(told_.handle, looker_));
    FATE_CUDA(cudaStreamWaitEvent(side_, told_.handle, 0));
    fetch_on(layers, at, side_);
}

// The step's own kernels go on beside what is added here: a graph has no end before all of its nodes have. Not so under HIP, which wants every branch joined by a
// stream: there steps look only where they are not captured.
void fate_cuda_prefetch::branch([[maybe_unused]] const fate_cuda_layer * layers, [[maybe_unused]] size_t from,
                                [[maybe_unused]] cudaGraph_t graph, [[maybe_unused]] unsigned long long capture,
                                [[maybe_unused]] const cudaGraphNode_t * after, [[maybe_unused]] size_t n_after,
                                [[maybe_unused]] bool chained) {
#if !defined(__HIP__)
    const int32_t         at      = static_cast<int32_t>(from);
    const bool            early   = chained && fate_cuda_starts_early();
    const cudaGraphNode_t look    = fate_cuda_branch(graph, after, n_after, early ? n_after : 0, fate_look_on, n_chunks_[from],
                                                     FATE_LOOK_THREADS, n_look_, layers, at, threshold_, wanted_);
    const cudaGraphNode_t first[] = { look, fetch_ };
    fetch_   = fate_cuda_branch(graph, first, capture == capture_ ? 2 : 1, early ? 1 : 0, fate_fetch, n_blocks_, FATE_BESIDE_THREADS, 0,
                                layers, static_cast<int32_t>(n_layers_), at);
    capture_ = capture;
#endif
}

cudaStream_t fate_cuda_prefetch::beside(cudaStream_t stream, cudaEvent_t begun) {
    if (waits_) {
        return stream;
    }
    is_busy_[0] = true;
    FATE_CUDA(cudaStreamWaitEvent(side_, begun, 0));
    return side_;
}

void fate_cuda_prefetch::fetch(const fate_cuda_layer * layers, cudaStream_t stream, cudaEvent_t planned) {
    if (waits_) {
        fetch_on(layers, -1, stream);
        return;
    }
    if (!alone_) {
        alone_.make(priority_, fate_fetch, n_blocks_, FATE_BESIDE_THREADS, layers, static_cast<int32_t>(n_layers_), -1);
    }
    alone_.launch(beside(stream, planned));
}

// from: the layer that is telling of others, -1: none.
void fate_cuda_prefetch::fetch_on(const fate_cuda_layer * layers, int32_t from, cudaStream_t on) {
    fate_cuda_launch(fate_fetch, static_cast<int>(n_blocks_), FATE_BESIDE_THREADS, 0, on, chains_, layers, static_cast<int32_t>(n_layers_),
                     from);
}
