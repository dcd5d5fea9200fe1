// Routing replay, for benchmarks: expert ids from a table in place of the router's, the same in every arm. Router weights stay the model's own.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <memory>
#include <vector>

// ids[n_tokens][n_layers][k], distinct within a token; steps follow each other and start over at the end.
struct fate_routing {
    int32_t              n_tokens;
    int32_t              n_layers;
    int32_t              k;
    std::vector<int32_t> ids;
};

// null: none
std::shared_ptr<const fate_routing> fate_current_routing();

// Writes one layer's ids to dst, [k, n_rows]; the first layer of a step moves on by all its tokens, a last layer that sees fewer rows gets the last ones.
// One object a device and context, used by its graph only.
class fate_router {
public:
    virtual ~fate_router() = default;

    virtual void launch(int32_t layer, bool is_first, ggml_tensor * dst, void * stream) = 0;

    // The next step starts at this row.
    virtual void seek(int64_t row) = 0;
};

// dev null: the CPU. Throws fate_error.
std::unique_ptr<fate_router> fate_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> & routing);
std::unique_ptr<fate_router> fate_device_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> & routing);
