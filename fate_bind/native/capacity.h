// Slots of each layer from what the user asked for. No ggml.
#pragma once

#include "fate.h"

#include <string>
#include <vector>

struct fate_layer_shape {
    int32_t n_experts;
    int32_t k;
    int64_t expert_bytes;
    bool    served;      // false: gets no slots, whatever was asked for
    int32_t device = -1; // GPU that runs it, -1: the CPU
};

// What `auto` can take of a GPU.
struct fate_budget {
    int64_t bytes;
    int64_t staging_bytes;    // of these, unless every expert gets a place
    int64_t free_bytes   = 0; // of the card, or of the size that it is to count on; for messages
    int64_t margin_bytes = 0; // of these, to stay free
};

// Never more than a layer's experts. Throws fate_error FATE_STATUS_CAPACITY with the minimum if a layer gets fewer slots than it uses experts per token.
// staging_bytes are taken off a size in bytes; budgets: by device, for FATE_SLOTS_AUTO.
std::vector<int32_t> fate_capacity(const fate_config & config, const std::vector<int32_t> & list,
                                   const std::vector<fate_layer_shape> & layers, int64_t staging_bytes = 0,
                                   const std::vector<fate_budget> & budgets = {});
