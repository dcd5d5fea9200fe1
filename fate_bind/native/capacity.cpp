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
            return fate_format("%g%%", percent);
        default:
            return fate_format("%d", k);
    }
}

// Slots of the layers of each GPU from what is free there.
static std::vector<int32_t> slots_for_budgets(const std::vector<fate_layer_shape> & layers, const std::vector<fate_budget> & budgets) {
    std::vector<int32_t> n_slots;
    for (size_t device = 0; device < budgets.size(); ++device) {
        std::vector<fate_layer_shape> here;
        int64_t                       all  = 0;
        int32_t                       most = 0;
        for (const fate_layer_shape & layer : layers) {
            if (layer.served && layer.device == static_cast<int32_t>(device)) {
                here.push_back(layer);
                all += layer.n_experts * layer.expert_bytes;
                most = std::max(most, layer.n_experts);
            }
        }
        const fate_budget & budget = budgets[device];
        n_slots.push_back(all <= budget.bytes ? most : slots_for_bytes(static_cast<double>(budget.bytes - budget.staging_bytes), here));
    }
    return n_slots;
}

static std::string too_little_vram(const fate_layer_shape & layer, int32_t n, const fate_budget & budget) {
    const double gib = 1 << 30;
    return fate_format(
        "slots: %.2f GiB of VRAM are free, %.2f GiB are to stay so and %.2f GiB are for staging: room for %d slots a layer, "
        "and a token uses %d "
        "experts; a shorter context (-c), a smaller -ub, fewer layers on the GPU (-ngl), a smaller vram_margin or a larger vram leave more",
        static_cast<double>(budget.free_bytes) / gib, static_cast<double>(budget.margin_bytes) / gib,
        static_cast<double>(budget.staging_bytes) / gib, n, layer.k);
}

// What comes to so many slots, where it is no number of them.
static std::string asked(const fate_config & config) {
    switch (config.slots_kind) {
        case FATE_SLOTS_BYTES:
            return fate_format(", of %.0f bytes in all,", config.slots_value);
        case FATE_SLOTS_PERCENT:
            return fate_format(", %g%% of its experts,", config.slots_value);
        default:
            return "";
    }
}

std::vector<int32_t> fate_capacity(const fate_config & config, const std::vector<int32_t> & list,
                                   const std::vector<fate_layer_shape> & layers, int64_t staging_bytes,
                                   const std::vector<fate_budget> & budgets) {
    if (config.slots_kind == FATE_SLOTS_LIST && list.size() != layers.size()) {
        throw fate_error(FATE_STATUS_CAPACITY,
                         fate_format("slots: the list has %zu numbers, but the model has %zu MoE layers; give one number for each layer",
                                     list.size(), layers.size()));
    }
    int32_t most = 0;
    for (const fate_layer_shape & layer : layers) {
        most = std::max(most, layer.n_experts);
    }
    int32_t for_bytes = 0;
    if (config.slots_kind == FATE_SLOTS_BYTES) {
        const int32_t unstaged = slots_for_bytes(config.slots_value, layers); // where every expert has a place nothing is staged
        for_bytes              = unstaged == most ? most : slots_for_bytes(config.slots_value - static_cast<double>(staging_bytes), layers);
    }

    std::vector<int32_t> for_budgets;
    if (config.slots_kind == FATE_SLOTS_AUTO) {
        for_budgets = slots_for_budgets(layers, budgets);
    }

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
                if (layers[i].device < 0) {
                    n = std::max(percent_of(AUTO_PERCENT_CPU, layers[i].n_experts), layers[i].k);
                } else {
                    n = for_budgets[layers[i].device];
                    if (n < layers[i].k) {
                        throw fate_error(FATE_STATUS_CAPACITY,
                                         too_little_vram(layers[i], static_cast<int32_t>(n), budgets[layers[i].device]));
                    }
                }
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
                fate_format("slots: %.0f in MoE layer %zu%s is fewer than the %d experts that it uses per token; the minimum is %s", n, i,
                            asked(config).c_str(), layers[i].k, minimum(config.slots_kind, layers, staging_bytes).c_str()));
        }
        n_slots[i] = std::min(static_cast<int32_t>(n), layers[i].n_experts);
    }
    return n_slots;
}
