// An engine's life and its steps.
#include "engine.h"

#include "status.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
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
    wants_steps_(config_.scores || config_.record || callback_),
    routing_(fate_current_routing()),
    predictions_(routing_ ? fate_current_predictions() : nullptr) {
    char name[256] = "";
    llama_model_meta_val_str(&ctx.get_model(), "general.name", name, sizeof(name));
    model_name_ = name;
    fate_registry_add(this);
}

fate_engine::~fate_engine() {
    {
        std::lock_guard<std::mutex> lock(policy_mutex_);
        closing_ = true;
    }
    try {
        flush();
    } catch (const fate_error &) {
        // a lost device: its last records are gone
    }
    fate_registry_remove(this);
    if (config_.on_close && stage_ == stage::SETTLED) {
        config_.on_close(config_.user, this);
    }
}

void fate_engine::open_routers() {
    std::vector<ggml_backend_dev_t> devs;
    for (auto & b : blocks_) {
        if (!routing_ || b->k > routing_->k) {
            continue;
        }
        const auto at = std::find(devs.begin(), devs.end(), b->route_dev);
        b->router     = at == devs.end() ? nullptr : routers_[at - devs.begin()].get();
        if (!b->router) {
            devs.push_back(b->route_dev);
            routers_.push_back(fate_router_open(b->route_dev, routing_));
            b->router          = routers_.back().get();
            b->is_first_routed = true;
        }
    }
}

// In place of what routers say of later layers.
void fate_engine::foretell() {
    for (auto & device : devices_) {
        const block & first = first_of(*device);
        if (predictions_ && looks() && first.router) {
            if (!first.route_dev) {
                throw fate_error(
                    FATE_STATUS_INVALID,
                    "predictions are given in place of routers that run on the CPU; expected on the GPU of their experts: raise -ngl");
            }
            device->foretell(*predictions_, *first.router);
        }
    }
}

void fate_engine::seek_routing(int64_t row) {
    if (routers_.empty() || row < 0) {
        throw fate_error(FATE_STATUS_INVALID, routers_.empty() ?
                                                  "no routing is replayed here; call fate_replay_routing() before the context is made" :
                                                  fate_format("row %lld: expected 0 or more", static_cast<long long>(row)));
    }
    for (auto & router : routers_) {
        router->seek(row);
    }
}

bool fate_engine::reserved(bool ok) {
    try {
        switch (stage_) {
            case stage::FINDING:
                measure();
                engage();
                open_routers();
                stage_ = stage::TRYING;
                break;
            case stage::TRYING:
                if (ok && !is_misjudged()) {
                    settle();
                    return false;
                }
                give_up(no_memory());
                if (ok || shrink()) {
                    engage();
                }
                stage_ = is_placed() ? stage::TRYING : stage::GIVEN_UP;
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
        if (!is_placed() && !routing_ && stage_ == stage::TRYING) { // nothing was allocated: the graphs stay as they are
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
    foretell();
    blind_ = why_blind();
    for (const auto & b : blocks_) { // whoever sees them has copies
        b->packed = {};
        b->norm_numbers.clear();
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
    linear_.reset(); // on_open sets it again
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto & device : devices_) {
            device->reset();
        }
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

// The first layer that a device serves.
const fate_engine::block & fate_engine::first_of(const fate_device & device) const {
    return **std::find_if(blocks_.begin(), blocks_.end(), [&](const auto & b) { return b->device == &device; });
}

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
        gathered_[current_] = 0;
        record_[current_].begin(static_cast<int32_t>(ubatch.n_tokens), wants_steps_ ? static_cast<int32_t>(blocks_.size()) : 0, max_k_,
                                config_.weights != 0, ubatch.token, ubatch.pos, ubatch.seq_id, ubatch.output);
        for (const auto & b : blocks_) {
            if (b->layer) {
                b->layer->begin_step();
            }
        }
        fate_device_orders orders;
        if (foresees()) {
            try {
                orders = foresee();
            } catch (const fate_error & e) { // the ubatch fails at its end: nothing may be thrown through llama.cpp here
                error_ = e.what();
            }
        }
        for (auto & device : devices_) {
            const int32_t     n_tokens = static_cast<int32_t>(ubatch.n_tokens);
            const bool        again    = first_of(*device).n_bulk_rows == n_tokens; // then the newest graph, or one like it, runs
            const std::string why      = device->begin(n_tokens, again, is_told(), orders);
            error_                     = why.empty() ? error_ : why;
        }
        if (!error_.empty()) {
            teller_.distrust();
        }
        if (sync_) {
            if (expect(true, !chances_.empty())) {
                publish(false);
            }
        }
        prefetch();
    }
}

// A ubatch that failed half-way is a step of what ran: its fills happened.
bool fate_engine::ubatch_end(bool ok) {
    if (!ok) {
        teller_.distrust();
    }
    if (!active_ || (!ok && !ran_)) {
        return true;
    }
    seed();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto & device : devices_) {
            const std::string why = device->end(current_);
            error_                = why.empty() ? error_ : why;
        }
        ++steps_;
        tokens_ += record_[current_].n_tokens();
    }
    snapshot();

    if (wants_steps_) {
        bool is_due = scores_due_;
        scores_due_ = false;
        if (sync_) {
            is_due = deliver(current_);
        } else if (held_back_) {
            is_due = deliver(1 - current_);
        }
        if (linear_ && !policy_failed_) { // before a step of one token it says it itself, for that token
            is_due = (is_due || held_back_) && linear_->has_scores() && !is_told();
            if (is_due) {
                linear_->scores(scores_.data(), bonus_.data());
            }
        } else if (!sync_ && steps_ > 1 && config_.expects) {
            if (!chances_.empty()) { // first, for the step runs already
                expect(false, true);
                prefetch();
            }
            is_due = expect(true, false);
        }
        if (is_due) {
            publish(!sync_);
        }
        held_back_ = !sync_;
        followed_  = false;
        if (foresees() && !devices_.empty()) {
            linear_->finish();
            linear_->warm(!evaluates_);
        }
    }
    current_ = 1 - current_;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        busy_us_ += ggml_time_us() - began_us_;
    }
    if (!error_.empty()) {
        teller_.distrust();
        fate_set_engine_error(FATE_STATUS_DECODE, error_);
    }
    return error_.empty();
}

// What devices know of a step; waits for it.
void fate_engine::gather(int32_t which) {
    for (size_t & n = gathered_[which]; n < devices_.size(); ++n) {
        devices_[n]->collect(which, record_[which]);
    }
}

// Hands over one of the two records; true if the policy published scores.
bool fate_engine::deliver(int32_t which) {
    gather(which);
    if (linear_) {
        follow();
    }
    if (!config_.on_step || ((policy_failed_ || linear_) && !config_.record)) {
        return false;
    }
    const fate_step step = record_[which].view();
    const bool      published =
        call([&](int32_t * flag) { return config_.on_step(config_.user, this, &step, scores_.data(), bonus_.data(), flag); });
    return published && !config_.expects;
}

// Tells what the step at hand consists of; true if the policy published scores.
bool fate_engine::expect(bool asks_scores, bool asks_chances) {
    if (!config_.expects || !config_.on_expect || policy_failed_) {
        return false;
    }
    const fate_step step = record_[current_].view();
    asks_chances         = asks_chances && step.n_tokens == 1 && record_[current_].has_output();
    if (!asks_scores && !asks_chances) {
        return false;
    }
    int32_t predicted = 0;
    if (asks_chances) {
        std::fill(chances_.begin(), chances_.end(), 0.0f);
    }
    const bool published = call([&](int32_t * flag) {
        return config_.on_expect(config_.user, this, step.n_tokens, step.tokens, step.positions, step.sequences,
                                 asks_scores ? scores_.data() : nullptr, asks_scores ? bonus_.data() : nullptr, flag,
                                 asks_chances ? chances_.data() : nullptr, &predicted);
    });
    predicted_           = predicted && asks_chances && !policy_failed_;
    return published && asks_scores;
}

// Runs a callback that may publish scores; true if it did.
template <typename F> bool fate_engine::call(F callback) {
    std::fill(scores_.begin(), scores_.end(), 0.0f);
    std::fill(bonus_.begin(), bonus_.end(), 0.0f);
    int32_t                     published = 0;
    std::lock_guard<std::mutex> lock(policy_mutex_);
    if (callback(&published) != FATE_STATUS_OK) {
        fail_policy();
    }
    return published && !policy_failed_;
}

// Sets what decides in place of the policy, without Python and for the very token that is about to run.
void fate_engine::set_linear(const fate_linear_model * model) {
    linear_.reset();
    if (!model) {
        return;
    }
    if (sync_ || !config_.scores) {
        throw fate_error(FATE_STATUS_INVALID,
                         "a linear model decides in table mode without sync, in place of a policy that publishes scores");
    }
    const bool fits = model->n_layers == static_cast<int32_t>(blocks_.size()) && model->max_experts == max_experts_ &&
                      model->max_k == max_k_ && std::equal(n_experts_.begin(), n_experts_.end(), model->n_experts);
    if (!fits) {
        throw fate_error(FATE_STATUS_INVALID,
                         fate_format("a linear model of %d layers with up to %d experts, of which up to %d are used: expected the "
                                     "engine's own, %zu, %d and %d",
                                     model->n_layers, model->max_experts, model->max_k, blocks_.size(), max_experts_, max_k_));
    }
    linear_    = std::make_unique<fate_linear>(*model);
    evaluates_ = true;
    teller_.distrust();
    if (!devices_.empty() && std::none_of(blocks_.begin(), blocks_.end(), [](const auto & b) { return b->layer != nullptr; })) {
        evaluates_ = !hand_over();
    }
}

// Has all devices evaluate the linear model, or none.
bool fate_engine::hand_over() {
    std::string why;
    for (auto & device : devices_) {
        why = why.empty() ? device->set_linear(linear_.get()) : why;
    }
    if (why.empty()) {
        return true;
    }
    LLAMA_LOG_WARN("fate: the host evaluates the classifier, which takes longer than a GPU does, because %s\n", why.c_str());
    for (auto & device : devices_) {
        device->set_linear(nullptr);
    }
    return false;
}

// Has the linear model take in the step that is held back, once.
void fate_engine::follow(bool defers) {
    if (held_back_ && !followed_) {
        gather(1 - current_);
        linear_->step(record_[1 - current_].view(), defers);
        followed_ = true;
    }
}

// Whether the linear model is asked about the step at hand. What it says is likely is of use only beside the step, where only a GPU brings experts in.
bool fate_engine::foresees() const {
    return linear_ && !policy_failed_ && is_told() && (linear_->has_scores() || predicts());
}

bool fate_engine::predicts() const {
    return !chances_.empty() && !devices_.empty();
}

// Before a step of one token: what it is likely to use, and what is worth keeping after it. The step before is over, for its output made the token; a program
// that did not look at it waits here.
fate_device_orders fate_engine::foresee() {
    fate_device_orders orders;
    if (!evaluates_) {
        orders.told     = &tell();
        orders.predicts = predicts();
        return orders;
    }
    const fate_step step = record_[current_].view();
    follow();
    linear_->expect(step.tokens[0], step.sequences[0], step.positions[0]);
    if (linear_->has_scores()) {
        linear_->scores(scores_.data(), bonus_.data());
        publish_on_host(false);
        orders.scores = scores_.data();
        orders.bonus  = bonus_.data();
    }
    if (predicts()) {
        linear_->chances(chances_.data());
        orders.chance = chances_.data();
    }
    return orders;
}

// The same for devices that evaluate it.
const fate_linear_told & fate_engine::tell() {
    const fate_step step   = record_[current_].view();
    const int64_t   before = linear_->n_observed();
    const bool      is_one = held_back_ && !followed_ && record_[1 - current_].n_tokens() == 1;
    follow(true);
    linear_->expect(step.tokens[0], step.sequences[0], step.positions[0]);
    return teller_.tell(*linear_, is_one && linear_->n_observed() == before + 1);
}

// behind: the policy has not seen the step at hand.
void fate_engine::publish(bool behind) {
    if (policy_failed_ || callback_) { // where the policy is not followed in callback mode, LRU is
        return;
    }
    publish_on_host(behind);
    for (auto & device : devices_) {
        device->publish(scores_.data(), bonus_.data(), behind);
    }
}

void fate_engine::publish_on_host(bool behind) {
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer) {
            blocks_[i]->layer->publish(&scores_[i * max_experts_], bonus_[i], behind);
        }
    }
}

// The scores that come of it act when they would have.
void fate_engine::flush() {
    if (held_back_) {
        scores_due_ = deliver(1 - current_) || (linear_ && linear_->has_scores());
        held_back_  = false;
    }
}

// The run goes on as LRU. In callback mode on any thread: no scores are in force.
void fate_engine::fail_policy() {
    policy_failed_ = true;
    if (callback_) {
        return;
    }
    for (auto & b : blocks_) {
        if (b->layer) {
            b->layer->forget_scores();
        }
    }
    for (auto & device : devices_) {
        if (!closing_) {
            device->publish(nullptr, nullptr, false);
        }
    }
}

bool fate_engine::ask(const fate_miss & miss, int32_t * victims) {
    std::lock_guard<std::mutex> lock(policy_mutex_);
    if (policy_failed_ || closing_) {
        return false;
    }
    const int32_t status = config_.on_miss(config_.user, this, miss.layer, miss.n_needed, miss.needed, miss.n_missing, miss.missing,
                                           miss.last_use, miss.n_victims, victims);
    if (status != FATE_STATUS_OK) {
        fail_policy();
    }
    return status == FATE_STATUS_OK;
}

void fate_engine::reject() {
    fail_policy();
}

void fate_engine::wait() {
    if (config_.on_wait) {
        config_.on_wait(config_.user);
    }
}

//
// what others read
//

// Of the layers on the CPU; GPUs are asked when somebody wants to know.
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
    info.gpu_nodes                 = graph_nodes_;
    info.bounced                   = bounced_.c_str();
    info.blind                     = blind_.c_str();
    for (const auto & device : devices_) {
        int64_t launches = 0;
        int64_t captures = 0;
        device->get_launches(launches, captures);
        info.gpu_launches += launches;
        info.gpu_captures += captures;
        const fate_device_asks asks = device->get_asks();
        info.gpu_asks += asks.n;
        info.gpu_timeouts += asks.n_timeouts;
        info.gpu_ask_us += asks.waited_ns / 1000;
    }
    return info;
}

void fate_engine::get_counters(int64_t * out, size_t n) const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (n != counters_.size()) {
        throw fate_error(FATE_STATUS_INVALID,
                         fate_format("n_counters %zu: expected n_layers x FATE_N_COUNTERS = %zu", n, counters_.size()));
    }
    std::copy(counters_.begin(), counters_.end(), out);
    std::vector<int64_t> there;
    for (const auto & device : devices_) {
        device->get_counters(there);
        for (size_t i = 0; i < blocks_.size(); ++i) {
            if (blocks_[i]->device == device.get()) {
                std::copy_n(there.data() + blocks_[i]->at * FATE_N_COUNTERS, FATE_N_COUNTERS, out + i * FATE_N_COUNTERS);
            }
        }
    }
}

void fate_engine::get_times(int64_t * out, size_t n) const {
    if (n != blocks_.size() * FATE_N_TIMES) {
        throw fate_error(FATE_STATUS_INVALID,
                         fate_format("n_times %zu: expected n_layers x FATE_N_TIMES = %zu", n, blocks_.size() * FATE_N_TIMES));
    }
    std::fill_n(out, n, 0);
    std::vector<int64_t> there;
    for (const auto & device : devices_) {
        device->get_times(there);
        for (size_t i = 0; i < blocks_.size() && !there.empty(); ++i) {
            if (blocks_[i]->device == device.get()) {
                std::copy_n(there.data() + blocks_[i]->at * FATE_N_TIMES, FATE_N_TIMES, out + i * FATE_N_TIMES);
            }
        }
    }
}

void fate_engine::check() const {
    std::vector<int32_t> slot_of;
    std::vector<int32_t> expert_of;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        const block & b = *blocks_[i];
        if (b.n_slots == 0) {
            continue;
        }
        if (b.device) {
            b.device->get_tables(b.at, slot_of, expert_of);
        } else {
            const fate_table & t = b.layer->table();
            slot_of.assign(t.slot_of, t.slot_of + t.n_experts);
            expert_of.assign(t.expert_of, t.expert_of + t.n_slots);
        }
        const int32_t bad = b.layer ? b.layer->first_inconsistent_slot() : fate_first_inconsistent_slot(slot_of, expert_of);
        if (bad >= 0) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("layer %zu: slot_of and expert_of disagree at slot %d", i, bad));
        }
        for (int32_t slot = 0; slot < b.n_slots; ++slot) {
            if (expert_of[slot] >= 0 && !pool_.holds(static_cast<int32_t>(i), expert_of[slot], slot)) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("layer %zu: slot %d does not hold the bytes of expert %d", i, slot, expert_of[slot]));
            }
        }
    }
}
