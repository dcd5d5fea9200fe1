// Callback mode on the GPU: one block of a launch posts the miss and waits for the host's answer, the others wait for that block.
//
// The first block that comes asks, whichever it is, so that nobody waits for a block that has not started; it alone decides whether the answer came in time.
#pragma once

#include "cuda_layer.cuh"
#include "mailbox.h"

// What a mailbox needs of the hardware.
struct fate_cuda_io {
    __device__ uint32_t load_acquire(const uint32_t * word) {
        const uint32_t value = *const_cast<const volatile uint32_t *>(word);
        __threadfence_system();
        return value;
    }

    __device__ void store_release(uint32_t * word, uint32_t value) {
        __threadfence_system();
        *const_cast<volatile uint32_t *>(word) = value;
    }

    __device__ void store(int64_t * number, int64_t value) { *const_cast<volatile int64_t *>(number) = value; }

    __device__ int64_t now_ns() { return static_cast<int64_t>(fate_now_ns()); }
};

// What the blocks of a launch agree on, in shared memory.
struct fate_cuda_miss {
    const int32_t * slot_of; // by expert
    const int32_t * first;   // by expert: the first use in the op, INT_MAX: not needed
    const int32_t * missing;
    int             n_missing;
    int             n_victims;
};

// All threads of one block. expert: of this thread's pair, -1 if it has none.
static __device__ void fate_post(const fate_cuda_layer & layer, const fate_cuda_miss & miss, int32_t expert, int * scratch) {
    fate_desk &    desk = *layer.desk;
    fate_mailbox & box  = *desk.box;
    const int      tid  = threadIdx.x;
    fate_cuda_io   io;
    __shared__ int s_verdict; // -1: may be asked
    int64_t        began = 0;
    if (tid == 0) {
        began     = io.now_ns();
        s_verdict = fate_mailbox_claim(desk, box, io) ? -1 : static_cast<int>(FATE_VERDICT_NONE);
    }
    __syncthreads();
    if (s_verdict < 0) {
        const bool is_expert = tid < layer.n_experts;
        const bool is_first  = expert >= 0 && miss.first[expert] == tid;
        int        n_needed;
        const int  at = fate_rank_of(is_first, scratch, n_needed);
        if (is_first) {
            box.needed[at] = expert;
        }
        if (tid < miss.n_missing) {
            box.missing[tid] = miss.missing[tid];
        }
        if (is_expert) {
            box.last_use[tid] = layer.last_use[tid];
        }
        const unsigned resident = __ballot_sync(0xffffffff, is_expert && miss.slot_of[tid] >= 0);
        if (tid % 32 == 0) {
            box.resident[tid / 32] = resident;
        }
        if (tid == 0) {
            box.layer     = layer.index;
            box.n_needed  = n_needed;
            box.n_missing = miss.n_missing;
            box.n_victims = miss.n_victims;
        }
        __syncthreads();
        if (tid == 0) {
            s_verdict = static_cast<int>(fate_mailbox_ask(desk, box, began + desk.timeout_ns, io));
        }
        __syncthreads();
        if (s_verdict == FATE_VERDICT_ANSWERED && tid < miss.n_victims) {
            desk.victims[tid] = *const_cast<const volatile int32_t *>(&box.victims[tid]);
        }
        __syncthreads();
    }
    if (tid == 0) {
        const uint32_t verdict = fate_mailbox_close(desk, box, static_cast<uint32_t>(s_verdict), began, io);
        __threadfence();
        *const_cast<volatile uint32_t *>(&desk.verdict) = verdict;
    }
    __syncthreads();
}

// Asks for the victims; all threads of all blocks. False: the rule decides. target[n_victims]: their slots.
static __device__ bool fate_ask(const fate_cuda_layer & layer, const fate_cuda_miss & miss, int32_t expert, int * scratch,
                                int32_t * target) {
    fate_desk &         desk = *layer.desk;
    const int           tid  = threadIdx.x;
    __shared__ uint32_t s_shared; // a ticket, then the verdict
    if (tid == 0) {
        s_shared = atomicAdd(&desk.tickets, 1);
    }
    __syncthreads();
    if (s_shared == 0) {
        fate_post(layer, miss, expert, scratch);
    }
    __syncthreads();
    if (tid == 0) {
        do {
            s_shared = *const_cast<const volatile uint32_t *>(&desk.verdict);
        } while (s_shared == FATE_VERDICT_NONE);
        __threadfence();
    }
    __syncthreads();
    const bool is_answered = s_shared == FATE_VERDICT_ANSWERED;
    if (is_answered && tid < miss.n_victims) {
        target[tid] = miss.slot_of[*const_cast<const volatile int32_t *>(&desk.victims[tid])];
    }
    return is_answered;
}

// By the last block of the launch, when all have their verdict.
static __device__ __forceinline__ void fate_ask_done(const fate_cuda_layer & layer) {
    layer.desk->tickets = 0;
    layer.desk->verdict = FATE_VERDICT_NONE;
}
