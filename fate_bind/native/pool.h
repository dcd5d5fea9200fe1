// The memory of one context's slots: for each expert tensor of a layer a tensor of the same type with slots in place of experts, where the layer runs.
// Layers on a GPU also get staging: full-size tensors, for each role (up, gate, down, ...) the same memory in all layers of a device.
#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <string>
#include <vector>

// Bytes that upstream's matrix kernels read past an expert whose rows are no multiple of 256.
static const size_t FATE_POOL_TAIL = 512;

// A tensor that is indexed by expert in its last dimension: weights in 3, biases in 2, scales in 1.
struct fate_pool_tensor {
    ggml_tensor * source;
    size_t        role;
    int           expert_dim;
    ggml_tensor * slots;
    ggml_tensor * staging; // null on the CPU

    size_t expert_bytes() const { return source->nb[expert_dim]; }

    // A matrix for each expert, not a bias or a scale.
    bool is_weight() const { return expert_dim == 2; }

    // What a kernel may read behind an expert.
    size_t tail_bytes() const { return ggml_is_quantized(source->type) && source->ne[0] % 256 != 0 ? FATE_POOL_TAIL : 0; }
};

class fate_pool {
public:
    // Why experts of this tensor cannot be copied by the host, "" if they can.
    static std::string refuse(const ggml_tensor * source, int64_t n_experts);

    // Adds one layer's tensors, by role (nulls are skipped); its index is the number of layers before. dev null: the CPU.
    void add_layer(const std::vector<ggml_tensor *> & sources, int64_t n_experts, ggml_backend_dev_t dev);

    int64_t expert_bytes(int32_t layer) const;
    int64_t bytes(const std::vector<int32_t> & n_slots) const;                   // of a whole pool, without alignment and staging
    int64_t staging_bytes(const std::vector<int32_t> * n_slots = nullptr) const; // null: if all layers engage

    int64_t staging_bytes_on(ggml_backend_dev_t dev, const std::vector<int32_t> * n_slots = nullptr) const; // likewise
    // Makes the slots of the layers with n_slots > 0, all zero. Where every expert of a GPU's layer has one, slot and expert have the same number and hold it
    // already. False if the memory cannot be had.
    bool allocate(const std::vector<int32_t> & n_slots);
    void release();

    // The slots of one of the layer's source tensors.
    ggml_tensor * slots_of(int32_t layer, ggml_tensor * source) const;
    // Its full-size stand-in on the GPU.
    ggml_tensor * staging_of(int32_t layer, ggml_tensor * source) const;

    const std::vector<fate_pool_tensor> & tensors(int32_t layer) const { return layers_[layer].tensors; }

    void fill(int32_t layer, int32_t expert, int32_t slot);
    bool holds(int32_t layer, int32_t expert, int32_t slot) const; // the slot's bytes are the expert's

private:
    struct layer {
        ggml_backend_dev_t            dev;
        int64_t                       n_experts;
        std::vector<fate_pool_tensor> tensors;
    };

    const fate_pool_tensor * find(int32_t layer, const ggml_tensor * source) const;
    bool                     is_staged(size_t layer, ggml_backend_dev_t dev, const std::vector<int32_t> * n_slots) const;
    void                     fill_whole_layers(const std::vector<int32_t> & n_slots);
    bool                     allocate_slots(ggml_backend_dev_t dev, const std::vector<int32_t> & n_slots);
    bool                     allocate_staging(ggml_backend_dev_t dev, const std::vector<int32_t> & n_slots);
    std::vector<size_t>      role_bytes(ggml_backend_dev_t dev, const std::vector<int32_t> * n_slots) const;

    std::vector<layer>                   layers_;
    std::vector<ggml_context_ptr>        ctxs_;
    std::vector<ggml_backend_buffer_ptr> buffers_;
};
