// Whether prefetch beside the step pays: what it hides against what it costs, window by window. No ggml, no CUDA.
//
// It hides the copies, or the parts of them, that are there at the first use. It costs the looking, a share of every step, and what copies beside a step take
// from it, a share of their own time. Where it does not pay it rests, first for some windows, then for twice as many each time, up to a limit; in between it is
// tried again, and a try that has shown enough is given up before its window ends. Where all copies together take hardly longer than the looking it is not even
// tried.
//
// On a link that has time to spare what is less likely is worth a copy too: at 16 of 32 slots of gpt-oss-20b's shape the classifier's predictions at the
// token's start made 3 % more tokens/s from a chance of 0.3 on than from 0.5 on, at 8 slots 2 % fewer. There all copies took 0.5 to 0.7 and 1.1 to 1.7 of the
// shortest of 16 steps.
#pragma once

#include <algorithm>
#include <cstdint>

static const int32_t FATE_WORTH_STEPS  = 16;   // of a window
static const double  FATE_WORTH_BESIDE = 0.25; // of the time of a copy: what it takes from the step beside it, and from others on the link
static const double  FATE_WORTH_LOOK   = 0.02; // of a step: layers tell of others
static const double  FATE_WORTH_PLAN   = 0.01; // of a step: what the token is to use is known
static const double  FATE_WORTH_LEAST  = 1.5;  // times what it costs to look: copies that are worth a try
static const int32_t FATE_WORTH_REST   = 4;    // windows
static const int32_t FATE_WORTH_TRY    = 4;    // steps that may be enough of a try
static const double  FATE_WORTH_HOPE   = 0.5;  // of what it costs: a try that hides less is given up then
static const int64_t FATE_WORTH_SHOWN  = 32;   // experts brought in that are
static const int32_t FATE_WORTH_MAX_REST = 128;

static const double FATE_WORTH_EASE = 0.6;  // of the least chance: what is enough on a link with time to spare,
static const double FATE_WORTH_IDLE = 0.75; // whose copies take so much of a window's shortest step,
static const double FATE_WORTH_BUSY = 1.0;  // and so much where it has none

// So far.
struct fate_worth_seen {
    int64_t n_brought = 0; // experts by prefetch
    double  n_hidden  = 0; // of these, what was there at their first use
    int64_t n_came    = 0; // experts in all
};

class fate_worth {
public:
    // ns_per_expert: that a copy takes. cost: share of a step, FATE_WORTH_LOOK or FATE_WORTH_PLAN.
    explicit fate_worth(double ns_per_expert = 0, double cost = 0) : ns_per_expert_(ns_per_expert), cost_(cost) {}

    // A step begins. is_told: one that experts may be brought in for; others, and what they copy, are not looked at. False: prefetch rests in it.
    bool begin(bool is_told, const fate_worth_seen & seen, int64_t now_ns) {
        if (was_told_) { // pauses between steps are not theirs: the shortest counts
            const int64_t ns = now_ns - began_ns_;
            shortest_ns_     = shortest_ns_ == 0 ? ns : std::min(shortest_ns_, ns);
        } else {
            before_.n_brought += seen.n_brought - last_.n_brought;
            before_.n_hidden += seen.n_hidden - last_.n_hidden;
            before_.n_came += seen.n_came - last_.n_came;
        }
        last_     = seen;
        began_ns_ = now_ns;
        was_told_ = is_told;
        if (!is_told) {
            return false;
        }
        if (n_steps_ == FATE_WORTH_STEPS || (is_shown(seen) && !pays(seen, FATE_WORTH_HOPE))) {
            ease_        = ease(seen);
            is_on_       = judge(seen);
            n_steps_     = 0;
            shortest_ns_ = 0;
            before_      = seen;
        }
        ++n_steps_;
        return is_on_;
    }

    // What the least chance worth a copy is to be multiplied by; 1 until a window is over.
    double ease() const { return ease_; }

    void reset() { *this = fate_worth(ns_per_expert_, cost_); }

private:
    // Whether a try has brought in enough to be judged.
    bool is_shown(const fate_worth_seen & seen) const {
        return is_on_ && is_try_ && n_steps_ >= FATE_WORTH_TRY && seen.n_brought - before_.n_brought >= FATE_WORTH_SHOWN;
    }

    double looking() const { return cost_ * static_cast<double>(shortest_ns_) * n_steps_; }

    double ease(const fate_worth_seen & seen) const {
        const double copies = ns_per_expert_ * static_cast<double>(seen.n_came - before_.n_came);
        const double busy   = copies / std::max(1.0, static_cast<double>(shortest_ns_) * n_steps_);
        const double share  = (busy - FATE_WORTH_IDLE) / (FATE_WORTH_BUSY - FATE_WORTH_IDLE);
        return FATE_WORTH_EASE + (1 - FATE_WORTH_EASE) * std::min(1.0, std::max(0.0, share));
    }

    bool pays(const fate_worth_seen & seen, double least = 1) const {
        const double hidden = ns_per_expert_ * (seen.n_hidden - before_.n_hidden);
        const double beside = FATE_WORTH_BESIDE * ns_per_expert_ * static_cast<double>(seen.n_brought - before_.n_brought);
        return hidden >= least * (looking() + beside);
    }

    // A window is over: whether it runs in the next.
    bool judge(const fate_worth_seen & seen) {
        n_resting_ = std::max(0, n_resting_ - 1);
        if (ns_per_expert_ * static_cast<double>(seen.n_came - before_.n_came) < FATE_WORTH_LEAST * looking()) {
            is_try_ = true;
            return false;
        }
        if (!is_on_) {
            return n_resting_ == 0;
        }
        is_try_    = !pays(seen);
        n_resting_ = is_try_ ? rest_ : 0;
        rest_      = is_try_ ? std::min(2 * rest_, FATE_WORTH_MAX_REST) : FATE_WORTH_REST;
        return !is_try_;
    }

    double          ns_per_expert_;
    double          cost_;
    fate_worth_seen before_;              // the window at hand
    fate_worth_seen last_;                // at the last step's begin
    bool            was_told_    = false; // the last step
    int64_t         began_ns_    = 0;
    int64_t         shortest_ns_ = 0;     // step of the window at hand
    int32_t         n_steps_     = 0;     // of the window
    bool            is_on_       = true;
    bool            is_try_      = true;  // nothing says yet that it pays
    int32_t         n_resting_   = 0;     // windows to come
    int32_t         rest_        = FATE_WORTH_REST;
    double          ease_        = 1;
};
