// Whether prefetch beside the step pays: by what becomes of it. No ggml, no CUDA.
//
// Of what is brought in, a share is used before it goes. Where that is too little, prefetch rests, first for some steps, then for twice as many each time, up to
// a limit; in between it is tried again. What the link and the waiting cost is not weighed.
#pragma once

#include <algorithm>
#include <cstdint>

static const int32_t FATE_WORTH_STEPS    = 16;   // after which it is judged
static const int64_t FATE_WORTH_EXPERTS  = 16;   // brought in, at least
static const double  FATE_WORTH_SHARE    = 0.25; // used, at least
static const int32_t FATE_WORTH_REST     = 64;   // steps
static const int32_t FATE_WORTH_MAX_REST = 2048;

class fate_worth {
public:
    // A step begins; n_brought and n_used: so far. False: prefetch rests in it.
    bool begin(int64_t n_brought, int64_t n_used) {
        if (n_resting_ > 0) {
            --n_resting_;
            n_steps_ = 0;
            note(n_brought, n_used);
            return n_resting_ == 0;
        }
        if (++n_steps_ < FATE_WORTH_STEPS || n_brought - n_brought_ < FATE_WORTH_EXPERTS) {
            return true;
        }
        const bool pays = static_cast<double>(n_used - n_used_) >= FATE_WORTH_SHARE * static_cast<double>(n_brought - n_brought_);
        n_steps_        = 0;
        note(n_brought, n_used);
        rest_      = pays ? FATE_WORTH_REST : std::min(2 * rest_, FATE_WORTH_MAX_REST);
        n_resting_ = pays ? 0 : rest_ / 2;
        return pays;
    }

    void reset() { *this = fate_worth(); }

private:
    void note(int64_t n_brought, int64_t n_used) {
        n_brought_ = n_brought;
        n_used_    = n_used;
    }

    int64_t n_brought_ = 0;
    int64_t n_used_    = 0;
    int32_t n_steps_   = 0;
    int32_t n_resting_ = 0;
    int32_t rest_      = FATE_WORTH_REST;
};
