// Layers that run on a GPU: their tables, kernels and copies. What the engine needs of it, without CUDA's headers.
//
// Everything is enqueued on the backend's own stream, so that order there is the only synchronisation, but for the copies of large batches and prefetch, which
// have streams of their own (cuda_bulk.h, cuda_prefetch.h). A step's counters and records come back with one copy enqueued behind it; collect() waits for
// that copy.
#pragma once

#include "linear.h"
#include "lookahead.h"
#include "record.h"
#include "routing.h"
#include "service.h"

#include "ggml-backend.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// One tensor that is indexed by expert.
struct fate_device_tensor {
    const void * source;     // host memory, page-locked by the device
    void *       slots;      // device memory, [n_slots] experts
    void *       staging;    // device memory, [n_experts] experts, shared with other layers
    size_t       expert_bytes;
    size_t       tail_bytes; // of what follows an expert in the source, also read by upstream's kernels
    bool         is_part;    // large: a bulk op leaves it to launch_part
};

// Questions in callback mode.
struct fate_device_asks {
    int64_t n;          // ops of layers that missed
    int64_t n_timeouts; // of these
    int64_t waited_ns;  // by the GPU
};

// A later layer as an earlier one sees it: by its router, applied to what the earlier one's reads.
struct fate_device_view {
    int32_t             index    = -1; // of the later layer, among all layers; -1: none
    int32_t             distance = 0;
    fate_gate           gate     = {}; // its pointers are those of the vectors
    std::vector<int8_t> weights;
    std::vector<float>  scale;
    std::vector<float>  bias;
    std::vector<float>  selection_bias;
    std::vector<float>  ratio;
};

struct fate_device_layer {
    int32_t                         index; // among all layers
    int32_t                         n_experts;
    int32_t                         k;
    int32_t                         n_slots;
    std::vector<fate_device_tensor> tensors;
    std::vector<fate_device_view>   views;      // by horizon, the nearest layer first; empty: it sees nothing
    int32_t                         n_embd = 0; // of what its router reads
};

// Memory that layers read experts from.
struct fate_host_range {
    const void * data;
    size_t       size;
};

// What a step begins with; rows of config.stride numbers, by index among all layers; null: nothing of the kind.
struct fate_device_orders {
    const float * scores = nullptr;              // published, of a policy that has seen all steps before
    const float * bonus  = nullptr;              // [n_layers], with scores
    const float * chance = nullptr;              // as prefetch() takes it

    const fate_linear_told * told     = nullptr; // in place of all that: the linear model's token,
    bool                     predicts = false;   // and experts may be brought in by its chances
};

class fate_device {
public:
    virtual ~fate_device() = default;

    // Cold, counters at zero.
    virtual void reset() = 0;

    // What failed, "" if nothing.
    // first_is_bulk: the first layer's op will be split. is_told: the step is of one token whose output is wanted, so that experts may be brought in for it.
    virtual std::string begin(int32_t n_tokens, bool first_is_bulk, bool is_told, const fate_device_orders & orders) = 0;
    // The launcher of a layer's op. src[0]: ids, src[2]: router weights or null, src[3]: what the router read or null. Throws fate_error.
    virtual void launch(size_t layer, uint8_t path, ggml_tensor * dst, void * stream)                                = 0;

    // Whether a staged op of so many rows is better split into an op for the ids and one for each large tensor, which are never captured: the copy engine
    // then brings what the slots lack of a layer while the layer before computes.
    virtual bool is_bulk(size_t layer, int32_t n_rows) const                                = 0;
    // Their launchers, in this order. next_is_bulk: the next layer of this device is split as well in the graph at hand.
    virtual void launch_bulk(size_t layer, ggml_tensor * dst, void * stream)                = 0;
    virtual void launch_part(size_t layer, size_t tensor, bool next_is_bulk, void * stream) = 0;
    // Enqueues the copies that bring the step back; which (0 or 1) names the buffer. What failed, "" if nothing.
    virtual std::string end(int which)                                                      = 0;
    // Waits for that step and adds its rows, pool path first, to the record.
    virtual void collect(int which, fate_record & record)                                   = 0;

    // Acts behind what is enqueued. scores[n_layers][config.stride], by index among all layers; null: zeros. behind: as in fate_layer.
    virtual void publish(const float * scores, const float * bonus, bool behind) = 0;

    // Brings in what chance[n_layers][config.stride] makes likely for the step of one token begun last: before its layers run where steps wait, else as far as
    // the copies come before them. By index among all layers. What failed, "" if nothing.
    virtual std::string prefetch(const float * chance) = 0;

    // Has the device evaluate a linear model, which is copied, where begin() is told of a token; null: it forgets it. Why it cannot, "" if it can. Throws
    // fate_error.
    virtual std::string set_linear(const fate_linear * linear) = 0;

    // In place of what routers say of later layers; router: that replays the routing of these layers.
    virtual void foretell(const fate_predictions & predictions, const fate_router & router) = 0;

    // Of the last step that was ended; [layer of this device][FATE_N_COUNTERS].
    virtual void get_counters(std::vector<int64_t> & counters) const = 0;

    // Of the newest step, [layer of this device][FATE_N_TIMES], empty if they are not kept; waits for it.
    virtual void get_times(std::vector<int64_t> & times) const = 0;

    // Launches so far, and those of them that went into a captured graph.
    virtual void get_launches(int64_t & launches, int64_t & captures) const = 0;

    // So far since the reset.
    virtual fate_device_asks get_asks() const = 0;

    // Why experts go through a ring of pinned memory, "" if kernels read them where they are.
    virtual std::string bounced() const = 0;

    // Waits until the device is idle.
    virtual void get_tables(size_t layer, std::vector<int32_t> & slot_of, std::vector<int32_t> & expert_of) const = 0;
};

struct fate_device_config {
    std::vector<fate_device_layer> layers;
    std::vector<fate_host_range>   ranges;                     // to page-lock
    bool                           page_lock;                  // false: ranges stay as they are
    int32_t                        max_tokens;                 // of a step
    int32_t                        stride;                     // numbers a row of scores and chances has
    bool                           wants_steps;                // records are collected
    bool                           weights;                    // with router weights
    fate_asker *                   asker;                      // callback mode: outlives the device; null: table mode
    int64_t                        timeout_ns;                 // of an answer
    int32_t                        prefetch_experts   = 0;     // at most so many of a layer and token, 0: none
    float                          prefetch_threshold = 0;     // the least chance worth a copy
    bool                           prefetch_eases     = false; // less is, where the link has time to spare (worth.h)
    bool                           prefetch_waits     = false; // steps wait for all that is planned
    std::vector<int32_t>           horizons;                   // of which the record is told
    bool                           times    = false;           // are kept
    double                         throttle = 0;               // bytes a second at which misses are filled at most, 0: as many as come
};

// Why layers on this device cannot be served, "" if they can.
std::string fate_device_refuse(ggml_backend_dev_t dev);
// The most tokens whose bits do not depend on the number of experts in the tensor.
int32_t fate_device_max_rows(ggml_backend_dev_t dev, ggml_type type);
// Writes what makes the backend launch an op instead of calling its function.
// is_eager: not to be captured.
void fate_device_mark(ggml_tensor * op, void (*launch)(ggml_tensor * dst, void * stream), bool is_eager);
// Throws fate_error with what failed.
std::unique_ptr<fate_device> fate_device_open(ggml_backend_dev_t dev, const fate_device_config & config);
// Nodes in the graph that the stream is being captured into, 0: it is not.
int64_t fate_device_captured_nodes(void * stream);
