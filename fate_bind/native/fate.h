// FATE: the whole C surface that Python may see. C99; cut into the cffi cdef between the two marks below.
//
// Conventions
// - Functions return FATE_STATUS_OK or another FATE_STATUS_*, unless said otherwise; they never abort and never print.
//   fate_last_error() of the same thread then says what happened, the value, what was expected and the next step.
// - Strings are UTF-8 and zero-terminated. Returned strings belong to the library.
// - "layer" counts mixture-of-experts (MoE) blocks from 0 in graph order, not transformer layers.
// - Unless a function says "any thread", handles are used by one thread at a time.
#ifndef FATE_H
#define FATE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define FATE_API __declspec(dllexport)
#else
#    define FATE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// cdef begin

#define FATE_ABI_VERSION 4

enum {
    FATE_STATUS_OK       = 0,
    FATE_STATUS_INVALID  = 1, // an argument is out of range
    FATE_STATUS_MODEL    = 2, // the model or the context cannot be opened
    FATE_STATUS_CAPACITY = 3, // the slots asked for do not fit this model
    FATE_STATUS_MEMORY   = 4, // an allocation failed
    FATE_STATUS_POLICY   = 5, // a callback reported an error
    FATE_STATUS_DECODE   = 6, // llama.cpp could not process a batch
};

enum {
    FATE_MODE_OFF      = 0,
    FATE_MODE_TABLE    = 1, // victims by score tables, no Python in the loop
    FATE_MODE_CALLBACK = 2, // on_miss names every victim
};

enum {
    FATE_SLOTS_AUTO    = 0, // on a GPU what its memory has room for, on the CPU half of the experts
    FATE_SLOTS_COUNT   = 1, // slots_value: slots of every layer
    FATE_SLOTS_PERCENT = 2, // slots_value: share of each layer's experts, in percent, rounded down
    FATE_SLOTS_BYTES   = 3, // slots_value: bytes of the whole pool, the same number of slots in every layer
    FATE_SLOTS_LIST    = 4, // slots_list: one number for each layer
};

enum {
    FATE_PATH_NOT_RUN = 0,
    FATE_PATH_POOL    = 1,
    FATE_PATH_STAGED  = 2,
    FATE_PATH_BYPASS  = 3,
};

// columns of fate_engine_get_counters, one row a layer; all count (token, expert) pairs unless said otherwise
enum {
    FATE_COUNTER_ROUTED            = 0,
    FATE_COUNTER_HITS              = 1,
    FATE_COUNTER_MISSES            = 2,
    FATE_COUNTER_STAGED            = 3,
    FATE_COUNTER_BYPASSED          = 4,
    FATE_COUNTER_FILLS             = 5, // experts copied into a slot, seeding and prefetch included
    FATE_COUNTER_SEED_FILLS        = 6,
    FATE_COUNTER_EVICTIONS         = 7,
    FATE_COUNTER_BYTES             = 8,  // fills x expert bytes
    FATE_COUNTER_ROWS              = 9,  // tokens that went through the pool
    FATE_COUNTER_ROWS_ALL_RESIDENT = 10, // of these, tokens without a miss

    // prefetch; all but the last two, nanoseconds and bytes, count experts
    FATE_COUNTER_PREFETCHES      = 11, // begun; fills too
    FATE_COUNTER_PREFETCH_USEFUL = 12, // of these, complete at their first use: hits
    FATE_COUNTER_PREFETCH_LATE   = 13, // of these, still on their way at their first use: misses
    FATE_COUNTER_PREFETCH_WASTED = 14, // of these, evicted before any use
    FATE_COUNTER_PREFETCH_CANCELLED =
        15, // planned, and not begun when a nearer layer no longer told of them or their layer ran; may be planned again
    FATE_COUNTER_PREFETCH_WAITED_NS = 16, // that layers waited for those that were late
    FATE_COUNTER_PREFETCH_HIDDEN    = 17, // bytes of those useful, and of those late what was there already at their first use
    FATE_N_COUNTERS                 = 18,
};

// When things of a layer happened in the newest step, in nanoseconds of the GPU's clock, 0: not at all.
enum fate_time {
    FATE_TIME_OP_BEGAN  = 0,  // the layer's op has its ids
    FATE_TIME_OP_COPIES = 1,  // it knows what it lacks
    FATE_TIME_OP_DONE   = 2,  // it has it; 0 where it had all when it began
    FATE_TIME_PLANNED   = 3,  // the first plan for the layer
    FATE_TIME_WATCHED   = 4,  // the first of those that copy beside the step has come; of a device's first layer
    FATE_TIME_LEFT      = 5,  // and the last gone
    FATE_TIME_BEGUN     = 6,  // [16] the copy of an expert that was planned
    FATE_TIME_COMPLETE  = 22, // [16]
    FATE_N_TIMES        = 38,
};

// What predicts.
enum fate_prefetch_from {
    FATE_PREFETCH_TOKEN = 1, // the policy, at the token's start; needs fate_config.expects
    FATE_PREFETCH_LAYER = 2, // the routers of the next layers, given what a layer's own router reads
};

// A linear model of routing, by which the engine itself may say which experts the token about to run needs and which are worth their slots: the sizes that
// its features have. Their order in a head's weights: FATE_LINEAR_RATE.. name the first of each kind.
enum {
    FATE_LINEAR_RATES     = 8, // decayed shares of the tokens that used the expert
    FATE_LINEAR_EARLY     = 4, // of their logs, also by how early in its sequence the token is
    FATE_LINEAR_NGRAMS    = 3, // lengths of context whose last occurrence is looked for
    FATE_LINEAR_MOST_GRAM = 8, // the longest one, in tokens
    FATE_LINEAR_DECAYED   = 2, // decayed sums of what tokens routed
    FATE_LINEAR_CONTEXTS =
        7, // what the context vector is made of, in pieces of rank_basis: token now, later; last token; repeat now, soon; decayed
    FATE_LINEAR_LATER         = 5,    // tokens that are "later" than a token
    FATE_LINEAR_FOLLOW        = 32,   // tokens of a repeat that are looked at
    FATE_LINEAR_MAX_COUNT     = 1024, // occurrences at which a row of a table is halved
    FATE_LINEAR_MAX_AGE       = 1024, // tokens since the last use
    FATE_LINEAR_MAX_SEQUENCES = 256,
    FATE_LINEAR_MOST_ROWS     = 64,   // of a larger step only the last ones are taken in
    FATE_LINEAR_UNKNOWN       = -1,   // a token that is not known

    FATE_LINEAR_RATE        = 0,
    FATE_LINEAR_LOG_RATE    = 8,
    FATE_LINEAR_LOG_AGE     = 16,
    FATE_LINEAR_TOKEN_NOW   = 17,
    FATE_LINEAR_PAIR_NOW    = 18,
    FATE_LINEAR_TOKEN_LATER = 19,
    FATE_LINEAR_PAIR_LATER  = 20,
    FATE_LINEAR_REPEAT      = 21, // now, soon, later, each FATE_LINEAR_NGRAMS
    FATE_LINEAR_EARLY_LOG   = 30,
    FATE_LINEAR_FEATURES    = 34,
};

typedef struct fate_engine  fate_engine;  // one for each llama.cpp context made while FATE is configured
typedef struct fate_model   fate_model;   // a loaded model
typedef struct fate_context fate_context; // a context of ours on it
typedef struct fate_linear  fate_linear;  // a linear model of routing, and what it has seen

// What an engine serves. Arrays have n_layers entries and live as long as the engine.
typedef struct fate_geometry {
    int32_t         n_layers;
    int32_t         n_layers_engaged;
    const int32_t * n_experts;
    const int32_t * k;       // experts used per token
    const int32_t * n_slots; // 0: this layer is not engaged
    const int64_t * expert_bytes;
    const char *    model;   // name of the model, "" if it has none
} fate_geometry;

// One finished step (ubatch). Arrays live until the callback returns.
typedef struct fate_step {
    int32_t         n_tokens;
    int32_t         n_layers;
    int32_t         k;         // the largest k of all layers
    const int32_t * ids;       // [n_tokens][n_layers][k], best first, -1: not run
    const float *   weights;   // like ids, router weights, 0 where unknown; null without fate_config.weights
    const uint8_t * hits;      // like ids, 1: a hit on the pool path
    const uint8_t * path;      // [n_tokens][n_layers], FATE_PATH_*
    const int32_t * tokens;    // [n_tokens] token ids, -1: unknown
    const int32_t * positions; // [n_tokens]
    const int32_t * sequences; // [n_tokens] first sequence of each token
    int32_t         n_fills;
    const int32_t * fills;     // [n_fills][2] (layer, expert), in order
    int32_t         n_evictions;
    const int32_t * evictions; // [n_evictions][2] (layer, expert), in order

    // What layers before told of each layer: the experts of which something is known, likeliest first; n_horizons 0: nothing is recorded.
    int32_t         n_horizons;
    const int32_t * horizons;      // how many layers before, the farthest first
    int32_t         n_ahead;
    const int32_t * ahead_ids;     // [n_tokens][n_layers][n_horizons][n_ahead], -1: none
    const float *   ahead_chances; // like ahead_ids
} fate_step;

// One question of a linear model of routing; its answers are log-odds.
typedef struct fate_linear_head {
    const float * weights;  // [n_layers][FATE_LINEAR_FEATURES]; null: the question is not asked, the rest is not read
    const float * fold;     // [rank][n_layers][max_experts], of the squeezed context
    const float * constant; // [n_layers][max_experts]
    const float * bonus;    // [n_layers], what a use in a step not observed yet adds
} fate_linear_head;

// What was counted of tokens, or of pairs of tokens, in training: the oldest row first. Halves are IEEE's, in 16 bits.
typedef struct fate_linear_table {
    int32_t          capacity; // rows that there is room for, 1 or more; the least recent makes room
    int32_t          n_rows;   // that it begins with; of more than the capacity the most recent
    const int64_t *  keys;     // [n_rows] tokens; of pairs [n_rows][2], the token before and the token
    const float *    n;        // [n_rows][2] occurrences, and those that later tokens were seen of
    const uint16_t * sums;     // [n_rows][2][n_layers * max_experts], of tokens + rank_basis more columns each
} fate_linear_table;

// Everything that was fitted. All arrays are the caller's and must live as long as what is opened with them.
typedef struct fate_linear_model {
    int32_t           n_layers;
    int32_t           max_experts;
    int32_t           max_k;
    int32_t           rank_basis;
    int32_t           rank;
    const int32_t *   n_experts;    // [n_layers], 1 to max_experts
    const float *     even_rates;   // [n_layers][max_experts], the rates that it begins with
    const float *     basis;        // [n_layers][max_experts][rank_basis], by whose sum a token's routing is summed up
    const float *     center;       // [rank_basis], subtracted from that sum
    const float *     squeeze;      // [FATE_LINEAR_CONTEXTS][rank_basis][rank]
    const float *     rate_keep;    // [FATE_LINEAR_RATES], what a token leaves of a rate
    const float *     context_keep; // [FATE_LINEAR_DECAYED]
    const float *     soon;         // [FATE_LINEAR_FOLLOW], what the tokens after a repeat count
    const float *     later;        // [FATE_LINEAR_FOLLOW]
    const float *     credit;       // [FATE_LINEAR_LATER], what the tokens after a token count
    const int32_t *   early_of;     // [FATE_LINEAR_EARLY], of which rates
    double            early_tokens; // earliness is halved every so many tokens,
    int32_t           early_end;    // and 0 from here on
    const int32_t *   ngrams;       // [FATE_LINEAR_NGRAMS], rising, up to FATE_LINEAR_MOST_GRAM
    int32_t           n_history;    // tokens in which contexts are looked for, more than FATE_LINEAR_FOLLOW
    int32_t           learn;        // 1: goes on counting what tokens use
    fate_linear_table tokens;
    fate_linear_table pairs;
    fate_linear_head  now;  // is it used by this token? Must be asked.
    fate_linear_head  keep; // what is it worth to keep it after this token?
} fate_linear_model;

// Callbacks run on the thread that decodes, which need not be the one that called in; on_miss for layers on a GPU on a thread of the engine's own, but
// never while another callback of the same engine but on_wait runs. They return FATE_STATUS_OK, or another status: on_open then fails the context; after any other
// the engine goes on as LRU and calls on_step, on_expect and on_miss no more, except on_step for records.

// An engine is ready, engaged or not, or was reset (fate_engine_get_info tells). Comes again after each reset.
typedef int32_t (*fate_open_fn)(void * user, fate_engine * engine);
// A step ended. scores[n_layers][max n_experts] and bonus[n_layers] are zero-filled; set *published to 1 to have them act from the next step on. The bonus
// counts for experts used in a step later than the one last handed over. With `expects` scores are taken from on_expect and not from here.
typedef int32_t (*fate_step_fn)(void * user, fate_engine * engine, const fate_step * step, float * scores, float * bonus,
                                int32_t * published);
// What the step after the one last handed over consists of, in arrays as in fate_step, [n_tokens]. With sync it comes just before that step runs, and the
// scores act on that very step. Without, it comes when that step was launched (not for the first one), and they act on the step after it: nothing waits for
// the answer. scores, bonus and published as in on_step; null where they are not asked for. chances, null where they are not: set *predicted to 1 and write
// chances[n_layers][max n_experts], zero-filled, that the step uses each expert. They act on that very step, as far as its layers have not run yet; therefore
// without sync they are asked for first, in a call of their own. They are asked for steps of one token whose output is wanted: of another the last layer does
// not run.
typedef int32_t (*fate_expect_fn)(void * user, fate_engine * engine, int32_t n_tokens, const int32_t * tokens, const int32_t * positions,
                                  const int32_t * sequences, float * scores, float * bonus, int32_t * published, float * chances,
                                  int32_t * predicted);
// One op of a layer missed. Write victims[n_victims]: distinct resident experts of this layer, none of needed. n_victims may be 0.
// last_use[n_experts of the layer]: the layer's clock at each expert's last use, 0: never; at seeding the uses of the step at hand are in it.
// A GPU does not follow an answer that comes after miss_timeout_seconds; the step's evictions then tell what went.
typedef int32_t (*fate_miss_fn)(void * user, fate_engine * engine, int32_t layer, int32_t n_needed, const int32_t * needed,
                                int32_t n_missing, const int32_t * missing, const int64_t * last_use, int32_t n_victims, int32_t * victims);
// Some 20 times a second on the thread that decodes, while it waits for an on_miss that is late: the host may handle signals. Returns at once.
typedef void (*fate_wait_fn)(void * user);
// The context ends; the engine is valid until this returns.
typedef void (*fate_close_fn)(void * user, fate_engine * engine);

typedef struct fate_config {
    int32_t mode;                 // FATE_MODE_*
    int32_t sync;                 // 1: records of step t are handed over at its end, 0: one step later; callback mode is always sync
    int32_t scores;               // 1: the policy publishes scores (call on_step)
    int32_t expects;              // 1: it wants to know the tokens that come (call on_expect too)
    int32_t prefetch;             // FATE_PREFETCH_*, together; in table mode, without stage_all
    int32_t prefetch_experts;     // at most so many of a layer and token
    float   prefetch_threshold;   // the least chance worth a copy; 0: a half, and less on a GPU whose link has time to spare
    int32_t record;               // 1: routing is recorded (call on_step)
    int32_t weights;              // 1: steps tell router weights
    double  miss_timeout_seconds; // callback mode on a GPU: how long it waits for on_miss before LRU decides
    int32_t no_page_lock;         // 1: the model's memory is not page-locked; a GPU's experts go through a small ring that is
    int32_t require; // 1: a context that does not engage is an error, unless another one is engaged (a draft model beside the main one)
    int32_t slots_kind;
    double  slots_value;
    const int32_t * slots_list;
    int32_t         n_slots_list;
    int64_t         vram_bytes;  // FATE_SLOTS_AUTO: counts on a card of this size, 0: on all that the card has
    int64_t         vram_margin; // FATE_SLOTS_AUTO: bytes of each card to leave free
    int32_t         stage_all;   // 1: on a GPU every step is staged, also a small one: a reference that needs few slots
    int32_t         times;       // for benchmarks: 1: the times of what a GPU does are kept
    double          throttle;    // for benchmarks: bytes a second at which a GPU's misses are filled at most, 0: as many as come
    fate_open_fn    on_open;     // each may be null
    fate_step_fn    on_step;
    fate_expect_fn  on_expect;
    fate_miss_fn    on_miss;
    fate_wait_fn    on_wait;
    fate_close_fn   on_close;
    void *          user;
} fate_config;

typedef struct fate_info {
    int32_t       engaged;
    int32_t       policy_failed; // 1: a callback failed or named no valid victims; the engine went on as LRU
    const char *  reason;        // why not, or why not in every layer; "" if every layer is engaged
    fate_geometry geometry;
    int64_t       steps;
    int64_t       tokens;
    int64_t       busy_us;      // wall time inside steps, policy included
    int64_t       pool_bytes;   // staging included
    int64_t       gpu_launches; // of ops of ours, by the host
    int64_t       gpu_captures; // of these, into a graph: replays of it launch without the host
    int64_t       gpu_nodes;    // of the newest captured graph, up to the last op of ours in it, branches included
    const char *  bounced;  // why a GPU's experts go through a ring of pinned memory, which is slower; "" if it reads them where they are
    const char *  blind;    // FATE_PREFETCH_LAYER: why no layer tells of later ones, "" if some do
    int64_t       gpu_asks; // callback mode: misses about which a GPU asked
    int64_t       gpu_timeouts; // of these, not answered in time: LRU decided
    int64_t       gpu_ask_us;   // that GPUs waited for answers
} fate_info;

// Any thread.
FATE_API int32_t      fate_abi_version(void);
FATE_API const char * fate_build_id(void);
FATE_API const char * fate_last_error(void); // of the calling thread; valid until its next call
FATE_API const char * fate_engine_error(
    void); // of the newest context that an engine refused or ubatch that it failed, "" if none; any thread, valid until the next call
FATE_API const char * fate_system_info(void); // llama.cpp's backends and CPU features

// Any thread. Sets what contexts created from now on get; null: no engine. The struct and slots_list are copied, callbacks and user must live on.
FATE_API int32_t fate_configure(const fate_config * config);

// For benchmarks: contexts made from now on while FATE is configured take the expert ids of their tokens from ids[n_tokens][n_layers][k], one row a token,
// over and over, instead of from the router, whether they engage or not, with FATE_MODE_OFF too; a last layer that sees a step's wanted tokens only takes them for its last ones.
// null: no longer. Copied; ids are distinct within a token and below n_experts.
FATE_API int32_t fate_replay_routing(const int32_t * ids, int32_t n_tokens, int32_t n_layers, int32_t k);

// For benchmarks, beside fate_replay_routing: contexts made from now on that prefetch by FATE_PREFETCH_LAYER and replay routing are told of the layer l,
// when the layer horizons[i] before it runs, ids[i][token][l][m] with chances alike in place of what its router says. ids: -1: none, likeliest first, each once.
// The row is that of the routing. At most two horizons, from the farthest to the nearest, 1 to 8. null: no longer. Copied.
FATE_API int32_t fate_replay_predictions(const int32_t * ids, const float * chances, int32_t n_horizons, const int32_t * horizons,
                                         int32_t n_tokens, int32_t n_layers, int32_t m);

// Any thread, between on_open and the return of on_close. Counters are those of the last finished step.
FATE_API int32_t fate_engine_get_info(const fate_engine * engine, fate_info * info);
FATE_API int32_t fate_engine_get_counters(const fate_engine * engine, int64_t * counters /* [n_layers][FATE_N_COUNTERS] */,
                                          size_t n_counters);
// Of the newest step, with fate_config.times; waits for it. Layers that no GPU serves have zeros. Decode thread.
FATE_API int32_t fate_engine_get_times(const fate_engine * engine, int64_t * times /* [n_layers][FATE_N_TIMES] */, size_t n_times);
// Has the engine decide by a linear model of routing in place of the policy: for the very token that is about to run, without asking Python; on_expect is not
// called any more, nor on_step but for records. In table mode without sync. The arrays live until the engine is gone or this is called again. null: no more.
// Within on_open; a reset forgets it.
FATE_API int32_t fate_engine_set_linear(fate_engine * engine, const fate_linear_model * model);
// Hands over the record that is held back without sync, so that nothing is missing from what was recorded. Decode thread.
FATE_API int32_t fate_engine_flush(fate_engine * engine);
// Of a context that replays routing: its next step takes the rows from this one on. Decode thread, no step under way.
FATE_API int32_t fate_engine_seek_routing(fate_engine * engine, int64_t row);
// Checks invariants 2 and 3 over all layers: slot_of and expert_of are inverse maps and every resident expert's bytes are those of the model. Decode thread.
FATE_API int32_t fate_engine_check(const fate_engine * engine);

// Runs one of llama.cpp's programs in this process: completion, cli, server, bench, perplexity, quantize. argv[0] is the program's name. *exit_code is what its
// main returned. Help and some errors end the process, as in the program itself.
FATE_API int32_t fate_program_run(const char * name, int32_t argc, char ** argv, int32_t * exit_code);

// From now on an interrupt (SIGINT) or a request to end (SIGTERM), unless it is ignored, first calls on_interrupt on a thread of ours, then the handler that the
// program installed; a program that has none ends with code 130 or 143. fate_interrupt_unwatch() restores what was there before. fate_interrupt_signal() tells
// on_interrupt which signal it was.
typedef void (*fate_interrupt_fn)(void * user);
FATE_API int32_t fate_interrupt_watch(fate_interrupt_fn on_interrupt, void * user);
FATE_API void    fate_interrupt_unwatch(void);
FATE_API int32_t fate_interrupt_signal(void);
// From now on on_exit is called once if the process ends through exit(), as some programs do on a second interrupt; null: no more.
FATE_API int32_t fate_exit_watch(fate_interrupt_fn on_exit, void * user);

// Opens a model with the flags of llama-completion (argv[0] is skipped). The flags also set what contexts on it are like.
FATE_API int32_t fate_model_open(int32_t argc, char ** argv, fate_model ** model);
FATE_API void    fate_model_close(fate_model * model); // after its contexts; null is ignored
FATE_API int32_t fate_model_n_vocab(const fate_model * model);
FATE_API int32_t fate_model_has_encoder(const fate_model * model);
// Writes up to n_max tokens; *n is the number needed.
FATE_API int32_t fate_model_tokenize(const fate_model * model, const char * text, int32_t n_text, int32_t add_special, int32_t * tokens,
                                     int32_t n_max, int32_t * n);
// Writes up to n_max bytes of the token's text, not terminated; *n is the number needed.
FATE_API int32_t      fate_model_piece(const fate_model * model, int32_t token, char * text, int32_t n_max, int32_t * n);
FATE_API int32_t      fate_model_is_eog(const fate_model * model, int32_t token); // 1 if the token ends a generation
FATE_API int32_t      fate_model_bos(const fate_model * model);                   // -1 if there is none
FATE_API const char * fate_model_prompt(const fate_model * model);                // -p / -f of the flags, "" if none

// engine 0: without FATE whatever is configured.
FATE_API int32_t fate_context_open(fate_model * model, int32_t engine, fate_context ** context);
FATE_API void    fate_context_close(fate_context * context); // null is ignored
FATE_API int32_t fate_context_n_ctx(const fate_context * context);
// The most tokens that one decode takes.
FATE_API int32_t fate_context_n_batch(const fate_context * context);
FATE_API int32_t fate_context_n_seq_max(const fate_context * context);
// The engine of this context, null if it has none.
FATE_API fate_engine * fate_context_engine(const fate_context * context);
// Decodes one batch of n <= n_batch tokens. sequences may be null: sequence 0. positions may be null: the tokens then follow what their
// sequences hold. outputs (1: wanted) may be null: all. logits[n_outputs][n_vocab] may be null.
FATE_API int32_t fate_context_decode(fate_context * context, int32_t n, const int32_t * tokens, const int32_t * positions,
                                     const int32_t * sequences, const int8_t * outputs, float * logits);
FATE_API int32_t fate_context_clear(fate_context * context); // forgets all sequences, keeps the pool
// Context shift: removes [p0, p1) of a sequence and moves what follows down by p1 - p0.
FATE_API int32_t fate_context_shift(fate_context * context, int32_t sequence, int32_t p0, int32_t p1);
FATE_API int32_t fate_context_state_size(fate_context * context, size_t * n_bytes);
FATE_API int32_t fate_context_state_get(fate_context * context, uint8_t * bytes, size_t n_bytes);
FATE_API int32_t fate_context_state_set(fate_context * context, const uint8_t * bytes, size_t n_bytes);
// temperature <= 0 is greedy.
FATE_API int32_t fate_context_set_sampler(fate_context * context, float temperature, int32_t top_k, float top_p, float min_p,
                                          uint32_t seed);
// Samples from the last output of the last batch.
FATE_API int32_t fate_context_sample(fate_context * context, int32_t * token);

// A linear model of routing by itself, for tests and timing. Any thread, one at a time for each fate_linear. Nothing but fate_linear_open allocates.
FATE_API int32_t fate_linear_open(const fate_linear_model * model, fate_linear ** linear); // the struct is copied, its arrays are not
FATE_API void    fate_linear_close(fate_linear * linear);                                  // null is ignored
// Forgets all but the model.
FATE_API int32_t fate_linear_reset(fate_linear * linear);
// Takes in what one token routed, distinct within a layer, best first, -1: not run. FATE_STATUS_INVALID changes nothing.
FATE_API int32_t fate_linear_observe(fate_linear * linear, const int32_t * ids /* [n_layers][max_k] */, int32_t token, int32_t sequence);
// Takes in the last FATE_LINEAR_MOST_ROWS tokens of a step; of it n_tokens, n_layers, k, ids, tokens and sequences are read.
FATE_API int32_t fate_linear_step(fate_linear * linear, const fate_step * step);
// Tells of the token that runs next; -1: token or position are not known.
FATE_API int32_t fate_linear_expect(fate_linear * linear, int32_t token, int32_t sequence, int32_t position);
// Of the token told: the chance that it uses each expert, 0 of those that do not exist, and what each is worth. Each may be null; scores and bonus must be
// if there is no head for them.
FATE_API int32_t fate_linear_get(fate_linear * linear, float * chances /* [n_layers][max_experts] */,
                                 float * scores /* [n_layers][max_experts] */, float * bonus /* [n_layers] */);

// cdef end

#ifdef __cplusplus
}
#endif

#endif // FATE_H
