// What contexts created from now on get, and the list of live engines.
#include "engine.h"
#include "status.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>

static std::mutex                           settings_mutex;
static std::shared_ptr<const fate_settings> settings;
static std::string                          refused_context;
static std::vector<fate_engine *>           engines;
static thread_local int                     n_no_engine    = 0;
static thread_local int32_t                 refusal_status = FATE_STATUS_OK;
static thread_local std::string             refusal;

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
    if (!current || n_no_engine > 0 || (current->config.mode == FATE_MODE_OFF && !fate_current_routing())) {
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
            const double value = config->slots_value;
            if (!(value >= 0 && value < 1e18) || (config->slots_kind == FATE_SLOTS_COUNT && value != std::floor(value)) ||
                (config->slots_kind == FATE_SLOTS_PERCENT && value > 100)) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("slots_value %g: expected a whole number, 0 to 100 percent, or bytes", value));
            }
            if (config->n_slots_list < 0 || (config->n_slots_list > 0 && !config->slots_list)) {
                throw fate_error(FATE_STATUS_INVALID, fate_format("n_slots_list %d without a list", config->n_slots_list));
            }
            if (config->vram_bytes < 0 || config->vram_margin < 0) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("vram_bytes %lld and vram_margin %lld: expected bytes, 0 or more",
                                             static_cast<long long>(config->vram_bytes), static_cast<long long>(config->vram_margin)));
            }
            if (config->vram_bytes > 0 && config->slots_kind != FATE_SLOTS_AUTO) {
                throw fate_error(FATE_STATUS_INVALID, "vram says how large a card `slots: auto` may count on; leave out one of the two");
            }
            if (!(config->throttle >= 0 && config->throttle < 1e18)) {
                throw fate_error(FATE_STATUS_INVALID, fate_format("throttle %g: expected bytes a second, or 0 for none", config->throttle));
            }
            if (config->mode == FATE_MODE_CALLBACK && !config->on_miss) {
                throw fate_error(FATE_STATUS_INVALID, "callback mode needs on_miss");
            }
            if (config->mode == FATE_MODE_CALLBACK && !(config->miss_timeout_seconds >= 0 && config->miss_timeout_seconds <= 1e6)) {
                throw fate_error(FATE_STATUS_INVALID,
                                 fate_format("miss_timeout_seconds %g: expected 0 to 1000000", config->miss_timeout_seconds));
            }
            if ((config->scores || config->record) && !config->on_step) {
                throw fate_error(FATE_STATUS_INVALID, "scores and record need on_step");
            }
            next                    = std::make_shared<fate_settings>();
            next->config            = *config;
            next->config.slots_list = nullptr; // ours is next->slots_list
            if (config->slots_kind == FATE_SLOTS_LIST) {
                next->slots_list.assign(config->slots_list, config->slots_list + config->n_slots_list);
            }
        }
        std::lock_guard<std::mutex> lock(settings_mutex);
        settings = next;
        refused_context.clear();
        if (!next && config) { // for routing replay alone
            next              = std::make_shared<fate_settings>();
            next->config.mode = FATE_MODE_OFF;
            settings          = next;
        }
        static std::once_flag once;
        std::call_once(once, llama_set_engine_factory, make_engine); // makes none where settings is null
    });
}

const char * fate_engine_error(void) {
    static thread_local std::string copy;
    std::lock_guard<std::mutex>     lock(settings_mutex);
    copy = refused_context;
    return copy.c_str();
}

void fate_set_engine_error(int32_t status, const std::string & why) {
    refusal_status = status;
    refusal        = why;
    std::lock_guard<std::mutex> lock(settings_mutex);
    refused_context = why;
}

int32_t fate_take_refusal(std::string & why) {
    const int32_t status = refusal_status;
    why                  = refusal;
    refusal_status       = FATE_STATUS_OK;
    refusal.clear();
    return status;
}

void fate_registry_add(fate_engine * engine) {
    std::lock_guard<std::mutex> lock(settings_mutex);
    engines.push_back(engine);
}

void fate_registry_remove(fate_engine * engine) {
    std::lock_guard<std::mutex> lock(settings_mutex);
    engines.erase(std::find(engines.begin(), engines.end(), engine));
}

bool fate_registry_any_engaged() {
    std::lock_guard<std::mutex> lock(settings_mutex);
    return std::any_of(engines.begin(), engines.end(), [](const fate_engine * engine) { return engine->is_engaged(); });
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

int32_t fate_engine_set_linear(fate_engine * engine, const fate_linear_model * model) {
    return fate_guard(FATE_STATUS_INVALID, [&] { engine->set_linear(model); });
}

int32_t fate_engine_seek_routing(fate_engine * engine, int64_t row) {
    return fate_guard(FATE_STATUS_INVALID, [&] { engine->seek_routing(row); });
}

int32_t fate_engine_get_times(const fate_engine * engine, int64_t * times, size_t n_times) {
    return fate_guard(FATE_STATUS_INVALID, [&] { engine->get_times(times, n_times); });
}

int32_t fate_engine_check(const fate_engine * engine) {
    return fate_guard(FATE_STATUS_INVALID, [&] { engine->check(); });
}
