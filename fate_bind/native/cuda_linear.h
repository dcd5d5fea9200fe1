// The host's side of a linear model of routing that is evaluated on the device.
#pragma once

#include "cuda_launch.h"
#include "cuda_linear.cuh"
#include "linear.h"

#include <vector>

class fate_cuda_evaluator {
public:
    // index: of the device's layers among all
    fate_cuda_evaluator(const fate_linear & linear, const std::vector<int32_t> & index);

    // What a kernel is told of a token: which (0 or 1) names the buffer. Step ids are not its.
    fate_cuda_told put(int which, const fate_linear_told & told);

    const fate_cuda_linear & view() const { return view_; }

    bool has_scores() const { return view_.n_heads > 1; }

    // Of a block's shared memory.
    size_t        n_bytes() const { return sizeof(fate_cuda_fitted) + page_bytes_; }
    static size_t n_bytes_of(const fate_linear & linear);

private:
    const std::vector<int32_t> index_;
    const size_t               page_bytes_; // at most
    fate_cuda_linear           view_ = {};
    device_array<float>        numbers_;    // all the view's but the fold
    device_array<int16_t>      fold_;
    pinned_buffer              home_[2];    // pages, then what is known
};
