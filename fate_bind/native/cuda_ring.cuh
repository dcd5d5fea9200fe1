// Experts from the ring, where the GPU cannot read the model's memory.
#pragma once

#include "cuda_layer.cuh"
#include "cuda_mailbox.cuh"
#include "ring.h"

// Writes one unit of an expert to its place; n: bytes of it that are no padding.
static __device__ __forceinline__ void fate_ring_store(char * to, uint4 unit, uint32_t width, uint64_t n) {
    if (width == 16) {
        *reinterpret_cast<uint4 *>(to) = unit;
        return;
    }
    const uint32_t words[4] = { unit.x, unit.y, unit.z, unit.w };
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
        if (width == 4 && 4 * i < n) {
            reinterpret_cast<uint32_t *>(to)[i] = words[i];
        }
#pragma unroll
        for (uint32_t b = 0; b < 4; ++b) {
            if (width == 1 && 4 * i + b < n) {
                to[4 * i + b] = static_cast<char>(words[i] >> (8 * b));
            }
        }
    }
}

// Brings n experts: to their slots, or each to its own place in staging. All threads of all blocks of a launch; the blocks take chunks as they come.
template <bool STAGE>
static __device__ void fate_ring_bring(const fate_cuda_layer & layer, int n, const int32_t * experts, const int32_t * slots) {
    fate_ring_desk &    desk = *layer.ring;
    fate_ring_box &     box  = *desk.box;
    const int           tid  = threadIdx.x;
    fate_cuda_io        io;
    __shared__ uint32_t s_shared; // a ticket, then the chunk of the order
    uint32_t            units_per_expert = 0;
    for (int t = 0; t < layer.n_tensors; ++t) {
        units_per_expert += fate_ring_units(layer.tensors[t].expert_bytes);
    }
    const uint32_t n_units  = units_per_expert * n;
    const uint32_t n_chunks = fate_ring_chunks(units_per_expert, n);
    const uint32_t first    = desk.first;

    if (tid == 0) {
        s_shared = atomicAdd(&desk.tickets, 1);
    }
    __syncthreads();
    if (s_shared == 0) {
        if (tid < n) {
            box.experts[tid] = experts[tid];
        }
        if (tid == 0) {
            box.layer     = layer.index;
            box.n_experts = n;
        }
        __syncthreads();
        if (tid == 0) {
            io.store_release(&box.posted, ++desk.n_posted);
        }
    }
    for (;;) {
        __syncthreads();
        if (tid == 0) {
            s_shared = atomicAdd(&desk.next, 1);
            if (s_shared < n_chunks) {
                fate_ring_await(box, first + s_shared, io);
            }
        }
        __syncthreads();
        const uint32_t chunk = s_shared;
        if (chunk >= n_chunks) {
            break;
        }
        const uint32_t units = FATE_RING_CHUNK / FATE_RING_UNIT;
        const uint4 *  from  = reinterpret_cast<const uint4 *>(desk.data) + static_cast<size_t>(fate_ring_place(first + chunk)) * units;
#pragma unroll 4
        for (uint32_t i = tid; i < units; i += FATE_CUDA_THREADS) {
            const uint32_t at = chunk * units + i;
            if (at >= n_units) {
                break;
            }
            const uint4   unit   = __ldcv(from + i);
            const int32_t which  = static_cast<int32_t>(at / units_per_expert);
            uint32_t      within = at - which * units_per_expert;
            int           t      = 0;
            for (; t < layer.n_tensors - 1 && within >= fate_ring_units(layer.tensors[t].expert_bytes); ++t) {
                within -= fate_ring_units(layer.tensors[t].expert_bytes);
            }
            const fate_cuda_tensor & tensor = layer.tensors[t];
            const uint64_t           offset = static_cast<uint64_t>(within) * FATE_RING_UNIT;
            char *                   to     = STAGE ? tensor.staging + experts[which] * tensor.expert_bytes + offset :
                                                      tensor.slots + slots[which] * tensor.expert_bytes + offset;
            fate_ring_store(to, unit, tensor.width, tensor.expert_bytes - offset);
        }
        __syncthreads();
        if (tid == 0) {
            fate_ring_give_back(box, first + chunk, io);
        }
    }
    if (tid == 0 && atomicAdd(&desk.n_gone, 1) == gridDim.x - 1) { // the others are through
        desk.first   = first + n_chunks;
        desk.tickets = 0;
        desk.next    = 0;
        desk.n_gone  = 0;
    }
}

// Before fate_stage, which then finds the absent experts in staging: brings them there, and zeros what kernels read behind an expert.
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_stage_absent(const __grid_constant__ fate_cuda_layer layer,
                                                                              const __grid_constant__ fate_cuda_call  call) {
    __shared__ uint8_t s_touched[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t s_absent[FATE_CUDA_MAX_EXPERTS];
    __shared__ int     s_scratch[33];
    fate_pdl_wait();
    const int tid = threadIdx.x;
    if (tid < layer.n_experts) {
        s_touched[tid] = 0;
    }
    __syncthreads();
    for (int i = tid; i < call.n_rows * layer.k; i += FATE_CUDA_THREADS) {
        s_touched[fate_id(call, i / layer.k, i % layer.k)] = 1;
    }
    __syncthreads();
    const bool is_absent = tid < layer.n_experts && s_touched[tid] && layer.slot_of[tid] < 0;
    int        n_absent;
    const int  at = fate_rank_of(is_absent, s_scratch, n_absent);
    if (is_absent) {
        s_absent[at] = tid;
    }
    __syncthreads();
    for (int t = blockIdx.x; t < layer.n_tensors; t += gridDim.x) {
        const fate_cuda_tensor & tensor = layer.tensors[t];
        const uint32_t           n_tail = tensor.n_tail * tensor.width;
        for (uint32_t i = tid; n_tail > 0 && i < layer.n_experts * n_tail; i += FATE_CUDA_THREADS) {
            const uint64_t expert = i / n_tail;
            const uint64_t place  = (expert + 1) * tensor.expert_bytes + i % n_tail;
            const uint64_t owner  = place / tensor.expert_bytes;
            if (s_touched[expert] && (owner >= static_cast<uint64_t>(layer.n_experts) || !s_touched[owner])) {
                tensor.staging[place] = 0;
            }
        }
    }
    if (n_absent > 0) {
        fate_ring_bring<true>(layer, n_absent, s_absent, nullptr);
    }
}

// The layer as fate_stage is to see it.
static inline fate_cuda_layer fate_staged_from_ring(fate_cuda_layer layer) {
    for (int t = 0; t < layer.n_tensors; ++t) {
        layer.tensors[t].source = layer.tensors[t].staging;
        layer.tensors[t].n_tail = 0;
    }
    return layer;
}
