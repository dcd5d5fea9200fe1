// Models and contexts of our own, opened with llama.cpp's flags.
#include "arg.h"
#include "common.h"
#include "engine.h"
#include "fit.h"
#include "status.h"

#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

//
// llama.cpp's log: quiet, the last errors kept for our messages
//

static std::mutex  log_mutex;
static std::string log_errors;

static void log_callback(ggml_log_level level, const char * text, void *) {
    static thread_local ggml_log_level last = GGML_LOG_LEVEL_NONE;
    last                                    = level == GGML_LOG_LEVEL_CONT ? last : level;
    if (last == GGML_LOG_LEVEL_ERROR) {
        std::lock_guard<std::mutex> lock(log_mutex);
        log_errors += text;
    }
}

// The first line of what llama.cpp logged as an error since the last call, "" if nothing.
static std::string take_log_error() {
    std::lock_guard<std::mutex> lock(log_mutex);
    std::string                 line = log_errors.substr(0, log_errors.find('\n'));
    log_errors.clear();
    return line;
}

static fate_error llama_error(int32_t status, const std::string & what) {
    const std::string why = take_log_error();
    return fate_error(status, why.empty() ? what : what + ": " + why);
}

//
// model
//

struct fate_model {
    common_params                       params;
    llama_context_params                cparams;
    llama_model_ptr                     model;
    std::vector<llama_adapter_lora_ptr> loras;

    const llama_vocab * vocab() const { return llama_model_get_vocab(model.get()); }
};

int32_t fate_model_open(int32_t argc, char ** argv, fate_model ** model) {
    return fate_guard(FATE_STATUS_MODEL, [&] {
        *model = nullptr;
        for (int32_t i = 1; i < argc; ++i) {
            for (const char * flag :
                 { "-h", "--help", "--usage", "--version", "-cl", "--cache-list", "--list-devices", "--completion-bash" }) {
                if (strcmp(argv[i], flag) == 0) {
                    throw fate_error(FATE_STATUS_INVALID, fate_format("%s ends llama.cpp's process; leave it out", flag));
                }
            }
        }
        static std::once_flag once;
        std::call_once(once, llama_backend_init);
        llama_log_set(log_callback, nullptr);
        take_log_error();

        auto m = std::make_unique<fate_model>();
        if (!common_params_parse(argc, argv, m->params, LLAMA_EXAMPLE_COMPLETION)) {
            throw fate_error(FATE_STATUS_INVALID, "llama.cpp does not take these flags (its message is above)");
        }
        common_params &    params  = m->params;
        llama_model_params mparams = common_model_params_to_llama(params);
        m->cparams                 = common_context_params_to_llama(params);
        if (params.fit_params && llama_supports_gpu_offload()) { // as llama.cpp's programs do
            common_fit_params(params.model.path.c_str(), &mparams, &m->cparams, params.tensor_split, params.tensor_buft_overrides.data(),
                              params.fit_params_target.data(), params.fit_params_min_ctx, nullptr, GGML_LOG_LEVEL_ERROR);
        }
        m->model.reset(llama_model_load_from_file(params.model.path.c_str(), mparams));
        if (!m->model) {
            throw llama_error(FATE_STATUS_MODEL, fate_format("cannot load model '%s'", params.model.path.c_str()));
        }
        for (common_adapter_lora_info & info : params.lora_adapters) {
            m->loras.emplace_back(llama_adapter_lora_init(m->model.get(), info.path.c_str()));
            info.ptr = m->loras.back().get();
            if (!info.ptr) {
                throw llama_error(FATE_STATUS_MODEL, fate_format("cannot load LoRA adapter '%s'", info.path.c_str()));
            }
        }
        *model = m.release();
    });
}

void fate_model_close(fate_model * model) {
    delete model;
}

int32_t fate_model_n_vocab(const fate_model * model) {
    return llama_vocab_n_tokens(model->vocab());
}

int32_t fate_model_has_encoder(const fate_model * model) {
    return llama_model_has_encoder(model->model.get());
}

int32_t fate_model_tokenize(const fate_model * model, const char * text, int32_t n_text, int32_t add_special, int32_t * tokens,
                            int32_t n_max, int32_t * n) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (llama_vocab_type(model->vocab()) == LLAMA_VOCAB_TYPE_NONE) {
            throw fate_error(FATE_STATUS_INVALID, "the model has no tokenizer; give token ids");
        }
        const int32_t got = llama_tokenize(model->vocab(), text, n_text, tokens, n_max, add_special != 0, /*parse_special =*/true);
        *n                = got < 0 ? -got : got;
    });
}

int32_t fate_model_piece(const fate_model * model, int32_t token, char * text, int32_t n_max, int32_t * n) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (token < 0 || token >= fate_model_n_vocab(model)) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("token %d: expected 0 to %d", token, fate_model_n_vocab(model) - 1));
        }
        const int32_t got = llama_token_to_piece(model->vocab(), token, text, n_max, 0, /*special =*/true);
        *n                = got < 0 ? -got : got;
    });
}

int32_t fate_model_is_eog(const fate_model * model, int32_t token) {
    return token >= 0 && token < fate_model_n_vocab(model) && llama_vocab_is_eog(model->vocab(), token);
}

int32_t fate_model_bos(const fate_model * model) {
    return llama_vocab_bos(model->vocab());
}

const char * fate_model_prompt(const fate_model * model) {
    return model->params.prompt.c_str();
}

//
// context
//

struct fate_context {
    fate_model *      model;
    llama_context_ptr ctx;
    llama_sampler_ptr sampler;
    bool              has_output = false; // the last batch left logits

    llama_memory_t memory() const { return llama_get_memory(ctx.get()); }
};

static void set_control_vectors(llama_context * ctx, const fate_model & model) {
    const common_params & params = model.params;
    if (params.control_vectors.empty()) {
        return;
    }
    const auto cvec  = common_control_vector_load(params.control_vectors);
    const int  first = std::max(params.control_vector_layer_start, 1);
    const int  last  = params.control_vector_layer_end > 0 ? params.control_vector_layer_end : llama_model_n_layer(model.model.get());
    if (cvec.n_embd == -1 || llama_set_adapter_cvec(ctx, cvec.data.data(), cvec.data.size(), cvec.n_embd, first, last) != 0) {
        throw llama_error(FATE_STATUS_MODEL, "cannot apply the control vectors");
    }
}

int32_t fate_context_open(fate_model * model, int32_t engine, fate_context ** context) {
    return fate_guard(FATE_STATUS_MODEL, [&] {
        *context = nullptr;
        take_log_error();
        std::string refusal;
        fate_take_refusal(refusal); // an older one
        auto c   = std::make_unique<fate_context>();
        c->model = model;
        {
            std::unique_ptr<fate_no_engine> off(engine ? nullptr : new fate_no_engine);
            c->ctx.reset(llama_init_from_model(model->model.get(), model->cparams));
        }
        if (!c->ctx) {
            if (const int32_t status = fate_take_refusal(refusal)) {
                throw fate_error(status, refusal);
            }
            throw llama_error(FATE_STATUS_MODEL, "cannot make a context");
        }
        common_set_adapter_lora(c->ctx.get(), model->params.lora_adapters);
        set_control_vectors(c->ctx.get(), *model);
        c->sampler.reset(llama_sampler_init_greedy());
        *context = c.release();
    });
}

void fate_context_close(fate_context * context) {
    delete context;
}

int32_t fate_context_n_ctx(const fate_context * context) {
    return static_cast<int32_t>(llama_n_ctx_seq(context->ctx.get()));
}

int32_t fate_context_n_batch(const fate_context * context) {
    // without causal attention llama.cpp needs the whole batch in one ubatch, and aborts if it gets more
    const llama_context * ctx   = context->ctx.get();
    const bool            whole = !context->memory() || !ctx->get_cparams().causal_attn || fate_model_has_encoder(context->model);
    return static_cast<int32_t>(whole ? std::min(llama_n_batch(ctx), llama_n_ubatch(ctx)) : llama_n_batch(ctx));
}

int32_t fate_context_n_seq_max(const fate_context * context) {
    return static_cast<int32_t>(llama_n_seq_max(context->ctx.get()));
}

fate_engine * fate_context_engine(const fate_context * context) {
    return fate_engine_of(context->ctx.get());
}

static void check_sequence(const fate_context & context, int32_t sequence) {
    const int32_t n = fate_context_n_seq_max(&context);
    if (sequence < 0 || sequence >= n) {
        throw fate_error(FATE_STATUS_INVALID, fate_format("sequence %d: expected 0 to %d (raise -np)", sequence, n - 1));
    }
}

static void process(fate_context & context, llama_process_type type, common_batch & batch) {
    const int32_t status = llama_process(context.ctx.get(), type, batch.get());
    if (status != 0) {
        const fate_engine * engine = fate_engine_of(context.ctx.get());
        if (engine && !engine->error().empty()) {
            throw fate_error(FATE_STATUS_DECODE, engine->error());
        }
        throw llama_error(FATE_STATUS_DECODE, status == 1 ? "no room in the context for this batch; raise -c or clear() first" :
                                                            fate_format("llama.cpp could not process the batch (status %d)", status));
    }
}

int32_t fate_context_decode(fate_context * context, int32_t n, const int32_t * tokens, const int32_t * positions, const int32_t * sequences,
                            const int8_t * outputs, float * logits) {
    return fate_guard(FATE_STATUS_DECODE, [&] {
        llama_context * ctx     = context->ctx.get();
        const int32_t   n_vocab = fate_model_n_vocab(context->model);
        if (n < 1 || n > fate_context_n_batch(context)) {
            throw fate_error(FATE_STATUS_INVALID,
                             fate_format("batch of %d tokens: expected 1 to n_batch = %d", n, fate_context_n_batch(context)));
        }
        take_log_error();

        llama_memory_t               memory = context->memory();
        std::map<int32_t, llama_pos> next; // of each sequence
        common_batch                 batch(ctx);
        int32_t                      n_outputs = 0;
        bool                         is_start  = true;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t sequence = sequences ? sequences[i] : 0;
            const bool    output   = !outputs || outputs[i];
            if (tokens[i] < 0 || tokens[i] >= n_vocab) {
                throw fate_error(FATE_STATUS_INVALID, fate_format("token %d at index %d: expected 0 to %d", tokens[i], i, n_vocab - 1));
            }
            check_sequence(*context, sequence);
            if (!next.count(sequence)) {
                next[sequence] = memory ? llama_memory_seq_pos_max(memory, sequence) + 1 : 0;
                is_start       = is_start && next[sequence] == 0;
            }
            batch.add(tokens[i], positions ? positions[i] : next[sequence]++, sequence, output);
            n_outputs += output;
        }
        if (llama_model_has_encoder(context->model->model.get()) && is_start) {
            process(*context, LLAMA_PROCESS_TYPE_ENCODE, batch);
        }
        context->has_output = false;
        process(*context, LLAMA_PROCESS_TYPE_DECODE, batch);
        context->has_output = n_outputs > 0 && context->model->model->output;
        if (logits && n_outputs > 0) {
            const float * from = llama_get_logits(ctx);
            if (!from || !context->has_output) {
                throw fate_error(FATE_STATUS_DECODE, "the model gives no logits (an embeddings-only model)");
            }
            memcpy(logits, from, static_cast<size_t>(n_outputs) * n_vocab * sizeof(float));
        } else {
            llama_synchronize(ctx);
        }
    });
}

int32_t fate_context_clear(fate_context * context) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (context->memory()) {
            llama_memory_clear(context->memory(), true);
        }
        context->has_output = false;
        llama_sampler_reset(context->sampler.get());
    });
}

int32_t fate_context_shift(fate_context * context, int32_t sequence, int32_t p0, int32_t p1) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        llama_memory_t memory = context->memory();
        if (!memory || !llama_memory_can_shift(memory)) {
            throw fate_error(FATE_STATUS_INVALID, "this model's context cannot be shifted");
        }
        check_sequence(*context, sequence);
        if (p0 < 0 || p1 <= p0) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("shift [%d, %d): expected 0 <= p0 < p1", p0, p1));
        }
        if (!llama_memory_seq_rm(memory, sequence, p0, p1)) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("positions [%d, %d) of sequence %d cannot be removed", p0, p1, sequence));
        }
        llama_memory_seq_add(memory, sequence, p1, -1, p0 - p1);
    });
}

int32_t fate_context_state_size(fate_context * context, size_t * n_bytes) {
    return fate_guard(FATE_STATUS_INVALID, [&] { *n_bytes = llama_state_get_size(context->ctx.get()); });
}

int32_t fate_context_state_get(fate_context * context, uint8_t * bytes, size_t n_bytes) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (llama_state_get_data(context->ctx.get(), bytes, n_bytes) == 0) {
            throw llama_error(FATE_STATUS_INVALID, fate_format("the state does not fit %zu bytes", n_bytes));
        }
    });
}

int32_t fate_context_state_set(fate_context * context, const uint8_t * bytes, size_t n_bytes) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (llama_state_set_data(context->ctx.get(), bytes, n_bytes) == 0) {
            throw llama_error(FATE_STATUS_INVALID, fate_format("%zu bytes are not a state of this model and these flags", n_bytes));
        }
    });
}

int32_t fate_context_set_sampler(fate_context * context, float temperature, int32_t top_k, float top_p, float min_p, uint32_t seed) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        if (temperature <= 0.0f) {
            context->sampler.reset(llama_sampler_init_greedy());
            return;
        }
        llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
        context->sampler.reset(chain);
        llama_sampler_chain_add(chain, llama_sampler_init_top_k(top_k));
        llama_sampler_chain_add(chain, llama_sampler_init_top_p(top_p, 1));
        llama_sampler_chain_add(chain, llama_sampler_init_min_p(min_p, 1));
        llama_sampler_chain_add(chain, llama_sampler_init_temp(temperature));
        llama_sampler_chain_add(chain, llama_sampler_init_dist(seed));
    });
}

int32_t fate_context_sample(fate_context * context, int32_t * token) {
    return fate_guard(FATE_STATUS_DECODE, [&] {
        if (!context->has_output) {
            throw fate_error(FATE_STATUS_DECODE, "there is nothing to sample from: the last batch asked for no output, or there was none");
        }
        *token = llama_sampler_sample(context->sampler.get(), context->ctx.get(), -1);
    });
}

const char * fate_system_info(void) {
    return llama_print_system_info();
}
