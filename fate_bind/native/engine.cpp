// An engine's life and its steps.
#include "engine.h"

#include "capacity.h"
#include "status.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>

//
// life
//

fate_engine::fate_engine(llama_context & ctx, std::shared_ptr<const fate_settings> settings) :
    ctx_(ctx),
    settings_(std::move(settings)),
    config_(settings_->config),
    callback_(config_.mode == FATE_MODE_CALLBACK),
    sync_(config_.sync || callback_),
    wants_steps_(config_.scores || config_.record || callback_) {
    char name[256] = "";
    llama_model_meta_val_str(&ctx.get_model(), "general.name", name, sizeof(name));
    model_name_ = name;
    fate_registry_add(this);
}

fate_engine::~fate_engine() {
    flush();
    fate_registry_remove(this);
    if (config_.on_close && found_all_) {
        config_.on_close(config_.user, this);
    }
}

void fate_engine::set_geometry(const std::vector<int32_t> & n_slots) {
    n_slots_ = n_slots;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        n_experts_.push_back(blocks_[i]->n_experts);
        k_.push_back(blocks_[i]->k);
        expert_bytes_.push_back(pool_.expert_bytes(static_cast<int32_t>(i)));
        max_k_       = std::max(max_k_, blocks_[i]->k);
        max_experts_ = std::max(max_experts_, blocks_[i]->n_experts);
    }
}

// Decides which layers engage and makes their pools; leaves reason_ set if none does.
void fate_engine::engage() {
    std::vector<int32_t> n_slots(blocks_.size(), 0);
    if (blocks_.empty()) {
        reason_ = "the model has no mixture-of-experts layers";
        return;
    }

    std::vector<fate_layer_shape> shapes;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        shapes.push_back({ blocks_[i]->n_experts, blocks_[i]->k, pool_.expert_bytes(static_cast<int32_t>(i)) });
    }
    const std::vector<int32_t> wanted = fate_capacity(config_, settings_->slots_list, shapes);
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (!blocks_[i]->refused.empty()) {
            reason_ = blocks_[i]->refused;
        } else if (wanted[i] >= blocks_[i]->n_experts) {
            reason_ = reason_.empty() ? "all experts resident" : reason_;
        } else {
            n_slots[i] = wanted[i];
            ++n_engaged_;
        }
    }
    if (n_engaged_ > 0 && !pool_.allocate(n_slots)) {
        reason_ =
            fate_format("a pool of %lld bytes could not be allocated; ask for fewer slots", static_cast<long long>(pool_.bytes(n_slots)));
        std::fill(n_slots.begin(), n_slots.end(), 0);
        n_engaged_ = 0;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (n_slots[i] > 0) {
            blocks_[i]->layer = std::make_unique<fate_layer>(shapes[i].n_experts, shapes[i].k, n_slots[i], shapes[i].expert_bytes);
        }
    }
    pool_bytes_ = pool_.bytes(n_slots);
    set_geometry(n_slots);
    engaged_ = n_engaged_ > 0;
    if (engaged_) {
        scores_.resize(static_cast<size_t>(n_slots.size()) * max_experts_);
        bonus_.resize(n_slots.size());
    }
}

bool fate_engine::reserved() {
    try {
        engage();
        if (!engaged_ && n_slots_.empty()) {
            set_geometry(std::vector<int32_t>(blocks_.size(), 0));
        }
        if (!engaged_ && config_.require) {
            throw fate_error(FATE_STATUS_MODEL, "not engaged because " + reason_);
        }
        open();
    } catch (const fate_error & e) {
        fate_set_engine_error(e.status(), e.what());
        throw;
    }
    fate_set_engine_error(FATE_STATUS_OK, "");
    found_all_ = true;
    ++epoch;
    return engaged_;
}

void fate_engine::open() {
    snapshot();
    if (config_.on_open && config_.on_open(config_.user, this) != FATE_STATUS_OK) {
        throw fate_error(FATE_STATUS_POLICY, "the policy failed to start");
    }
}

void fate_engine::perf_reset() {
    if (!found_all_) {
        return;
    }
    for (auto & b : blocks_) {
        if (b->layer) {
            b->layer->reset();
        }
    }
    held_back_ = false;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        steps_   = 0;
        tokens_  = 0;
        busy_us_ = 0;
    }
    snapshot();
    if (config_.on_open && !policy_failed_ && config_.on_open(config_.user, this) != FATE_STATUS_OK) {
        fail_policy();
    }
}

//
// steps
//

void fate_engine::ubatch_begin(const llama_ubatch & ubatch) {
    const bool active = engaged_ && !ctx_.get_cparams().warmup;
    if (active != active_) {
        active_ = active;
        ++epoch;
    }
    if (active_) {
        began_us_      = ggml_time_us();
        record_tokens_ = static_cast<int32_t>(ubatch.n_tokens);
        record_[current_].begin(record_tokens_, wants_steps_ ? static_cast<int32_t>(blocks_.size()) : 0, max_k_, config_.record != 0,
                                ubatch.token, ubatch.pos, 1, ubatch.seq_id, ubatch.output);
    }
}

void fate_engine::ubatch_end() {
    if (!active_) {
        return;
    }
    seed();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ++steps_;
        tokens_ += record_tokens_;
    }
    snapshot();

    if (wants_steps_) {
        if (held_back_) {
            held_back_ = false;
            deliver(record_[1 - current_]);
        }
        if (sync_) {
            deliver(record_[current_]);
        } else {
            held_back_ = true;
            current_   = 1 - current_;
        }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    busy_us_ += ggml_time_us() - began_us_;
}

void fate_engine::deliver(const fate_record & record) {
    if (!config_.on_step || (policy_failed_ && !config_.record)) {
        return;
    }
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    std::fill(bonus_.begin(), bonus_.end(), 0.0f);
    int32_t         published = 0;
    const fate_step step      = record.view();
    if (config_.on_step(config_.user, this, &step, scores_.data(), bonus_.data(), &published) != FATE_STATUS_OK) {
        fail_policy();
        return;
    }
    if (!published || policy_failed_) {
        return;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer) {
            blocks_[i]->layer->publish(&scores_[i * max_experts_], bonus_[i]);
        }
    }
}

void fate_engine::flush() {
    if (held_back_) {
        held_back_ = false;
        deliver(record_[1 - current_]);
    }
}

// The run goes on as LRU.
void fate_engine::fail_policy() {
    policy_failed_ = true;
    for (auto & b : blocks_) {
        if (b->layer) {
            b->layer->forget_scores();
        }
    }
}

//
// what others read
//

void fate_engine::snapshot() {
    std::lock_guard<std::mutex> lock(mutex_);
    counters_.assign(blocks_.size() * FATE_N_COUNTERS, 0);
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer) {
            const std::vector<int64_t> & from = blocks_[i]->layer->counters();
            std::copy(from.begin(), from.end(), counters_.begin() + static_cast<std::ptrdiff_t>(i * FATE_N_COUNTERS));
        }
    }
}

fate_info fate_engine::info() const {
    std::lock_guard<std::mutex> lock(mutex_);
    fate_info                   info{};
    info.engaged                   = engaged_;
    info.policy_failed             = policy_failed_;
    info.reason                    = reason_.c_str();
    info.geometry.n_layers         = static_cast<int32_t>(blocks_.size());
    info.geometry.n_layers_engaged = n_engaged_;
    info.geometry.n_experts        = n_experts_.data();
    info.geometry.k                = k_.data();
    info.geometry.n_slots          = n_slots_.data();
    info.geometry.expert_bytes     = expert_bytes_.data();
    info.geometry.model            = model_name_.c_str();
    info.steps                     = steps_;
    info.tokens                    = tokens_;
    info.busy_us                   = busy_us_;
    info.pool_bytes                = pool_bytes_;
    return info;
}

void fate_engine::get_counters(int64_t * out, size_t n) const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (n != counters_.size()) {
        throw fate_error(FATE_STATUS_INVALID,
                         fate_format("n_counters %zu: expected n_layers x FATE_N_COUNTERS = %zu", n, counters_.size()));
    }
    std::copy(counters_.begin(), counters_.end(), out);
}

void fate_engine::check() const {
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (!blocks_[i]->layer) {
            continue;
        }
        const int32_t bad = blocks_[i]->layer->first_inconsistent_slot();
        if (bad >= 0) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("layer %zu: slot_of and expert_of disagree at slot %d", i, bad));
        }
        const fate_table & t = blocks_[i]->layer->table();
        for (int32_t slot = 0; slot < t.n_slots; ++slot) {
            if (t.expert_of[slot] >= 0 && !pool_.holds(static_cast<int32_t>(i), t.expert_of[slot], slot)) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("layer %zu: slot %d does not hold the bytes of expert %d", i, slot, t.expert_of[slot]));
            }
        }
    }
}
