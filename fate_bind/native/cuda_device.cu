// The CUDA half of the engine: owns a device's tables and buffers, launches, brings records back.
#include "cuda_bulk.h"
#include "cuda_callback.h"
#include "cuda_check.h"
#include "cuda_kernels.cuh"
#include "cuda_launch.h"
#include "cuda_linear.h"
#include "cuda_prefetch.h"
#include "cuda_ring.h"
#include "device.h"
#include "pin.h"

#include "ggml-cuda.h"

#include <algorithm>
#include <cstring>

int get_mmvq_mmid_max_batch(ggml_type type, int cc); // upstream's mmvq.cuh

// From so many uses of an expert on average, nearly all are used: whatever has no slot can be brought before the ids are known.
static const int32_t BULK_USES      = 8;
static const int32_t MAX_ROWS_FLOAT = 8; // upstream's kernels for unquantised types do not look at the number of experts

std::string fate_device_refuse(ggml_backend_dev_t dev) {
    try {
        fate_cuda_ordinal(dev);
        return "";
    } catch (const fate_error & e) {
        return e.what();
    }
}

int32_t fate_device_max_rows(ggml_backend_dev_t dev, ggml_type type) {
    int major = 0;
    int minor = 0;
    FATE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, fate_cuda_ordinal(dev)));
    FATE_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, fate_cuda_ordinal(dev)));
    return ggml_is_quantized(type) ? get_mmvq_mmid_max_batch(type, 100 * major + 10 * minor) : MAX_ROWS_FLOAT;
}

void fate_device_mark(ggml_tensor * op, void (*launch)(ggml_tensor * dst, void * stream), bool is_eager) {
    const ggml_cuda_custom custom = { GGML_CUDA_CUSTOM_MAGIC, launch, is_eager };
    static_assert(GGML_CUDA_CUSTOM_OFFSET + sizeof(custom) <= GGML_MAX_OP_PARAMS, "op_params are too small");
    memcpy(reinterpret_cast<char *>(op->op_params) + GGML_CUDA_CUSTOM_OFFSET, &custom, sizeof(custom));
}

int64_t fate_device_captured_nodes(void * stream) {
    size_t n = 0;
    if (const cudaGraph_t graph = fate_cuda_captured(static_cast<cudaStream_t>(stream))) {
        FATE_CUDA(cudaGraphGetNodes(graph, nullptr, &n));
    }
    return static_cast<int64_t>(n);
}

class fate_cuda_device final : public fate_device {
public:
    fate_cuda_device(int ordinal, const fate_device_config & config);
    ~fate_cuda_device() override;

    void             reset() override;
    std::string      begin(int32_t n_tokens, bool first_is_bulk, bool is_told, const fate_device_orders & orders) override;
    void             launch(size_t layer, uint8_t path, ggml_tensor * dst, void * stream) override;
    bool             is_bulk(size_t layer, int32_t n_rows) const override;
    void             launch_bulk(size_t layer, ggml_tensor * dst, void * stream) override;
    void             launch_part(size_t layer, size_t tensor, bool next_is_bulk, void * stream) override;
    std::string      end(int which) override;
    void             collect(int which, fate_record & record) override;
    void             publish(const float * scores, const float * bonus, bool behind) override;
    std::string      prefetch(const float * chance) override;
    std::string      set_linear(const fate_linear * linear) override;
    void             foretell(const fate_predictions & predictions, const fate_router & router) override;
    void             get_counters(std::vector<int64_t> & counters) const override;
    void             get_times(std::vector<int64_t> & times) const override;
    void             get_launches(int64_t & launches, int64_t & captures) const override;
    fate_device_asks get_asks() const override;
    std::string      bounced() const override;
    void             get_tables(size_t layer, std::vector<int32_t> & slot_of, std::vector<int32_t> & expert_of) const override;

private:
    // Where the parts of what comes back lie; the part that grows with the tokens is last.
    struct parts {
        size_t counters, steps, fills, evictions, foretold, chances, ids, weights, hits, size;
    };

    parts          parts_of(int32_t n_tokens) const;
    void           pin(const fate_device_config & config);
    void           bind(const fate_device_config & config);
    fate_cuda_call call_of(size_t layer, const ggml_tensor * dst);
    void           enqueue(uint8_t path, const fate_cuda_layer & layer, const fate_cuda_call & call);
    void           note_launch();
    void           note_prefetches();
    void           open(fate_cuda_opening opening, const fate_device_orders & orders, cudaStream_t on);
    void           fail(ggml_tensor * dst);
    const void *   on_device(const void * p) const;
    int64_t        expert_bytes_of(size_t layer) const;

    // Of a layer, for the record.
    size_t n_foretold() const { return config_.horizons.empty() ? 0 : FATE_LOOKAHEAD_LAYERS * FATE_LOOKAHEAD_MOST; }

    int newest_open() const { return static_cast<int>((n_opened_ - 1) % 2); }

    size_t n_all() const { return 1 + static_cast<size_t>(config_.layers.back().index); } // layers that scores are told of

    size_t pairs(int32_t n_tokens) const { return layers_.size() * static_cast<size_t>(n_tokens) * max_k_; }

    const int                    ordinal_;
    const fate_device_config     config_;
    bool                         chains_   = false; // programmatic dependent launch
    int                          n_blocks_ = 0;     // of kernels that have the device to themselves
    std::vector<fate_pin>        pins_;
    std::string                  no_pin_;           // why there are none: experts come through the ring
    std::vector<fate_cuda_layer> layers_;
    size_t                       max_experts_ = 0;
    int32_t                      max_k_       = 0;

    device_array<int32_t>         maps_;  // slot_of, expert_of
    device_array<char>            state_; // last_use, score, head
    size_t                        state_bytes_ = 0;
    device_array<char>            back_;  // parts
    device_array<fate_cuda_layer> device_layers_;
    device_array<int32_t>         index_;
    device_array<int64_t>         times_;
    pinned_buffer                 home_[2];
    fate_cuda_event               is_home_[2];
    pinned_buffer                 orders_[2];    // scores, bonus, chances
    fate_cuda_event               is_open_[2];   // what the buffer's kernel does is done
    int64_t                       n_opened_ = 0;
    int                           begun_    = 0; // the one of is_open_ that the step began with

    std::unique_ptr<fate_cuda_bulk>      bulk_;
    std::unique_ptr<fate_cuda_prefetch>  prefetch_;  // null: none
    std::unique_ptr<fate_cuda_evaluator> evaluator_; // of a linear model, null: none

    cudaStream_t    stream_       = nullptr;         // of the backend, known from the first launch on
    int32_t         n_tokens_     = 0;
    int32_t         tokens_in_[2] = { 0, 0 };
    int             last_         = -1; // the buffer of the last step, -1: none since the reset
    int64_t         n_launches_   = 0;
    fate_worth_seen seen_;
    int64_t         n_captures_ = 0;

    std::unique_ptr<fate_cuda_callback> callback_; // null: table mode
    std::unique_ptr<fate_cuda_ring>     ring_;     // null: kernels read experts from the page-locked source
};

static fate_cuda_tensor tensor_of(const fate_device_tensor & from, const void * source) {
    fate_cuda_tensor t;
    t.source       = static_cast<const char *>(source);
    t.slots        = static_cast<char *>(from.slots);
    t.staging      = static_cast<char *>(from.staging);
    t.expert_bytes = from.expert_bytes;

    const uintptr_t all = reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(from.slots) |
                          reinterpret_cast<uintptr_t>(from.staging) | from.expert_bytes | from.tail_bytes;
    t.width             = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
    t.n_units           = static_cast<uint32_t>(from.expert_bytes / t.width);
    t.n_tail            = static_cast<uint32_t>(from.tail_bytes / t.width);
    return t;
}

// What layers see of others is large, and of use only while it is taken to the device.
static fate_device_config without_views(fate_device_config config) {
    for (fate_device_layer & layer : config.layers) {
        layer.views.clear();
    }
    return config;
}

fate_cuda_device::fate_cuda_device(int ordinal, const fate_device_config & config) : ordinal_(ordinal), config_(without_views(config)) {
    const device_scope scope(ordinal);
    FATE_CUDA(cudaDeviceGetAttribute(&n_blocks_, cudaDevAttrMultiProcessorCount, ordinal));
    chains_ = fate_cuda_chains(ordinal, reinterpret_cast<const void *>(fate_bring<false>));

    pin(config);
    if (!no_pin_.empty()) {
        no_pin_ += config.prefetch_experts > 0 ? "; nothing is prefetched through it" : "";
        ring_ = std::make_unique<fate_cuda_ring>(config.layers);
    }
    if (config.asker) {
        callback_ = std::make_unique<fate_cuda_callback>(*config.asker, config.timeout_ns);
    }
    bind(config);
    bulk_ = std::make_unique<fate_cuda_bulk>(ordinal, layers_, config_.layers, maps_.data, max_experts_);
    reset();
}

// All ranges or none.
void fate_cuda_device::pin(const fate_device_config & config) {
    if (!config.page_lock) {
        no_pin_ = "page_lock is false";
        return;
    }
    try {
        for (const fate_host_range & range : config.ranges) {
            pins_.emplace_back(range.data, range.size);
        }
    } catch (const fate_error & e) {
        pins_.clear();
        no_pin_ = e.what();
    }
}

const void * fate_cuda_device::on_device(const void * p) const {
    for (size_t i = 0; i < pins_.size(); ++i) {
        const char * begin = static_cast<const char *>(config_.ranges[i].data);
        if (p >= begin && p < begin + config_.ranges[i].size) {
            return pins_[i].on_device(p);
        }
    }
    throw fate_error(FATE_STATUS_MODEL, "an expert lies outside of the page-locked memory");
}

fate_cuda_device::parts fate_cuda_device::parts_of(int32_t n_tokens) const {
    const size_t n = layers_.size();
    parts        p;
    p.counters  = 0;
    p.steps     = p.counters + n * FATE_N_COUNTERS * sizeof(int64_t);
    p.fills     = p.steps + n * sizeof(fate_cuda_step);
    p.evictions = p.fills + n * max_experts_ * sizeof(int32_t);
    p.foretold  = p.evictions + n * max_experts_ * sizeof(int32_t);
    p.chances   = p.foretold + n * n_foretold() * sizeof(int32_t);
    p.ids       = p.chances + n * n_foretold() * sizeof(float);
    p.weights   = p.ids + pairs(n_tokens) * sizeof(int32_t);
    p.hits      = p.weights + (config_.weights ? pairs(n_tokens) * sizeof(float) : 0);
    p.size      = config_.wants_steps ? p.hits + pairs(n_tokens) : p.steps;
    return p;
}

// Makes the device's memory and points the layers at it.
void fate_cuda_device::bind(const fate_device_config & config) {
    const size_t n = config.layers.size();
    layers_.resize(n);
    for (const fate_device_layer & from : config.layers) {
        if (from.n_experts > FATE_CUDA_MAX_EXPERTS || from.tensors.size() > FATE_CUDA_MAX_TENSORS) {
            throw fate_error(FATE_STATUS_MODEL,
                             fate_format("layer %d has %d experts in %zu tensors; the CUDA engine serves up to %d in %d", from.index,
                                         from.n_experts, from.tensors.size(), FATE_CUDA_MAX_EXPERTS, FATE_CUDA_MAX_TENSORS));
        }
        max_experts_ = std::max(max_experts_, static_cast<size_t>(from.n_experts));
        max_k_       = std::max(max_k_, from.k);
    }
    const size_t rows       = n * max_experts_;
    const size_t head_bytes = n * sizeof(fate_cuda_head);
    state_bytes_            = rows * (sizeof(int64_t) + sizeof(float)) + head_bytes;
    maps_.allocate(2 * rows);
    if (config.times) {
        times_.allocate(n * FATE_N_TIMES);
    }
    state_.allocate(state_bytes_);
    const parts p = parts_of(config.max_tokens);
    back_.allocate(p.size);

    int64_t *            last_use = reinterpret_cast<int64_t *>(state_.data);
    fate_cuda_head *     head     = reinterpret_cast<fate_cuda_head *>(state_.data + rows * sizeof(int64_t));
    float *              score    = reinterpret_cast<float *>(state_.data + rows * sizeof(int64_t) + head_bytes);
    int32_t              most     = 0;
    std::vector<int32_t> index(n);
    for (size_t i = 0; i < n; ++i) {
        const fate_device_layer & from = config.layers[i];
        fate_cuda_layer &         to   = layers_[i];
        memset(&to, 0, sizeof(to));
        to.index     = from.index;
        to.n_experts = from.n_experts;
        to.n_slots   = from.n_slots;
        to.k         = from.k;
        to.n_tensors = static_cast<int32_t>(from.tensors.size());
        to.slot_of   = maps_.data + i * max_experts_;
        to.expert_of = maps_.data + rows + i * max_experts_;
        to.last_use  = last_use + i * max_experts_;
        to.score     = score + i * max_experts_;
        to.head      = head + i;
        to.counters  = reinterpret_cast<int64_t *>(back_.data + p.counters) + i * FATE_N_COUNTERS;
        to.times     = config.times ? times_.data + i * FATE_N_TIMES : nullptr;
        to.desk      = callback_ ? callback_->desk() : nullptr;
        to.ring      = ring_ ? ring_->desk() : nullptr;
        if (config.wants_steps) {
            to.step      = reinterpret_cast<fate_cuda_step *>(back_.data + p.steps) + i;
            to.fills     = reinterpret_cast<int32_t *>(back_.data + p.fills) + i * max_experts_;
            to.evictions = reinterpret_cast<int32_t *>(back_.data + p.evictions) + i * max_experts_;
            if (n_foretold() > 0) {
                to.foretold        = reinterpret_cast<int32_t *>(back_.data + p.foretold) + i * n_foretold();
                to.foretold_chance = reinterpret_cast<float *>(back_.data + p.chances) + i * n_foretold();
            }
        }
        uint64_t n_units      = 0;
        double   expert_bytes = 0;
        to.is_wide            = true;
        for (int32_t t = 0; t < to.n_tensors; ++t) {
            to.tensors[t] = tensor_of(from.tensors[t], ring_ ? nullptr : on_device(from.tensors[t].source));
            n_units += to.tensors[t].n_units + to.tensors[t].n_tail + 2 * FATE_CUDA_LINE_UNITS;
            to.is_wide = to.is_wide && to.tensors[t].width == 16;
            expert_bytes += static_cast<double>(from.tensors[t].expert_bytes);
        }
        if (n_units * from.n_experts >= INT32_MAX) {
            throw fate_error(FATE_STATUS_MODEL, fate_format("layer %d: its experts are too many or too oddly sized to copy", from.index));
        }
        to.ns_per_expert = config.throttle > 0 ? static_cast<float>(1e9 * expert_bytes / config.throttle) : 0.0f;
        index[i]         = from.index;
        most             = std::max(most, from.index);
    }
    if (config.prefetch_experts > 0 && !ring_ && !callback_) {
        prefetch_ = std::make_unique<fate_cuda_prefetch>(ordinal_, config, max_experts_);
        for (size_t i = 0; i < n; ++i) {
            prefetch_->bind(layers_[i], i);
        }
    }
    device_layers_.allocate(n);
    index_.allocate(n);
    fate_cuda_upload(device_layers_.data, layers_.data(), n * sizeof(fate_cuda_layer));
    fate_cuda_upload(index_.data, index.data(), n * sizeof(int32_t));
    for (int i = 0; i < 2; ++i) {
        home_[i].allocate(p.size);
        is_home_[i].create();
        orders_[i].allocate(n_all() * (2 * config.stride + 1) * sizeof(float));
        is_open_[i].create();
    }
}

fate_cuda_device::~fate_cuda_device() {
    try {
        const device_scope scope(ordinal_);
        FATE_CUDA(cudaDeviceSynchronize());
    } catch (const fate_error &) {
        // a lost device: there is nothing left to wait for
    }
}

void fate_cuda_device::reset() {
    const device_scope scope(ordinal_);
    const parts        p = parts_of(0);
    if (prefetch_) {
        prefetch_->reset(stream_);
    }
    FATE_CUDA(cudaMemsetAsync(maps_.data, 0xff, 2 * layers_.size() * max_experts_ * sizeof(int32_t), stream_));
    FATE_CUDA(cudaMemsetAsync(state_.data, 0, state_bytes_, stream_));
    FATE_CUDA(cudaMemsetAsync(back_.data, 0, config_.wants_steps ? p.fills : p.steps, stream_));
    if (!stream_) {
        FATE_CUDA(cudaDeviceSynchronize());
    }
    last_ = -1;
    seen_ = {};
    if (callback_) {
        callback_->reset();
    }
}

std::string fate_cuda_device::begin(int32_t n_tokens, bool first_is_bulk, bool is_told, const fate_device_orders & orders) {
    n_tokens_ = n_tokens;
    if (callback_) {
        callback_->wake();
    }
    if (ring_) {
        ring_->wake();
    }
    try {
        const device_scope scope(ordinal_);
        fate_cuda_opening  opening = {};
        opening.begins             = true;
        opening.publishes          = orders.scores || (orders.told && evaluator_->has_scores());
        if (!stream_) { // nothing has run
            if (opening.publishes || orders.told) {
                open(opening, { orders.scores, orders.bonus, nullptr, orders.told }, nullptr);
            }
            return "";
        }
        fate_device_orders now = orders;
        if (prefetch_) {
            note_prefetches();
            opening.looks = prefetch_->begin(is_told, seen_, stream_);
        }
        if (n_foretold() > 0 && config_.wants_steps) { // behind what told of the step before
            const parts p = parts_of(0);
            FATE_CUDA(cudaMemsetAsync(back_.data + p.foretold, 0xff, p.chances - p.foretold, stream_));
            FATE_CUDA(cudaMemsetAsync(back_.data + p.chances, 0, p.ids - p.chances, stream_));
        }
        if (times_.data) {
            FATE_CUDA(cudaMemsetAsync(times_.data, 0, layers_.size() * FATE_N_TIMES * sizeof(int64_t), stream_));
        }
        const bool is_run = prefetch_ && prefetch_->runs();
        now.chance        = is_run ? now.chance : nullptr;
        opening.plans     = is_run && (now.chance || now.predicts);
        if (prefetch_ || opening.publishes || now.told) {
            open(opening, now, stream_);
            begun_ = newest_open();
            if (opening.plans) {
                prefetch_->fetch(device_layers_.data, stream_, is_open_[begun_].handle);
            }
        } else if (config_.wants_steps) { // layers that the step leaves out say so
            FATE_CUDA(cudaMemsetAsync(back_.data + parts_of(0).steps, 0, layers_.size() * sizeof(fate_cuda_step), stream_));
        }
        bulk_->begin(first_is_bulk, stream_);
        return "";
    } catch (const fate_error & e) {
        return e.what();
    }
}

// Does before the step, or beside it, what the orders say.
void fate_cuda_device::open(fate_cuda_opening opening, const fate_device_orders & orders, cudaStream_t on) {
    const int    which  = static_cast<int>(n_opened_++ % 2);
    const size_t n_all  = this->n_all();
    const size_t n_rows = n_all * config_.stride;
    if (n_opened_ > 2) {
        FATE_CUDA(cudaEventSynchronize(is_open_[which].handle)); // long done: two ago
    }
    float *    home = reinterpret_cast<float *>(orders_[which].data);
    const auto put  = [&](const float * from, size_t n) {
        const float * to = from ? home : nullptr;
        home             = from ? std::copy_n(from, n, home) : home;
        return to;
    };
    opening.scores    = put(orders.scores, n_rows);
    opening.bonus     = put(orders.bonus, n_all);
    opening.chances   = put(orders.chance, n_rows);
    opening.stride    = config_.stride;
    opening.threshold = prefetch_ ? prefetch_->threshold() : 0.0f;
    opening.wanted    = config_.prefetch_experts;
    size_t n_bytes    = opening.plans ? fate_tables_bytes(static_cast<int32_t>(max_experts_)) : 0;
    if (orders.told) {
        opening.model           = evaluator_->view();
        opening.told            = evaluator_->put(which, *orders.told);
        opening.told.ids        = reinterpret_cast<const int32_t *>(back_.data + parts_of(1).ids);
        opening.told.ids_stride = max_k_;
        opening.page_at         = n_bytes; // a multiple of 32, as the tables' entries are
        n_bytes                 = opening.page_at + evaluator_->n_bytes();
    }
    fate_cuda_launch(fate_open, static_cast<int>(layers_.size()), FATE_BESIDE_THREADS, n_bytes, on, chains_, device_layers_.data,
                     index_.data, opening);
    FATE_CUDA(cudaEventRecord(is_open_[which].handle, on));
    if (!on) {
        FATE_CUDA(cudaDeviceSynchronize());
    }
}

// What came back last tells what prefetch was good for; a step that is still under way tells nothing yet.
void fate_cuda_device::note_prefetches() {
    if (last_ < 0 || cudaEventQuery(is_home_[last_].handle) != cudaSuccess) {
        cudaGetLastError(); // not ready is no error
        return;
    }
    const int64_t * counters = reinterpret_cast<const int64_t *>(home_[last_].data);
    seen_                    = {};
    for (size_t i = 0; i < layers_.size(); ++i) {
        const int64_t * c = counters + i * FATE_N_COUNTERS;
        seen_.n_brought += c[FATE_COUNTER_PREFETCHES];
        seen_.n_hidden += static_cast<double>(c[FATE_COUNTER_PREFETCH_USEFUL]) +
                          static_cast<double>(c[FATE_COUNTER_PREFETCH_HIDDEN]) / static_cast<double>(expert_bytes_of(i));
        seen_.n_came += c[FATE_COUNTER_FILLS] - c[FATE_COUNTER_SEED_FILLS];
    }
}

void fate_cuda_device::enqueue(uint8_t path, const fate_cuda_layer & layer, const fate_cuda_call & call) {
    if (path == FATE_PATH_POOL) {
        const auto bring = ring_ ? (callback_ ? fate_bring<false, true, true> : fate_bring<false, false, true>) :
                                   (callback_ ? fate_bring<false, true> :
                                    prefetch_ ? fate_bring<false, false, false, true> :
                                                fate_bring<false>);
        fate_cuda_launch(bring, FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, fate_bring_bytes(layer.n_experts), stream_, chains_, layer, call);
        return;
    }
    bulk_->join(stream_);
    if (ring_) {
        fate_cuda_launch(fate_stage_absent, FATE_CUDA_FILL_BLOCKS, FATE_CUDA_THREADS, 0, stream_, chains_, layer, call);
    }
    fate_cuda_launch(fate_stage, n_blocks_, FATE_CUDA_THREADS, 0, stream_, chains_, ring_ ? fate_staged_from_ring(layer) : layer, call);
    // from staging while it holds them
    fate_cuda_launch(callback_ ? fate_bring<true, true> : fate_bring<true>, n_blocks_, FATE_CUDA_THREADS, fate_bring_bytes(layer.n_experts),
                     stream_, chains_, layer, fate_seeds_of(layer, call));
}

fate_cuda_call fate_cuda_device::call_of(size_t layer, const ggml_tensor * dst) {
    const ggml_tensor * ids     = dst->src[0];
    const ggml_tensor * weights = dst->src[2];

    fate_cuda_call call = {};
    call.ids            = static_cast<const char *>(ids->data);
    call.stride         = static_cast<int64_t>(ids->nb[1]);
    call.n_rows         = static_cast<int32_t>(ids->ne[1]);
    call.out            = static_cast<int32_t *>(dst->data);
    if (dst->src[3] && layers_[layer].sight) {
        call.input = static_cast<const float *>(dst->src[3]->data);
    }
    if (config_.wants_steps) {
        const parts  p   = parts_of(n_tokens_);
        const size_t at  = layer * static_cast<size_t>(n_tokens_) * max_k_;
        call.record_k    = max_k_;
        call.record_ids  = reinterpret_cast<int32_t *>(back_.data + p.ids) + at;
        call.record_hits = reinterpret_cast<uint8_t *>(back_.data + p.hits) + at;
        if (weights && config_.weights) {
            call.weights        = static_cast<const char *>(weights->data);
            call.weights_nb1    = static_cast<int64_t>(weights->nb[1]);
            call.weights_nb2    = static_cast<int64_t>(weights->nb[2]);
            call.record_weights = reinterpret_cast<float *>(back_.data + p.weights) + at;
        }
    }
    return call;
}

void fate_cuda_device::note_launch() {
    ++n_launches_;
    n_captures_ += fate_cuda_captured(stream_) != nullptr;
}

void fate_cuda_device::launch(size_t layer, uint8_t path, ggml_tensor * dst, void * stream) {
    stream_ = static_cast<cudaStream_t>(stream);
    fate_cuda_call call;
    try {
        call = call_of(layer, dst);
        enqueue(path, layers_[layer], call);
        note_launch();
    } catch (const fate_error &) {
        fail(dst);
        throw;
    }
    if (call.input && path == FATE_PATH_POOL) { // whose op has shown it, or is about to; where this fails the op's result stands
        prefetch_->look_on(device_layers_.data, layer, chains_, stream_);
    }
}

// What reads the result of an op that failed must stay within the experts.
void fate_cuda_device::fail(ggml_tensor * dst) {
    cudaMemsetAsync(dst->data, 0, ggml_nbytes(dst), stream_);
    cudaGetLastError();
}

bool fate_cuda_device::is_bulk(size_t layer, int32_t n_rows) const {
    const fate_device_layer & l = config_.layers[layer];
    return !ring_ && static_cast<int64_t>(n_rows) * l.k >= static_cast<int64_t>(BULK_USES) * l.n_experts;
}

void fate_cuda_device::launch_bulk(size_t layer, ggml_tensor * dst, void * stream) {
    stream_ = static_cast<cudaStream_t>(stream);
    try {
        bulk_->launch(layer, call_of(layer, dst), stream_);
        note_launch();
    } catch (const fate_error &) {
        fail(dst);
        throw;
    }
}

void fate_cuda_device::launch_part(size_t layer, size_t tensor, bool next_is_bulk, void * stream) {
    bulk_->launch_part(layer, tensor, next_is_bulk && layer + 1 < layers_.size(), static_cast<cudaStream_t>(stream));
}

std::string fate_cuda_device::end(int which) {
    try {
        const device_scope scope(ordinal_);
        const parts        p = parts_of(n_tokens_);
        if (prefetch_ && n_foretold() > 0) { // the record waits for whoever tells
            prefetch_->join(stream_);
        }
        FATE_CUDA(cudaMemcpyAsync(home_[which].data, back_.data, p.size, cudaMemcpyDeviceToHost, stream_));
        FATE_CUDA(cudaEventRecord(is_home_[which].handle, stream_));
        tokens_in_[which] = n_tokens_;
        last_             = which;
        return "";
    } catch (const fate_error & e) {
        return e.what();
    }
}

void fate_cuda_device::collect(int which, fate_record & record) {
    FATE_CUDA(cudaEventSynchronize(is_home_[which].handle));
    if (callback_) {
        callback_->rest();
    }
    const char *           home      = home_[which].data;
    const int32_t          n_tokens  = tokens_in_[which];
    const parts            p         = parts_of(n_tokens);
    const fate_cuda_step * steps     = reinterpret_cast<const fate_cuda_step *>(home + p.steps);
    const int32_t *        fills     = reinterpret_cast<const int32_t *>(home + p.fills);
    const int32_t *        evictions = reinterpret_cast<const int32_t *>(home + p.evictions);
    const int32_t *        ids       = reinterpret_cast<const int32_t *>(home + p.ids);
    const float *          weights   = reinterpret_cast<const float *>(home + p.weights);
    const uint8_t *        hits      = reinterpret_cast<const uint8_t *>(home + p.hits);
    const int32_t *        foretold  = reinterpret_cast<const int32_t *>(home + p.foretold);
    const float *          chances   = reinterpret_cast<const float *>(home + p.chances);
    const size_t           n_told    = config_.horizons.size() * FATE_LOOKAHEAD_MOST;
    for (const int32_t path : { FATE_PATH_POOL, FATE_PATH_STAGED }) {
        for (size_t i = 0; i < layers_.size(); ++i) {
            if (steps[i].path != path) {
                continue;
            }
            const int32_t layer = config_.layers[i].index;
            const int32_t k     = config_.layers[i].k;
            for (int32_t row = 0; row < steps[i].n_rows; ++row) {
                const int32_t token = record.token_of_row(row, steps[i].n_rows);
                const size_t  at    = (i * n_tokens + row) * static_cast<size_t>(max_k_);
                if (token < 0) {
                    break; // not one of the step's tokens: left out of the record
                }
                record.set_row(token, layer, static_cast<uint8_t>(path));
                std::copy_n(ids + at, k, record.ids(token, layer));
                std::copy_n(hits + at, k, record.hits(token, layer));
                if (config_.weights && record.weights(token, layer)) {
                    std::copy_n(weights + at, k, record.weights(token, layer));
                }
            }
            if (n_told > 0 && n_tokens == 1 && record.has_ahead()) { // the nearest are the last ones
                const size_t from = (i + 1) * n_foretold() - n_told;
                std::copy_n(foretold + from, n_told, record.ahead_ids(0, layer));
                std::copy_n(chances + from, n_told, record.ahead_chances(0, layer));
            }
            for (int32_t j = 0; j < steps[i].n_fills; ++j) {
                record.add_fill(layer, fills[i * max_experts_ + j]);
            }
            for (int32_t j = 0; j < steps[i].n_evictions; ++j) {
                record.add_eviction(layer, evictions[i * max_experts_ + j]);
            }
        }
    }
}

void fate_cuda_device::publish(const float * scores, const float * bonus, bool behind) {
    const device_scope scope(ordinal_);
    if (prefetch_ && !behind) { // who plans beside the step before reads scores
        prefetch_->join(stream_);
    }
    fate_cuda_opening opening = {};
    opening.publishes         = true;
    opening.behind            = behind;
    open(opening, { scores, bonus }, stream_);
}

std::string fate_cuda_device::set_linear(const fate_linear * linear) {
    const device_scope scope(ordinal_);
    FATE_CUDA(cudaDeviceSynchronize()); // who is told of a token reads the one before
    evaluator_.reset();
    if (!linear) {
        return "";
    }
    const size_t n_bytes = fate_tables_bytes(static_cast<int32_t>(max_experts_)) + fate_cuda_evaluator::n_bytes_of(*linear);
    if (n_bytes > FATE_OPEN_BYTES) {
        return fate_format("with planning it takes %zu bytes of shared memory, of which there are %zu; a model of a lower rank takes less",
                           n_bytes, FATE_OPEN_BYTES);
    }
    std::vector<int32_t> index;
    for (const fate_device_layer & layer : config_.layers) {
        index.push_back(layer.index);
    }
    try {
        evaluator_ = std::make_unique<fate_cuda_evaluator>(*linear, index);
    } catch (const fate_error & e) {
        if (e.status() != FATE_STATUS_MEMORY) {
            throw;
        }
        return std::string(e.what()) + "; leave more free, with fewer slots or a larger vram_margin";
    }
    return "";
}

void fate_cuda_device::foretell(const fate_predictions & predictions, const fate_router & router) {
    if (prefetch_) {
        const device_scope scope(ordinal_);
        prefetch_->foretell(predictions, router.end());
    }
}

std::string fate_cuda_device::prefetch(const float * chance) {
    if (!prefetch_ || !stream_ || !prefetch_->runs()) { // or nothing has run: begin() settled nothing
        return "";
    }
    try {
        const device_scope scope(ordinal_);
        const cudaStream_t on      = prefetch_->beside(stream_, is_open_[begun_].handle);
        fate_cuda_opening  opening = {};
        opening.plans              = true;
        open(opening, { nullptr, nullptr, chance }, on);
        prefetch_->fetch(device_layers_.data, stream_, is_open_[newest_open()].handle);
        return "";
    } catch (const fate_error & e) {
        return e.what();
    }
}

int64_t fate_cuda_device::expert_bytes_of(size_t layer) const {
    int64_t bytes = 0;
    for (const fate_device_tensor & t : config_.layers[layer].tensors) {
        bytes += static_cast<int64_t>(t.expert_bytes);
    }
    return bytes;
}

void fate_cuda_device::get_counters(std::vector<int64_t> & counters) const {
    counters.assign(layers_.size() * FATE_N_COUNTERS, 0);
    if (last_ < 0) {
        return;
    }
    FATE_CUDA(cudaEventSynchronize(is_home_[last_].handle));
    memcpy(counters.data(), home_[last_].data, counters.size() * sizeof(int64_t));
    for (size_t i = 0; i < layers_.size(); ++i) {
        int64_t *     c            = counters.data() + i * FATE_N_COUNTERS;
        const int64_t expert_bytes = expert_bytes_of(i);
        c[FATE_COUNTER_ROUTED]     = c[FATE_COUNTER_HITS] + c[FATE_COUNTER_MISSES] + c[FATE_COUNTER_STAGED];
        c[FATE_COUNTER_BYTES]      = c[FATE_COUNTER_FILLS] * expert_bytes;
        c[FATE_COUNTER_PREFETCH_HIDDEN] += c[FATE_COUNTER_PREFETCH_USEFUL] * expert_bytes;
    }
}

void fate_cuda_device::get_times(std::vector<int64_t> & times) const {
    times.assign(times_.data ? layers_.size() * FATE_N_TIMES : 0, 0);
    if (times_.data) {
        const device_scope scope(ordinal_);
        FATE_CUDA(cudaDeviceSynchronize());
        FATE_CUDA(cudaMemcpy(times.data(), times_.data, times.size() * sizeof(int64_t), cudaMemcpyDeviceToHost));
    }
}

void fate_cuda_device::get_launches(int64_t & launches, int64_t & captures) const {
    launches = n_launches_;
    captures = n_captures_;
}

fate_device_asks fate_cuda_device::get_asks() const {
    return callback_ ? callback_->get_asks() : fate_device_asks{};
}

std::string fate_cuda_device::bounced() const {
    return no_pin_;
}

void fate_cuda_device::get_tables(size_t layer, std::vector<int32_t> & slot_of, std::vector<int32_t> & expert_of) const {
    const device_scope scope(ordinal_);
    FATE_CUDA(cudaDeviceSynchronize());
    slot_of.resize(layers_[layer].n_experts);
    expert_of.resize(layers_[layer].n_slots);
    FATE_CUDA(cudaMemcpy(slot_of.data(), layers_[layer].slot_of, slot_of.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
    FATE_CUDA(cudaMemcpy(expert_of.data(), layers_[layer].expert_of, expert_of.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
}

std::unique_ptr<fate_device> fate_device_open(ggml_backend_dev_t dev, const fate_device_config & config) {
    return std::make_unique<fate_cuda_device>(fate_cuda_ordinal(dev), config);
}
