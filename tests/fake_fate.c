// A stand-in for libfate without llama.cpp: the same C surface, a model of two layers that routes by token id, and a script of faults
// taken from environment variables:
//   FAKE_ABI, FAKE_BUILD_ID   what the library says it is
//   FAKE_WRONG_LOGIT          this token position gets a logit that is off by one bit in contexts with an engine
//   FAKE_REFUSE               contexts with an engine are refused, with this text
#include "fate.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_LAYERS = 2, N_EXPERTS = 8, K = 2, N_AHEAD = 16, N_VOCAB = 16, N_BATCH = 8, N_CTX = 256, MAX_MOVES = 64 };

struct fate_engine {
    fate_config config;
    int32_t     n_experts[N_LAYERS], k[N_LAYERS], n_slots[N_LAYERS];
    int64_t     expert_bytes[N_LAYERS];
    int32_t     resident[N_LAYERS][N_EXPERTS];
    int64_t     last_use[N_LAYERS][N_EXPERTS];
    int64_t     clock[N_LAYERS];
    float       scores[N_LAYERS * N_EXPERTS];
    float       bonus[N_LAYERS];
    int64_t     counters[N_LAYERS][FATE_N_COUNTERS];
    int64_t     steps, tokens;
    int32_t     engaged, policy_failed;
};

struct fate_model {
    char prompt[256];
    int  n_contexts;
};

struct fate_context {
    fate_model *  model;
    fate_engine * engine;
    int32_t       n_past;
    int32_t       last_token;
};

static char        last_error[512];
static char        refusal[512];
static fate_config configured;
static int         is_configured;
static int         n_open_engines;

static int32_t fail(int32_t status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

int32_t fate_abi_version(void) {
    return getenv("FAKE_ABI") ? atoi(getenv("FAKE_ABI")) : FATE_ABI_VERSION;
}

const char * fate_build_id(void) {
    return getenv("FAKE_BUILD_ID") ? getenv("FAKE_BUILD_ID") : "fake";
}

const char * fate_last_error(void) {
    return last_error;
}

const char * fate_engine_error(void) {
    return refusal;
}

const char * fate_system_info(void) {
    return "FAKE : OPEN = 1 | ";
}

int32_t fate_configure(const fate_config * config) {
    is_configured = config && config->mode != FATE_MODE_OFF;
    if (is_configured) {
        configured = *config;
    }
    return FATE_STATUS_OK;
}

int32_t fate_replay_routing(const int32_t * ids, int32_t n_tokens, int32_t n_layers, int32_t k) {
    (void) ids;
    return n_tokens >= 0 && n_layers >= 0 && k >= 0 ? FATE_STATUS_OK : FATE_STATUS_INVALID;
}

//
// engine
//

static void engine_reset(fate_engine * e) {
    memset(e->resident, 0, sizeof(e->resident));
    memset(e->last_use, 0, sizeof(e->last_use));
    memset(e->clock, 0, sizeof(e->clock));
    memset(e->counters, 0, sizeof(e->counters));
    e->steps = e->tokens = 0;
}

static fate_engine * engine_open(void) {
    if (getenv("FAKE_REFUSE")) {
        snprintf(refusal, sizeof(refusal), "%s", getenv("FAKE_REFUSE"));
        return NULL;
    }
    fate_engine * e = calloc(1, sizeof(fate_engine));
    e->config       = configured;
    for (int l = 0; l < N_LAYERS; ++l) {
        int slots          = configured.slots_kind == FATE_SLOTS_COUNT ? (int) configured.slots_value : N_EXPERTS / 2;
        e->n_experts[l]    = N_EXPERTS;
        e->k[l]            = K;
        e->n_slots[l]      = slots < N_EXPERTS ? slots : 0;
        e->expert_bytes[l] = 100;
        e->engaged         = e->n_slots[l] > 0;
    }
    if (!e->engaged && configured.require) {
        snprintf(refusal, sizeof(refusal), "not engaged because all experts resident");
        free(e);
        return NULL;
    }
    if (configured.on_open && configured.on_open(configured.user, e) != FATE_STATUS_OK) {
        snprintf(refusal, sizeof(refusal), "the policy failed to start");
        free(e);
        return NULL;
    }
    refusal[0] = 0;
    ++n_open_engines;
    return e;
}

static void engine_close(fate_engine * e) {
    if (e) {
        if (e->config.on_close) {
            e->config.on_close(e->config.user, e);
        }
        --n_open_engines;
        free(e);
    }
}

int32_t fate_engine_get_info(const fate_engine * e, fate_info * info) {
    memset(info, 0, sizeof(*info));
    info->engaged       = e->engaged;
    info->policy_failed = e->policy_failed;
    info->reason        = e->engaged ? "" : "all experts resident";
    info->geometry      = (fate_geometry){
        N_LAYERS, e->engaged ? N_LAYERS : 0, e->n_experts, e->k, e->n_slots, e->expert_bytes, "fake",
    };
    info->steps      = e->steps;
    info->tokens     = e->tokens;
    info->pool_bytes = (int64_t) 100 * N_LAYERS * e->n_slots[0];
    return FATE_STATUS_OK;
}

int32_t fate_engine_get_counters(const fate_engine * e, int64_t * counters, size_t n) {
    if (n != N_LAYERS * FATE_N_COUNTERS) {
        return fail(FATE_STATUS_INVALID, "%zu counters: expected %d", n, N_LAYERS * FATE_N_COUNTERS);
    }
    memcpy(counters, e->counters, sizeof(e->counters));
    return FATE_STATUS_OK;
}

int32_t fate_engine_get_times(const fate_engine * e, int64_t * times, size_t n) {
    if (n != N_LAYERS * FATE_N_TIMES) {
        return fail(FATE_STATUS_INVALID, "%zu times: expected %d", n, N_LAYERS * FATE_N_TIMES);
    }
    for (size_t i = 0; i < n; ++i) {
        times[i] = e->config.times ? (int64_t) i : 0;
    }
    return FATE_STATUS_OK;
}

int32_t fate_engine_check(const fate_engine * e) {
    for (int l = 0; l < N_LAYERS; ++l) {
        int n = 0;
        for (int x = 0; x < N_EXPERTS; ++x) {
            n += e->resident[l][x];
        }
        if (e->engaged && n > e->n_slots[l]) {
            return fail(FATE_STATUS_INVALID, "layer %d holds %d experts in %d slots", l, n, e->n_slots[l]);
        }
    }
    return FATE_STATUS_OK;
}

int32_t fate_replay_predictions(const int32_t * ids, const float * chances, int32_t n_horizons, const int32_t * horizons,
                                int32_t n_tokens, int32_t n_layers, int32_t m) {
    (void) ids, (void) chances, (void) n_horizons, (void) horizons, (void) n_tokens, (void) n_layers, (void) m;
    return FATE_STATUS_OK;
}

int32_t fate_engine_set_linear(fate_engine * engine, const fate_linear_model * model) {
    (void) engine;
    (void) model;
    return FATE_STATUS_OK;
}

int32_t fate_engine_seek_routing(fate_engine * e, int64_t row) {
    (void) e;
    return row >= 0 ? FATE_STATUS_OK : FATE_STATUS_INVALID;
}

int32_t fate_engine_flush(fate_engine * e) {
    (void) e;
    return FATE_STATUS_OK;
}

static int is_needed(const int32_t * needed, int32_t expert) {
    for (int i = 0; i < K; ++i) {
        if (needed[i] == expert) {
            return 1;
        }
    }
    return 0;
}

static float key(const fate_engine * e, int l, int x) {
    return e->scores[l * N_EXPERTS + x];
}

static int32_t pick(const fate_engine * e, int l, const int32_t * needed) {
    int32_t best = -1;
    for (int x = 0; x < N_EXPERTS; ++x) {
        if (e->resident[l][x] && !is_needed(needed, x)) {
            if (best < 0 || key(e, l, x) < key(e, l, best) ||
                (key(e, l, x) == key(e, l, best) && e->last_use[l][x] < e->last_use[l][best])) {
                best = x;
            }
        }
    }
    return best;
}

// Asks for the victims of one layer; anything wrong with them makes the engine go on as LRU.
static void ask(fate_engine * e, int l, const int32_t * needed, const int32_t * missing, int n_missing, int n_victims, int32_t * victims) {
    if (e->config.mode != FATE_MODE_CALLBACK || e->policy_failed) {
        victims[0] = -1;
        return;
    }
    if (e->config.on_miss(e->config.user, e, l, K, needed, n_missing, missing, e->last_use[l], n_victims, victims) != FATE_STATUS_OK) {
        e->policy_failed = 1;
        victims[0]       = -1;
        return;
    }
    for (int i = 0; i < n_victims; ++i) {
        if (victims[i] < 0 || victims[i] >= N_EXPERTS || !e->resident[l][victims[i]] || is_needed(needed, victims[i])) {
            e->policy_failed = 1;
            victims[0]       = -1;
            return;
        }
    }
}

// What a callback told; scores act from the next step on.
static void put_in_force(fate_engine * e, int32_t status, const float * scores, int32_t published) {
    if (status != FATE_STATUS_OK) {
        e->policy_failed = 1;
    } else if (published) {
        memcpy(e->scores, scores, sizeof(e->scores));
    }
}

static void expect(fate_engine * e, int32_t token, int32_t position) {
    if (e->config.expects && !e->policy_failed) {
        const int32_t sequence                     = 0;
        float         scores[N_LAYERS * N_EXPERTS] = { 0 }, bonus[N_LAYERS] = { 0 };
        int32_t       published                    = 0;
        float         chances[N_LAYERS * N_EXPERTS] = { 0 };
        int32_t       predicted                     = 0;
        put_in_force(e,
                     e->config.on_expect(e->config.user, e, 1, &token, &position, &sequence, scores, bonus, &published,
                                         e->config.prefetch ? chances : NULL, &predicted),
                     scores, published);
        for (int i = 0; predicted && i < N_LAYERS * N_EXPERTS; ++i) { // nothing comes in, it only counts
            e->counters[i / N_EXPERTS][FATE_COUNTER_PREFETCHES] += chances[i] >= (e->config.prefetch_threshold > 0 ? e->config.prefetch_threshold : 0.5f);
        }
    }
}

// Every token is a step of its own.
static void engine_step(fate_engine * e, int32_t token, int32_t position) {
    expect(e, token, position);
    int32_t ids[N_LAYERS][K], fills[MAX_MOVES][2], evictions[MAX_MOVES][2], n_fills = 0, n_evictions = 0;
    float   weights[N_LAYERS][K];
    uint8_t hits[N_LAYERS][K], path[N_LAYERS];
    for (int l = 0; l < N_LAYERS; ++l) {
        int32_t missing[K], victims[K], n_missing = 0, n_resident = 0, n_asked = 0;
        for (int i = 0; i < K; ++i) {
            ids[l][i]     = (token + l + 3 * i) % N_EXPERTS;
            weights[l][i] = 0.5f;
            hits[l][i]    = (uint8_t) e->resident[l][ids[l][i]];
        }
        for (int i = K - 1; i >= 0; --i) {
            if (!hits[l][i]) {
                missing[n_missing++] = ids[l][i];
            }
            e->last_use[l][ids[l][i]] = ++e->clock[l];
        }
        for (int x = 0; x < N_EXPERTS; ++x) {
            n_resident += e->resident[l][x];
        }
        const int n_victims = n_resident + n_missing - e->n_slots[l];
        if (n_missing > 0) {
            ask(e, l, ids[l], missing, n_missing, n_victims > 0 ? n_victims : 0, victims);
        }
        for (int i = 0; i < n_victims; ++i) {
            const int32_t victim          = victims[0] < 0 ? pick(e, l, ids[l]) : victims[n_asked++];
            e->resident[l][victim]        = 0;
            evictions[n_evictions][0]     = l;
            evictions[n_evictions++][1]   = victim;
            e->counters[l][FATE_COUNTER_EVICTIONS]++;
        }
        for (int i = 0; i < n_missing; ++i) {
            e->resident[l][missing[i]] = 1;
            fills[n_fills][0]          = l;
            fills[n_fills++][1]        = missing[i];
        }
        path[l] = FATE_PATH_POOL;
        e->counters[l][FATE_COUNTER_ROUTED] += K;
        e->counters[l][FATE_COUNTER_HITS] += K - n_missing;
        e->counters[l][FATE_COUNTER_MISSES] += n_missing;
        e->counters[l][FATE_COUNTER_FILLS] += n_missing;
        e->counters[l][FATE_COUNTER_BYTES] += 100 * n_missing;
        e->counters[l][FATE_COUNTER_ROWS]++;
        e->counters[l][FATE_COUNTER_ROWS_ALL_RESIDENT] += n_missing == 0;
    }
    e->steps++;
    e->tokens++;
    const int wants = e->config.record || e->config.scores || e->config.mode == FATE_MODE_CALLBACK;
    if (!wants || (e->policy_failed && !e->config.record)) {
        return;
    }
    const int32_t   sequence = 0;
    // the layer before tells what is then used
    const int32_t horizon = 1;
    int32_t       ahead[N_LAYERS][N_AHEAD];
    float         chances[N_LAYERS][N_AHEAD];
    for (int l = 0; l < N_LAYERS; ++l) {
        for (int i = 0; i < N_AHEAD; ++i) {
            ahead[l][i]   = l > 0 && i < K ? ids[l][i] : -1;
            chances[l][i] = ahead[l][i] >= 0 ? 0.9f - 0.1f * (float) i : 0.0f;
        }
    }
    const int       tells = e->config.record && (e->config.prefetch & FATE_PREFETCH_LAYER);
    const fate_step step  = {
        1,       N_LAYERS,    K, &ids[0][0],   e->config.weights ? &weights[0][0] : NULL,
        &hits[0][0], path, &token, &position, &sequence, n_fills, &fills[0][0], n_evictions, &evictions[0][0],
        tells,   &horizon,    N_AHEAD, &ahead[0][0], &chances[0][0],
    };
    float   scores[N_LAYERS * N_EXPERTS] = { 0 }, bonus[N_LAYERS] = { 0 };
    int32_t published                    = 0;
    const int32_t status = e->config.on_step(e->config.user, e, &step, scores, bonus, &published);
    put_in_force(e, status, scores, published);
}

//
// model and context
//

int32_t fate_model_open(int32_t argc, char ** argv, fate_model ** model) {
    *model = calloc(1, sizeof(fate_model));
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--bogus") == 0) {
            free(*model);
            *model = NULL;
            return fail(FATE_STATUS_INVALID, "flag --bogus is unknown");
        }
        if (strcmp(argv[i], "-p") == 0 && i + 1 < argc) {
            snprintf((*model)->prompt, sizeof((*model)->prompt), "%s", argv[i + 1]);
        }
    }
    return FATE_STATUS_OK;
}

void fate_model_close(fate_model * model) {
    if (model && model->n_contexts) {
        abort(); // a model must outlive its contexts
    }
    free(model);
}

int32_t fate_model_n_vocab(const fate_model * model) {
    (void) model;
    return N_VOCAB;
}

int32_t fate_model_has_encoder(const fate_model * model) {
    (void) model;
    return 0;
}

int32_t fate_model_tokenize(const fate_model * model, const char * text, int32_t n_text, int32_t add_special, int32_t * tokens, int32_t n_max,
                            int32_t * n) {
    (void) model;
    (void) add_special;
    if (n_text > 0 && text[0] == '?') {
        return fail(FATE_STATUS_INVALID, "the model has no tokenizer; give token ids");
    }
    *n = n_text;
    for (int i = 0; i < n_text && i < n_max; ++i) {
        tokens[i] = (unsigned char) text[i] % N_VOCAB;
    }
    return FATE_STATUS_OK;
}

// Token 1 is the first byte of "é", token 2 its second, token t > 2 the letter 'a' + t.
int32_t fate_model_piece(const fate_model * model, int32_t token, char * text, int32_t n_max, int32_t * n) {
    (void) model;
    *n = 1;
    if (n_max > 0) {
        text[0] = token == 1 ? (char) 0xc3 : token == 2 ? (char) 0xa9 : (char) ('a' + token);
    }
    return FATE_STATUS_OK;
}

int32_t fate_model_is_eog(const fate_model * model, int32_t token) {
    (void) model;
    return token == 0;
}

int32_t fate_model_bos(const fate_model * model) {
    (void) model;
    return -1;
}

const char * fate_model_prompt(const fate_model * model) {
    return model->prompt;
}

int32_t fate_context_open(fate_model * model, int32_t engine, fate_context ** context) {
    fate_context * c = calloc(1, sizeof(fate_context));
    c->model         = model;
    *context         = NULL;
    if (engine && is_configured) {
        c->engine = engine_open();
        if (!c->engine) {
            free(c);
            return fail(FATE_STATUS_CAPACITY, "%s", refusal);
        }
    }
    model->n_contexts++;
    *context = c;
    return FATE_STATUS_OK;
}

void fate_context_close(fate_context * context) {
    if (context) {
        engine_close(context->engine);
        context->model->n_contexts--;
        free(context);
    }
}

int32_t fate_context_n_ctx(const fate_context * context) {
    (void) context;
    return N_CTX;
}

int32_t fate_context_n_batch(const fate_context * context) {
    (void) context;
    return N_BATCH;
}

int32_t fate_context_n_seq_max(const fate_context * context) {
    (void) context;
    return 4;
}

fate_engine * fate_context_engine(const fate_context * context) {
    return context->engine;
}

int32_t fate_context_decode(fate_context * c, int32_t n, const int32_t * tokens, const int32_t * positions, const int32_t * sequences,
                            const int8_t * outputs, float * logits) {
    (void) sequences;
    if (n < 1 || n > N_BATCH) {
        return fail(FATE_STATUS_INVALID, "batch of %d tokens: expected 1 to n_batch = %d", n, N_BATCH);
    }
    const int wrong = getenv("FAKE_WRONG_LOGIT") ? atoi(getenv("FAKE_WRONG_LOGIT")) : -1;
    for (int i = 0; i < n; ++i) {
        const int32_t position = positions ? positions[i] : c->n_past;
        if (c->engine && c->engine->engaged) {
            engine_step(c->engine, tokens[i], position);
        }
        if (logits && (!outputs || outputs[i])) {
            for (int v = 0; v < N_VOCAB; ++v) {
                logits[v] = (float) (v == (tokens[i] + 1) % N_VOCAB) + 0.25f;
            }
            if (c->engine && position == wrong) {
                logits[3] = 0.25000003f;
            }
            logits += N_VOCAB;
        }
        c->last_token = tokens[i];
        c->n_past++;
    }
    return FATE_STATUS_OK;
}

int32_t fate_context_clear(fate_context * context) {
    context->n_past = 0;
    return FATE_STATUS_OK;
}

int32_t fate_context_shift(fate_context * context, int32_t sequence, int32_t p0, int32_t p1) {
    (void) sequence;
    if (p0 < 0 || p1 <= p0) {
        return fail(FATE_STATUS_INVALID, "shift [%d, %d): expected 0 <= p0 < p1", p0, p1);
    }
    context->n_past -= p1 - p0;
    return FATE_STATUS_OK;
}

int32_t fate_context_state_size(fate_context * context, size_t * n_bytes) {
    (void) context;
    *n_bytes = sizeof(int32_t);
    return FATE_STATUS_OK;
}

int32_t fate_context_state_get(fate_context * context, uint8_t * bytes, size_t n_bytes) {
    memcpy(bytes, &context->n_past, n_bytes);
    return FATE_STATUS_OK;
}

int32_t fate_context_state_set(fate_context * context, const uint8_t * bytes, size_t n_bytes) {
    if (n_bytes != sizeof(int32_t)) {
        return fail(FATE_STATUS_INVALID, "%zu bytes are not a state", n_bytes);
    }
    memcpy(&context->n_past, bytes, n_bytes);
    return FATE_STATUS_OK;
}

int32_t fate_context_set_sampler(fate_context * context, float temperature, int32_t top_k, float top_p, float min_p, uint32_t seed) {
    (void) context, (void) temperature, (void) top_k, (void) top_p, (void) min_p, (void) seed;
    return FATE_STATUS_OK;
}

int32_t fate_context_sample(fate_context * context, int32_t * token) {
    *token = (context->last_token + 1) % N_VOCAB;
    return FATE_STATUS_OK;
}

//
// programs
//

static fate_interrupt_fn on_interrupt;
static int32_t           interrupt_signal;
static void *            interrupt_user;

int32_t fate_interrupt_watch(fate_interrupt_fn callback, void * user) {
    on_interrupt   = callback;
    interrupt_user = user;
    return FATE_STATUS_OK;
}

int32_t fate_exit_watch(fate_interrupt_fn on_exit, void * user) {
    (void) on_exit;
    (void) user;
    return FATE_STATUS_OK;
}

int32_t fate_interrupt_signal(void) {
    return interrupt_signal;
}

void fate_interrupt_unwatch(void) {
    on_interrupt = NULL;
}

// Flags: --tokens N decodes that many in a context; --reset resets the engine after half of them; --interrupt; --exit CODE.
int32_t fate_program_run(const char * name, int32_t argc, char ** argv, int32_t * exit_code) {
    int n_tokens = 8, reset = 0, interrupt = 0;
    *exit_code = 0;
    printf("%s:", name);
    for (int i = 1; i < argc; ++i) {
        printf(" %s", argv[i]);
        if (strcmp(argv[i], "--tokens") == 0) {
            n_tokens = atoi(argv[i + 1]);
        } else if (strcmp(argv[i], "--exit") == 0) {
            *exit_code = atoi(argv[i + 1]);
        } else if (strcmp(argv[i], "--reset") == 0) {
            reset = 1;
        } else if (strcmp(argv[i], "--interrupt") == 0) {
            interrupt = 1;
        }
    }
    printf("\n");
    fate_model     model = { "", 0 };
    fate_context * c     = NULL;
    if (fate_context_open(&model, 1, &c) != FATE_STATUS_OK) {
        *exit_code = 1;
        return FATE_STATUS_OK;
    }
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (reset && i == n_tokens / 2 && c->engine) {
            engine_reset(c->engine);
            c->engine->config.on_open(c->engine->config.user, c->engine);
        }
        fate_context_decode(c, 1, &i, NULL, NULL, NULL, NULL);
        if (interrupt && i == n_tokens / 2) {
            interrupt_signal = 2; // SIGINT
            on_interrupt(interrupt_user);
            interrupt_signal = 0;
        }
    }
    fate_context_close(c);
    return FATE_STATUS_OK;
}

int32_t fate_linear_open(const fate_linear_model * model, fate_linear ** linear) {
    (void) model;
    (void) linear;
    return fail(FATE_STATUS_INVALID, "linear models: expected the real library");
}

void fate_linear_close(fate_linear * linear) {
    (void) linear;
}

int32_t fate_linear_reset(fate_linear * linear) {
    (void) linear;
    return FATE_STATUS_INVALID;
}

int32_t fate_linear_observe(fate_linear * linear, const int32_t * ids, int32_t token, int32_t sequence) {
    (void) linear, (void) ids, (void) token, (void) sequence;
    return FATE_STATUS_INVALID;
}

int32_t fate_linear_step(fate_linear * linear, const fate_step * step) {
    (void) linear, (void) step;
    return FATE_STATUS_INVALID;
}

int32_t fate_linear_expect(fate_linear * linear, int32_t token, int32_t sequence, int32_t position) {
    (void) linear, (void) token, (void) sequence, (void) position;
    return FATE_STATUS_INVALID;
}

int32_t fate_linear_get(fate_linear * linear, float * chances, float * scores, float * bonus) {
    (void) linear, (void) chances, (void) scores, (void) bonus;
    return FATE_STATUS_INVALID;
}
