// The host's side of prefetch: launches what looks and copies beside the running step or adds it to the step's graph, and has all of it end before the
// next.
#pragma once

#include "cuda_bulk.h"
#include "cuda_launch.h"
#include "device.h"
#include "worth.h"

#include <vector>

struct fate_cuda_plan;
struct fate_cuda_sight;

class fate_cuda_prefetch {
public:
    fate_cuda_prefetch(int ordinal, const fate_device_config & config, size_t max_experts);
    ~fate_cuda_prefetch();

    // Points a layer at its part.
    void bind(fate_cuda_layer & layer, size_t at) const;

    // In place of what layers see; end: of the rows of the step at hand, on the device.
    void foretell(const fate_predictions & predictions, const int64_t * end);

    void reset(cudaStream_t stream);
    // A step is about to be enqueued, outside of a capture; what it begins with comes behind all that is beside the one before. is_told: of one token whose
    // output is wanted. seen: as far as known. Whether layers tell of others in it.
    bool begin(bool is_told, const fate_worth_seen & seen, cudaStream_t stream);
    // Whether experts are brought in for the step begun last.
    bool runs() const { return !rests_; }
    // The least chance worth a copy of those known at its start.
    float threshold() const { return eases_ ? threshold_ * static_cast<float>(worth_.ease()) : threshold_; }
    // Behind the op of a layer that sees others, launched into the chain or not: looks, and copies what comes of it. May be captured.
    void look_on(const fate_cuda_layer * layers, size_t from, bool chained, cudaStream_t stream);
    // What the stream does next comes behind all that is beside the step.
    void join(cudaStream_t stream);
    // The stream on which plans are made for the step begun last once it is enqueued, behind `begun`; `stream` itself where steps wait.
    cudaStream_t beside(cudaStream_t stream, cudaEvent_t begun);
    // Copies what is planned, behind `planned`, on such a stream.
    void fetch(const fate_cuda_layer * layers, cudaStream_t stream, cudaEvent_t planned);

private:
    double ns_per_expert(const fate_device_config & config);
    void   see(const std::vector<fate_device_layer> & layers);
    void   allow(const void * kernel, size_t n_bytes);
    void   fetch_on(const fate_cuda_layer * layers, int32_t from, cudaStream_t on);
    void   branch(const fate_cuda_layer * layers, size_t from, cudaGraph_t graph, unsigned long long capture, const cudaGraphNode_t * after,
                  size_t n_after, bool chained);

    std::vector<int32_t> index_; // of each layer, among all
    const size_t         n_layers_;
    const size_t         max_experts_;
    const int32_t        wanted_;
    const float          threshold_;
    const bool           eases_;
    const bool           waits_;

    device_array<char>           plans_;
    device_array<char>           sights_;
    std::vector<fate_cuda_sight> views_;    // as they are on the device
    std::vector<unsigned>        n_chunks_; // by layer, of all its views
    const size_t                 n_tables_; // bytes of shared memory of whoever plans
    size_t                       n_views_ = 0;
    device_array<float>          inputs_;
    device_array<float>          selections_;
    device_array<int8_t>         weights_;
    device_array<float>          numbers_;      // of routers: scales and biases
    int32_t                      max_embd_ = 0;
    size_t                       n_look_   = 0; // bytes of shared memory of whoever looks
    device_array<int32_t>        foretold_;
    device_array<float>          foretold_chances_;
    device_array<int32_t>        waiting_; // [layer][max_experts]
    device_array<uint32_t>       words_;   // n_demands, n_posts
    fate_cuda_event              shown_;
    fate_cuda_event              told_;
    fate_cuda_event              ended_[2];
    fate_worth                   worth_;
    bool                         rests_      = false;            // prefetch does, in the step at hand
    bool                         looks_      = false;            // in the step at hand
    bool                         chains_     = false;            // programmatic dependent launch
    bool                         is_busy_[2] = { false, false }; // side_, looker_: have something of it
    unsigned                     n_blocks_   = 0;                // that copy
    int                          priority_   = 0;                // of what is beside the step, outside of its graph
    fate_cuda_alone              alone_;                         // what copies from the token's start on
    unsigned long long           capture_ = 0;                   // that fetch_ is of, 0: none
    cudaGraphNode_t              fetch_   = nullptr;             // its last that copies
    cudaStream_t                 side_    = nullptr;             // copies
    cudaStream_t                 looker_  = nullptr;
};
