// Every CUDA call goes through here. An error is taken off CUDA's own books, so that nobody else trips over it.
#pragma once

#include "status.h"

#include "cuda_api.h"

inline void fate_cuda_check(cudaError_t error, const char * what) {
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw fate_error(error == cudaErrorMemoryAllocation ? FATE_STATUS_MEMORY : FATE_STATUS_DECODE,
                         fate_format("%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error)));
    }
}

#define FATE_CUDA(call) fate_cuda_check(call, #call)

// Host memory to the device, all of it there on return: a plain copy from pageable memory may return before, and streams that do not block do not wait for it.
inline void fate_cuda_upload(void * to, const void * from, size_t n_bytes) {
    FATE_CUDA(cudaMemcpy(to, from, n_bytes, cudaMemcpyHostToDevice));
    FATE_CUDA(cudaStreamSynchronize(nullptr));
}
