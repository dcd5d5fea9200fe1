// CUDA's names where a HIP compiler reads the code: what hipify would write, and what HIP has otherwise or not at all. For waves of 32 threads.
//
// It compiles with hipcc 5.2. Nothing here was run: no AMD GPU was at hand. There are no programmatic dependent launches, and no batches of copies.
#pragma once

#include <cstdint>

#include <hip/hip_runtime.h>

#if defined(__HIP_DEVICE_COMPILE__) && defined(__AMDGCN_WAVEFRONT_SIZE) && __AMDGCN_WAVEFRONT_SIZE != 32
#    error "waves of 64 threads are not served: compile for an architecture whose waves have 32"
#endif

#define cudaDevAttrComputeCapabilityMajor           hipDeviceAttributeComputeCapabilityMajor
#define cudaDevAttrComputeCapabilityMinor           hipDeviceAttributeComputeCapabilityMinor
#define cudaDevAttrMultiProcessorCount              hipDeviceAttributeMultiprocessorCount
#define cudaDeviceGetAttribute                      hipDeviceGetAttribute
#define cudaDeviceGetByPCIBusId                     hipDeviceGetByPCIBusId
#define cudaDeviceGetStreamPriorityRange            hipDeviceGetStreamPriorityRange
#define cudaDeviceSynchronize                       hipDeviceSynchronize
#define cudaErrorInvalidValue                       hipErrorInvalidValue
#define cudaErrorMemoryAllocation                   hipErrorOutOfMemory
#define cudaErrorNotSupported                       hipErrorNotSupported
#define cudaError_t                                 hipError_t
#define cudaEventCreateWithFlags                    hipEventCreateWithFlags
#define cudaEventDefault                            hipEventDefault
#define cudaEventDestroy                            hipEventDestroy
#define cudaEventDisableTiming                      hipEventDisableTiming
#define cudaEventElapsedTime                        hipEventElapsedTime
#define cudaEventQuery                              hipEventQuery
#define cudaEventRecord                             hipEventRecord
#define cudaEventSynchronize                        hipEventSynchronize
#define cudaEvent_t                                 hipEvent_t
#define cudaFree                                    hipFree
#define cudaFreeHost                                hipHostFree
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncAttributes                          hipFuncAttributes
#define cudaGetDevice                               hipGetDevice
#define cudaGetErrorName                            hipGetErrorName
#define cudaGetErrorString                          hipGetErrorString
#define cudaGetLastError                            hipGetLastError
#define cudaGraphAddKernelNode                      hipGraphAddKernelNode
#define cudaGraphCreate                             hipGraphCreate
#define cudaGraphDestroy                            hipGraphDestroy
#define cudaGraphExecDestroy                        hipGraphExecDestroy
#define cudaGraphExec_t                             hipGraphExec_t
#define cudaGraphGetNodes                           hipGraphGetNodes
#define cudaGraphInstantiate                        hipGraphInstantiate
#define cudaGraphLaunch                             hipGraphLaunch
#define cudaGraphNode_t                             hipGraphNode_t
#define cudaGraph_t                                 hipGraph_t
#define cudaHostAlloc                               hipHostMalloc
#define cudaHostAllocMapped                         hipHostMallocMapped
#define cudaHostAllocPortable                       hipHostMallocPortable
#define cudaHostGetDevicePointer                    hipHostGetDevicePointer
#define cudaHostRegister                            hipHostRegister
#define cudaHostRegisterMapped                      hipHostRegisterMapped
#define cudaHostRegisterPortable                    hipHostRegisterPortable
#define cudaHostRegisterReadOnly                    0x08
#define cudaHostUnregister                          hipHostUnregister
#define cudaKernelNodeParams                        hipKernelNodeParams
#define cudaMalloc                                  hipMalloc
#define cudaMemcpy                                  hipMemcpy
#define cudaMemcpyAsync                             hipMemcpyAsync
#define cudaMemcpyDeviceToHost                      hipMemcpyDeviceToHost
#define cudaMemcpyHostToDevice                      hipMemcpyHostToDevice
#define cudaMemoryTypeHost                          hipMemoryTypeHost
#define cudaMemsetAsync                             hipMemsetAsync
#define cudaPointerAttributes                       hipPointerAttribute_t
#define cudaPointerGetAttributes                    hipPointerGetAttributes
#define cudaSetDevice                               hipSetDevice
#define cudaStreamCaptureStatus                     hipStreamCaptureStatus
#define cudaStreamCaptureStatusActive               hipStreamCaptureStatusActive
#define cudaStreamCaptureStatusNone                 hipStreamCaptureStatusNone
#define cudaStreamCreateWithFlags                   hipStreamCreateWithFlags
#define cudaStreamCreateWithPriority                hipStreamCreateWithPriority
#define cudaStreamDestroy                           hipStreamDestroy
#define cudaStreamGetCaptureInfo_v2                 hipStreamGetCaptureInfo_v2
#define cudaStreamNonBlocking                       hipStreamNonBlocking
#define cudaStreamPerThread                         hipStreamPerThread
#define cudaStreamSynchronize                       hipStreamSynchronize
#define cudaStreamWaitEvent                         hipStreamWaitEvent
#define cudaStream_t                                hipStream_t
#define cudaSuccess                                 hipSuccess

#define __grid_constant__

#if HIP_VERSION_MAJOR < 6
#    define FATE_MEMORY_TYPE memoryType
#else
#    define FATE_MEMORY_TYPE type
#endif

// at 100 MHz
static __device__ __forceinline__ uint64_t fate_hip_clock() {
#if HIP_VERSION < 50300000
    return __builtin_amdgcn_s_memrealtime();
#else
    return static_cast<uint64_t>(wall_clock64());
#endif
}

template <typename F> static inline hipError_t cudaFuncGetAttributes(hipFuncAttributes * attributes, F kernel) {
    return hipFuncGetAttributes(attributes, reinterpret_cast<const void *>(kernel));
}

template <typename F> static inline hipError_t cudaFuncSetAttribute(F kernel, hipFuncAttribute attribute, int value) {
    return hipFuncSetAttribute(reinterpret_cast<const void *>(kernel), attribute, value);
}

// loads that caches are not to keep, or not to answer
template <typename T> static __device__ __forceinline__ T __ldcs(const T * p) {
    return *p;
}

template <typename T> static __device__ __forceinline__ T __ldcg(const T * p) {
    return *const_cast<const volatile T *>(p);
}

static __device__ __forceinline__ uint4 __ldcv(const uint4 * p) {
    const volatile uint32_t * words = reinterpret_cast<const volatile uint32_t *>(p);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

static __device__ __forceinline__ unsigned __ballot_sync(unsigned, int flag) {
    return static_cast<unsigned>(__ballot(flag));
}

static __device__ __forceinline__ int __any_sync(unsigned, int flag) {
    return __any(flag);
}

template <typename T> static __device__ __forceinline__ T __shfl_up_sync(unsigned, T value, unsigned by) {
    return __shfl_up(value, by, 32);
}

template <typename T> static __device__ __forceinline__ T __shfl_xor_sync(unsigned, T value, int mask) {
    return __shfl_xor(value, mask, 32);
}

static __device__ __forceinline__ void __syncwarp(unsigned = ~0u) {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}

static __device__ __forceinline__ void __nanosleep(unsigned) {
    __builtin_amdgcn_s_sleep(8); // some 500 cycles
}
