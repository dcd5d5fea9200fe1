// When prefetch rests: never where what it brings is used, nearly always where it is not, and not for good.
#include "check.h"
#include "worth.h"

// How many of n steps prefetch ran in, when a share of the 8 experts that it brings is used.
static int run(fate_worth & worth, int n, double share, int64_t & brought, double & used) {
    int n_ran = 0;
    for (int i = 0; i < n; ++i) {
        if (worth.begin(brought, static_cast<int64_t>(used))) {
            ++n_ran;
            brought += 8;
            used += 8 * share;
        }
    }
    return n_ran;
}

int main() {
    {
        fate_worth worth;
        int64_t    brought = 0;
        double     used    = 0;
        CHECK(run(worth, 1000, 0.3, brought, used) == 1000);
    }
    {
        fate_worth worth;
        int64_t    brought = 0;
        double     used    = 0;
        CHECK(run(worth, 64, 0.0, brought, used) == FATE_WORTH_STEPS - 1);
        const int later = run(worth, 4000, 0.0, brought, used);
        CHECK(later > 0 && later < 120);
        // it comes back when what is predicted turns right, after a rest at most
        run(worth, FATE_WORTH_MAX_REST + FATE_WORTH_STEPS, 1.0, brought, used);
        CHECK(run(worth, 500, 1.0, brought, used) == 500);
        // and begins anew with short rests
        CHECK(run(worth, 200, 0.0, brought, used) > 2 * FATE_WORTH_STEPS);
    }
    {
        fate_worth worth; // what brings nothing costs nothing
        CHECK(worth.begin(0, 0));
        for (int i = 0; i < 200; ++i) {
            CHECK(worth.begin(i / 20, 0));
        }
        worth.reset();
        CHECK(worth.begin(0, 0));
    }
    return check_result("test-worth");
}
