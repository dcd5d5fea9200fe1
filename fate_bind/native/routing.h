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

// In place of what routers say of later layers. ids and chances [n_horizons][n_tokens][n_layers][m], -1: none.
struct fate_predictions {
    std::vector<int32_t> horizons; // from the farthest to the nearest
    int32_t              n_tokens;
    int32_t              n_layers;
    int32_t              m;
    std::vector<int32_t> ids;
    std::vector<float>   chances;

    // Where a horizon and a layer's first row begin; rows follow by n_layers * m.
    size_t at(size_t horizon, int32_t layer) const { return (horizon * n_tokens * n_layers + static_cast<size_t>(layer % n_layers)) * m; }
};

// null: none
std::shared_ptr<const fate_routing>     fate_current_routing();
std::shared_ptr<const fate_predictions> fate_current_predictions();

// Writes one layer's ids to dst, [k, n_rows]; the first layer of a step moves on by all its tokens, a last layer that sees fewer rows gets the last ones.
// One object a device and context, used by its graph only.
class fate_router {
public:
    virtual ~fate_router() = default;

    virtual void launch(int32_t layer, bool is_first, ggml_tensor * dst, void * stream) = 0;

    // The next step starts at this row.
    virtual void seek(int64_t row) = 0;

    // The row behind those of the step at hand, once its first layer ran; in memory of the device.
    virtual const int64_t * end() const = 0;
};

// dev null: the CPU. Throws fate_error.
std::unique_ptr<fate_router> fate_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> & routing);
std::unique_ptr<fate_router> fate_device_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> & routing);
