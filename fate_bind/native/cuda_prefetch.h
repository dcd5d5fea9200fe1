// The host's side of prefetch: hands chances over, launches what plans and copies beside the running step, and has all of it end before the next.
#pragma once

#include "cuda_bulk.h"
#include "cuda_launch.h"

#include <vector>

struct fate_cuda_plan;

class fate_cuda_prefetch {
public:
    // wanted: at most so many experts of a layer and token.
    fate_cuda_prefetch(int ordinal, size_t n_layers, size_t max_experts, int32_t wanted, float threshold);
    ~fate_cuda_prefetch();

    // Points a layer at its part.
    void bind(fate_cuda_layer & layer, size_t at) const;

    void reset(cudaStream_t stream);
    // A step is about to be enqueued, outside of a capture: what the one before left is settled.
    void begin(const fate_cuda_layer * layers, cudaStream_t stream);
    // chance[n_all][stride], by index, for the step begun last. waits: its layers run when all is copied, else beside the copies.
    void launch(const fate_cuda_layer * layers, const int32_t * index, const float * chance, size_t n_all, int32_t stride, bool waits,
                cudaStream_t stream);

private:
    const size_t  n_layers_;
    const size_t  max_experts_;
    const int32_t wanted_;
    const float   threshold_;

    device_array<char>     plans_;
    device_array<int32_t>  waiting_; // [layer][max_experts]
    device_array<uint32_t> n_demands_;
    pinned_buffer          chances_[2];
    fate_cuda_event        is_planned_[2]; // the buffer is free again
    int64_t                n_launched_ = 0;
    fate_cuda_event        settled_;
    fate_cuda_event        ended_;
    bool                   is_busy_  = false; // the side stream has something of the step at hand
    int                    n_blocks_ = 0;     // that copy
    cudaStream_t           side_     = nullptr;
};
