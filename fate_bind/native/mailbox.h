// Questions of a GPU to the host and their answers, in pinned memory that both see. No CUDA: the host's tests play the GPU.
//
// There is one question at a time. The next one is posted only when the last was answered, be it too late, so that neither side writes what the other
// still reads; a miss that meets a late answer goes by the rule at once. All kernels of a stream share a mailbox and a desk.
#pragma once

#include "rule.h"

#include <cstdint>

static const int FATE_MAILBOX_EXPERTS = 1024;

enum fate_verdict : uint32_t {
    FATE_VERDICT_NONE     = 0, // not yet
    FATE_VERDICT_ANSWERED = 1, // the victims are valid
    FATE_VERDICT_RULE     = 2, // no valid answer, or none in time: the rule decides
};

struct fate_mailbox {
    // the GPU's
    int32_t  layer; // among all layers
    int32_t  n_needed;
    int32_t  n_missing;
    int32_t  n_victims;
    int32_t  needed[FATE_MAILBOX_EXPERTS];
    int32_t  missing[FATE_MAILBOX_EXPERTS];
    int64_t  last_use[FATE_MAILBOX_EXPERTS];
    uint32_t resident[FATE_MAILBOX_EXPERTS / 32]; // bits
    int64_t  n_asked;
    int64_t  n_timeouts;                          // of these
    int64_t  waited_ns;

    alignas(64) uint32_t asked; // number of the newest question, written last

    // the host's
    alignas(64) uint32_t answered; // number of the newest answer, written last
    uint32_t verdict;
    int32_t  victims[FATE_MAILBOX_EXPERTS];
};

// What the GPU keeps of it, in its own memory.
struct fate_desk {
    fate_mailbox * box; // as the GPU addresses it
    int64_t        timeout_ns;
    uint32_t       n_posted;
    uint32_t       n_seen;  // answers
    uint32_t       tickets; // blocks of the launch that have come; the first one asks
    uint32_t       verdict; // for the other blocks; back to FATE_VERDICT_NONE when all have read it
    int64_t        n_asked;
    int64_t        n_timeouts;
    int64_t        waited_ns;
    int32_t        victims[FATE_MAILBOX_EXPERTS];
};

// The GPU's side, run by one thread. IO: load_acquire(&word), store_release(&word, value), store(&number, value), all seen by the host; now_ns().

// Whether the mailbox may be written. Not while the answer to an older question is out: it is late already, and nobody waits for it again.
template <typename IO> FATE_HOST_DEVICE bool fate_mailbox_claim(fate_desk & desk, const fate_mailbox & box, IO & io) {
    if (desk.n_seen != desk.n_posted) {
        desk.n_seen = io.load_acquire(&box.answered);
    }
    return desk.n_seen == desk.n_posted;
}

// Posts what was written and waits. FATE_VERDICT_ANSWERED: the victims in the box may be read.
template <typename IO> FATE_HOST_DEVICE uint32_t fate_mailbox_ask(fate_desk & desk, fate_mailbox & box, int64_t deadline_ns, IO & io) {
    io.store_release(&box.asked, ++desk.n_posted);
    do {
        desk.n_seen = io.load_acquire(&box.answered);
        if (desk.n_seen == desk.n_posted) {
            return box.verdict;
        }
    } while (io.now_ns() <= deadline_ns);
    return FATE_VERDICT_NONE;
}

// Counts a question and returns what the blocks go by.
template <typename IO>
FATE_HOST_DEVICE uint32_t fate_mailbox_close(fate_desk & desk, fate_mailbox & box, uint32_t verdict, int64_t began_ns, IO & io) {
    const bool in_time = verdict != FATE_VERDICT_NONE;
    io.store(&box.n_asked, ++desk.n_asked);
    io.store(&box.n_timeouts, desk.n_timeouts += !in_time);
    io.store(&box.waited_ns, desk.waited_ns += io.now_ns() - began_ns);
    return in_time ? verdict : static_cast<uint32_t>(FATE_VERDICT_RULE);
}
