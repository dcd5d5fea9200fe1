// Slots of each layer from what the user asked for. No ggml.
#pragma once

#include "fate.h"

#include <string>
#include <vector>

struct fate_layer_shape {
    int32_t n_experts;
    int32_t k;
    int64_t expert_bytes;
    bool    served; // false: gets no slots, whatever was asked for
};

// Never more than a layer's experts. Throws fate_error FATE_STATUS_CAPACITY with the minimum if a layer gets fewer slots than it uses experts per token.
// staging_bytes are taken off a budget in bytes.
std::vector<int32_t> fate_capacity(const fate_config & config, const std::vector<int32_t> & list,
                                   const std::vector<fate_layer_shape> & layers, int64_t staging_bytes = 0);
