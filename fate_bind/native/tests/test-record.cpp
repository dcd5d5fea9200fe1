// Rows of a layer find their tokens, also where the last layer sees output rows only.
#include "check.h"
#include "record.h"
#include "status.h"

#include <cstring>
#include <thread>

static void test_rows_of_outputs() {
    const int32_t   tokens[]    = { 10, 11, 12, 13 };
    const int32_t   positions[] = { 5, 6, 0, 1 };
    const int32_t   sequence[]  = { 0, 1 };
    const int32_t * sequences[] = { &sequence[0], &sequence[0], &sequence[1], &sequence[1] };
    const int8_t    outputs[]   = { 0, 1, 0, 1 };
    fate_record     record;
    record.begin(4, 2, 3, true, tokens, positions, sequences, outputs);
    CHECK(record.token_of_row(2, 4) == 2);
    CHECK(record.token_of_row(0, 2) == 1);
    CHECK(record.token_of_row(1, 2) == 3);
    CHECK(record.token_of_row(0, 3) == -1);

    record.set_row(3, 1, FATE_PATH_POOL);
    record.ids(3, 1)[2]     = 7;
    record.weights(3, 1)[2] = 0.5f;
    record.hits(3, 1)[2]    = 1;
    record.add_fill(1, 7);
    record.add_eviction(1, 4);
    const fate_step step = record.view();
    CHECK(step.n_tokens == 4 && step.n_layers == 2 && step.k == 3);
    CHECK(step.ids[(3 * 2 + 1) * 3 + 2] == 7);
    CHECK(step.ids[0] == -1);
    CHECK(step.weights[(3 * 2 + 1) * 3 + 2] == 0.5f);
    CHECK(step.hits[(3 * 2 + 1) * 3 + 2] == 1);
    CHECK(step.path[3 * 2 + 1] == FATE_PATH_POOL && step.path[0] == FATE_PATH_NOT_RUN);
    CHECK(step.tokens[2] == 12 && step.positions[2] == 0 && step.sequences[2] == 1);
    CHECK(step.n_fills == 1 && step.fills[0] == 1 && step.fills[1] == 7);
    CHECK(step.n_evictions == 1 && step.evictions[1] == 4);

    CHECK(step.n_horizons == 0 && !record.has_ahead());

    record.set_horizons({ 2, 1 });
    record.begin(3, 2, 3, true, tokens, positions, sequences, outputs);
    record.ahead_ids(2, 1)[FATE_LOOKAHEAD_MOST + 1]     = 5; // one layer before, the second likeliest
    record.ahead_chances(2, 1)[FATE_LOOKAHEAD_MOST + 1] = 0.5f;
    const fate_step told                                = record.view();
    const int32_t   at                                  = ((2 * 2 + 1) * 2 + 1) * FATE_LOOKAHEAD_MOST + 1;
    CHECK(told.n_horizons == 2 && told.horizons[0] == 2 && told.horizons[1] == 1 && told.n_ahead == FATE_LOOKAHEAD_MOST);
    CHECK(told.ahead_ids[at] == 5 && told.ahead_chances[at] == 0.5f && told.ahead_ids[at - 1] == -1 && told.ahead_chances[0] == 0.0f);
    record.set_horizons({});

    record.begin(1, 2, 3, false, nullptr, nullptr, nullptr, nullptr);
    CHECK(record.view().n_fills == 0);
    CHECK(record.view().tokens[0] == -1);
    CHECK(record.view().weights == nullptr);
}

static void test_last_error_belongs_to_its_thread() {
    fate_set_last_error("mine");
    std::thread other([] {
        CHECK(strcmp(fate_last_error(), "") == 0);
        CHECK(fate_guard(FATE_STATUS_DECODE, [] { throw fate_error(FATE_STATUS_MEMORY, "theirs"); }) == FATE_STATUS_MEMORY);
        CHECK(strcmp(fate_last_error(), "theirs") == 0);
    });
    other.join();
    CHECK(strcmp(fate_last_error(), "mine") == 0);
    CHECK(fate_guard(FATE_STATUS_DECODE, [] { throw std::runtime_error("foreign"); }) == FATE_STATUS_DECODE);
    CHECK(fate_guard(FATE_STATUS_DECODE, [] { throw std::bad_alloc(); }) == FATE_STATUS_MEMORY);
    CHECK(fate_format("%d-%s", 5, "x") == "5-x");
}

int main() {
    test_rows_of_outputs();
    test_last_error_belongs_to_its_thread();
    return check_result("test-record");
}
