#include "capacity.h"

#include "status.h"

#include <algorithm>

static const double AUTO_PERCENT_CPU = 50.0;

static int32_t percent_of(double percent, int32_t n_experts) {
    return static_cast<int32_t>(percent * n_experts / 100.0 + 1e-9);
}

// The same number of slots in every layer, as many as fit.
static int32_t slots_for_bytes(double bytes, const std::vector<fate_layer_shape> & layers) {
    int32_t most = 0;
    for (const fate_layer_shape & layer : layers) {
        most = std::max(most, layer.n_experts);
    }
    int32_t n = 0;
    for (double sum = 0; n < most; ++n) {
        for (const fate_layer_shape & layer : layers) {
            sum += layer.served && n < layer.n_experts ? static_cast<double>(layer.expert_bytes) : 0.0;
        }
        if (sum > bytes) {
            break;
        }
    }
    return n;
}

// What to ask for so that every layer gets its k.
static std::string minimum(int32_t kind, const std::vector<fate_layer_shape> & layers, int64_t staging_bytes) {
    int32_t k       = 0;
    double  percent = 0.0;
    int64_t bytes   = staging_bytes;
    for (const fate_layer_shape & layer : layers) {
        if (!layer.served) {
            continue;
        }
        k       = std::max(k, layer.k);
        percent = std::max(percent, 100.0 * layer.k / layer.n_experts);
    }
    for (const fate_layer_shape & layer : layers) {
        bytes += layer.served ? std::min(k, layer.n_experts) * layer.expert_bytes : 0;
    }
    switch (kind) {
        case FATE_SLOTS_BYTES:
            return fate_format("%lld bytes", static_cast<long long>(bytes));
        case FATE_SLOTS_PERCENT:
        case FATE_SLOTS_AUTO:
            return fate_format("%g%%", percent);
        default:
            return fate_format("%d", k);
    }
}

std::vector<int32_t> fate_capacity(const fate_config & config, const std::vector<int32_t> & list,
                                   const std::vector<fate_layer_shape> & layers, int64_t staging_bytes) {
    if (config.slots_kind == FATE_SLOTS_LIST && list.size() != layers.size()) {
        throw fate_error(FATE_STATUS_CAPACITY,
                         fate_format("slots: the list has %zu numbers, but the model has %zu MoE layers; give one number for each layer",
                                     list.size(), layers.size()));
    }
    int32_t most = 0;
    for (const fate_layer_shape & layer : layers) {
        most = std::max(most, layer.n_experts);
    }
    const int32_t for_bytes =
        config.slots_kind == FATE_SLOTS_BYTES ? slots_for_bytes(config.slots_value - static_cast<double>(staging_bytes), layers) : 0;

    std::vector<int32_t> n_slots(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        if (!layers[i].served) {
            continue;
        }
        double n = 0;
        switch (config.slots_kind) {
            case FATE_SLOTS_COUNT:
                n = config.slots_value;
                break;
            case FATE_SLOTS_LIST:
                n = list[i];
                break;
            case FATE_SLOTS_BYTES:
                n = for_bytes;
                break;
            case FATE_SLOTS_PERCENT:
                n = percent_of(config.slots_value, layers[i].n_experts);
                break;
            default:
                n = percent_of(AUTO_PERCENT_CPU, layers[i].n_experts);
                n = std::max<double>(n, layers[i].k);
                break;
        }
        if (n > most) {
            throw fate_error(
                FATE_STATUS_CAPACITY,
                fate_format("slots: %.0f per layer asked for, but the model has %d experts per layer; the maximum is %d", n, most, most));
        }
        if (n < layers[i].k) {
            throw fate_error(
                FATE_STATUS_CAPACITY,
                fate_format("slots: %.0f in MoE layer %zu is fewer than the %d experts that it uses per token; the minimum is %s", n, i,
                            layers[i].k, minimum(config.slots_kind, layers, staging_bytes).c_str()));
        }
        n_slots[i] = std::min(static_cast<int32_t>(n), layers[i].n_experts);
    }
    return n_slots;
}
