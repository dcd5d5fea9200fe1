// The host's side of a mailbox: a thread that hands a GPU's questions to the policy. It makes no CUDA call, so that a waiting kernel never waits for itself.
#pragma once

#include "mailbox.h"
#include "poller.h"

#include <vector>

// One op of a layer that missed. Arrays live until the call returns.
struct fate_miss {
    int32_t         layer; // among all layers
    int32_t         n_needed;
    const int32_t * needed;
    int32_t         n_missing;
    const int32_t * missing;
    const int64_t * last_use; // [n_experts of the layer]
    int32_t         n_victims;
};

// Who names the victims in callback mode. Called on the service's thread.
class fate_asker {
public:
    virtual ~fate_asker() = default;

    // Fills victims[n_victims]; false: the rule decides.
    virtual bool ask(const fate_miss & miss, int32_t * victims) = 0;
    virtual void reject()                                       = 0; // the answer was none: the rule decides
    virtual void wait()                                         = 0; // now and then, on the thread that waits for a late answer
};

class fate_service {
public:
    // Both outlive it.
    fate_service(fate_mailbox & box, fate_asker & asker);

    void wake(); // a step begins: questions may come
    void rest(); // the step's kernels are done; waits for an answer that is late

private:
    bool serve();
    void answer();
    bool is_valid(int32_t n) const;

    fate_mailbox &       box_;
    fate_asker &         asker_;
    std::vector<int32_t> victims_;
    fate_poller          poller_; // last: it uses the others
};
