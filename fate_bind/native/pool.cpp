#include "pool.h"

#include "status.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <set>

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

void fate_pool::add_layer(const std::vector<ggml_tensor *> & sources, int64_t n_experts, ggml_backend_dev_t dev) {
    layer l = { dev, n_experts, {} };
    for (size_t role = 0; role < sources.size(); ++role) {
        if (sources[role] && refuse(sources[role], n_experts).empty()) {
            l.tensors.push_back({ sources[role], role, expert_dim(sources[role]), nullptr, nullptr });
        }
    }
    layers_.push_back(l);
}

int64_t fate_pool::expert_bytes(int32_t layer) const {
    int64_t sum = 0;
    for (const fate_pool_tensor & t : layers_[layer].tensors) {
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

bool fate_pool::is_staged(size_t layer, ggml_backend_dev_t dev, const std::vector<int32_t> * n_slots) const {
    return layers_[layer].dev == dev && (!n_slots || ((*n_slots)[layer] > 0 && (*n_slots)[layer] < layers_[layer].n_experts));
}

// The largest tensor of each role on a device; what upstream reads past its end is counted in.
std::vector<size_t> fate_pool::role_bytes(ggml_backend_dev_t dev, const std::vector<int32_t> * n_slots) const {
    const size_t        align = ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(dev));
    std::vector<size_t> bytes;
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (!is_staged(i, dev, n_slots)) {
            continue;
        }
        for (const fate_pool_tensor & t : layers_[i].tensors) {
            bytes.resize(std::max(bytes.size(), t.role + 1));
            const size_t size = ggml_backend_buft_get_alloc_size(ggml_backend_dev_buffer_type(dev), t.source) + FATE_POOL_TAIL;
            bytes[t.role]     = std::max(bytes[t.role], GGML_PAD(size, align));
        }
    }
    return bytes;
}

int64_t fate_pool::staging_bytes_on(ggml_backend_dev_t dev, const std::vector<int32_t> * n_slots) const {
    int64_t sum = 0;
    for (const size_t n : role_bytes(dev, n_slots)) {
        sum += static_cast<int64_t>(n);
    }
    return sum;
}

int64_t fate_pool::staging_bytes(const std::vector<int32_t> * n_slots) const {
    std::set<ggml_backend_dev_t> devs;
    int64_t                      sum = 0;
    for (const layer & l : layers_) {
        if (l.dev && devs.insert(l.dev).second) {
            sum += staging_bytes_on(l.dev, n_slots);
        }
    }
    return sum;
}

bool fate_pool::allocate_slots(ggml_backend_dev_t dev, const std::vector<int32_t> & n_slots) {
    size_t n_tensors = 0;
    for (const layer & l : layers_) {
        n_tensors += l.tensors.size();
    }
    ctxs_.emplace_back(ggml_init({ (n_tensors + 1) * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    if (!ctxs_.back()) {
        return false;
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (n_slots[i] == 0 || layers_[i].dev != dev) {
            continue;
        }
        for (fate_pool_tensor & t : layers_[i].tensors) {
            int64_t ne[GGML_MAX_DIMS] = { t.source->ne[0], t.source->ne[1], t.source->ne[2], 1 };
            ne[t.expert_dim]          = n_slots[i];
            t.slots                   = ggml_new_tensor(ctxs_.back().get(), t.source->type, GGML_MAX_DIMS, ne);
            ggml_format_name(t.slots, "%.48s (slots)", t.source->name);
        }
    }
    ggml_backend_buffer_type_t buft = dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_cpu_buffer_type();
    buffers_.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(ctxs_.back().get(), buft));
    if (!buffers_.back()) {
        return false;
    }
    ggml_backend_buffer_set_usage(buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(buffers_.back().get(), 0);
    return true;
}

bool fate_pool::allocate_staging(ggml_backend_dev_t dev, const std::vector<int32_t> & n_slots) {
    const std::vector<size_t> bytes     = role_bytes(dev, &n_slots);
    size_t                    n_tensors = 0;
    size_t                    total     = 0;
    for (const layer & l : layers_) {
        n_tensors += l.tensors.size();
    }
    for (const size_t n : bytes) {
        total += n;
    }
    if (total == 0) {
        return true;
    }
    ctxs_.emplace_back(ggml_init({ (n_tensors + 1) * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }));
    buffers_.emplace_back(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(dev), total));
    if (!ctxs_.back() || !buffers_.back()) {
        return false;
    }
    ggml_backend_buffer_set_usage(buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (!is_staged(i, dev, &n_slots)) {
            continue;
        }
        for (fate_pool_tensor & t : layers_[i].tensors) {
            char * at = static_cast<char *>(ggml_backend_buffer_get_base(buffers_.back().get()));
            for (size_t role = 0; role < t.role; ++role) {
                at += bytes[role];
            }
            t.staging = ggml_dup_tensor(ctxs_.back().get(), t.source);
            ggml_format_name(t.staging, "%.46s (staging)", t.source->name);
            if (ggml_backend_tensor_alloc(buffers_.back().get(), t.staging, at) != GGML_STATUS_SUCCESS) {
                return false;
            }
        }
    }
    ggml_backend_buffer_clear(buffers_.back().get(), 0);
    return true;
}

bool fate_pool::allocate(const std::vector<int32_t> & n_slots) {
    std::set<ggml_backend_dev_t> devs;
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (n_slots[i] > 0) {
            devs.insert(layers_[i].dev);
        }
    }
    for (ggml_backend_dev_t dev : devs) {
        if (!allocate_slots(dev, n_slots) || (dev && !allocate_staging(dev, n_slots))) {
            release();
            return false;
        }
    }
    fill_whole_layers(n_slots);
    return true;
}

void fate_pool::fill_whole_layers(const std::vector<int32_t> & n_slots) {
    for (size_t i = 0; i < layers_.size(); ++i) {
        if (!layers_[i].dev || n_slots[i] < layers_[i].n_experts) {
            continue;
        }
        for (const fate_pool_tensor & t : layers_[i].tensors) {
            ggml_backend_tensor_set(t.slots, t.source->data, 0, ggml_nbytes(t.source));
        }
    }
}

void fate_pool::release() {
    for (layer & l : layers_) {
        for (fate_pool_tensor & t : l.tensors) {
            t.slots   = nullptr;
            t.staging = nullptr;
        }
    }
    buffers_.clear();
    ctxs_.clear();
}

const fate_pool_tensor * fate_pool::find(int32_t layer, const ggml_tensor * source) const {
    for (const fate_pool_tensor & t : layers_[layer].tensors) {
        if (t.source == source) {
            return &t;
        }
    }
    return nullptr;
}

ggml_tensor * fate_pool::slots_of(int32_t layer, ggml_tensor * source) const {
    const fate_pool_tensor * t = find(layer, source);
    return t ? t->slots : nullptr;
}

ggml_tensor * fate_pool::staging_of(int32_t layer, ggml_tensor * source) const {
    const fate_pool_tensor * t = find(layer, source);
    return t ? t->staging : nullptr;
}

void fate_pool::fill(int32_t layer, int32_t expert, int32_t slot) {
#if defined(FATE_FAULT_COPY_SKIPPED)
    if (expert % 4 == 1) {
        return;
    }
#endif
    for (const fate_pool_tensor & t : layers_[layer].tensors) {
        const size_t n = t.expert_bytes();
        memcpy(static_cast<char *>(t.slots->data) + slot * n, static_cast<const char *>(t.source->data) + expert * n, n);
    }
}

bool fate_pool::holds(int32_t layer, int32_t expert, int32_t slot) const {
    for (const fate_pool_tensor & t : layers_[layer].tensors) {
        const size_t      n = t.expert_bytes();
        std::vector<char> copy;
        const char *      held = static_cast<const char *>(t.slots->data) + slot * n;
        if (layers_[layer].dev) {
            copy.resize(n);
            ggml_backend_tensor_get(t.slots, copy.data(), slot * n, n);
            held = copy.data();
        }
        if (memcmp(held, static_cast<const char *>(t.source->data) + expert * n, n) != 0) {
            return false;
        }
    }
    return true;
}
