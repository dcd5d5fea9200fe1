// A build without a GPU backend.
#include "device.h"
#include "routing.h"
#include "status.h"

std::string fate_device_refuse(ggml_backend_dev_t dev) {
    return fate_format("it runs on %s, and this build serves layers on the CPU only; add -ngl 0", ggml_backend_dev_name(dev));
}

int32_t fate_device_max_rows(ggml_backend_dev_t, ggml_type) {
    return 0;
}

void fate_device_mark(ggml_tensor *, void (*)(ggml_tensor *, void *), bool) {}

int64_t fate_device_captured_nodes(void *) {
    return 0;
}

std::unique_ptr<fate_device> fate_device_open(ggml_backend_dev_t dev, const fate_device_config &) {
    throw fate_error(FATE_STATUS_MODEL, fate_device_refuse(dev));
}

std::unique_ptr<fate_router> fate_device_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> &) {
    throw fate_error(FATE_STATUS_MODEL, fate_device_refuse(dev));
}
