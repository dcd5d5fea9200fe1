#include "courier.h"

#include <algorithm>
#include <cstring>

fate_courier::fate_courier(fate_ring_box & box, char * data, std::vector<std::vector<fate_courier_tensor>> layers, int n_threads) :
    box_(box),
    data_(data),
    layers_(std::move(layers)) {
    for (int i = 0; i < n_threads; ++i) {
        pollers_.push_back(std::make_unique<fate_poller>([this] { return bring(); }));
    }
}

void fate_courier::wake() {
    for (const auto & poller : pollers_) {
        poller->wake();
    }
}

// One chunk, if any is due whose place is free.
bool fate_courier::bring() {
    uint32_t chunk = next_.load(std::memory_order_acquire);
    if (chunk == end_.load(std::memory_order_acquire) && !accept()) {
        return false;
    }
    chunk = next_.load(std::memory_order_acquire);
    do {
        if (static_cast<int32_t>(end_.load(std::memory_order_acquire) - chunk) <= 0 ||
            fate_load_acquire(box_.n_taken[fate_ring_place(chunk)]) != chunk - FATE_RING_CHUNKS + 1) {
            return false;
        }
    } while (!next_.compare_exchange_weak(chunk, chunk + 1, std::memory_order_acq_rel));
    copy(chunk);
    fate_store_release(box_.n_brought[fate_ring_place(chunk)], chunk + 1);
    return true;
}

// The next order, if one was posted; all chunks of the last are taken then.
bool fate_courier::accept() {
    if (fate_load_acquire(box_.posted) == n_accepted_) {
        return false;
    }
    std::lock_guard<std::mutex> lock(accept_mutex_);
    const uint32_t              posted = fate_load_acquire(box_.posted); // again: it may have moved on meanwhile
    if (posted == n_accepted_) {
        return true;                                                     // another thread was faster
    }
    n_accepted_ = posted;
    first_      = end_;
    tensors_    = &layers_.at(static_cast<size_t>(box_.layer));
    units_      = 0;
    for (const fate_courier_tensor & t : *tensors_) {
        units_ += fate_ring_units(t.expert_bytes);
    }
    experts_.assign(box_.experts, box_.experts + box_.n_experts);
    end_.store(first_ + fate_ring_chunks(units_, box_.n_experts), std::memory_order_release);
    return true;
}

void fate_courier::copy(uint32_t chunk) {
    const uint64_t expert_bytes = static_cast<uint64_t>(units_) * FATE_RING_UNIT;
    uint64_t       at           = static_cast<uint64_t>(chunk - first_) * FATE_RING_CHUNK; // in the stream
    char *         to           = data_ + static_cast<size_t>(fate_ring_place(chunk)) * FATE_RING_CHUNK;
    uint64_t       room         = FATE_RING_CHUNK;
    while (room > 0 && at < expert_bytes * experts_.size()) {
        const uint64_t expert = static_cast<uint64_t>(experts_[at / expert_bytes]);
        uint64_t       within = at % expert_bytes;
        for (const fate_courier_tensor & t : *tensors_) {
            const uint64_t padded = static_cast<uint64_t>(fate_ring_units(t.expert_bytes)) * FATE_RING_UNIT;
            if (within >= padded) {
                within -= padded;
                continue;
            }
            const uint64_t n = std::min(room, padded - within);
            if (within < t.expert_bytes) {
                memcpy(to, t.data + expert * t.expert_bytes + within, std::min(n, t.expert_bytes - within));
            }
            at += n;
            to += n;
            room -= n;
            within = 0;
            if (room == 0) {
                break;
            }
        }
    }
}
