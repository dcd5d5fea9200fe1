#include "routing.h"

#include "fate.h"
#include "lookahead.h"
#include "status.h"

#include <algorithm>
#include <mutex>

static std::mutex                              routing_mutex;
static std::shared_ptr<const fate_routing>     routing;
static std::shared_ptr<const fate_predictions> predictions;

std::shared_ptr<const fate_routing> fate_current_routing() {
    std::lock_guard<std::mutex> lock(routing_mutex);
    return routing;
}

std::shared_ptr<const fate_predictions> fate_current_predictions() {
    std::lock_guard<std::mutex> lock(routing_mutex);
    return predictions;
}

int32_t fate_replay_routing(const int32_t * ids, int32_t n_tokens, int32_t n_layers, int32_t k) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        std::shared_ptr<fate_routing> next;
        if (ids) {
            if (n_tokens < 1 || n_layers < 1 || k < 1) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("routing of %d x %d x %d: expected at least 1 each", n_tokens, n_layers, k));
            }
            next  = std::make_shared<fate_routing>();
            *next = { n_tokens, n_layers, k, std::vector<int32_t>(ids, ids + static_cast<size_t>(n_tokens) * n_layers * k) };
        }
        std::lock_guard<std::mutex> lock(routing_mutex);
        routing = next;
    });
}

static void check_predictions(const int32_t * ids, int32_t n_horizons, const int32_t * horizons, int32_t n_tokens, int32_t n_layers,
                              int32_t m) {
    if (n_horizons < 1 || n_horizons > FATE_LOOKAHEAD_LAYERS || n_tokens < 1 || n_layers < 1 || m < 1 || m > FATE_LOOKAHEAD_MOST) {
        throw fate_error(
            FATE_STATUS_INVALID,
            fate_format("predictions of %d x %d x %d x %d: expected up to %d horizons, at least 1 token and layer, up to %d experts",
                        n_horizons, n_tokens, n_layers, m, FATE_LOOKAHEAD_LAYERS, FATE_LOOKAHEAD_MOST));
    }
    for (int32_t i = 0; i < n_horizons; ++i) {
        if (horizons[i] < 1 || horizons[i] > FATE_LOOKAHEAD_FARTHEST || (i > 0 && horizons[i] >= horizons[i - 1])) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("horizon %d: expected 1 to %d, from the farthest to the nearest", horizons[i],
                                                              FATE_LOOKAHEAD_FARTHEST));
        }
    }
    const size_t n_rows = static_cast<size_t>(n_horizons) * n_tokens * n_layers;
    for (size_t row = 0; row < n_rows; ++row) {
        const int32_t * named = ids + row * m;
        for (int32_t i = 1; i < m; ++i) {
            if (named[i] >= 0 && std::find(named, named + i, named[i]) != named + i) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("row %zu of the predictions names expert %d twice; expected it once", row, named[i]));
            }
        }
    }
}

int32_t fate_replay_predictions(const int32_t * ids, const float * chances, int32_t n_horizons, const int32_t * horizons, int32_t n_tokens,
                                int32_t n_layers, int32_t m) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        std::shared_ptr<fate_predictions> next;
        if (ids) {
            check_predictions(ids, n_horizons, horizons, n_tokens, n_layers, m);
            const size_t n = static_cast<size_t>(n_horizons) * n_tokens * n_layers * m;
            next           = std::make_shared<fate_predictions>();
            next->horizons.assign(horizons, horizons + n_horizons);
            next->n_tokens = n_tokens;
            next->n_layers = n_layers;
            next->m        = m;
            next->ids.assign(ids, ids + n);
            next->chances.assign(chances, chances + n);
        }
        std::lock_guard<std::mutex> lock(routing_mutex);
        predictions = next;
    });
}

class host_router final : public fate_router {
public:
    explicit host_router(std::shared_ptr<const fate_routing> routing) : routing_(std::move(routing)) {}

    void launch(int32_t layer, bool is_first, ggml_tensor * dst, void *) override {
        const fate_routing & r   = *routing_;
        int32_t *            out = static_cast<int32_t *>(dst->data);
        if (is_first) {
            end_ += dst->ne[1];
        }
        for (int64_t row = 0; row < dst->ne[1]; ++row) {
            const int64_t token = (end_ - dst->ne[1] + row) % r.n_tokens;
            for (int64_t rank = 0; rank < dst->ne[0]; ++rank) {
                out[row * dst->ne[0] + rank] = r.ids[(token * r.n_layers + layer % r.n_layers) * r.k + rank];
            }
        }
    }

    void seek(int64_t row) override { end_ = row; }

    const int64_t * end() const override { return &end_; }

private:
    std::shared_ptr<const fate_routing> routing_;
    int64_t                             end_ = 0; // of the step's tokens
};

std::unique_ptr<fate_router> fate_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> & routing) {
    if (dev) {
        return fate_device_router_open(dev, routing);
    }
    return std::make_unique<host_router>(routing);
}
