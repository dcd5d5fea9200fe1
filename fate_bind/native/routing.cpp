#include "routing.h"

#include "fate.h"
#include "status.h"

#include <mutex>

static std::mutex                          routing_mutex;
static std::shared_ptr<const fate_routing> routing;

std::shared_ptr<const fate_routing> fate_current_routing() {
    std::lock_guard<std::mutex> lock(routing_mutex);
    return routing;
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
