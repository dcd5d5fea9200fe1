#include "pool.h"

#include "status.h"

#include "ggml-backend.h"

#include <cstring>

static int expert_dim(const ggml_tensor * t) {
    return ggml_n_dims(t) <= 1 ? 0 : (t->ne[2] > 1 ? 2 : 1);
}

std::string fate_pool::refuse(const ggml_tensor * source, int64_t n_experts) {
    if (source->data == nullptr || source->buffer == nullptr) {
        return fate_format("%s has no data", source->name);
    }
    if (!ggml_backend_buffer_is_host(source->buffer)) {
        return fate_format(
            "%s lies in a %s buffer, which the host cannot copy experts from; add --no-repack, or --cpu-moe if it is on a GPU",
            source->name, ggml_backend_buffer_name(source->buffer));
    }
    const int dim = expert_dim(source);
    if (source->ne[dim] != n_experts || !ggml_is_contiguous(source)) {
        return fate_format("%s is not indexed by expert (%lld experts, shape %lld x %lld x %lld)", source->name, (long long) n_experts,
                           (long long) source->ne[0], (long long) source->ne[1], (long long) source->ne[2]);
    }
    return "";
}

void fate_pool::add_layer(const std::vector<ggml_tensor *> & sources, int64_t n_experts) {
    std::vector<fate_pool_tensor> tensors;
    for (ggml_tensor * source : sources) {
        if (source && refuse(source, n_experts).empty()) {
            tensors.push_back({ source, expert_dim(source), nullptr });
        }
    }
    layers_.push_back(tensors);
}

int64_t fate_pool::expert_bytes(int32_t layer) const {
    int64_t sum = 0;
    for (const fate_pool_tensor & t : layers_[layer]) {
        sum += static_cast<int64_t>(t.expert_bytes());
    }
    return sum;
}

int64_t fate_pool::bytes(const std::vector<int32_t> & n_slots) const {
    int64_t sum = 0;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        sum += n_slots[layer] * expert_bytes(static_cast<int32_t>(layer));
    }
    return sum;
}

bool fate_pool::allocate(const std::vector<int32_t> & n_slots) {
    size_t n_tensors = 0;
    for (const auto & layer : layers_) {
        n_tensors += layer.size();
    }
    ctx_.reset(ggml_init({ (n_tensors + 1) * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    if (!ctx_) {
        return false;
    }
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        if (n_slots[layer] == 0) {
            continue;
        }
        for (fate_pool_tensor & t : layers_[layer]) {
            int64_t ne[GGML_MAX_DIMS] = { t.source->ne[0], t.source->ne[1], t.source->ne[2], 1 };
            ne[t.expert_dim]          = n_slots[layer];
            t.slots                   = ggml_new_tensor(ctx_.get(), t.source->type, GGML_MAX_DIMS, ne);
            ggml_format_name(t.slots, "%.48s (slots)", t.source->name);
        }
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), ggml_backend_cpu_buffer_type()));
    if (!buffer_) {
        return false;
    }
    ggml_backend_buffer_set_usage(buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(buffer_.get(), 0);
    return true;
}

ggml_tensor * fate_pool::slots_of(int32_t layer, ggml_tensor * source) const {
    for (const fate_pool_tensor & t : layers_[layer]) {
        if (t.source == source) {
            return t.slots;
        }
    }
    return nullptr;
}

void fate_pool::release() {
    buffer_.reset();
    ctx_.reset();
}

void fate_pool::fill(int32_t layer, int32_t expert, int32_t slot) {
#if defined(FATE_FAULT_COPY_SKIPPED)
    if (expert % 4 == 1) {
        return;
    }
#endif
    for (const fate_pool_tensor & t : layers_[layer]) {
        const size_t n = t.expert_bytes();
        memcpy(static_cast<char *>(t.slots->data) + slot * n, static_cast<const char *>(t.source->data) + expert * n, n);
    }
}

bool fate_pool::holds(int32_t layer, int32_t expert, int32_t slot) const {
    for (const fate_pool_tensor & t : layers_[layer]) {
        const size_t n = t.expert_bytes();
        if (memcmp(static_cast<const char *>(t.slots->data) + slot * n, static_cast<const char *>(t.source->data) + expert * n, n) != 0) {
            return false;
        }
    }
    return true;
}
