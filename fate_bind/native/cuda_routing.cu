// Routing replay on the GPU: the table and the place in it live there, so that a captured graph moves on by itself.
#include "cuda_check.h"
#include "cuda_launch.h"
#include "routing.h"

static __global__ void route(const int32_t * ids, int64_t * end, int32_t n_tokens, int32_t n_layers, int32_t table_k, int32_t layer,
                             int32_t k, int32_t n_rows, bool is_first, int32_t * out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
#endif
    const int64_t at = *end - (is_first ? 0 : n_rows);
    for (int32_t i = threadIdx.x; i < n_rows * k; i += blockDim.x) {
        const int64_t token = (at + i / k) % n_tokens;
        out[i]              = ids[(token * n_layers + layer) * table_k + i % k];
    }
    __syncthreads();
    if (is_first && threadIdx.x == 0) {
        *end = at + n_rows;
    }
}

class device_router final : public fate_router {
public:
    device_router(int ordinal, const fate_routing & r) : ordinal_(ordinal), n_tokens_(r.n_tokens), n_layers_(r.n_layers), k_(r.k) {
        const device_scope scope(ordinal);
        ids_.allocate(r.ids.size());
        end_.allocate(1);
        fate_cuda_upload(ids_.data, r.ids.data(), r.ids.size() * sizeof(int32_t));
        seek(0);
        chains_ = fate_cuda_chains(ordinal, reinterpret_cast<const void *>(route));
    }

    void launch(int32_t layer, bool is_first, ggml_tensor * dst, void * stream) override {
        fate_cuda_launch(route, 1, 256, 0, static_cast<cudaStream_t>(stream), chains_, ids_.data, end_.data, n_tokens_, n_layers_, k_,
                         layer % n_layers_, static_cast<int32_t>(dst->ne[0]), static_cast<int32_t>(dst->ne[1]), is_first,
                         static_cast<int32_t *>(dst->data));
    }

    void seek(int64_t row) override {
        const device_scope scope(ordinal_);
        FATE_CUDA(cudaDeviceSynchronize());
        fate_cuda_upload(end_.data, &row, sizeof(row));
        FATE_CUDA(cudaDeviceSynchronize());
    }

    const int64_t * end() const override { return end_.data; }

private:
    const int             ordinal_;
    const int32_t         n_tokens_, n_layers_, k_;
    bool                  chains_ = false;
    device_array<int32_t> ids_;
    device_array<int64_t> end_; // of the step's tokens
};

std::unique_ptr<fate_router> fate_device_router_open(ggml_backend_dev_t dev, const std::shared_ptr<const fate_routing> & routing) {
    return std::make_unique<device_router>(fate_cuda_ordinal(dev), *routing);
}
