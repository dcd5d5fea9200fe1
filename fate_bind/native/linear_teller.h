// Tells a linear model's tokens to devices that evaluate it. They keep what is known of each expert and take it on by what their own layers used in the step
// before; where that is not the one token that the model took in since, they are told all.
#pragma once

#include "linear.h"

class fate_linear_teller {
public:
    // Of the token that is expected. follows: since the token told last the model took in one token, which was a step by itself, the devices' newest.
    const fate_linear_told & tell(fate_linear & linear, bool follows) {
        told_          = linear.tell();
        told_.advances = follows && at_ >= 0 && linear.n_observed() == at_ + 1;
        if (!told_.advances && at_ != linear.n_observed()) {
            linear.tell_all(told_);
        }
        at_ = linear.n_observed();
        return told_;
    }

    // What devices know is not to be relied on.
    void distrust() { at_ = -1; }

private:
    fate_linear_told told_ = {};
    int64_t          at_   = -1; // tokens that what devices know of experts is of
};
