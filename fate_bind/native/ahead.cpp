// What is brought in before it is asked for: where chances come from, and where they go.
#include "engine.h"
#include "engine_io.h"
#include "status.h"

#include "llama-context.h"

#include <algorithm>

// A weight whose numbers can be read back: not one that the CPU has repacked.
static bool is_leaf(const ggml_tensor * tensor) {
    if (!tensor || tensor->op != GGML_OP_NONE || !tensor->buffer) {
        return false;
    }
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return ggml_backend_buffer_is_host(tensor->buffer) || (dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU);
}

static bool is_numbers(const ggml_tensor * tensor, int64_t n) {
    return is_leaf(tensor) && tensor->type == GGML_TYPE_F32 && ggml_nelements(tensor) == n && ggml_is_contiguous(tensor);
}

// A weight's numbers, wherever it lies.
static std::vector<float> numbers_of(const ggml_tensor * tensor) {
    std::vector<float> numbers;
    if (!tensor) {
        return numbers;
    }
    numbers.resize(ggml_nelements(tensor));
    if (tensor->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(tensor, numbers.data(), 0, ggml_nbytes(tensor));
        return numbers;
    }
    std::vector<char> raw(ggml_nbytes(tensor));
    ggml_backend_tensor_get(tensor, raw.data(), 0, raw.size());
    ggml_get_type_traits(tensor->type)->to_float(raw.data(), numbers.data(), static_cast<int64_t>(numbers.size()));
    return numbers;
}

// What a tensor is made of, but for what only shows it in another shape.
static const ggml_tensor * below(const ggml_tensor * tensor, ggml_op shaping) {
    while (tensor->op == shaping) {
        tensor = tensor->src[0];
    }
    return tensor;
}

// Of values in groups, of which the best are selected from and the others masked: which groups those are. Null: that is not what it is.
static const ggml_tensor * find_groups(const ggml_tensor * masked, int32_t & n_groups, int32_t & n_used) {
    const ggml_tensor * kept    = masked->src[0];
    const ggml_tensor * ids     = masked->src[1];
    const ggml_tensor * nothing = masked->src[2];
    if (!kept || kept->op != GGML_OP_GET_ROWS || kept->src[1] != ids || !nothing || nothing->op != GGML_OP_FILL) {
        return nullptr;
    }
    const ggml_tensor * grouped = kept->src[0];
    const ggml_tensor * by      = below(ids, GGML_OP_VIEW);
    by                          = by->op == GGML_OP_ARGSORT || by->op == GGML_OP_TOP_K ? below(by->src[0], GGML_OP_RESHAPE) : nullptr;
    const ggml_tensor * best    = by && by->op == GGML_OP_SUM_ROWS ? below(by->src[0], GGML_OP_RESHAPE) : nullptr;
    if (!best || best->op != GGML_OP_GET_ROWS || best->src[1]->ne[0] != 2 ||
        below(best->src[0], GGML_OP_RESHAPE) != below(grouped, GGML_OP_RESHAPE)) {
        return nullptr; // ranked by something else than the sum of the best two
    }
    n_groups = static_cast<int32_t>(grouped->ne[1]);
    n_used   = static_cast<int32_t>(ids->ne[0]);
    return grouped;
}

// How a layer's router selects, from the graph that does it: what is selected by is followed back to what the router reads. Sets why_blind where it is not
// understood.
void fate_engine::find_gate(block & b, const llama_moe_args & args) {
    b.why_blind           = fate_format("layer %d routes in a way that is not known", args.il);
    const ggml_tensor * t = args.ids;
    while (t && (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE)) {
        t = t->src[0];
    }
    t = t && (t->op == GGML_OP_ARGSORT || t->op == GGML_OP_TOP_K) ? t->src[0] : nullptr;
    while (t && t->op != GGML_OP_MUL_MAT) {
        if (t->op == GGML_OP_ADD && is_numbers(t->src[1], b.n_experts)) {
            const bool           is_of_logits = t->src[0]->op == GGML_OP_MUL_MAT;
            const ggml_tensor *& to           = is_of_logits ? b.gate_bias : b.selection_bias;
            if (to) {
                return;
            }
            to = t->src[1];
        } else if (t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_SIGMOID) {
            b.is_sigmoid = true;
        } else if (t->op == GGML_OP_SOFT_MAX) { // each value needs all logits
            b.is_softmax = true;
        } else if (t->op == GGML_OP_SET_ROWS && b.n_groups == 0 && !b.gate_bias && !b.selection_bias && !b.is_sigmoid && !b.is_softmax) {
            t = find_groups(t, b.n_groups, b.n_groups_used);
            if (!t) {
                return;
            }
            continue;
        } else if (t->op != GGML_OP_RESHAPE) {
            return;
        }
        t = t->src[0];
    }
    const bool is_known = t && t->src[0] == args.gate_inp && t->src[1] == args.cur && is_leaf(args.gate_inp) &&
                          ggml_is_contiguous(args.gate_inp) && args.gate_inp->ne[1] == b.n_experts &&
                          ggml_nrows(args.gate_inp) == b.n_experts && !(b.is_softmax && (b.selection_bias || b.is_sigmoid));
    if (!is_known || (args.gate_inp->type != GGML_TYPE_F32 && !ggml_get_type_traits(args.gate_inp->type)->to_float)) {
        return;
    }
    b.why_blind.clear();
    b.gate_inp              = args.gate_inp;
    const ggml_tensor * cur = args.cur;
    if (cur->op == GGML_OP_MUL && cur->src[0]->op == GGML_OP_RMS_NORM && is_numbers(cur->src[1], args.gate_inp->ne[0])) {
        b.norm = cur->src[1];
    }
}

// Whether layers tell of later ones.
bool fate_engine::looks() const {
    return (config_.prefetch & FATE_PREFETCH_LAYER) != 0 && config_.mode == FATE_MODE_TABLE && !config_.stage_all;
}

// How many layers before it each layer is told of, the nearest first.
std::vector<int32_t> fate_engine::distances() const {
    if (!looks()) {
        return {};
    }
    return predictions_ ? std::vector<int32_t>(predictions_->horizons.rbegin(), predictions_->horizons.rend()) :
                          std::vector<int32_t>{ 1, 2 };
}

// Reads a layer's router and packs it, once for all that see it.
void fate_engine::pack(block & b) {
    if (!b.gate_inp || !b.packed.weights.empty()) {
        return;
    }
    const int32_t            n_embd  = static_cast<int32_t>(b.gate_inp->ne[0]);
    const int32_t            stride  = fate_gate_stride(n_embd);
    const std::vector<float> weights = numbers_of(b.gate_inp);
    b.packed.gate                    = {};
    b.packed.gate.stride             = stride;
    b.packed.gate.n_embd             = n_embd;
    b.packed.gate.n_experts          = b.n_experts;
    b.packed.gate.k                  = b.k;
    b.packed.gate.is_sigmoid         = b.is_sigmoid;
    b.packed.gate.is_softmax         = b.is_softmax;
    b.packed.gate.n_groups           = b.n_groups;
    b.packed.gate.n_groups_used      = b.n_groups_used;
    b.packed.bias                    = numbers_of(b.gate_bias);
    b.packed.selection_bias          = numbers_of(b.selection_bias);
    b.norm_numbers                   = numbers_of(b.norm);
    b.packed.scale.resize(b.n_experts);
    b.packed.weights.resize(static_cast<size_t>(b.n_experts) * stride);
    for (int32_t e = 0; e < b.n_experts; ++e) {
        b.packed.scale[e] =
            fate_gate_pack(&weights[static_cast<size_t>(e) * n_embd], n_embd, &b.packed.weights[static_cast<size_t>(e) * stride]);
    }
}

// The later layer's router as the earlier one sees it.
static fate_device_view seen_from(const std::vector<float> & own_norm, const fate_device_view & packed, const std::vector<float> & norm) {
    fate_device_view view = packed;
    if (!own_norm.empty() && !norm.empty()) {
        view.ratio = norm;
        for (size_t i = 0; i < norm.size(); ++i) {
            view.ratio[i] = own_norm[i] != 0.0f ? norm[i] / own_norm[i] : 0.0f;
        }
    }
    return view;
}

// What the layer sees of later ones that the same device serves, one view for each distance.
std::vector<fate_device_view> fate_engine::views_of(int32_t layer) const {
    const block &                 from = *blocks_[layer];
    std::vector<fate_device_view> views;
    bool                          sees_any = false;
    for (const int32_t distance : distances()) {
        fate_device_view view;
        const size_t     at = static_cast<size_t>(layer) + distance;
        if (at < blocks_.size() && blocks_[at]->n_slots > 0 && blocks_[at]->dev == from.dev) {
            const block & to      = *blocks_[at];
            const bool    is_seen = from.gate_inp && to.gate_inp && from.gate_inp->ne[0] == to.gate_inp->ne[0];
            if (is_seen) {
                view = seen_from(from.norm_numbers, to.packed, to.norm_numbers);
            }
            view.index = is_seen || predictions_ ? static_cast<int32_t>(at) : -1;
        }
        view.distance = distance;
        sees_any      = sees_any || view.index >= 0;
        views.push_back(std::move(view));
    }
    return sees_any ? views : std::vector<fate_device_view>();
}

// What the routers that layers see take of a GPU, at most.
int64_t fate_engine::view_bytes_on(ggml_backend_dev_t dev) const {
    int64_t bytes = 0;
    for (const auto & b : blocks_) {
        if (looks() && b->dev == dev && b->gate_inp) {
            bytes += static_cast<int64_t>(distances().size()) * b->n_experts * fate_gate_stride(static_cast<int32_t>(b->gate_inp->ne[0]));
        }
    }
    return bytes;
}

// Whether a layer may tell of later ones: on the CPU only where steps wait.
bool fate_engine::may_see(const block & b) const {
    return looks() && b.n_slots > 0 && (sync_ || b.dev);
}

// Why layers that were to tell of later ones do not, "" if some do.
std::string fate_engine::why_blind() const {
    std::string why;
    bool        may_see_any = false;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (sees(static_cast<int32_t>(i))) {
            return "";
        }
        why         = blocks_[i]->why_blind.empty() ? why : blocks_[i]->why_blind;
        may_see_any = may_see_any || may_see(*blocks_[i]);
    }
    if (!looks() || n_engaged_ == 0) {
        return "";
    }
    return why.empty() && may_see_any ? "no layer is followed by another on the same device" : why;
}

// Layers that engaged are told what they see.
void fate_engine::open_views() {
    for (const auto & b : blocks_) {
        if (may_see(*b)) {
            pack(*b);
        }
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
        block & b = *blocks_[i];
        b.views.clear();
        if (may_see(b)) {
            b.views = views_of(static_cast<int32_t>(i));
        }
        for (fate_device_view & view : b.views) {
            view.gate.weights        = view.weights.data();
            view.gate.scale          = view.scale.data();
            view.gate.bias           = view.bias.empty() ? nullptr : view.bias.data();
            view.gate.selection_bias = view.selection_bias.empty() ? nullptr : view.selection_bias.data();
            view.gate.ratio          = view.ratio.empty() ? nullptr : view.ratio.data();
        }
    }
}

// Of what layers tell, what is recorded: the distances, the farthest first. None where no layer can.
std::vector<int32_t> fate_engine::horizons() const {
    const bool tells = std::any_of(blocks_.begin(), blocks_.end(),
                                   [](const auto & b) { return !b->views.empty() && (!b->device || b->device->bounced().empty()); });
    if (!config_.record || !tells) {
        return {};
    }
    std::vector<int32_t> all = distances();
    std::reverse(all.begin(), all.end());
    return all;
}

bool fate_engine::sees(int32_t layer) const {
    return !blocks_[layer]->views.empty();
}

// Whether what the router reads can be handed on: of one token.
bool fate_engine::shows(const llama_moe_args & args) {
    return args.ids->ne[1] == 1 && args.cur && args.cur->type == GGML_TYPE_F32 && ggml_is_contiguous(args.cur) && ggml_nrows(args.cur) == 1;
}

// Whether experts may be brought in for the step at hand: of another the last layer does not run.
bool fate_engine::is_told() const {
    return record_[current_].n_tokens() == 1 && record_[current_].has_output();
}

// Whether layers tell of later ones in the step at hand.
bool fate_engine::looks_now() const {
    return looks() && is_told();
}

// On the host, where steps wait: a layer's input tells of later ones.
void fate_engine::look_on(int32_t layer, const float * input) {
    if (!sync_ || !looks_now()) {
        return;
    }
    std::vector<float> chance(max_experts_);
    std::vector<float> scratch(max_experts_);
    const block &      from = *blocks_[layer];
    for (size_t v = 0; v < from.views.size(); ++v) {
        const fate_device_view & view = from.views[v];
        if (view.index < 0) {
            continue;
        }
        const block & to = *blocks_[view.index];
        std::fill(chance.begin(), chance.end(), 0.0f);
        if (predictions_ && to.router) {
            const size_t horizon = predictions_->horizons.size() - 1 - v;
            const size_t row     = static_cast<size_t>((*to.router->end() - 1) % predictions_->n_tokens);
            const size_t at      = predictions_->at(horizon, view.index) + row * predictions_->n_layers * predictions_->m;
            for (int32_t i = 0; i < predictions_->m; ++i) {
                const int32_t expert = predictions_->ids[at + i];
                if (expert >= 0 && expert < to.n_experts) {
                    chance[expert] = predictions_->chances[at + i];
                }
            }
        } else {
            fate_gate_chances(view.gate, input, scratch.data(), chance.data());
        }
        note_chances(view.index, from.views.size() - 1 - v, chance);
        prefetch(view.index, chance.data());
    }
}

// For the record; at: of the horizon, the farthest first.
void fate_engine::note_chances(int32_t layer, size_t at, const std::vector<float> & chance) {
    fate_record & record = record_[current_];
    if (!record.has_ahead()) {
        return;
    }
    std::vector<int32_t> order(blocks_[layer]->n_experts);
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = static_cast<int32_t>(i);
    }
    const size_t most = std::min<size_t>(order.size(), FATE_LOOKAHEAD_MOST);
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(most), order.end(),
                      [&](int32_t a, int32_t b) { return fate_prefetch_before(chance[a], a, chance[b], b); });
    for (size_t i = 0; i < most && chance[order[i]] > 0.0f; ++i) {
        record.ahead_ids(0, layer)[at * FATE_LOOKAHEAD_MOST + i]     = order[i];
        record.ahead_chances(0, layer)[at * FATE_LOOKAHEAD_MOST + i] = chance[order[i]];
    }
}

// A layer on the host brings in what is likely.
void fate_engine::prefetch(int32_t layer, const float * chance) {
    const block &  b = *blocks_[layer];
    fate_engine_io io(*this, layer);
    b.layer->prefetch(chance, fate_prefetch_threshold(config_.prefetch_threshold),
                      fate_prefetch_most(config_.prefetch_experts, b.n_slots, b.k), io);
}

// Has layers bring in what the step at hand is predicted to use, if that is known: with sync before it, else beside it, which only a GPU can.
void fate_engine::prefetch() {
    if (!predicted_) {
        return;
    }
    predicted_ = false;
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer && sync_) {
            prefetch(static_cast<int32_t>(i), &chances_[i * max_experts_]);
        }
    }
    for (auto & device : devices_) {
        const std::string why = device->prefetch(chances_.data());
        error_                = why.empty() ? error_ : why;
    }
}
