#include "engine.h"

#include "capacity.h"
#include "status.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>

//
// settings and the list of engines
//

static std::mutex                           settings_mutex;
static std::shared_ptr<const fate_settings> settings;
static std::string                          refused_context;
static std::vector<fate_engine *>           engines;
static thread_local int                     n_no_engine = 0;

std::shared_ptr<const fate_settings> fate_current_settings() {
    std::lock_guard<std::mutex> lock(settings_mutex);
    return settings;
}

fate_no_engine::fate_no_engine() {
    ++n_no_engine;
}

fate_no_engine::~fate_no_engine() {
    --n_no_engine;
}

fate_engine * fate_engine_of(const llama_context * ctx) {
    std::lock_guard<std::mutex> lock(settings_mutex);
    for (fate_engine * engine : engines) {
        if (&engine->context() == ctx) {
            return engine;
        }
    }
    return nullptr;
}

static std::unique_ptr<llama_engine_i> make_engine(llama_context & ctx) {
    auto current = fate_current_settings();
    if (!current || n_no_engine > 0) {
        return nullptr;
    }
    return std::make_unique<fate_engine>(ctx, current);
}

int32_t fate_configure(const fate_config * config) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        std::shared_ptr<fate_settings> next;
        if (config && config->mode != FATE_MODE_OFF) {
            if (config->mode != FATE_MODE_TABLE && config->mode != FATE_MODE_CALLBACK) {
                throw fate_error(FATE_STATUS_INVALID, fate_format("mode %d: expected FATE_MODE_OFF, _TABLE or _CALLBACK", config->mode));
            }
            if (config->slots_kind < FATE_SLOTS_AUTO || config->slots_kind > FATE_SLOTS_LIST) {
                throw fate_error(FATE_STATUS_INVALID, fate_format("slots_kind %d: expected FATE_SLOTS_*", config->slots_kind));
            }
            if (config->mode == FATE_MODE_CALLBACK && !config->on_miss) {
                throw fate_error(FATE_STATUS_INVALID, "callback mode needs on_miss");
            }
            if ((config->scores || config->record) && !config->on_step) {
                throw fate_error(FATE_STATUS_INVALID, "scores and record need on_step");
            }
            next         = std::make_shared<fate_settings>();
            next->config = *config;
            if (config->slots_kind == FATE_SLOTS_LIST) {
                next->slots_list.assign(config->slots_list, config->slots_list + config->n_slots_list);
            }
        }
        std::lock_guard<std::mutex> lock(settings_mutex);
        settings = next;
        llama_set_engine_factory(next ? make_engine : nullptr);
    });
}

const char * fate_engine_error(void) {
    static thread_local std::string copy;
    std::lock_guard<std::mutex>     lock(settings_mutex);
    copy = refused_context;
    return copy.c_str();
}

static void set_refused_context(const std::string & why) {
    std::lock_guard<std::mutex> lock(settings_mutex);
    refused_context = why;
}

//
// what a decision causes
//

class fate_engine::io final : public fate_layer_io {
public:
    io(fate_engine & engine, int32_t layer) : engine_(engine), layer_(layer) {}

    bool ask(const std::vector<int32_t> & needed, const std::vector<int32_t> & missing, int32_t n, int32_t * victims) override {
        if (engine_.policy_failed_) {
            return false;
        }
        const fate_config & config = engine_.config_;
        const int32_t       status = config.on_miss(config.user, &engine_, layer_, static_cast<int32_t>(needed.size()), needed.data(),
                                                    static_cast<int32_t>(missing.size()), missing.data(), n, victims);
        if (status != FATE_STATUS_OK) {
            engine_.fail_policy();
        }
        return status == FATE_STATUS_OK;
    }

    void evict(int32_t expert) override { engine_.record_[engine_.current_].add_eviction(layer_, expert); }

    void fill(int32_t expert, int32_t slot) override {
        engine_.pool_.fill(layer_, expert, slot);
        engine_.record_[engine_.current_].add_fill(layer_, expert);
    }

private:
    fate_engine & engine_;
    int32_t       layer_;
};

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
    std::lock_guard<std::mutex> lock(settings_mutex);
    engines.push_back(this);
}

fate_engine::~fate_engine() {
    flush();
    {
        std::lock_guard<std::mutex> lock(settings_mutex);
        engines.erase(std::find(engines.begin(), engines.end(), this));
    }
    if (config_.on_close && found_all_) {
        config_.on_close(config_.user, this);
    }
}

static std::vector<ggml_tensor *> expert_tensors(const llama_moe_args & args) {
    return {
        args.up,     args.gate,      args.down, args.gate_up, args.up_b,   args.gate_b,
        args.down_b, args.gate_up_b, args.up_s, args.gate_s,  args.down_s,
    };
}

std::string fate_engine::refuse(const llama_moe_args & args) const {
    for (const ggml_tensor * tensor : expert_tensors(args)) {
        const std::string why = tensor ? fate_pool::refuse(tensor, args.down->ne[2]) : "";
        if (!why.empty()) {
            return why;
        }
    }
    const llama_model & model = ctx_.get_model();
    if (args.il >= 0 && args.il < static_cast<int>(model.hparams.n_layer_all)) {
        ggml_backend_dev_t device = model.dev_layer(args.il);
        if (device && ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            return fate_format("layer %d runs on %s, and this build serves layers on the CPU only; add -ngl 0", args.il,
                               ggml_backend_dev_name(device));
        }
    }
    return "";
}

void fate_engine::find(const llama_moe_args & args) {
    if (block_of_.count(args.down)) {
        return;
    }
    auto b       = std::make_unique<block>();
    b->sources   = expert_tensors(args);
    b->n_experts = static_cast<int32_t>(args.down->ne[2]);
    b->k         = static_cast<int32_t>(args.ids->ne[0]);
    b->refused   = refuse(args);

    const int32_t layer  = static_cast<int32_t>(blocks_.size());
    b->pool_op           = { this, layer, FATE_PATH_POOL };
    b->bypass_op         = { this, layer, FATE_PATH_BYPASS };
    block_of_[args.down] = b.get();
    pool_.add_layer(b->sources, b->n_experts);
    blocks_.push_back(std::move(b));
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
    } catch (const std::exception & e) {
        set_refused_context(e.what());
        throw;
    }
    set_refused_context("");
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
        steps_  = 0;
        tokens_ = 0;
    }
    snapshot();
    if (config_.on_open && !policy_failed_ && config_.on_open(config_.user, this) != FATE_STATUS_OK) {
        fail_policy();
    }
}

//
// graphs
//

void fate_engine::build_moe(ggml_context * ctx0, ggml_cgraph * gf, llama_moe_args & args) {
    if (!found_all_) {
        find(args);
        return;
    }
    const auto it = block_of_.find(args.down);
    if (it == block_of_.end() || !it->second->layer || ctx_.get_cparams().warmup) {
        return;
    }
    block &       b      = *it->second;
    const int64_t k      = args.ids->ne[0];
    const int64_t n_rows = args.ids->ne[1];
    if (k != b.k) {
        return; // a warm-up with all experts
    }

    std::vector<ggml_tensor *> sources = { args.ids };
    if (config_.record && args.weights && args.weights->type == GGML_TYPE_F32 && args.weights->ne[1] == k) {
        sources.push_back(args.weights);
    }
    if (k * n_rows > b.layer->table().n_slots) {
        ggml_tensor * note =
            ggml_custom_4d(ctx0, GGML_TYPE_I32, 1, 1, 1, 1, sources.data(), static_cast<int>(sources.size()), run_op, 1, &b.bypass_op);
        ggml_format_name(note, "fate_note-%d", args.il);
        ggml_build_forward_expand(gf, note);
        return;
    }

    ggml_tensor * slots =
        ggml_custom_4d(ctx0, GGML_TYPE_I32, k, n_rows, 1, 1, sources.data(), static_cast<int>(sources.size()), run_op, 1, &b.pool_op);
    ggml_format_name(slots, "fate_slots-%d", args.il);
    args.ids = slots;

    ggml_tensor ** replaced[] = {
        &args.up,     &args.gate,      &args.down, &args.gate_up, &args.up_b,   &args.gate_b,
        &args.down_b, &args.gate_up_b, &args.up_s, &args.gate_s,  &args.down_s,
    };
    for (ggml_tensor ** tensor : replaced) {
#if defined(FATE_FAULT_BIAS_NOT_POOLED)
        if (tensor == &args.up_b || tensor == &args.gate_b || tensor == &args.down_b || tensor == &args.gate_up_b) {
            continue;
        }
#endif
        if (*tensor) {
            *tensor = pool_.slots_of(b.pool_op.layer, *tensor);
        }
    }
}

void fate_engine::run_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) nth;
    if (ith == 0) {
        const op * self = static_cast<const op *>(userdata);
        self->engine->run(self->layer, self->path, dst);
    }
}

void fate_engine::run(int32_t layer, uint8_t path, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const fate_ids      ids = { static_cast<const char *>(src->data), static_cast<int64_t>(src->nb[1]), static_cast<int32_t>(src->ne[1]),
                                static_cast<int32_t>(src->ne[0]) };
    fate_layer &        l   = *blocks_[layer]->layer;
    fate_record &       r   = record_[current_];

    const size_t n_pairs = static_cast<size_t>(ids.n_rows) * ids.k;
    hits_.assign(n_pairs, 0);
    if (path == FATE_PATH_POOL) {
        io        io_(*this, layer);
        int32_t * slots = static_cast<int32_t *>(dst->data);
        l.resolve(ids, callback_, io_, slots, hits_.data());
#if defined(FATE_FAULT_WRONG_SLOT)
        if (n_pairs > 1) {
            std::swap(slots[0], slots[1]);
        }
#endif
    } else {
        l.bypass(ids);
    }
    if (!wants_steps_) {
        return;
    }

    const ggml_tensor * weights = dst->src[1];
    for (int32_t row = 0; row < ids.n_rows; ++row) {
        const int32_t token = r.token_of_row(row, ids.n_rows);
        if (token >= record_tokens_) {
            break;
        }
        r.set_row(token, layer, path);
        int32_t * out = r.ids(token, layer);
        for (int32_t rank = 0; rank < ids.k; ++rank) {
            out[rank] = ids.at(row, rank);
        }
        std::copy_n(hits_.data() + static_cast<size_t>(row) * ids.k, ids.k, r.hits(token, layer));
        float * out_weights = r.weights(token, layer);
        if (weights && out_weights) {
            for (int32_t rank = 0; rank < ids.k; ++rank) {
                out_weights[rank] = *reinterpret_cast<const float *>(static_cast<const char *>(weights->data) + rank * weights->nb[1] +
                                                                     row * weights->nb[2]);
            }
        }
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
        record_tokens_ = static_cast<int32_t>(ubatch.n_tokens);
        record_[current_].begin(record_tokens_, wants_steps_ ? static_cast<int32_t>(blocks_.size()) : 0, max_k_, config_.record != 0,
                                ubatch.token, ubatch.pos, 1, ubatch.seq_id, ubatch.output);
    }
}

void fate_engine::ubatch_end() {
    if (!active_) {
        return;
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer) {
            io io_(*this, static_cast<int32_t>(i));
            blocks_[i]->layer->seed(callback_, io_);
        }
    }
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

int32_t fate_engine_get_info(const fate_engine * engine, fate_info * info) {
    return fate_guard(FATE_STATUS_INVALID, [&] { *info = engine->info(); });
}

int32_t fate_engine_get_counters(const fate_engine * engine, int64_t * counters, size_t n_counters) {
    return fate_guard(FATE_STATUS_INVALID, [&] { engine->get_counters(counters, n_counters); });
}

int32_t fate_engine_flush(fate_engine * engine) {
    return fate_guard(FATE_STATUS_POLICY, [&] { engine->flush(); });
}

int32_t fate_engine_check(const fate_engine * engine) {
    return fate_guard(FATE_STATUS_INVALID, [&] { engine->check(); });
}
