// The memory of one context's slots: for each expert tensor of a layer a tensor of the same type with slots in place of experts.
#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <string>
#include <vector>

// A tensor that is indexed by expert in its last dimension: weights in 3, biases in 2, scales in 1.
struct fate_pool_tensor {
    ggml_tensor * source;
    int           expert_dim;
    ggml_tensor * slots;

    size_t expert_bytes() const { return source->nb[expert_dim]; }
};

class fate_pool {
public:
    // Why experts of this tensor cannot be copied by the host, "" if they can.
    static std::string refuse(const ggml_tensor * source, int64_t n_experts);

    // Adds one layer's tensors (nulls are skipped); its index is the number of layers before.
    void add_layer(const std::vector<ggml_tensor *> & sources, int64_t n_experts);

    int64_t expert_bytes(int32_t layer) const;
    int64_t bytes(const std::vector<int32_t> & n_slots) const; // of a whole pool, without alignment

    void release();

    // Makes the slots of the layers with n_slots > 0, all zero. False if the memory cannot be had.
    bool allocate(const std::vector<int32_t> & n_slots);

    // The slots of one of the layer's source tensors.
    ggml_tensor * slots_of(int32_t layer, ggml_tensor * source) const;

    void fill(int32_t layer, int32_t expert, int32_t slot);
    bool holds(int32_t layer, int32_t expert, int32_t slot) const; // the slot's bytes are the expert's

private:
    std::vector<std::vector<fate_pool_tensor>> layers_;
    ggml_context_ptr                           ctx_;
    ggml_backend_buffer_ptr                    buffer_;
};
