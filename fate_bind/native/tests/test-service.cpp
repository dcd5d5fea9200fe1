// Callback mode's dialogue, a thread in place of the GPU. Built with the thread sanitizer too.
#include "check.h"
#include "service.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <set>
#include <thread>

using namespace std::chrono_literals;

struct host_io {
    uint32_t load_acquire(const uint32_t * word) {
        std::this_thread::yield();
        return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    }

    void store_release(uint32_t * word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

    void store(int64_t * number, int64_t value) { __atomic_store_n(number, value, __ATOMIC_RELAXED); }

    int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch() / 1ns; }
};

// What the kernel does on a miss, and on what it then decides.
struct gpu {
    fate_mailbox box{};
    fate_desk    desk{};

    explicit gpu(std::chrono::nanoseconds timeout) { desk.timeout_ns = timeout.count(); }

    uint32_t ask(const std::vector<int32_t> & resident, const std::vector<int32_t> & needed, int32_t n_victims,
                 std::vector<int32_t> & victims) {
        host_io       io;
        const int64_t began   = io.now_ns();
        uint32_t      verdict = FATE_VERDICT_NONE;
        if (fate_mailbox_claim(desk, box, io)) {
            box.layer     = 3;
            box.n_needed  = static_cast<int32_t>(needed.size());
            box.n_missing = n_victims;
            box.n_victims = n_victims;
            std::copy(needed.begin(), needed.end(), box.needed);
            std::copy_n(needed.begin(), n_victims, box.missing);
            std::fill(std::begin(box.last_use), std::end(box.last_use), began);
            std::fill(std::begin(box.resident), std::end(box.resident), 0);
            for (const int32_t expert : resident) {
                box.resident[expert / 32] |= 1u << expert % 32;
            }
            verdict = fate_mailbox_ask(desk, box, began + desk.timeout_ns, io);
            victims.assign(box.victims, box.victims + (verdict == FATE_VERDICT_ANSWERED ? n_victims : 0));
        }
        return fate_mailbox_close(desk, box, verdict, began, io);
    }
};

// Names the first of `answers`; sleeps before.
struct scripted : fate_asker {
    std::vector<int32_t>                   answer;
    bool                                   fails = false;
    std::atomic<std::chrono::milliseconds> sleep{ 0ms };
    std::atomic<int>                       n_asked{ 0 }, n_rejected{ 0 }, n_waits{ 0 };
    fate_miss                              last{};
    int64_t                                last_use = 0;

    bool ask(const fate_miss & miss, int32_t * victims) override {
        ++n_asked;
        last     = miss;
        last_use = miss.last_use[miss.needed[0]];
        std::this_thread::sleep_for(sleep.load());
        std::copy_n(answer.begin(), std::min<size_t>(answer.size(), static_cast<size_t>(miss.n_victims)), victims);
        return !fails;
    }

    void reject() override { ++n_rejected; }

    void wait() override { ++n_waits; }
};

static const std::vector<int32_t> RESIDENT = { 0, 5, 31, 32, 700, 1023 };

static void test_answers() {
    scripted     asker;
    gpu          g(10s);
    fate_service service(g.box, asker);

    struct row {
        std::vector<int32_t> answer;
        bool                 valid;
    };

    const row rows[] = {
        { { 5, 1023 },    true  },
        { { 0, 700 },     true  },
        { { 5, 5 },       false }, // twice
        { { 5, 31 },      false }, // needed
        { { 5, 6 },       false }, // not resident
        { { 5, -1 },      false },
        { { 5, 1024 },    false },
        { { 1 << 30, 5 }, false },
        { { 1023, 0 },    true  },
    };
    int n_bad = 0;
    for (const row & r : rows) {
        service.wake();
        asker.answer = r.answer;
        std::vector<int32_t> victims;
        const uint32_t       verdict = g.ask(RESIDENT, { 31, 9, 12 }, 2, victims);
        service.rest();
        n_bad += !r.valid;
        CHECK(verdict == (r.valid ? FATE_VERDICT_ANSWERED : FATE_VERDICT_RULE));
        CHECK(!r.valid || victims == r.answer);
        CHECK(asker.n_rejected == n_bad);
        CHECK(asker.last.layer == 3 && asker.last.n_needed == 3 && asker.last.n_missing == 2 && asker.last.n_victims == 2);
        CHECK(asker.last_use > 0);
    }
    service.wake();
    asker.fails = true;
    std::vector<int32_t> victims;
    CHECK(g.ask(RESIDENT, { 31 }, 1, victims) == FATE_VERDICT_RULE);
    asker.fails = false;
    CHECK(g.ask(RESIDENT, { 31 }, 0, victims) == FATE_VERDICT_ANSWERED && victims.empty());
    service.rest();
    CHECK(asker.n_rejected == n_bad);
    CHECK(g.box.n_asked == asker.n_asked && g.box.n_timeouts == 0 && g.box.waited_ns > 0);
}

// A late answer is not followed, nor taken for that of a later question; what it was told stays whole meanwhile.
static void test_timeouts() {
    scripted     asker;
    gpu          g(20ms);
    fate_service service(g.box, asker);
    service.wake();
    std::vector<int32_t> victims;
    asker.answer = { 5 };
    asker.sleep  = 300ms;
    CHECK(g.ask(RESIDENT, { 31, 9 }, 1, victims) == FATE_VERDICT_RULE); // in time to ask, too late to answer
    CHECK(g.ask(RESIDENT, { 5, 9 }, 1, victims) == FATE_VERDICT_RULE);  // not even asked
    CHECK(g.box.n_asked == 2 && g.box.n_timeouts == 2);
    asker.sleep = 0ms;
    service.rest();
    CHECK(asker.n_asked == 1 && asker.n_rejected == 0);
    CHECK(asker.last.needed[0] == 31);

    asker.answer = { 0 };
    service.wake();
    CHECK(g.ask(RESIDENT, { 31, 9 }, 1, victims) == FATE_VERDICT_ANSWERED && victims == std::vector<int32_t>{ 0 });
    service.rest();
    CHECK(g.box.n_asked == 3 && g.box.n_timeouts == 2 && asker.n_asked == 2);
}

// Nobody waits twice for a policy that is late, and who waits for it at the step's end is told.
static void test_waits() {
    scripted     asker;
    gpu          g(20ms);
    fate_service service(g.box, asker);
    service.wake();
    std::vector<int32_t> victims;
    asker.answer = { 5 };
    asker.sleep  = 1500ms;
    CHECK(g.ask(RESIDENT, { 31 }, 1, victims) == FATE_VERDICT_RULE);
    const int64_t waited = g.box.waited_ns;
    for (int i = 0; i < 100; ++i) {
        CHECK(g.ask(RESIDENT, { 32 }, 1, victims) == FATE_VERDICT_RULE);
    }
    CHECK(g.box.waited_ns - waited < 1000 * 1000 * 1000); // each for itself would be two seconds
    CHECK(asker.n_waits == 0);
    service.rest();
    CHECK(asker.n_waits > 0);
    CHECK(asker.n_asked == 1 && g.box.n_timeouts == 101);
}

// Steps of many questions under random delays on both sides: nothing tears, nothing hangs.
static void test_many() {
    struct checking : fate_asker {
        std::mt19937     random{ 1 };
        std::atomic<int> n_torn{ 0 };

        bool ask(const fate_miss & miss, int32_t * victims) override {
            if (random() % 50 == 0) {
                std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
            }
            const int32_t mark = miss.needed[0];
            for (int32_t i = 0; i < miss.n_needed; ++i) {
                n_torn += miss.needed[i] != mark + i;
            }
            victims[0] = (mark + 500) % 1000;
            return true;
        }

        void reject() override { ++n_torn; }

        void wait() override {}
    } asker;

    std::vector<int32_t> all;
    for (int32_t e = 0; e < 1000; ++e) {
        all.push_back(e);
    }
    std::mt19937         random(2);
    gpu                  g(1ms);
    fate_service         service(g.box, asker);
    std::vector<int32_t> victims;
    int64_t              n_answered = 0;
    for (int step = 0; step < 60; ++step) {
        service.wake();
        if (step % 20 == 10) {
            std::this_thread::sleep_for(25ms); // long enough for it to doze off
        }
        for (int i = static_cast<int>(random() % 20); i > 0; --i) {
            const int32_t        mark = static_cast<int32_t>(random() % 400);
            std::vector<int32_t> needed;
            for (int32_t j = 0; j < 8; ++j) {
                needed.push_back(mark + j);
            }
            if (g.ask(all, needed, 1, victims) == FATE_VERDICT_ANSWERED) {
                ++n_answered;
                CHECK(victims == std::vector<int32_t>{ mark + 500 });
            }
        }
        service.rest();
        CHECK(g.box.asked == g.box.answered);
    }
    CHECK(asker.n_torn == 0);
    CHECK(n_answered > 0 && n_answered == g.box.n_asked - g.box.n_timeouts);
}

// An engine may go while a question that timed out is still with the policy, and while none was ever asked.
static void test_ends() {
    scripted asker;
    asker.answer = { 5 };
    asker.sleep  = 100ms;
    gpu g(5ms);
    {
        fate_service         service(g.box, asker);
        std::vector<int32_t> victims;
        service.wake();
        CHECK(g.ask(RESIDENT, { 31 }, 1, victims) == FATE_VERDICT_RULE);
    }
    CHECK(asker.n_asked <= 1);
    gpu          other(5ms);
    fate_service idle(other.box, asker);
    CHECK(other.box.answered == 0);
}

int main() {
    test_answers();
    test_timeouts();
    test_waits();
    test_many();
    test_ends();
    return check_result("test-service");
}
