#include "cuda_linear.h"

#include <algorithm>
#include <cstring>

static const size_t UNIT = sizeof(uint4);

static size_t whole_units(size_t n_bytes) {
    return (n_bytes + UNIT - 1) / UNIT * UNIT;
}

// What all of a page takes.
static size_t page_bytes_of(const fate_linear & linear) {
    const fate_linear_model & m = linear.model();
    return whole_units(linear.fold().stride() * sizeof(int16_t)) +
           whole_units(static_cast<size_t>(FATE_LINEAR_REPEAT_TOKENS) * m.max_k * sizeof(uint16_t)) +
           4 * whole_units(m.max_experts * sizeof(uint16_t));
}

size_t fate_cuda_evaluator::n_bytes_of(const fate_linear & linear) {
    return sizeof(fate_cuda_fitted) + page_bytes_of(linear);
}

fate_cuda_evaluator::fate_cuda_evaluator(const fate_linear & linear, const std::vector<int32_t> & index) :
    index_(index),
    page_bytes_(page_bytes_of(linear)) {
    const fate_linear_model & m      = linear.model();
    const size_t              size   = static_cast<size_t>(m.n_layers) * m.max_experts;
    const fate_linear_head *  head[] = { &m.now, &m.keep };
    view_.n_heads                    = linear.n_heads();
    view_.n_layers                   = m.n_layers;
    view_.max_experts                = m.max_experts;
    view_.max_k                      = m.max_k;
    view_.stride                     = linear.fold().stride();
    std::copy_n(m.rate_keep, FATE_LINEAR_RATES, view_.rate_keep);
    std::copy_n(m.early_of, FATE_LINEAR_EARLY, view_.early_of);

    std::vector<float> numbers;
    const auto         add = [&](const float * from, size_t n) {
        const size_t at = numbers.size();
        numbers.insert(numbers.end(), from, from + n);
        return at;
    };
    const size_t constant = add(linear.constant().data(), linear.constant().size());
    const size_t scale    = add(linear.fold().column_scale().data(), linear.fold().column_scale().size());
    const size_t soon     = add(m.soon, FATE_LINEAR_FOLLOW);
    const size_t later    = add(m.later, FATE_LINEAR_FOLLOW);
    const size_t bonus    = add(head[view_.n_heads - 1]->bonus, m.n_layers);
    const size_t weights  = numbers.size();
    for (int32_t h = 0; h < view_.n_heads; ++h) {
        add(head[h]->weights, static_cast<size_t>(m.n_layers) * FATE_LINEAR_FEATURES);
    }
    const size_t known = numbers.size();
    numbers_.allocate(known + size * (FATE_LINEAR_RATES + 1));
    fate_cuda_upload(numbers_.data, numbers.data(), known * sizeof(float));
    const std::vector<int16_t> & fold = linear.fold().numbers();
    fold_.allocate(fold.size());
    fate_cuda_upload(fold_.data, fold.data(), fold.size() * sizeof(int16_t));
    view_.constant = numbers_.data + constant;
    view_.scale    = numbers_.data + scale;
    view_.soon     = numbers_.data + soon;
    view_.later    = numbers_.data + later;
    view_.bonus    = numbers_.data + bonus;
    view_.weights  = numbers_.data + weights;
    view_.rates    = numbers_.data + known;
    view_.age      = view_.rates + size * FATE_LINEAR_RATES;
    view_.fold     = fold_.data;
    for (pinned_buffer & home : home_) {
        home.allocate(index_.size() * page_bytes_ + size * (FATE_LINEAR_RATES + 1) * sizeof(float));
    }
}

fate_cuda_told fate_cuda_evaluator::put(int which, const fate_linear_told & told) {
    const size_t   n    = view_.max_experts;
    const size_t   k    = view_.max_k;
    const size_t   size = view_.n_layers * n;
    fate_cuda_told out  = {};
    out.unit            = told.unit;
    out.early           = told.early;
    out.level           = told.level;
    out.n_used          = told.n_used;
    out.advances        = told.advances;
    size_t bytes        = whole_units(view_.stride * sizeof(int16_t));
    out.used_at         = static_cast<uint32_t>(bytes);
    bytes += whole_units(told.n_used * k * sizeof(uint16_t));
    for (int later = 0; later < 2; ++later) {
        for (int pair = 0; pair < 2; ++pair) {
            out.n[later][pair] = told.n[later][pair];
            if (told.sums[later][pair]) {
                out.sums_at[later][pair] = static_cast<uint32_t>(bytes);
                bytes += whole_units(n * sizeof(uint16_t));
            }
        }
    }
    char * home    = home_[which].data;
    out.pages      = reinterpret_cast<const uint4 *>(home);
    out.page_units = static_cast<uint32_t>(bytes / UNIT);
    for (size_t at = 0; at < index_.size(); ++at) {
        char *       page  = home + at * bytes;
        const size_t index = index_[at];
        memcpy(page, told.context, view_.stride * sizeof(int16_t));
        uint16_t * used = reinterpret_cast<uint16_t *>(page + out.used_at);
        for (int32_t i = 0; i < told.n_used; ++i) {
            used = std::copy_n(told.used[i] + index * k, k, used);
        }
        for (int later = 0; later < 2; ++later) {
            for (int pair = 0; pair < 2; ++pair) {
                if (told.sums[later][pair]) {
                    memcpy(page + out.sums_at[later][pair], told.sums[later][pair] + index * n, n * sizeof(uint16_t));
                }
            }
        }
    }
    if (told.rates) {
        float * known = reinterpret_cast<float *>(home + index_.size() * page_bytes_);
        std::copy_n(told.rates, size * FATE_LINEAR_RATES, known);
        std::copy_n(told.age, size, known + size * FATE_LINEAR_RATES);
        out.rates = known;
        out.age   = known + size * FATE_LINEAR_RATES;
    }
    return out;
}
