// Experts on their way to a GPU that cannot read the model's memory: the kernel orders them, couriers copy them into a ring of pinned memory, chunk by chunk,
// the kernel takes them from there. No CUDA: the host's tests play the GPU.
//
// An order is a stream of bytes: its experts one after another, of each the layer's tensors, each padded to a unit. Chunks are numbered through all orders
// (the numbers may wrap) and lie in the ring by their number. There is one order at a time: the next is posted when the last was taken.
#pragma once

#include "rule.h"

#include <cstdint>

static const int      FATE_RING_EXPERTS = 1024;
static const uint32_t FATE_RING_UNIT    = 16;        // bytes
static const uint32_t FATE_RING_CHUNK   = 256 << 10; // bytes
static const uint32_t FATE_RING_CHUNKS  = 64;        // a power of two

struct fate_ring_box {
    // the GPU's
    int32_t layer; // among all layers
    int32_t n_experts;
    int32_t experts[FATE_RING_EXPERTS];
    alignas(64) uint32_t posted;                    // number of the newest order, written last
    alignas(64) uint32_t n_taken[FATE_RING_CHUNKS]; // by place: number of the newest chunk taken from it, plus 1

    // the host's
    alignas(64) uint32_t n_brought[FATE_RING_CHUNKS]; // by place: number of the newest chunk in it, plus 1
};

// What the GPU keeps of it, in its own memory.
struct fate_ring_desk {
    fate_ring_box * box;     // as the GPU addresses it
    const char *    data;    // FATE_RING_CHUNKS chunks
    uint32_t        n_posted;
    uint32_t        first;   // chunk of the order
    uint32_t        tickets; // blocks of the launch that have come; the first one posts
    uint32_t        next;    // chunk of the order to be taken by a block
    uint32_t        n_gone;  // blocks that found no more
};

// Before the first order.
inline void fate_ring_clear(fate_ring_box & box) {
    for (uint32_t place = 0; place < FATE_RING_CHUNKS; ++place) {
        box.n_taken[place]   = place - FATE_RING_CHUNKS + 1;
        box.n_brought[place] = place - FATE_RING_CHUNKS + 1;
    }
}

FATE_HOST_DEVICE inline uint32_t fate_ring_place(uint32_t chunk) {
    return chunk % FATE_RING_CHUNKS;
}

// Units that a tensor's expert takes in the stream.
FATE_HOST_DEVICE inline uint32_t fate_ring_units(uint64_t expert_bytes) {
    return static_cast<uint32_t>((expert_bytes + FATE_RING_UNIT - 1) / FATE_RING_UNIT);
}

// Chunks of an order. units_per_expert: of all tensors.
FATE_HOST_DEVICE inline uint32_t fate_ring_chunks(uint32_t units_per_expert, int32_t n_experts) {
    const uint64_t bytes = static_cast<uint64_t>(units_per_expert) * static_cast<uint64_t>(n_experts) * FATE_RING_UNIT;
    return static_cast<uint32_t>((bytes + FATE_RING_CHUNK - 1) / FATE_RING_CHUNK);
}

// The GPU's side, by one thread of a block. IO: load_acquire(&word), store_release(&word, value), both seen by the host.

template <typename IO> FATE_HOST_DEVICE void fate_ring_await(const fate_ring_box & box, uint32_t chunk, IO & io) {
    while (io.load_acquire(&box.n_brought[fate_ring_place(chunk)]) != chunk + 1) {
    }
}

template <typename IO> FATE_HOST_DEVICE void fate_ring_give_back(fate_ring_box & box, uint32_t chunk, IO & io) {
    io.store_release(&box.n_taken[fate_ring_place(chunk)], chunk + 1);
}
