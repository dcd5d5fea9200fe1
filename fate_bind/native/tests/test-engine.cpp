// The engine on a real model: test-engine MODEL exact | cycles N | threads. Also built with sanitizers.
#include "check.h"
#include "fate.h"
#include "llama.h"

#if defined(__GLIBC__)
#    include <malloc.h>
#endif

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

static std::string model_path;

static void ok(int32_t status) {
    if (status != FATE_STATUS_OK) {
        fprintf(stderr, "status %d: %s\n", status, fate_last_error());
        exit(1);
    }
}

static fate_model * open_model() {
    std::vector<std::string> args = {
        "test", "-m", model_path, "-c", "256", "-ub", "32", "-t", "1", "--no-repack", "-fit", "off", "-np", "4",
    };
    std::vector<char *> argv;
    for (std::string & arg : args) {
        argv.push_back(&arg[0]);
    }
    fate_model * model = nullptr;
    ok(fate_model_open(static_cast<int32_t>(argv.size()), argv.data(), &model));
    return model;
}

static fate_context * open_context(fate_model * model, bool engine) {
    fate_context * context = nullptr;
    ok(fate_context_open(model, engine, &context));
    return context;
}

static void configure(int32_t mode, double percent, fate_config config = {}) {
    config.mode        = mode;
    config.slots_kind  = FATE_SLOTS_PERCENT;
    config.slots_value = percent;
    ok(fate_configure(&config));
}

// Prompt and greedy decode; all logits in one row.
static std::vector<float> run(fate_model * model, fate_context * context, int n_decode) {
    const size_t         n_vocab = static_cast<size_t>(fate_model_n_vocab(model));
    std::vector<int32_t> prompt;
    for (int32_t i = 0; i < 24; ++i) {
        prompt.push_back(100 + 37 * i);
    }
    std::vector<float> all(prompt.size() * n_vocab);
    ok(fate_context_decode(context, static_cast<int32_t>(prompt.size()), prompt.data(), nullptr, nullptr, nullptr, all.data()));
    for (int i = 0; i < n_decode; ++i) {
        const float * last = all.data() + all.size() - n_vocab;
        int32_t       best = 0;
        for (size_t j = 1; j < n_vocab; ++j) {
            best = last[j] > last[best] ? static_cast<int32_t>(j) : best;
        }
        std::vector<float> row(n_vocab);
        ok(fate_context_decode(context, 1, &best, nullptr, nullptr, nullptr, row.data()));
        all.insert(all.end(), row.begin(), row.end());
    }
    return all;
}

// what a binding does in its callbacks, without Python
struct user_data {
    std::atomic<int> opened{ 0 }, closed{ 0 }, steps{ 0 }, expected{ 0 }, misses{ 0 };
    int              steps_before = 0; // handed over before the first is expected
    bool             lie          = false;
};

static int32_t on_open(void * user, fate_engine *) {
    ++static_cast<user_data *>(user)->opened;
    return FATE_STATUS_OK;
}

static void on_close(void * user, fate_engine *) {
    ++static_cast<user_data *>(user)->closed;
}

static int32_t on_step(void * user, fate_engine *, const fate_step * step, float * scores, float * bonus, int32_t * published) {
    ++static_cast<user_data *>(user)->steps;
    scores[0]  = static_cast<float>(step->n_tokens);
    bonus[0]   = 1.0f;
    *published = 1;
    return FATE_STATUS_OK;
}

// One step is expected more than was handed over.
static int32_t on_expect(void * user, fate_engine *, int32_t n_tokens, const int32_t * tokens, const int32_t *, const int32_t * sequences,
                         float * scores, float * bonus, int32_t * published, float *, int32_t *) {
    user_data * data = static_cast<user_data *>(user);
    CHECK(data->expected == data->steps - data->steps_before);
    ++data->expected;
    scores[0]  = static_cast<float>(tokens[n_tokens - 1] + sequences[0]);
    bonus[0]   = 1.0f;
    *published = 1;
    return FATE_STATUS_OK;
}

static int32_t on_miss(void * user, fate_engine *, int32_t, int32_t, const int32_t * needed, int32_t, const int32_t *, const int64_t *,
                       int32_t n_victims, int32_t * victims) {
    user_data * data = static_cast<user_data *>(user);
    ++data->misses;
    for (int32_t i = 0; i < n_victims; ++i) {
        victims[i] = needed[0]; // never valid
    }
    return data->lie ? FATE_STATUS_OK : FATE_STATUS_POLICY;
}

static fate_config with_callbacks(user_data & data) {
    fate_config config{};
    config.scores   = 1;
    config.record   = 1;
    config.on_open  = on_open;
    config.on_step  = on_step;
    config.on_miss  = on_miss;
    config.on_close = on_close;
    config.user     = &data;
    return config;
}

static void test_exact() {
    fate_model *             model     = open_model();
    fate_context *           plain     = open_context(model, false);
    const std::vector<float> reference = run(model, plain, 12);
    CHECK(fate_context_engine(plain) == nullptr);

    for (const double percent : { 12.5, 25.0, 96.875 }) {
        for (const bool lie : { false, true }) {
            for (const int32_t mode : { FATE_MODE_TABLE, FATE_MODE_CALLBACK }) {
                user_data data;
                data.lie = lie;
                configure(mode, percent, with_callbacks(data));
                fate_context *           context = open_context(model, true);
                const std::vector<float> logits  = run(model, context, 12);
                CHECK(logits.size() == reference.size() && memcmp(logits.data(), reference.data(), logits.size() * sizeof(float)) == 0);

                fate_engine * engine = fate_context_engine(context);
                fate_info     info;
                ok(fate_engine_get_info(engine, &info));
                CHECK(info.engaged && info.geometry.n_layers == info.geometry.n_layers_engaged);
                CHECK(info.policy_failed == (mode == FATE_MODE_CALLBACK));
                CHECK(fate_engine_check(engine) == FATE_STATUS_OK);
                CHECK(fate_engine_flush(engine) == FATE_STATUS_OK);
                CHECK(data.steps == 13);
                CHECK((data.misses > 0) == (mode == FATE_MODE_CALLBACK));

                std::vector<int64_t> counters(static_cast<size_t>(info.geometry.n_layers) * FATE_N_COUNTERS);
                CHECK(fate_engine_get_counters(engine, counters.data(), 1) == FATE_STATUS_INVALID);
                ok(fate_engine_get_counters(engine, counters.data(), counters.size()));
                CHECK(counters[FATE_COUNTER_FILLS] > 0);
                fate_context_close(context);
                CHECK(data.opened == 1 && data.closed == 1);
            }
        }
    }
    fate_context_close(plain);
    fate_model_close(model);
}

// Bytes that are allocated. Resident memory would also count what the allocator keeps, which wanders by megabytes.
static size_t allocated_bytes() {
#if defined(__GLIBC__)
    const struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
#else
    return 0;
#endif
}

static void test_cycles(int n) {
    user_data data;
    configure(FATE_MODE_TABLE, 25, with_callbacks(data));
    const int32_t token  = 5;
    size_t        before = 0;
    for (int i = 0; i < n; ++i) {
        fate_model *   model   = open_model();
        fate_context * context = open_context(model, true);
        ok(fate_context_decode(context, 1, &token, nullptr, nullptr, nullptr, nullptr));
        fate_context_close(context);
        fate_model_close(model);
        if (i == n / 10) {
            before = allocated_bytes();
        }
    }
    const size_t after = allocated_bytes();
    printf("allocated: %zu bytes after %d cycles, %zu after %d\n", before, n / 10 + 1, after, n);
    CHECK(data.opened == n && data.closed == n);
    CHECK(after < before + 64 * 1024);
}

// With sync a step is told before it runs, the first too; without, once it runs and the one before was handed over.
static void test_expected_steps() {
    fate_model * model = open_model();
    for (const int32_t sync : { 0, 1 }) {
        user_data   data;
        fate_config config = with_callbacks(data);
        config.sync        = sync;
        config.expects     = 1;
        config.on_expect   = on_expect;
        data.steps_before  = sync ? 0 : 1;
        configure(FATE_MODE_TABLE, 25, config);
        fate_context * context = open_context(model, true);
        run(model, context, 12);
        CHECK(data.expected == (sync ? 13 : 12));
        CHECK(data.steps == (sync ? 13 : 12));
        CHECK(fate_engine_check(fate_context_engine(context)) == FATE_STATUS_OK);
        fate_context_close(context);
        CHECK(data.steps == 13);
    }
    fate_model_close(model);
}

// what the steps told, to hold against the counters
struct told {
    fate_engine * engine = nullptr;
    int64_t       fills = 0, evictions = 0, pairs = 0;
    int           countdown = -1; // calls of the abort callback until it aborts
};

static bool abort_now(void * user) {
    told * t = static_cast<told *>(user);
    return t->countdown >= 0 && t->countdown-- == 0;
}

// A ubatch that is aborted half-way is a step of what ran; nothing of it reaches the next.
static void test_aborted_ubatch() {
    told        t;
    fate_config config{};
    config.sync    = 1;
    config.record  = 1;
    config.user    = &t;
    config.on_open = [](void * user, fate_engine * engine) -> int32_t {
        static_cast<told *>(user)->engine = engine;
        return FATE_STATUS_OK;
    };
    config.on_step = [](void * user, fate_engine *, const fate_step * step, float *, float *, int32_t *) -> int32_t {
        told * t = static_cast<told *>(user);
        t->fills += step->n_fills;
        t->evictions += step->n_evictions;
        for (int32_t i = 0; i < step->n_tokens * step->n_layers; ++i) {
            t->pairs += step->path[i] != FATE_PATH_NOT_RUN ? step->k : 0;
        }
        return FATE_STATUS_OK;
    };
    configure(FATE_MODE_TABLE, 25, config);

    llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts    = false;
    llama_model *        model      = llama_model_load_from_file(model_path.c_str(), model_params);
    llama_context_params params     = llama_context_default_params();
    params.n_ctx                    = 256;
    params.n_threads                = 1;
    params.n_threads_batch          = 1;
    params.abort_callback           = abort_now;
    params.abort_callback_data      = &t;
    llama_context * ctx             = llama_init_from_model(model, params);
    CHECK(ctx && t.engine);

    int n_aborted = 0;
    for (int i = 0; i < 24; ++i) {
        llama_token tokens[24];
        for (int j = 0; j < 24; ++j) {
            tokens[j] = 50 + 91 * i + 13 * j;
        }
        const bool abort_this = i % 3 == 1;
        t.countdown           = abort_this ? 40 + 37 * i % 200 : -1;
        n_aborted += llama_decode(ctx, llama_batch_get_one(tokens, i % 2 ? 1 : 12)) == 2;
    }
    CHECK(n_aborted > 2);
    fate_info info;
    ok(fate_engine_get_info(t.engine, &info));
    std::vector<int64_t> counters(static_cast<size_t>(info.geometry.n_layers) * FATE_N_COUNTERS);
    ok(fate_engine_get_counters(t.engine, counters.data(), counters.size()));
    int64_t sums[FATE_N_COUNTERS] = {};
    for (size_t i = 0; i < counters.size(); ++i) {
        sums[i % FATE_N_COUNTERS] += counters[i];
    }
    CHECK(sums[FATE_COUNTER_FILLS] == t.fills);
    CHECK(sums[FATE_COUNTER_EVICTIONS] == t.evictions);
    CHECK(sums[FATE_COUNTER_ROUTED] == t.pairs);
    CHECK(sums[FATE_COUNTER_FILLS] - sums[FATE_COUNTER_SEED_FILLS] == sums[FATE_COUNTER_MISSES]);
    CHECK(fate_engine_check(t.engine) == FATE_STATUS_OK);
    llama_free(ctx);
    llama_model_free(model);
}

// Two contexts decode on two threads while a third reads what any thread may.
static void test_threads() {
    user_data data;
    configure(FATE_MODE_TABLE, 25, with_callbacks(data));
    fate_model *   model      = open_model();
    fate_context * contexts[] = { open_context(model, true), open_context(model, true) };

    std::atomic<bool>        stop{ false };
    std::vector<std::thread> threads;
    for (fate_context * context : contexts) {
        threads.emplace_back([=] { run(model, context, 20); });
    }
    std::thread reader([&] {
        while (!stop) {
            for (fate_context * context : contexts) {
                fate_engine * engine = fate_context_engine(context);
                fate_info     info;
                ok(fate_engine_get_info(engine, &info));
                std::vector<int64_t> counters(static_cast<size_t>(info.geometry.n_layers) * FATE_N_COUNTERS);
                ok(fate_engine_get_counters(engine, counters.data(), counters.size()));
            }
            configure(FATE_MODE_TABLE, 50);
            std::this_thread::yield();
        }
    });
    for (std::thread & thread : threads) {
        thread.join();
    }
    stop = true;
    reader.join();
    for (fate_context * context : contexts) {
        CHECK(fate_engine_check(fate_context_engine(context)) == FATE_STATUS_OK);
        fate_context_close(context);
    }
    CHECK(data.steps == 2 * 21);
    fate_model_close(model);
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL exact | cycles N | threads\n", argv[0]);
        return 2;
    }
    model_path             = argv[1];
    const std::string what = argv[2];
    if (what == "exact") {
        test_exact();
        test_expected_steps();
        test_aborted_ubatch();
    } else if (what == "cycles" && argc > 3) {
        test_cycles(atoi(argv[3]));
    } else if (what == "threads") {
        test_threads();
    }
    return check_result(("test-engine " + what).c_str());
}
