// Staging a large batch: what the GPU does beside the copy engine. Launched in stream order, one step after the other.
#pragma once

#include "cuda_copy.cuh"

// A layer's batch, in device memory.
struct fate_cuda_batch {
    int32_t * slot_of; // [n_experts] as it was before the batch seeds the slots
    uint8_t * touched; // [n_experts]
    int64_t * clock;   // before the batch
};

// One block: opens the batch and counts it.
static __global__ void fate_batch_open(const __grid_constant__ fate_cuda_layer layer, fate_cuda_batch batch, int32_t n_rows) {
    fate_pdl_wait();
    for (int e = threadIdx.x; e < layer.n_experts; e += blockDim.x) {
        batch.slot_of[e] = layer.slot_of[e];
        batch.touched[e] = 0;
    }
    if (threadIdx.x == 0) {
        const int64_t n_pairs = static_cast<int64_t>(n_rows) * layer.k;
        *batch.clock          = layer.head->clock;
        layer.head->clock += n_pairs;
        fate_add(&layer.counters[FATE_COUNTER_STAGED], n_pairs);
        if (layer.step) {
            *layer.step = { FATE_PATH_STAGED, n_rows, 0, 0 };
        }
    }
}

// One thread a pair: notes its use, hands the id on.
static __global__ void fate_batch_note(const __grid_constant__ fate_cuda_layer layer, const __grid_constant__ fate_cuda_call call,
                                       fate_cuda_batch batch) {
    fate_pdl_wait();
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= call.n_rows * layer.k) {
        return;
    }
    const int     row              = i / layer.k;
    const int     rank             = layer.k - 1 - i % layer.k;
    const int32_t expert           = fate_id(call, row, rank);
    batch.touched[expert]          = 1;
    call.out[row * layer.k + rank] = expert;
    fate_max(&layer.last_use[expert], *batch.clock + i + 1);
    fate_note(layer, call, row, rank, expert, false);
}

// Brings touched experts to their own place in staging: those that have a slot, with from_host also the others.
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_batch_stage(const __grid_constant__ fate_cuda_layer layer,
                                                                             fate_cuda_batch batch, bool from_host) {
    __shared__ uint8_t s_touched[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t s_experts[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t s_slot_of[FATE_CUDA_MAX_EXPERTS];
    __shared__ int     s_scratch[33];

    fate_pdl_wait();
    const int tid  = threadIdx.x;
    bool      mine = false;
    if (tid < layer.n_experts) {
        s_touched[tid] = batch.touched[tid];
        s_slot_of[tid] = batch.slot_of[tid];
        mine           = s_touched[tid] && (from_host || s_slot_of[tid] >= 0);
    }
    int       n;
    const int at = fate_rank_of(mine, s_scratch, n);
    if (mine) {
        s_experts[at] = tid;
    }
    __syncthreads();
    fate_copy<FATE_COPY_STAGE>(layer, n, s_experts, nullptr, s_slot_of, s_touched);
}

// Copies what the batch's seeds admitted from staging into its slots; the tables name it already.
static __global__ void __launch_bounds__(FATE_CUDA_THREADS) fate_batch_seed(const __grid_constant__ fate_cuda_layer layer,
                                                                            fate_cuda_batch                         batch) {
    __shared__ int32_t s_experts[FATE_CUDA_MAX_EXPERTS];
    __shared__ int32_t s_slots[FATE_CUDA_MAX_EXPERTS];
    __shared__ int     s_scratch[33];

    fate_pdl_wait();
    const int     tid  = threadIdx.x;
    const int32_t slot = tid < layer.n_experts ? layer.slot_of[tid] : -1;
    const bool    mine = slot >= 0 && slot != batch.slot_of[tid];
    int           n;
    const int     at = fate_rank_of(mine, s_scratch, n);
    if (mine) {
        s_experts[at] = tid;
        s_slots[at]   = slot;
    }
    __syncthreads();
    fate_copy<FATE_COPY_SEED>(layer, n, s_experts, s_slots, nullptr, nullptr);
}
