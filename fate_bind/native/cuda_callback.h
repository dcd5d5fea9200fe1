// Callback mode on one GPU: the memory of the dialogue and the thread that answers.
#pragma once

#include "cuda_launch.h"
#include "device.h"
#include "mailbox.h"
#include "service.h"

#include <memory>

class fate_cuda_callback {
public:
    // On the current device. Destroy it when no kernel runs any more that may ask.
    fate_cuda_callback(fate_asker & asker, int64_t timeout_ns) {
        box_.allocate(sizeof(fate_mailbox));
        desk_.allocate(1);
        fate_desk desk  = {};
        desk.timeout_ns = timeout_ns;
        FATE_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void **>(&desk.box), box_.data, 0));
        fate_cuda_upload(desk_.data, &desk, sizeof(desk));
        service_ = std::make_unique<fate_service>(box(), asker);
    }

    fate_desk * desk() const { return desk_.data; }

    void wake() { service_->wake(); }

    void rest() { service_->rest(); }

    void reset() { before_ = counted(); }

    fate_device_asks get_asks() const {
        const fate_device_asks now = counted();
        return { now.n - before_.n, now.n_timeouts - before_.n_timeouts, now.waited_ns - before_.waited_ns };
    }

private:
    fate_mailbox & box() const { return *reinterpret_cast<fate_mailbox *>(box_.data); }

    // Written by the GPU meanwhile.
    fate_device_asks counted() const {
        const volatile fate_mailbox & now = box();
        return { now.n_asked, now.n_timeouts, now.waited_ns };
    }

    pinned_buffer                 box_;
    device_array<fate_desk>       desk_;
    fate_device_asks              before_ = {};
    std::unique_ptr<fate_service> service_; // ends first
};
