// Devices, memory and launches, each CUDA call checked.
#pragma once

#include "cuda_check.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

// The CUDA device behind a backend device. Throws fate_error if it is none.
inline int fate_cuda_ordinal(ggml_backend_dev_t dev) {
    int                    ordinal = 0;
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);
    if (!props.device_id || cudaDeviceGetByPCIBusId(&ordinal, props.device_id) != cudaSuccess) {
        cudaGetLastError();
        throw fate_error(FATE_STATUS_MODEL, fate_format("%s is not a CUDA device", ggml_backend_dev_name(dev)));
    }
    return ordinal;
}

// Switches this thread to a device for as long as it lives.
class device_scope {
public:
    explicit device_scope(int ordinal) {
        FATE_CUDA(cudaGetDevice(&before_));
        FATE_CUDA(cudaSetDevice(ordinal));
    }

    ~device_scope() { cudaSetDevice(before_); }

private:
    int before_ = 0;
};

template <typename T> struct device_array {
    T * data = nullptr;

    device_array()                                 = default;
    device_array(const device_array &)             = delete;
    device_array & operator=(const device_array &) = delete;

    void allocate(size_t n) { FATE_CUDA(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T))); }

    ~device_array() { cudaFree(data); }
};

struct pinned_buffer {
    char * data = nullptr;

    pinned_buffer()                                  = default;
    pinned_buffer(const pinned_buffer &)             = delete;
    pinned_buffer & operator=(const pinned_buffer &) = delete;

    void allocate(size_t n) {
        FATE_CUDA(cudaHostAlloc(reinterpret_cast<void **>(&data), n, cudaHostAllocPortable | cudaHostAllocMapped));
        memset(data, 0, n);
    }

    ~pinned_buffer() { cudaFreeHost(data); }
};

// Whether a kernel may be launched into upstream's chain of programmatic dependent launches: it must wait for what runs before by itself.
inline bool fate_cuda_chains([[maybe_unused]] int ordinal, [[maybe_unused]] const void * kernel) {
#if defined(__HIP__)
    return false;
#else
    int major = 0;
    FATE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
    cudaFuncAttributes attributes;
    FATE_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    const char * pdl = getenv("GGML_CUDA_PDL"); // upstream's switch
    return major >= 9 && attributes.ptxVersion >= 90 && (!pdl || atoi(pdl) != 0);
#endif
}

// Whether a node of a graph may start before a kernel that it depends on has ended, where that kernel is launched into the chain.
inline bool fate_cuda_starts_early() {
#if defined(__HIP__) || CUDART_VERSION < 12030
    return false;
#else
    int driver = 0;
    FATE_CUDA(cudaDriverGetVersion(&driver));
    return driver >= 12030;
#endif
}

// Every kernel of ours that is not in a graph is launched here, and where it can be into the chain. A plain launch before each token, even of a kernel that does
// nothing, cost every kernel of the process's graphs from then on a sixth of a microsecond, 4 % of a token of gpt-oss-20b's shape; the same kernel launched into
// the chain, or a copy, cost nothing of the kind (H200, driver 580). On a stream beside the step it does either way, where that happens at each token: see
// fate_cuda_alone. What looks ahead in steps that are not captured does no such harm.
template <typename... Params, typename... Args>
void fate_cuda_launch(void (*kernel)(Params...), int n_blocks, int n_threads, size_t shared, cudaStream_t stream, bool chained,
                      Args &&... args) {
#if defined(__HIP__)
    (void) chained;
    kernel<<<static_cast<unsigned>(n_blocks), static_cast<unsigned>(n_threads), shared, stream>>>(static_cast<Params>(args)...);
    FATE_CUDA(cudaGetLastError());
#else
    cudaLaunchAttribute attribute;
    attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config                            = {};
    config.gridDim                                       = dim3(static_cast<unsigned>(n_blocks));
    config.blockDim                                      = dim3(static_cast<unsigned>(n_threads));
    config.dynamicSmemBytes                              = shared;
    config.stream                                        = stream;
    config.attrs                                         = &attribute;
    config.numAttrs                                      = chained ? 1 : 0;
    FATE_CUDA(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
#endif
}

// The graph that a stream is captured into, null: none. after: what the stream's next node would depend on, until something is done with the stream. id: of the
// capture, never the same again.
inline cudaGraph_t fate_cuda_captured(cudaStream_t stream, const cudaGraphNode_t ** after = nullptr, size_t * n_after = nullptr,
                                      unsigned long long * id = nullptr) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t             graph  = nullptr;
#if CUDART_VERSION >= 13000
    FATE_CUDA(cudaStreamGetCaptureInfo(stream, &status, id, &graph, after, nullptr, n_after));
#else
    FATE_CUDA(cudaStreamGetCaptureInfo_v2(stream, &status, id, &graph, after, n_after));
#endif
    return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

// Adds a kernel to a graph that is being captured, behind some of its nodes, on a branch of its own: nothing that the stream does later in the graph
// waits for it, only whoever waits for the whole graph. It may start as soon as all blocks of the first n_early nodes have said so, kernels launched into the
// chain, and not only when they have ended: 0 unless fate_cuda_starts_early().
template <typename... Params, typename... Args>
cudaGraphNode_t fate_cuda_branch(cudaGraph_t graph, const cudaGraphNode_t * after, size_t n_after, size_t n_early,
                                 void (*kernel)(Params...), unsigned n_blocks, unsigned n_threads, size_t shared, Args &&... args) {
    std::tuple<Params...> values(static_cast<Params>(args)...);
    cudaGraphNode_t       node = nullptr;
    std::apply(
        [&](Params &... value) {
            void *               pointers[] = { const_cast<void *>(static_cast<const void *>(&value))... };
            cudaKernelNodeParams params     = {};
            params.func                     = reinterpret_cast<void *>(kernel);
            params.gridDim                  = dim3(n_blocks);
            params.blockDim                 = dim3(n_threads);
            params.sharedMemBytes           = static_cast<unsigned>(shared);
            params.kernelParams             = pointers;
            FATE_CUDA(cudaGraphAddKernelNode(&node, graph, after + n_early, n_after - n_early, &params));
        },
        values);
#if !defined(__HIP__) && CUDART_VERSION >= 12030
    cudaGraphEdgeData edge = {};
    edge.from_port         = cudaGraphKernelNodePortProgrammatic;
    edge.type              = cudaGraphDependencyTypeProgrammatic;
    for (size_t i = 0; i < n_early; ++i) {
#    if CUDART_VERSION >= 13000
        FATE_CUDA(cudaGraphAddDependencies(graph, after + i, &node, &edge, 1));
#    else
        FATE_CUDA(cudaGraphAddDependencies_v2(graph, after + i, &node, &edge, 1));
#    endif
    }
#endif
    return node;
}

// A kernel with its arguments as a graph by itself. A kernel launched onto a stream beside the step makes the process's graphs slower, as a plain one before
// the step does; as a graph it does not (python -m bench.graph_time --arms classifier+token@all-but-one).
class fate_cuda_alone {
public:
    fate_cuda_alone()                                    = default;
    fate_cuda_alone(const fate_cuda_alone &)             = delete;
    fate_cuda_alone & operator=(const fate_cuda_alone &) = delete;

    ~fate_cuda_alone() {
        if (exec_) {
            cudaGraphExecDestroy(exec_);
        }
    }

    // priority: of its blocks, as of a stream's
    template <typename... Params, typename... Args>
    void make([[maybe_unused]] int priority, void (*kernel)(Params...), unsigned n_blocks, unsigned n_threads, Args &&... args) {
        cudaGraph_t graph = nullptr;
        FATE_CUDA(cudaGraphCreate(&graph, 0));
        try {
            [[maybe_unused]] const cudaGraphNode_t node =
                fate_cuda_branch(graph, nullptr, 0, 0, kernel, n_blocks, n_threads, 0, std::forward<Args>(args)...);
#if !defined(__HIP__)
            cudaLaunchAttributeValue value = {};
            value.priority                 = priority;
            FATE_CUDA(cudaGraphKernelNodeSetAttribute(node, cudaLaunchAttributePriority, &value));
#endif
            FATE_CUDA(cudaGraphInstantiate(&exec_, graph, nullptr, nullptr, 0));
        } catch (const fate_error &) {
            cudaGraphDestroy(graph);
            throw;
        }
        cudaGraphDestroy(graph);
    }

    explicit operator bool() const { return exec_ != nullptr; }

    void launch(cudaStream_t stream) const { FATE_CUDA(cudaGraphLaunch(exec_, stream)); }

private:
    cudaGraphExec_t exec_ = nullptr;
};
