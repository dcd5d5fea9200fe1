// An engine's life and its steps.
#include "engine.h"

#include "capacity.h"
#include "status.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>

// A warm-up decodes two tokens, or encodes two and decodes one.
static const int64_t WARM_UP_TOKENS = 4;

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
    if (config_.on_close && stage_ == stage::SETTLED) {
        config_.on_close(config_.user, this);
    }
}

// Decides which layers engage and makes their pools; leaves reason_ set if one does not.
void fate_engine::engage() {
    std::vector<fate_layer_shape> shapes;
    bool                          any_served = false;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        const block & b      = *blocks_[i];
        const int64_t bytes  = pool_.expert_bytes(static_cast<int32_t>(i));
        const bool    served = b.refused.empty();
        any_served           = any_served || served;
        reason_              = served ? reason_ : b.refused;
        shapes.push_back({ b.n_experts, b.k, bytes, served });
        n_experts_.push_back(b.n_experts);
        k_.push_back(b.k);
        expert_bytes_.push_back(bytes);
        max_k_       = std::max(max_k_, b.k);
        max_experts_ = std::max(max_experts_, b.n_experts);
    }
    n_slots_.assign(blocks_.size(), 0);
    if (blocks_.empty()) {
        reason_ = "the model has no mixture-of-experts layers";
    }
    if (!any_served) {
        return;
    }

    std::vector<int32_t> wanted;
    try {
        wanted = fate_capacity(config_, settings_->slots_list, shapes);
    } catch (const fate_error & error) {
        if (!fate_registry_any_engaged()) {
            throw;
        }
        reason_ = error.what(); // a draft model or an MTP context beside the model that the slots were meant for
        return;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (shapes[i].served && wanted[i] < shapes[i].n_experts) {
            n_slots_[i] = wanted[i];
            ++n_engaged_;
        } else if (shapes[i].served && reason_.empty()) {
            reason_ = "all experts resident";
        }
    }
    if (n_engaged_ == 0) {
        return;
    }
    pool_bytes_ = pool_.bytes(n_slots_);
    engaged_    = pool_.allocate(n_slots_);
    if (!engaged_) {
        give_up();
        return;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (n_slots_[i] > 0) {
            blocks_[i]->layer = std::make_unique<fate_layer>(shapes[i].n_experts, shapes[i].k, n_slots_[i], shapes[i].expert_bytes);
        }
    }
    scores_.resize(n_slots_.size() * static_cast<size_t>(max_experts_));
    bonus_.resize(n_slots_.size());
}

// No memory for the pool, or none left for llama.cpp's own buffers beside it.
void fate_engine::give_up() {
    reason_     = fate_format("there is no memory for a pool of %lld bytes; ask for fewer slots", static_cast<long long>(pool_bytes_));
    engaged_    = false;
    n_engaged_  = 0;
    pool_bytes_ = 0;
    n_slots_.assign(n_slots_.size(), 0);
    for (auto & b : blocks_) {
        b->layer.reset();
    }
    pool_.release();
}

bool fate_engine::reserved(bool ok) {
    try {
        switch (stage_) {
            case stage::FINDING:
                engage();
                stage_ = stage::TRYING;
                break;
            case stage::TRYING:
                if (ok) {
                    settle();
                    return false;
                }
                give_up();
                stage_ = stage::GIVEN_UP;
                break;
            case stage::GIVEN_UP:
                if (!ok) {
                    throw fate_error(FATE_STATUS_MEMORY, "llama.cpp cannot reserve its buffers; lower -c or -ub");
                }
                settle();
                return false;
            case stage::SETTLED:
                return false;
        }
        ++epoch;
        if (!engaged_ && stage_ == stage::TRYING) { // nothing was allocated: the graphs stay as they are
            settle();
            return false;
        }
        return true;
    } catch (const fate_error & e) {
        fate_set_engine_error(e.status(), e.what());
        throw;
    }
}

void fate_engine::settle() {
    if (!engaged_ && config_.require && !fate_registry_any_engaged()) {
        throw fate_error(FATE_STATUS_MODEL, "not engaged because " + reason_);
    }
    open();
    stage_ = stage::SETTLED;
    fate_set_engine_error(FATE_STATUS_OK, "");
}

void fate_engine::open() {
    snapshot();
    if (config_.on_open && config_.on_open(config_.user, this) != FATE_STATUS_OK) {
        throw fate_error(FATE_STATUS_POLICY, "the policy failed to start");
    }
}

// Comes after the warm-up, which leaves no trace. A program may call it at other times for its own timings: those are none of ours.
void fate_engine::perf_reset() {
    if (stage_ != stage::SETTLED || tokens_ > WARM_UP_TOKENS) {
        return;
    }
    for (auto & b : blocks_) {
        if (b->layer) {
            b->layer->reset();
        }
    }
    held_back_     = false;
    scores_due_    = false;
    policy_failed_ = false;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        steps_   = 0;
        tokens_  = 0;
        busy_us_ = 0;
    }
    snapshot();
    if (config_.on_open && config_.on_open(config_.user, this) != FATE_STATUS_OK) {
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
        began_us_ = ggml_time_us();
        ran_      = false;
        error_.clear();
        record_[current_].begin(static_cast<int32_t>(ubatch.n_tokens), wants_steps_ ? static_cast<int32_t>(blocks_.size()) : 0, max_k_,
                                config_.record != 0, ubatch.token, ubatch.pos, ubatch.seq_id, ubatch.output);
    }
}

// A ubatch that failed half-way is a step of what ran: its fills happened.
bool fate_engine::ubatch_end(bool ok) {
    if (!active_ || (!ok && !ran_)) {
        return true;
    }
    seed();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ++steps_;
        tokens_ += record_[current_].n_tokens();
    }
    snapshot();

    if (wants_steps_) {
        if (scores_due_) {
            scores_due_ = false;
            publish();
        }
        if (held_back_) {
            held_back_ = false;
            if (deliver(record_[1 - current_])) {
                publish();
            }
        }
        if (!sync_) {
            held_back_ = true;
            current_   = 1 - current_;
        } else if (deliver(record_[current_])) {
            publish();
        }
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        busy_us_ += ggml_time_us() - began_us_;
    }
    if (!error_.empty()) {
        fate_set_last_error(error_);
    }
    return error_.empty();
}

// True if the policy published scores.
bool fate_engine::deliver(const fate_record & record) {
    if (!config_.on_step || (policy_failed_ && !config_.record)) {
        return false;
    }
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    std::fill(bonus_.begin(), bonus_.end(), 0.0f);
    int32_t         published = 0;
    const fate_step step      = record.view();
    if (config_.on_step(config_.user, this, &step, scores_.data(), bonus_.data(), &published) != FATE_STATUS_OK) {
        fail_policy();
    }
    return published && !policy_failed_;
}

void fate_engine::publish() {
    if (policy_failed_) {
        return;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer) {
            blocks_[i]->layer->publish(&scores_[i * max_experts_], bonus_[i]);
        }
    }
}

// The scores that come of it act when they would have.
void fate_engine::flush() {
    if (held_back_) {
        held_back_  = false;
        scores_due_ = deliver(record_[1 - current_]);
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
