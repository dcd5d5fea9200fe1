// Copies of experts by the blocks of one launch together: straight from host memory, or on the device.
#pragma once

#include "cuda_layer.cuh"

// Test builds: a missed expert's slot, and what the copy engine fills of staging, first holds NaNs, and the bytes come late. Whoever reads too early is found out.
#if defined(FATE_FAULT_LATE_FILLS) || defined(FATE_FAULT_NOT_AWAITED) || defined(FATE_FAULT_VICTIM_IN_FLIGHT)
#    define FATE_LATE_FILLS
#endif

enum fate_cuda_copy { FATE_COPY_FILL, FATE_COPY_SEED, FATE_COPY_STAGE };

struct fate_cuda_piece {
    uint4  data;
    char * to;
    int    width;
};

// Units that one launch walks for one expert of a tensor. A wide one begins at the line of host memory that the expert begins in, so that warps read whole
// lines over the link: of a file they are rarely aligned (47 against 50 GB/s on PCIe 5).
static const int FATE_CUDA_LINE_UNITS = 8; // 128 bytes

static __device__ __forceinline__ uint32_t fate_lead(const char * expert) {
    return reinterpret_cast<uintptr_t>(expert) / 16 % FATE_CUDA_LINE_UNITS;
}

template <fate_cuda_copy KIND, bool WIDE> static __device__ __forceinline__ uint32_t fate_span(const fate_cuda_tensor & tensor) {
    const uint32_t n = tensor.n_units + (KIND == FATE_COPY_STAGE ? tensor.n_tail : 0);
    return WIDE ? (n + 2 * FATE_CUDA_LINE_UNITS - 2) / FATE_CUDA_LINE_UNITS * FATE_CUDA_LINE_UNITS : n;
}

// One unit of the copies: experts[i] goes to slots[i], or to its own place in staging.
template <fate_cuda_copy KIND, bool WIDE>
static __device__ __forceinline__ fate_cuda_piece fate_load(const fate_cuda_layer & layer, const int32_t * experts, const int32_t * slots,
                                                            const int32_t * slot_of, const uint8_t * touched, uint32_t n_units,
                                                            uint32_t at) {
    const uint32_t i    = at / n_units;
    uint32_t       unit = at - i * n_units;
    int            t    = 0;
    for (; t < layer.n_tensors - 1; ++t) {
        const uint32_t n = fate_span<KIND, WIDE>(layer.tensors[t]);
        if (unit < n) {
            break;
        }
        unit -= n;
    }
    const fate_cuda_tensor & tensor = layer.tensors[t];
    const int32_t            expert = experts[i];
    const uint32_t           width  = WIDE ? 16 : tensor.width;

    fate_cuda_piece piece;
    piece.data  = make_uint4(0, 0, 0, 0);
    piece.to    = nullptr;
    piece.width = static_cast<int>(width);
    if (WIDE) {
        unit -= fate_lead(tensor.source + expert * tensor.expert_bytes);
        if (unit >= tensor.n_units + (KIND == FATE_COPY_STAGE ? tensor.n_tail : 0)) { // before the expert, or behind it
            return piece;
        }
    }
    const uint64_t offset = static_cast<uint64_t>(unit) * width;
    const uint64_t place  = expert * tensor.expert_bytes + offset;
    const char *   from   = tensor.source + place;
    if (KIND == FATE_COPY_FILL) {
        piece.to = tensor.slots + slots[i] * tensor.expert_bytes + offset;
    } else if (KIND == FATE_COPY_SEED) {
        piece.to = tensor.slots + slots[i] * tensor.expert_bytes + offset;
        from     = tensor.staging + place;
    } else {
        piece.to = tensor.staging + place;
        if (unit >= tensor.n_units) { // what follows the expert, unless the next one brings it; zeros behind the last
            if (expert + 1 < layer.n_experts && touched[expert + 1]) {
                piece.to = nullptr;
            }
            from = place < layer.n_experts * tensor.expert_bytes ? from : nullptr;
        } else if (slot_of[expert] < 0 && from == piece.to) { // the ring brought it already
            piece.to = nullptr;
        } else if (slot_of[expert] >= 0) {
            from = tensor.slots + slot_of[expert] * tensor.expert_bytes + offset;
        }
    }
    if (piece.to && from) {
        switch (width) {
            case 16:
                piece.data = __ldcs(reinterpret_cast<const uint4 *>(from));
                break;
            case 4:
                piece.data.x = *reinterpret_cast<const uint32_t *>(from);
                break;
            default:
                piece.data.x = *reinterpret_cast<const uint8_t *>(from);
                break;
        }
    }
    return piece;
}

static __device__ __forceinline__ void fate_store(const fate_cuda_piece & piece) {
    if (!piece.to) {
        return;
    }
    switch (piece.width) {
        case 16:
            *reinterpret_cast<uint4 *>(piece.to) = piece.data;
            break;
        case 4:
            *reinterpret_cast<uint32_t *>(piece.to) = piece.data.x;
            break;
        default:
            *reinterpret_cast<uint8_t *>(piece.to) = static_cast<uint8_t>(piece.data.x);
            break;
    }
}

#if defined(FATE_LATE_FILLS)
template <fate_cuda_copy KIND, bool WIDE>
static __device__ void fate_poison(const fate_cuda_layer & layer, const int32_t * experts, const int32_t * slots, const int32_t * slot_of,
                                   const uint8_t * touched, uint32_t n_units, uint32_t total) {
    for (uint32_t at = blockIdx.x * blockDim.x + threadIdx.x; at < total; at += gridDim.x * blockDim.x) {
        fate_cuda_piece piece = fate_load<KIND, WIDE>(layer, experts, slots, slot_of, touched, n_units, at);
        piece.data            = make_uint4(~0u, ~0u, ~0u, ~0u);
        fate_store(piece);
    }
    __syncthreads();
    for (unsigned i = 0; i <= blockIdx.x % 8; ++i) {
        __nanosleep(10000);
    }
}
#endif

// The blocks of a launch copy n experts together.
template <fate_cuda_copy KIND, bool WIDE>
static __device__ void fate_copy(const fate_cuda_layer & layer, int n, const int32_t * experts, const int32_t * slots,
                                 const int32_t * slot_of, const uint8_t * touched) {
    uint32_t n_units = 0;
    for (int t = 0; t < layer.n_tensors; ++t) {
        n_units += fate_span<KIND, WIDE>(layer.tensors[t]);
    }
    const uint32_t total  = n_units * n;
    const uint32_t stride = gridDim.x * blockDim.x;
    uint32_t       at     = blockIdx.x * blockDim.x + threadIdx.x;
#if defined(FATE_LATE_FILLS)
    if (KIND == FATE_COPY_FILL) {
        fate_poison<KIND, WIDE>(layer, experts, slots, slot_of, touched, n_units, total);
    }
#endif

    // a window of loads: the oldest is stored and makes room for the next, so that the link never runs dry
    fate_cuda_piece window[FATE_CUDA_LOADS];
#pragma unroll
    for (int i = 0; i < FATE_CUDA_LOADS; ++i, at += stride) {
        window[i].to = nullptr;
        if (at < total) {
            window[i] = fate_load<KIND, WIDE>(layer, experts, slots, slot_of, touched, n_units, at);
        }
    }
    while (at - FATE_CUDA_LOADS * stride < total) {
#pragma unroll
        for (int i = 0; i < FATE_CUDA_LOADS; ++i, at += stride) {
            fate_store(window[i]);
            window[i].to = nullptr;
            if (at < total) {
                window[i] = fate_load<KIND, WIDE>(layer, experts, slots, slot_of, touched, n_units, at);
            }
        }
    }
}

template <fate_cuda_copy KIND>
static __device__ void fate_copy(const fate_cuda_layer & layer, int n, const int32_t * experts, const int32_t * slots,
                                 const int32_t * slot_of, const uint8_t * touched) {
    if (layer.is_wide) {
        fate_copy<KIND, true>(layer, n, experts, slots, slot_of, touched);
    } else {
        fate_copy<KIND, false>(layer, n, experts, slots, slot_of, touched);
    }
}
