// Slots from counts, percentages, bytes, lists and auto; the errors name the minimum.
#include "capacity.h"
#include "check.h"
#include "status.h"

#include <cstring>

static const std::vector<fate_layer_shape> LAYERS = {
    { 32,  4, 100, true },
    { 128, 8, 200, true },
};

static std::vector<int32_t> slots(int32_t kind, double value, const std::vector<int32_t> & list = {}) {
    fate_config config{};
    config.slots_kind  = kind;
    config.slots_value = value;
    return fate_capacity(config, list, LAYERS);
}

static std::string error(int32_t kind, double value, const std::vector<int32_t> & list = {}) {
    try {
        slots(kind, value, list);
    } catch (const fate_error & e) {
        CHECK(e.status() == FATE_STATUS_CAPACITY);
        return e.what();
    }
    return "";
}

static bool says(const std::string & message, const char * part) {
    return strstr(message.c_str(), part) != nullptr;
}

int main() {
    using list = std::vector<int32_t>;
    CHECK((slots(FATE_SLOTS_COUNT, 16) == list{ 16, 16 }));
    CHECK((slots(FATE_SLOTS_COUNT, 64) == list{ 32, 64 })); // never more than a layer's experts
    CHECK((slots(FATE_SLOTS_PERCENT, 12.5) == list{ 4, 16 }));
    CHECK((slots(FATE_SLOTS_PERCENT, 100) == list{ 32, 128 }));
    CHECK((slots(FATE_SLOTS_BYTES, 10 * 300) == list{ 10, 10 }));
    CHECK((slots(FATE_SLOTS_BYTES, 10 * 300 + 299) == list{ 10, 10 }));
    CHECK((slots(FATE_SLOTS_BYTES, 32 * 300 + 5 * 200) == list{ 32, 37 }));
    CHECK((slots(FATE_SLOTS_BYTES, 1e12) == list{ 32, 128 }));
    CHECK((slots(FATE_SLOTS_LIST, 0, { 4, 8 }) == list{ 4, 8 }));
    CHECK((slots(FATE_SLOTS_AUTO, 0) == list{ 16, 64 }));

    // two GPUs and the CPU: each GPU's layers share its memory, the last GPU has room for all of its experts and then needs no staging
    const std::vector<fate_layer_shape> spread = {
        { 32,  4, 100, true,  0  },
        { 128, 8, 200, true,  0  },
        { 64,  8, 50,  true,  1  },
        { 64,  8, 50,  true,  -1 },
        { 64,  8, 900, false, -1 },
    };
    fate_config free_memory{};
    free_memory.slots_kind = FATE_SLOTS_AUTO;
    const auto with        = [&](int64_t first, int64_t second) {
        return fate_capacity(free_memory,
                             {
        },
                             spread, 0, { { first, 1000 }, { second, 500 } });
    };
    CHECK((with(1000 + 20 * 300, 64 * 50) == list{ 20, 20, 64, 32, 0 }));
    CHECK((with(1000 + 20 * 300 - 1, 64 * 50 - 1) == list{ 19, 19, 53, 32, 0 }));
    CHECK((with(1000 + 32 * 300 + 7 * 200, 500 + 8 * 50) == list{ 32, 39, 8, 32, 0 }));
    CHECK((with(32 * 100 + 128 * 200, 1 << 30) == list{ 32, 128, 64, 32, 0 }));
    for (const int64_t too_little : { int64_t(1000 + 8 * 300 - 1), int64_t(0), -(int64_t(1) << 40) }) {
        std::string why;
        try {
            with(too_little, 1 << 30);
        } catch (const fate_error & e) {
            CHECK(e.status() == FATE_STATUS_CAPACITY);
            why = e.what();
        }
        CHECK(says(why, "VRAM") && says(why, "-c"));
    }

    // a layer that cannot be served gets nothing, and its bytes go to the others
    fate_config config{};
    config.slots_kind  = FATE_SLOTS_BYTES;
    config.slots_value = 2000;
    CHECK((fate_capacity(config,
                         {
    },
                         { { 32, 4, 100, false }, { 128, 8, 200, true } }) == list{ 0, 10 }));

    CHECK(says(error(FATE_SLOTS_COUNT, 0), "the minimum is 8"));
    CHECK(says(error(FATE_SLOTS_COUNT, 7), "layer 1"));
    CHECK(says(error(FATE_SLOTS_PERCENT, 6), ", 6% of its experts, is fewer than"));
    CHECK(says(error(FATE_SLOTS_PERCENT, 6), "the minimum is 12.5%"));
    CHECK(says(error(FATE_SLOTS_BYTES, 1024), ", of 1024 bytes in all, is fewer than"));
    CHECK(says(error(FATE_SLOTS_BYTES, 1000), "the minimum is 2400 bytes"));
    CHECK(says(error(FATE_SLOTS_COUNT, 129), "the maximum is 128"));
    CHECK(says(error(FATE_SLOTS_LIST, 0, { 4 }), "2 MoE layers"));
    CHECK(says(error(FATE_SLOTS_LIST, 0, { 4, -1 }), "-1 in MoE layer 1"));
    return check_result("test-capacity");
}
