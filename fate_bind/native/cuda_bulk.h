// Staging a large batch with the copy engine running ahead. The host knows from the slot tables, fetched once a step, what every layer lacks; as soon as a
// layer's product has read a staging tensor, the copy engine fills it for the next layer, on a stream of its own.
#pragma once

#include "cuda_bulk.cuh"
#include "cuda_launch.h"
#include "device.h"

#include <vector>

struct fate_cuda_event {
    cudaEvent_t handle = nullptr;

    fate_cuda_event()                                    = default;
    fate_cuda_event(const fate_cuda_event &)             = delete;
    fate_cuda_event & operator=(const fate_cuda_event &) = delete;

    fate_cuda_event(fate_cuda_event && other) noexcept : handle(std::exchange(other.handle, nullptr)) {}

    void create(bool is_timed = false) {
        FATE_CUDA(cudaEventCreateWithFlags(&handle, is_timed ? cudaEventDefault : cudaEventDisableTiming));
    }

    ~fate_cuda_event() {
        if (handle) {
            cudaEventDestroy(handle);
        }
    }
};

class fate_cuda_bulk {
public:
    // layers: as the kernels see them; given: what they were made of. Both live on.
    fate_cuda_bulk(int ordinal, const std::vector<fate_cuda_layer> & layers, const std::vector<fate_device_layer> & given,
                   const int32_t * slot_of, size_t stride);
    ~fate_cuda_bulk();

    // A step is about to be enqueued, outside of a capture. If it is a bulk one, waits for what is enqueued and has the first layer's experts brought.
    void begin(bool is_bulk, cudaStream_t stream);
    // The op of the ids.
    void launch(size_t layer, const fate_cuda_call & call, cudaStream_t stream);
    // The op of a tensor; llama.cpp's graph has its product next.
    void launch_part(size_t layer, size_t tensor, bool next_is_bulk, cudaStream_t stream);
    // Whoever else uses staging comes after the copies that are under way.
    void join(cudaStream_t stream);

private:
    struct part {
        fate_cuda_layer layer;              // with this tensor alone
        fate_cuda_event filled;
        bool            is_ordered = false; // in this step, from the engine
        bool            is_used    = false; // in this step, by a product that is enqueued behind this part
    };

    void fetch(cudaStream_t stream);
    void order(size_t layer, size_t tensor);
    void copy();

    const std::vector<fate_cuda_layer> &   layers_;
    const std::vector<fate_device_layer> & given_;
    const int32_t *                        slot_of_; // on the device, [layer][stride]
    const size_t                           stride_;
    int                                    n_blocks_ = 0;
    bool                                   chains_   = false; // programmatic dependent launch
    cudaStream_t                           engine_   = nullptr;
    std::vector<void *>                    to_;               // copies to be made
    std::vector<const void *>              from_;
    std::vector<size_t>                    size_;
#if defined(FATE_LATE_FILLS)
    std::vector<size_t> alone_; // of size_, without tails
#endif
    fate_cuda_event                reached_;
    std::vector<std::vector<part>> parts_; // [layer][tensor]
    std::vector<fate_cuda_batch>   batches_;
    device_array<int32_t>          before_;
    device_array<uint8_t>          touched_;
    device_array<int64_t>          clocks_;
    pinned_buffer                  tables_;             // int32 [layer][stride]
    int64_t                        ahead_      = -1;    // the layer for which was ordered last, until its op comes
    bool                           is_fetched_ = false; // in this step
    bool                           is_busy_    = false; // the engine may be copying
};
