// A thread that looks for work in memory that a GPU writes, where nothing can notify it. Attentive while work comes, easing off when none does.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

class fate_poller {
public:
    // work() does what there is to do, on the thread, and says whether there was anything.
    explicit fate_poller(std::function<bool()> work);
    ~fate_poller(); // waits for work() to return

    void wake();    // work may come
    void rest();    // none will, until wake()

private:
    fate_poller(const fate_poller &)             = delete;
    fate_poller & operator=(const fate_poller &) = delete;

    void run();
    void poll();

    std::function<bool()>   work_;
    std::mutex              mutex_;
    std::condition_variable changed_;
    std::atomic<bool>       is_awake_{ false };
    std::atomic<uint32_t>   n_wakes_{ 0 };
    bool                    is_over_ = false;
    std::thread             thread_; // last: it uses the others
};

// What the host reads and writes of that memory.
inline uint32_t fate_load_acquire(const uint32_t & word) {
    return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

inline void fate_store_release(uint32_t & word, uint32_t value) {
    __atomic_store_n(&word, value, __ATOMIC_RELEASE);
}

// For the body of a loop that waits for the other side.
inline void fate_spin() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}
