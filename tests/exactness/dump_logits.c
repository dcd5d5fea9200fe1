// Logits of a prompt and of each of the tokens after it, with llama.cpp's public C API only: dump_logits MODEL OUT.
#include "llama.h"

#include <stdio.h>
#include <stdlib.h>

static void quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level;
    (void) text;
    (void) user;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 2;
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model_params mparams = llama_model_default_params();
    mparams.use_extra_bufts           = false;
    struct llama_model * model        = llama_model_load_from_file(argv[1], mparams);
    struct llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                       = 256;
    cparams.n_ubatch                    = 16;
    cparams.n_threads                   = 2;
    cparams.n_threads_batch             = 2;
    struct llama_context * ctx          = model ? llama_init_from_model(model, cparams) : NULL;
    FILE *                 out          = fopen(argv[2], "wb");
    if (!ctx || !out) {
        return 1;
    }
    const int   n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token prompt[40];
    for (int i = 0; i < 40; ++i) {
        prompt[i] = 1 + (i * 37) % (n_vocab - 1);
    }
    llama_token next = 0;
    for (int i = 0; i < 25; ++i) {
        struct llama_batch batch = i == 0 ? llama_batch_get_one(prompt, 40) : llama_batch_get_one(&next, 1);
        if (llama_decode(ctx, batch) != 0) {
            return 1;
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        fwrite(logits, sizeof(float), (size_t) n_vocab, out);
        next = 0;
        for (int j = 1; j < n_vocab; ++j) {
            next = logits[j] > logits[next] ? j : next;
        }
    }
    fclose(out);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
