// llama.cpp's own programs, called in this process.
#include "status.h"

#include <cstring>

int llama_bench(int argc, char ** argv);
int llama_cli(int argc, char ** argv);
int llama_completion(int argc, char ** argv);
int llama_perplexity(int argc, char ** argv);
int llama_quantize(int argc, char ** argv);
int llama_server(int argc, char ** argv);

struct program {
    const char * name;
    int (*main)(int argc, char ** argv);
};

static const program programs[] = {
    { "bench",      llama_bench      },
    { "cli",        llama_cli        },
    { "completion", llama_completion },
    { "perplexity", llama_perplexity },
    { "quantize",   llama_quantize   },
    { "server",     llama_server     },
};

int32_t fate_program_run(const char * name, int32_t argc, char ** argv, int32_t * exit_code) {
    return fate_guard(FATE_STATUS_MODEL, [&] {
        for (const program & p : programs) {
            if (strcmp(p.name, name) == 0) {
                *exit_code = p.main(argc, argv);
                return;
            }
        }
        throw fate_error(FATE_STATUS_INVALID,
                         fate_format("program '%s': expected bench, cli, completion, perplexity, quantize or server", name));
    });
}
