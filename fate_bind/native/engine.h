// The engine of one context: what llama.cpp's doors (llama-engine.h) lead to.
#pragma once

#include "capacity.h"
#include "device.h"
#include "fate.h"
#include "layer.h"
#include "linear_teller.h"
#include "llama-engine.h"
#include "pool.h"
#include "record.h"
#include "routing.h"
#include "service.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

// fate_config with the list owned.
struct fate_settings {
    fate_config          config = {};
    std::vector<int32_t> slots_list;
};

std::shared_ptr<const fate_settings> fate_current_settings();

// What fate_engine_error() returns. The context that this thread makes next is told its own by fate_take_refusal().
void fate_set_engine_error(int32_t status, const std::string & why);
// FATE_STATUS_OK if no engine of this thread refused since the last call.
int32_t fate_take_refusal(std::string & why);
void    fate_registry_add(fate_engine * engine);
void    fate_registry_remove(fate_engine * engine);
bool    fate_registry_any_engaged();

// While one lives, contexts created by this thread get no engine.
class fate_no_engine {
public:
    fate_no_engine();
    ~fate_no_engine();
};

// The live engine of a context, null if it has none. Any thread.
fate_engine * fate_engine_of(const llama_context * ctx);

struct fate_engine final : llama_engine_i, private fate_asker {
    fate_engine(llama_context & ctx, std::shared_ptr<const fate_settings> settings);
    ~fate_engine() override;

    void build_moe(ggml_context * ctx0, ggml_cgraph * gf, llama_moe_args & args) override;
    bool reserved(bool ok) override;
    void ubatch_begin(const llama_ubatch & ubatch) override;
    bool ubatch_end(bool ok) override;
    void perf_reset() override;

    // the custom op of a layer; dst holds the slots on the pool path
    void run(int32_t layer, uint8_t path, ggml_tensor * dst);

    void      flush();
    void      seek_routing(int64_t row);
    void      set_linear(const fate_linear_model * model);
    void      check() const;
    fate_info info() const;
    void      get_counters(int64_t * out, size_t n) const;
    void      get_times(int64_t * out, size_t n) const;

    const llama_context & context() const { return ctx_; }

    bool is_engaged() const { return engaged_; }

    bool is_placed() const { return engaged_ || n_whole_ > 0; }

    const std::string & error() const { return error_; } // why the last ubatch failed, "" if not by us; decode thread

private:
    // userdata of a custom op, stable in memory while graphs live
    struct op {
        fate_engine * engine;
        int32_t       layer;
        uint8_t       path;
        int32_t       part = -1; // tensor of the layer, -1: the op is about the ids
    };

    // one MoE block of the model
    struct block {
        std::vector<ggml_tensor *>    sources; // what is indexed by expert
        int32_t                       n_experts;
        int32_t                       k;
        std::string                   refused;                   // why it cannot be served, "" if it can
        ggml_backend_dev_t            dev;                       // that runs the layer, null: the CPU
        ggml_backend_dev_t            route_dev = nullptr;       // where its routing is replayed: where its router is
        int32_t                       n_slots   = 0;             // 0: not engaged
        bool                          is_whole  = false;         // every expert is on the GPU
        int32_t                       max_rows  = INT32_MAX;     // of the pool path
        std::unique_ptr<fate_layer>   layer;                     // engaged on the CPU
        fate_device *                 device          = nullptr; // engaged on a GPU
        size_t                        at              = 0;       // its place there
        fate_router *                 router          = nullptr; // routing replay
        bool                          is_first_routed = false;   // of its router's layers
        op                            pool_op;
        op                            other_op;                  // staged on a GPU, bypassed on the CPU
        op                            route_op;
        op                            bulk_op;                   // staged on a GPU, with an op for each large tensor
        std::vector<op>               part_ops;                  // by tensor
        const ggml_tensor *           gate_inp       = nullptr;  // null: not known how it selects
        const ggml_tensor *           gate_bias      = nullptr;  // of its logits
        const ggml_tensor *           selection_bias = nullptr;  // of what is selected by
        bool                          is_sigmoid     = false;    // of the logits is selected by
        bool                          is_softmax     = false;    // alike
        int32_t                       n_groups       = 0;        // that experts are selected from the best of, 0: no groups
        int32_t                       n_groups_used  = 0;
        std::string                   why_blind;                 // why not
        const ggml_tensor *           norm = nullptr;            // weights of the norm before it, null: not known
        fate_device_view              packed;                    // its router, while the engine opens
        std::vector<float>            norm_numbers;              // alike
        std::vector<fate_device_view> views;                     // what it sees of later layers
        int32_t                       n_bulk_rows = 0;           // in the newest graph, 0: it is not split
        const block *                 next        = nullptr;     // on the same GPU
    };

    friend class fate_engine_io;

    static void run_op(ggml_tensor * dst, int ith, int nth, void * userdata);
    static void launch_op(ggml_tensor * dst, void * stream);
    static void route(const op & self, ggml_tensor * dst, void * stream);

    void                 stage_in_parts(ggml_context * ctx0, block & b, llama_moe_args & args, ggml_tensor * anchor, ggml_tensor * weights);
    static void          mark(ggml_tensor * dst, op & self, bool is_eager);
    static ggml_tensor * add_op(ggml_context * ctx0, int64_t k, int64_t n_rows, ggml_tensor * ids, ggml_tensor * anchor,
                                ggml_tensor * weights, op & self, bool is_eager = false);

    // what has been decided
    enum class stage {
        FINDING,  // the first reserve: blocks are found
        TRYING,   // the second, with a pool
        GIVEN_UP, // the third, without
        SETTLED,
    };

    void        find(llama_moe_args & args);
    std::string refuse(llama_moe_args & args) const;

    bool is_auto() const { return config_.slots_kind == FATE_SLOTS_AUTO && !gpus_.empty(); }

    std::vector<fate_budget> budgets() const;
    ggml_backend_dev_t       device_of(const llama_moe_args & args) const;

    const block & first_of(const fate_device & device) const;

    void measure();
    bool ask(const fate_miss & miss, int32_t * victims) override;
    void reject() override;
    void wait() override;

    void               engage();
    bool               choose();
    bool               shrink();
    bool               is_misjudged();
    void               open_devices();
    void               open_routers();
    void               replay(ggml_context * ctx0, block & b, llama_moe_args & args);
    void               give_up(const std::string & why);
    std::string        no_memory() const;
    void               settle();
    void               open();
    void               publish(bool behind);
    void               publish_on_host(bool behind);
    bool               foresees() const;
    bool               predicts() const;
    fate_device_orders foresee();
    void               follow(bool defers = false);
    bool               hand_over();
    void               gather(int32_t which);
    bool               expect(bool asks_scores, bool asks_chances);
    void               find_gate(block & b, const llama_moe_args & args);
    bool               looks() const;
    bool               looks_now() const;
    bool               is_told() const;
    bool               sees(int32_t layer) const;
    static bool        shows(const llama_moe_args & args);
    std::string        why_blind() const;
    void               open_views();
    static void        pack(block & b);
    bool               may_see(const block & b) const;
    void               foretell();
    void               look_on(int32_t layer, const float * input);
    void               note_chances(int32_t layer, size_t at, const std::vector<float> & chance);
    void               prefetch();
    void               prefetch(int32_t layer, const float * chance);

    const fate_linear_told &      tell();
    int64_t                       view_bytes_on(ggml_backend_dev_t dev) const;
    std::vector<int32_t>          distances() const;
    std::vector<int32_t>          horizons() const;
    std::vector<fate_device_view> views_of(int32_t layer) const;

    void seed();
    bool deliver(int32_t which);
    void fail_policy();
    void snapshot();

    template <typename F> bool call(F callback);

    llama_context &                      ctx_;
    std::shared_ptr<const fate_settings> settings_;
    const fate_config &                  config_;
    const bool                           callback_;
    const bool                           sync_;
    const bool                           wants_steps_;

    stage                                            stage_ = stage::FINDING;
    std::vector<std::unique_ptr<block>>              blocks_;
    std::unordered_map<const ggml_tensor *, block *> block_of_; // by down weights
    fate_pool                                        pool_;
    std::vector<std::unique_ptr<fate_device>>        devices_;
    std::shared_ptr<const fate_routing>              routing_;     // null: the model's own
    std::shared_ptr<const fate_predictions>          predictions_; // null: of routers
    std::string                                      blind_;       // why no layer tells of later ones
    std::vector<std::unique_ptr<fate_router>>        routers_;

    std::atomic<bool> engaged_{ false };
    std::string       reason_;  // why not, or why not wholly
    std::string       bounced_; // why experts go through a ring
    std::string       model_name_;
    int32_t           n_engaged_   = 0;
    int32_t           n_whole_     = 0;
    int32_t           max_k_       = 0;
    int32_t           max_experts_ = 0;
    int64_t           pool_bytes_  = 0;

    std::vector<fate_layer_shape>   shapes_;
    std::vector<ggml_backend_dev_t> gpus_;  // by fate_layer_shape::device
    std::vector<int64_t>            most_;  // bytes of each that `auto` may take: less than what failed
    std::vector<int64_t>            tried_; // that it took last
    int32_t                         n_tries_ = 0;

    std::vector<int32_t> n_experts_;
    std::vector<int32_t> k_;
    std::vector<int32_t> n_slots_;
    std::vector<int64_t> expert_bytes_;

    bool                         active_  = false;   // graphs of the current ubatch go through the pool
    bool                         closing_ = false;   // the backends and their streams are gone; written under policy_mutex_
    std::atomic<bool>            policy_failed_{ false };
    std::unique_ptr<fate_linear> linear_;            // decides in place of the policy, null: none
    bool                         evaluates_ = false; // the engine itself does, and not devices
    fate_linear_teller           teller_;            // of it, to them
    std::mutex                   policy_mutex_;      // a policy is asked by one thread at a time: that which decodes, or a GPU's service
    fate_record                  record_[2];
    int32_t                      current_     = 0;
    int64_t                      began_us_    = 0;
    size_t                       gathered_[2] = {};    // devices of which record_ has what they know
    bool                         held_back_   = false; // record_[1 - current_] waits to be delivered
    bool                         followed_    = false; // and linear_ has taken it in
    bool                         scores_due_  = false; // scores_ were handed over early, by flush()
    bool                         ran_         = false; // a layer ran in this step
    std::string                  error_;               // of an op; fails the ubatch
    std::atomic<int64_t>         graph_nodes_{ 0 };    // of the newest captured graph, up to the last op of ours, branches included

    std::vector<float>   scores_;
    std::vector<float>   bonus_;
    std::vector<float>   chances_;           // empty: nothing is predicted
    bool                 predicted_ = false; // chances_ are of the step at hand
    std::vector<uint8_t> hits_;              // of one op

    mutable std::mutex   mutex_;             // guards what follows, read by any thread
    int64_t              steps_   = 0;
    int64_t              tokens_  = 0;
    int64_t              busy_us_ = 0;
    std::vector<int64_t> counters_; // of the layers on the CPU
};
