#include "service.h"

#include <algorithm>
#include <chrono>

using namespace std::chrono_literals;

// How long nothing was asked before the thread eases off; a layer takes some 70 us.
static const auto SPIN_FOR  = 100us;
static const auto YIELD_FOR = 20ms;
static const auto NAP       = 100us;

static uint32_t load_acquire(const uint32_t & word) {
    return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

static void spin() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

fate_service::fate_service(fate_mailbox & box, fate_asker & asker) :
    box_(box),
    asker_(asker),
    victims_(FATE_MAILBOX_EXPERTS),
    thread_(&fate_service::run, this) {}

fate_service::~fate_service() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_over_  = true;
        is_awake_ = false;
    }
    changed_.notify_all();
    thread_.join();
}

void fate_service::wake() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_awake_ = true;
    }
    changed_.notify_all();
}

void fate_service::rest() {
    while (load_acquire(box_.asked) != load_acquire(box_.answered)) {
        std::this_thread::sleep_for(NAP);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    is_awake_ = false;
}

void fate_service::run() {
    for (;;) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return is_awake_ || is_over_; });
            if (is_over_) {
                return;
            }
        }
        serve();
    }
}

void fate_service::serve() {
    auto last = std::chrono::steady_clock::now();
    while (is_awake_) {
        if (load_acquire(box_.asked) != box_.answered) {
            answer();
            last = std::chrono::steady_clock::now();
            continue;
        }
        const auto idle = std::chrono::steady_clock::now() - last;
        if (idle < SPIN_FOR) {
            spin();
        } else if (idle < YIELD_FOR) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(NAP);
        }
    }
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
    __atomic_store_n(&box_.answered, box_.answered + 1, __ATOMIC_RELEASE);
}

bool fate_service::is_valid(int32_t n) const {
    return fate_rule_valid(victims_.data(), n, [this](int32_t expert) {
        return expert >= 0 && expert < FATE_MAILBOX_EXPERTS && (box_.resident[expert / 32] >> (expert % 32) & 1) != 0 &&
               std::find(box_.needed, box_.needed + box_.n_needed, expert) == box_.needed + box_.n_needed;
    });
}
