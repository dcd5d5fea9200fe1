// When prefetch rests: never where it hides more than it costs, nearly always where it does not, and not for good; and where next to nothing is copied.
#include "check.h"
#include "worth.h"

#include <cmath>
#include <utility>

static const double  NS_PER_EXPERT = 1000000;
static const int64_t NS_PER_STEP   = 10000000;

// Drives it with steps in which so many experts come, of which prefetch, where it runs, brings half.
struct driven {
    explicit driven(double cost = FATE_WORTH_LOOK) : worth(NS_PER_EXPERT, cost) {}

    fate_worth worth;
    double     came = 0, brought = 0, hidden = 0;
    int64_t    now = 1;

    // How many of n steps prefetch ran in, when a share of what it brings is there when it is used. pause: before every third step.
    int run(int n, double share, double n_came = 16, int64_t pause = 0) {
        int n_ran = 0;
        for (int i = 0; i < n; ++i) {
            now += NS_PER_STEP + (i % 3 == 0 ? pause : 0);
            if (worth.begin(true, { static_cast<int64_t>(brought), hidden, static_cast<int64_t>(came) }, now)) {
                ++n_ran;
                brought += n_came / 2;
                hidden += n_came / 2 * share;
            }
            came += n_came;
        }
        return n_ran;
    }
};

int main() {
    {
        driven d;
        CHECK(d.run(1000, 0.4) == 1000);
    }
    {
        driven d;
        CHECK(d.run(64, 0.2) == FATE_WORTH_STEPS); // copies beside the steps cost more
    }
    {
        driven d;
        CHECK(d.run(64, 0.05) == FATE_WORTH_TRY); // far more, which is soon seen
        const int later = d.run(8000, 0.0);
        CHECK(later > 0 && later < 160);
        // it comes back when what is predicted turns right, after a rest at most
        d.run((FATE_WORTH_MAX_REST + 2) * FATE_WORTH_STEPS, 1.0);
        CHECK(d.run(500, 1.0) == 500);
        // where it paid a whole window is looked at; then it begins anew with short rests
        CHECK(d.run(3 * FATE_WORTH_STEPS, 0.0) > FATE_WORTH_TRY);
        CHECK(d.run(5 * FATE_WORTH_STEPS, 0.0) == FATE_WORTH_TRY);
    }
    {
        driven d; // too few to tell before the window is over
        CHECK(d.run(64, 0.2, 2) == FATE_WORTH_STEPS);
    }
    {
        driven d; // half of two experts a step hide a tenth of it, of a quarter of one less than looking costs
        CHECK(d.run(500, 1.0, 2) == 500);
        CHECK(d.run(500, 0.6, 0.9) < 200);
        driven cheap(FATE_WORTH_PLAN);
        CHECK(cheap.run(500, 0.6, 0.9) == 500);
    }
    {
        driven d; // copies take a hundredth of the steps: not even tried
        CHECK(d.run(FATE_WORTH_STEPS, 1.0, 0.1) == FATE_WORTH_STEPS);
        CHECK(d.run(1000, 1.0, 0.1) == 0);
        // once they take more it runs again, at once
        CHECK(d.run(3 * FATE_WORTH_STEPS, 1.0, 2) >= FATE_WORTH_STEPS);
        CHECK(d.run(100, 1.0, 2) == 100);
        // it is the steps that count and not what is between them
        CHECK(d.run(300, 1.0, 2, 1000 * NS_PER_STEP) == 300);
        d.worth.reset();
        CHECK(d.run(FATE_WORTH_STEPS, 1.0, 0.1) == FATE_WORTH_STEPS);
    }
    {
        driven d; // copies take as long as so many steps
        CHECK(d.worth.ease() == 1);
        for (const auto & [n_came, ease] : {
                 std::pair(16.0, 1.0), { 5.0,  FATE_WORTH_EASE },
                   { 10.0, 1.0             },
                   { 8.75, 0.8             },
                   { 7.0,  FATE_WORTH_EASE }
        }) {
            d.run(2 * FATE_WORTH_STEPS, 1.0, n_came, 1000 * NS_PER_STEP); // pauses are not theirs
            CHECK(std::fabs(d.worth.ease() - ease) < 0.02);
        }
        d.worth.reset();
        CHECK(d.worth.ease() == 1);
    }
    {
        driven d; // prompts and batches, with misses that nothing was brought in for: not looked at
        CHECK(d.run(100, 0.5, 8) == 100);
        for (int i = 0; i < 2000; ++i) {
            d.came += 40;
            d.now += i % 3 ? 1000 : 30 * NS_PER_STEP; // some are enqueued at once
            CHECK(!d.worth.begin(false, { static_cast<int64_t>(d.brought), d.hidden, static_cast<int64_t>(d.came) }, d.now));
        }
        CHECK(d.run(100, 0.5, 8) == 100);
        int n_ran = 0; // nor where they come in between
        for (int i = 0; i < 400; ++i) {
            n_ran += d.run(1, 0.5, 8);
            for (int j = 0; j < 3; ++j) {
                d.now += 1000;
                d.worth.begin(false, { static_cast<int64_t>(d.brought), d.hidden, static_cast<int64_t>(d.came) }, d.now);
                d.came += 40;
            }
        }
        CHECK(n_ran == 400);
    }
    {
        driven d; // a rest passes while hardly anything is copied
        d.run(600, 0.0);
        d.run(FATE_WORTH_MAX_REST * FATE_WORTH_STEPS, 1.0, 0.1);
        CHECK(d.run(200, 1.0, 8) >= 200 - 2 * FATE_WORTH_STEPS);
    }
    return check_result("test-worth");
}
