// What a decision of a layer on the host causes.
#pragma once

#include "engine.h"

class fate_engine_io final : public fate_layer_io {
public:
    fate_engine_io(fate_engine & engine, int32_t layer) : engine_(engine), layer_(layer) {}

    bool ask(const std::vector<int32_t> & needed, const std::vector<int32_t> & missing, const int64_t * last_use, int32_t n,
             int32_t * victims) override {
        const fate_miss miss = {
            layer_, static_cast<int32_t>(needed.size()), needed.data(), static_cast<int32_t>(missing.size()), missing.data(), last_use, n
        };
        return engine_.ask(miss, victims);
    }

    void reject() override { engine_.reject(); }

    void evict(int32_t expert) override {
        if (engine_.wants_steps_) {
            engine_.record_[engine_.current_].add_eviction(layer_, expert);
        }
    }

    void fill(int32_t expert, int32_t slot) override {
        engine_.pool_.fill(layer_, expert, slot);
        if (engine_.wants_steps_) {
            engine_.record_[engine_.current_].add_fill(layer_, expert);
        }
    }

private:
    fate_engine & engine_;
    int32_t       layer_;
};
