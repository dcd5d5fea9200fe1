// Whether prefetch beside the step pays: by what comes in at all, and by what becomes of what it brings. No ggml, no CUDA.
//
// Prefetch hides copies, and looking for what to copy takes time of its own. Where all copies take less than that share of the steps, it rests until they take
// more. Of what it brings in, a share is there when it is used, whole experts or parts of them; where that is too little, because predictions are bad or the
// link is slow, it rests too, first for some steps, then for twice as many each time, up to a limit; in between it is tried again.
#pragma once

#include <algorithm>
#include <cstdint>

static const int32_t FATE_WORTH_STEPS   = 16;   // after which it is judged
static const int64_t FATE_WORTH_EXPERTS = 16;   // brought in, at least
static const double  FATE_WORTH_SHARE   = 0.15; // of these there when used, at least
static const double  FATE_WORTH_TIME =
    0.06; // of a step that copies take, at least: what prefetch has cost where nothing was to be copied, at most
static const int32_t FATE_WORTH_REST     = 64; // steps
static const int32_t FATE_WORTH_MAX_REST = 2048;

class fate_worth {
public:
    // ns_per_expert: that a copy takes.
    explicit fate_worth(double ns_per_expert = 0) : ns_per_expert_(ns_per_expert) {}

    // A step begins. n_brought: experts by prefetch so far, n_hidden: of these, what was there at their first use; n_came: all that came. False: prefetch rests in it.
    bool begin(int64_t n_brought, double n_hidden, int64_t n_came, int64_t now_ns) {
        if (began_ns_ > 0) { // pauses between steps are not theirs: the shortest counts
            const int64_t ns = now_ns - began_ns_;
            shortest_ns_     = shortest_ns_ == 0 ? ns : std::min(shortest_ns_, ns);
        }
        began_ns_ = now_ns;
        if (++n_timed_ > FATE_WORTH_STEPS) {
            const double copies = ns_per_expert_ * static_cast<double>(n_came - n_came_);
            const double steps  = static_cast<double>(shortest_ns_) * FATE_WORTH_STEPS;
            is_idle_            = ns_per_expert_ > 0 && copies < FATE_WORTH_TIME * steps;
            n_timed_            = 1;
            shortest_ns_        = 0;
            n_came_             = n_came;
        }
        if (is_idle_) {
            n_steps_ = 0;
            note(n_brought, n_hidden);
            return false;
        }
        if (n_resting_ > 0) {
            --n_resting_;
            n_steps_ = 0;
            note(n_brought, n_hidden);
            return n_resting_ == 0;
        }
        if (++n_steps_ < FATE_WORTH_STEPS || n_brought - n_brought_ < FATE_WORTH_EXPERTS) {
            return true;
        }
        const bool pays = n_hidden - n_hidden_ >= FATE_WORTH_SHARE * static_cast<double>(n_brought - n_brought_);
        n_steps_        = 0;
        note(n_brought, n_hidden);
        rest_      = pays ? FATE_WORTH_REST : std::min(2 * rest_, FATE_WORTH_MAX_REST);
        n_resting_ = pays ? 0 : rest_ / 2;
        return pays;
    }

    void reset() { *this = fate_worth(ns_per_expert_); }

private:
    void note(int64_t n_brought, double n_hidden) {
        n_brought_ = n_brought;
        n_hidden_  = n_hidden;
    }

    double  ns_per_expert_;
    int64_t began_ns_    = 0;
    int64_t shortest_ns_ = 0; // of the steps at hand
    int32_t n_timed_     = 0;
    int64_t n_came_      = 0;
    bool    is_idle_     = false;
    int64_t n_brought_   = 0;
    double  n_hidden_    = 0;
    int32_t n_steps_     = 0;
    int32_t n_resting_   = 0;
    int32_t rest_        = FATE_WORTH_REST;
};
