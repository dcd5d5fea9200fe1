// What an engine places where: which layers engage, with how many slots, in whose memory.
#include "engine.h"
#include "status.h"

#include "llama-context.h"

#include <algorithm>

static const int32_t MAX_TRIES = 8; // of `auto`, to find a size that fits

// What the first reserve found.
void fate_engine::measure() {
    for (size_t i = 0; i < blocks_.size(); ++i) {
        const block &    b      = *blocks_[i];
        const int64_t    bytes  = pool_.expert_bytes(static_cast<int32_t>(i));
        fate_layer_shape shape  = { b.n_experts, b.k, bytes, b.refused.empty(), -1 };
        const auto       device = std::find(gpus_.begin(), gpus_.end(), b.dev);
        if (b.dev && shape.served) {
            shape.device = static_cast<int32_t>(device - gpus_.begin());
            if (device == gpus_.end()) {
                gpus_.push_back(b.dev);
            }
        }
        shapes_.push_back(shape);
        n_experts_.push_back(b.n_experts);
        k_.push_back(b.k);
        expert_bytes_.push_back(bytes);
        max_k_       = std::max(max_k_, b.k);
        max_experts_ = std::max(max_experts_, b.n_experts);
    }
    most_.assign(gpus_.size(), INT64_MAX);
    tried_.assign(gpus_.size(), 0);
    scores_.resize(blocks_.size() * static_cast<size_t>(max_experts_));
    bonus_.resize(blocks_.size());
    if ((config_.prefetch & FATE_PREFETCH_TOKEN) != 0 && config_.mode == FATE_MODE_TABLE && !config_.stage_all) {
        chances_.resize(scores_.size());
    }
}

// Of each GPU what is free now and may be taken.
std::vector<fate_budget> fate_engine::budgets() const {
    std::vector<fate_budget> all;
    for (size_t i = 0; i < gpus_.size(); ++i) {
        size_t free;
        size_t total;
        ggml_backend_dev_memory(gpus_[i], &free, &total);
        const int64_t spared = config_.vram_bytes > 0 ? std::max<int64_t>(static_cast<int64_t>(total) - config_.vram_bytes, 0) : 0;
        const int64_t ours   = static_cast<int64_t>(free) - spared;
        const int64_t bytes  = std::min(ours - config_.vram_margin - view_bytes_on(gpus_[i]), most_[i]);
        all.push_back({ bytes, pool_.staging_bytes_on(gpus_[i]), ours, config_.vram_margin });
    }
    return all;
}

// Which layers engage; reason_ is set if one does not. False if there is nothing to place.
bool fate_engine::choose() {
    reason_    = blocks_.empty() ? "the model has no mixture-of-experts layers" : "";
    n_engaged_ = 0;
    n_whole_   = 0;
    n_slots_.assign(blocks_.size(), 0);
    if (config_.mode == FATE_MODE_OFF) {
        reason_ = "the mode is off";
        return false;
    }
    bool any_served = false;
    for (const auto & b : blocks_) {
        any_served = any_served || b->refused.empty();
        reason_    = b->refused.empty() ? reason_ : b->refused;
    }
    if (!any_served) {
        return false;
    }
    std::vector<int32_t>           wanted;
    const std::vector<fate_budget> now = budgets();
    for (size_t i = 0; i < now.size(); ++i) {
        tried_[i] = now[i].bytes;
    }
    try {
        wanted = fate_capacity(config_, settings_->slots_list, shapes_, pool_.staging_bytes(), now);
    } catch (const fate_error & error) {
        // `auto` takes what there is; a draft model or an MTP context is beside the model that the slots were meant for
        if (config_.slots_kind != FATE_SLOTS_AUTO && !fate_registry_any_engaged()) {
            throw;
        }
        reason_ = error.what();
        return false;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        block & b  = *blocks_[i];
        b.is_whole = shapes_[i].served && b.dev && wanted[i] == b.n_experts;
        n_whole_ += b.is_whole;
        if (shapes_[i].served && wanted[i] < b.n_experts) {
            n_slots_[i] = wanted[i];
            ++n_engaged_;
        } else if (shapes_[i].served && reason_.empty()) {
            reason_ = "all experts resident";
        }
        b.n_slots = n_slots_[i];
    }
    return n_engaged_ + n_whole_ > 0;
}

// Makes the pools of the layers that engage; leaves reason_ set if one does not.
void fate_engine::engage() {
    while (choose()) {
        std::vector<int32_t> n_placed = n_slots_;
        for (size_t i = 0; i < blocks_.size(); ++i) {
            block & b = *blocks_[i];
            if (b.is_whole) {
                n_placed[i] = b.n_experts;
            } else if (b.n_slots > 0 && !b.dev) {
                b.layer = std::make_unique<fate_layer>(b.n_experts, b.k, b.n_slots, shapes_[i].expert_bytes);
            }
        }
        pool_bytes_ = pool_.bytes(n_placed) + pool_.staging_bytes(&n_placed);
        engaged_    = n_engaged_ > 0;
        try {
            if (!pool_.allocate(n_placed)) {
                throw fate_error(FATE_STATUS_MEMORY, no_memory());
            }
            open_views();
            open_devices();
            const std::vector<int32_t> told = horizons();
            for (fate_record & record : record_) {
                record.set_horizons(told);
            }
            return;
        } catch (const fate_error & e) {
            give_up(e.what());
            if (e.status() != FATE_STATUS_MEMORY || !shrink()) {
                return;
            }
        }
    }
}

// Has `auto` ask for less than it tried. False if that is of no use.
bool fate_engine::shrink() {
    if (!is_auto() || n_tries_ == MAX_TRIES) {
        return false;
    }
    ++n_tries_;
    for (size_t i = 0; i < tried_.size(); ++i) {
        most_[i] = tried_[i] - std::max<int64_t>(tried_[i] / 16, 0);
    }
    return true;
}

// Whether `auto` is to choose again beside llama.cpp's own buffers as they are now: they serve the experts' products too, or no longer hold copies of
// experts, and so have grown into the margin or left room.
bool fate_engine::is_misjudged() {
    if (!is_auto() || !is_placed() || n_tries_ == MAX_TRIES) {
        return false;
    }
    const std::vector<fate_budget> now      = budgets();
    bool                           is_drawn = false;
    bool                           has_room = false;
    for (size_t i = 0; i < now.size(); ++i) {
        const int64_t left = now[i].free_bytes - now[i].margin_bytes;
        int64_t       slot = 0; // one more in every layer that can have it
        for (size_t j = 0; j < blocks_.size(); ++j) {
            slot += blocks_[j]->n_slots > 0 && shapes_[j].device == static_cast<int32_t>(i) ? shapes_[j].expert_bytes : 0;
        }
        is_drawn = is_drawn || left < 0;
        has_room = has_room || (slot > 0 && left > slot && most_[i] == INT64_MAX);
    }
    n_tries_ += is_drawn || has_room;
    return is_drawn || has_room;
}

std::string fate_engine::no_memory() const {
    if (is_auto()) {
        return fate_format(
            "there is no memory for a pool of %lld bytes; a larger vram_margin, a shorter context (-c) or a smaller -ub leave more",
            static_cast<long long>(pool_bytes_));
    }
    return fate_format("there is no memory for a pool of %lld bytes; ask for fewer slots", static_cast<long long>(pool_bytes_));
}

// One device object for each GPU that runs engaged layers.
void fate_engine::open_devices() {
    std::vector<ggml_backend_dev_t> devs;
    for (const auto & b : blocks_) {
        if (b->n_slots > 0 && b->dev && std::find(devs.begin(), devs.end(), b->dev) == devs.end()) {
            devs.push_back(b->dev);
        }
    }
    for (ggml_backend_dev_t dev : devs) {
        fate_device_config config;
        config.page_lock   = !config_.no_page_lock;
        config.max_tokens  = static_cast<int32_t>(ctx_.get_cparams().n_ubatch);
        config.stride      = max_experts_;
        config.wants_steps = wants_steps_;
        config.weights     = config_.weights != 0;
        config.throttle    = config_.throttle;
        config.times       = config_.times != 0;
        if (!chances_.empty() || looks()) {
            config.prefetch_experts   = config_.prefetch_experts;
            config.prefetch_threshold = fate_prefetch_threshold(config_.prefetch_threshold);
            config.prefetch_eases     = !sync_ && !(config_.prefetch_threshold > 0);
            config.prefetch_waits     = sync_;
        }
        config.horizons   = horizons();
        config.asker      = callback_ ? this : nullptr;
        config.timeout_ns = static_cast<int64_t>(config_.miss_timeout_seconds * 1e9);
        std::vector<ggml_backend_buffer_t> buffers;
        std::vector<block *>               served;
        for (size_t i = 0; i < blocks_.size(); ++i) {
            block & b = *blocks_[i];
            if (b.n_slots == 0 || b.dev != dev) {
                continue;
            }
            fate_device_layer layer = {
                static_cast<int32_t>(i), b.n_experts, b.k, b.n_slots, {}, b.views, b.gate_inp ? static_cast<int32_t>(b.gate_inp->ne[0]) : 0
            };
            for (const fate_pool_tensor & t : pool_.tensors(static_cast<int32_t>(i))) {
                layer.tensors.push_back(
                    { t.source->data, t.slots->data, t.staging->data, t.expert_bytes(), t.tail_bytes(), t.is_weight() });
                ggml_backend_buffer_t buffer = t.source->buffer;
                if (std::find(buffers.begin(), buffers.end(), buffer) == buffers.end()) {
                    buffers.push_back(buffer);
                    config.ranges.push_back({ ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer) });
                }
            }
            config.layers.push_back(layer);
            served.push_back(&b);
        }
        devices_.push_back(fate_device_open(dev, config));
        bounced_ = devices_.back()->bounced().empty() ? bounced_ : devices_.back()->bounced();
        for (size_t i = 0; i < served.size(); ++i) {
            served[i]->device = devices_.back().get();
            served[i]->at     = i;
            served[i]->next   = i + 1 < served.size() ? served[i + 1] : nullptr;
            for (fate_device_view & view : served[i]->views) { // the device has them
                view.weights = {};
            }
        }
    }
}

// No memory for the pool, none left for llama.cpp's own buffers beside it, or a device that cannot serve.
void fate_engine::give_up(const std::string & why) {
    reason_     = why;
    engaged_    = false;
    n_engaged_  = 0;
    pool_bytes_ = 0;
    bounced_.clear();
    n_slots_.assign(n_slots_.size(), 0);
    n_whole_ = 0;
    for (auto & b : blocks_) {
        b->n_slots  = 0;
        b->is_whole = false;
        b->device   = nullptr;
        b->layer.reset();
    }
    devices_.clear();
    pool_.release();
}
