// Preloaded (LD_PRELOAD): times every launch of a CUDA graph on the device, between two events; but not those onto streams of
// a higher priority than the default's, which is what goes on beside a step.
// What would be linked against is looked up in the CUDA runtime that the process has loaded, so that it
// compiles anywhere.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 1 << 16, IN_FLIGHT = 4 };

static void *runtime;
static void *began[IN_FLIGHT], *ended[IN_FLIGHT];
static float times[MOST]; // milliseconds
static int n_launches, n_times;

static void *find(const char *name) {
  void *symbol = runtime ? dlsym(runtime, name) : NULL;
  if (!symbol) {
    fprintf(stderr, "graph_time: the CUDA runtime has no %s\n", name);
    abort();
  }
  return symbol;
}

// The runtime of this process: the file that its maps name.
static void open_runtime(void) {
  char line[4096];
  FILE *maps = fopen("/proc/self/maps", "r");
  while (maps && !runtime && fgets(line, sizeof(line), maps)) {
    char *path = strchr(line, '/');
    if (path && strstr(path, "libcudart")) {
      path[strcspn(path, "\n")] = 0;
      runtime = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    }
  }
  if (maps)
    fclose(maps);
}

int cudaGraphLaunch(void *graph, void *stream) {
  static int (*launch)(void *, void *);
  static int (*record)(void *, void *);
  static int (*elapsed)(float *, void *, void *);
  static int (*priority_of)(void *, int *);
  if (!launch) {
    open_runtime();
    int (*create)(void **) = (int (*)(void **))find("cudaEventCreate");
    for (int i = 0; i < IN_FLIGHT; ++i) // of every launch that is not read yet
      if (create(&began[i]) || create(&ended[i])) {
        fprintf(stderr, "graph_time: cudaEventCreate failed\n");
        abort();
      }
    record = (int (*)(void *, void *))find("cudaEventRecord");
    elapsed = (int (*)(float *, void *, void *))find("cudaEventElapsedTime");
    priority_of = (int (*)(void *, int *))find("cudaStreamGetPriority");
    launch = (int (*)(void *, void *))find("cudaGraphLaunch");
  }
  int priority = 0;
  if (priority_of(stream, &priority) == 0 && priority < 0)
    return launch(graph, stream);
  const int i = n_launches % IN_FLIGHT;
  float ms;
  if (n_launches >= IN_FLIGHT && n_times < MOST &&
      elapsed(&ms, began[i], ended[i]) == 0)
    times[n_times++] = ms;
  ++n_launches;
  record(began[i], stream);
  const int status = launch(graph, stream);
  record(ended[i], stream);
  return status;
}

// Hands over the times so far, oldest first, and forgets them; returns how many.
int graph_time_take(float *to, int most) {
  const int n = n_times < most ? n_times : most;
  memcpy(to, times, (size_t)n * sizeof(float));
  n_times = 0;
  return n;
}
