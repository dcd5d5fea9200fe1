// Every CUDA call goes through here. An error is taken off CUDA's own books, so that nobody else trips over it.
#pragma once

#include "status.h"

#include <cuda_runtime.h>

inline void fate_cuda_check(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw fate_error(error == cudaErrorMemoryAllocation ? FATE_STATUS_MEMORY : FATE_STATUS_DECODE,
                         fate_format("%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error)));
    }
}

#define FATE_CUDA(call) fate_cuda_check(call, #call)
