#include "service.h"

#include <algorithm>
#include <chrono>
#include <thread>

static const auto WAIT = std::chrono::milliseconds(1); // between two looks for a late answer
static const int  TELL = 50;                           // looks after which the asker is told

fate_service::fate_service(fate_mailbox & box, fate_asker & asker) :
    box_(box),
    asker_(asker),
    victims_(FATE_MAILBOX_EXPERTS),
    poller_([this] { return serve(); }) {}

void fate_service::wake() {
    poller_.wake();
}

void fate_service::rest() {
    for (int i = 1; fate_load_acquire(box_.asked) != fate_load_acquire(box_.answered); ++i) {
        std::this_thread::sleep_for(WAIT);
        if (i % TELL == 0) {
            asker_.wait();
        }
    }
    poller_.rest();
}

bool fate_service::serve() {
    if (fate_load_acquire(box_.asked) == box_.answered) {
        return false;
    }
    answer();
    return true;
}

void fate_service::answer() {
    const fate_miss miss = { box_.layer, box_.n_needed, box_.needed, box_.n_missing, box_.missing, box_.last_use, box_.n_victims };
    bool            ok   = asker_.ask(miss, victims_.data());
    if (ok && !is_valid(miss.n_victims)) {
        asker_.reject();
        ok = false;
    }
    std::copy_n(victims_.begin(), ok ? miss.n_victims : 0, box_.victims);
    box_.verdict = ok ? FATE_VERDICT_ANSWERED : FATE_VERDICT_RULE;
    fate_store_release(box_.answered, box_.answered + 1);
}

bool fate_service::is_valid(int32_t n) const {
    return fate_rule_valid(victims_.data(), n, [this](int32_t expert) {
        return expert >= 0 && expert < FATE_MAILBOX_EXPERTS && (box_.resident[expert / 32] >> (expert % 32) & 1) != 0 &&
               std::find(box_.needed, box_.needed + box_.n_needed, expert) == box_.needed + box_.n_needed;
    });
}
