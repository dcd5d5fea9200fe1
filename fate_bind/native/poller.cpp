#include "poller.h"

#include <chrono>

using namespace std::chrono_literals;

// How long there was no work before the thread eases off. A layer takes some 70 us, a token some milliseconds.
static const auto SPIN_FOR  = 100us;
static const auto YIELD_FOR = 20ms;
static const auto NAP_FOR   = 1s;
static const auto NAP       = 100us;
static const auto DOZE      = 5ms;

fate_poller::fate_poller(std::function<bool()> work) : work_(std::move(work)), thread_(&fate_poller::run, this) {}

fate_poller::~fate_poller() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_over_  = true;
        is_awake_ = false;
    }
    changed_.notify_all();
    thread_.join();
}

void fate_poller::wake() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_awake_ = true;
        ++n_wakes_;
    }
    changed_.notify_all();
}

void fate_poller::rest() {
    std::lock_guard<std::mutex> lock(mutex_);
    is_awake_ = false;
}

void fate_poller::run() {
    for (;;) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return is_awake_ || is_over_; });
            if (is_over_) {
                return;
            }
        }
        poll();
    }
}

void fate_poller::poll() {
    uint32_t n_wakes = 0;
    auto     last    = std::chrono::steady_clock::now();
    while (is_awake_) {
        const bool was_woken = n_wakes != n_wakes_;
        n_wakes              = n_wakes_;
        if (work_() || was_woken) {
            last = std::chrono::steady_clock::now();
            continue;
        }
        const auto idle = std::chrono::steady_clock::now() - last;
        if (idle < SPIN_FOR) {
            fate_spin();
        } else if (idle < YIELD_FOR) {
            std::this_thread::yield();
        } else if (idle < NAP_FOR) {
            std::this_thread::sleep_for(NAP);
        } else {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait_for(lock, DOZE, [&] { return !is_awake_ || n_wakes != n_wakes_; });
        }
    }
}
