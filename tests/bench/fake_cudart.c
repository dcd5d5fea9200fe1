// A CUDA runtime that checks what it is given: a copy stays within what is
// page-locked and allocated and takes 1 ms.
#include <stddef.h>
#include <stdint.h>

static const char *locked;
static size_t n_locked, n_allocated;
static int n_copies, counted_from, counted_to;

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *free_bytes = 70000000000u;
  *total = 80000000000u;
  return 0;
}

int cudaHostRegister(void *p, size_t n, unsigned flags) {
  locked = p;
  n_locked = n;
  return flags == (2 | 8) && n % 4096 == 0 && (uintptr_t)p % 4096 == 0 ? 0 : 1;
}

int cudaMalloc(void **p, size_t n) {
  n_allocated = n;
  *p = (void *)0x7f0000000000;
  return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind,
                    void *stream) {
  ++n_copies;
  const char *at = from;
  return to == (void *)0x7f0000000000 && n == n_allocated && at >= locked &&
                 at + n <= locked + n_locked && kind == 1 && !stream
             ? 0
             : 1;
}

int cudaEventCreate(void **event) {
  static int n;
  *event = (void *)(uintptr_t)(0x700000000000 + ++n);
  return 0;
}

int cudaEventRecord(void *event, void *stream) {
  *((uintptr_t)event & 1 ? &counted_from : &counted_to) = n_copies;
  return stream ? 1 : 0;
}

int cudaEventSynchronize(void *event) {
  return event != (void *)(uintptr_t)0x700000000002;
}

int cudaEventElapsedTime(float *ms, void *from, void *to) {
  *ms = (float)(counted_to - counted_from);
  return from == (void *)(uintptr_t)0x700000000001 &&
                 to == (void *)(uintptr_t)0x700000000002
             ? 0
             : 1;
}
