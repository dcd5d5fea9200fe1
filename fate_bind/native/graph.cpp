// Where graphs are built and run: finds the MoE blocks, puts the custom ops in, runs them.
#include "engine.h"
#include "engine_io.h"
#include "status.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cstring>

// Everything in args that is indexed by expert, null where the model has none.
static std::array<ggml_tensor **, 11> expert_tensors(llama_moe_args & args) {
    return {
        &args.up,     &args.gate,      &args.down, &args.gate_up, &args.up_b,   &args.gate_b,
        &args.down_b, &args.gate_up_b, &args.up_s, &args.gate_s,  &args.down_s,
    };
}

static std::vector<ggml_tensor *> sources_of(llama_moe_args & args) {
    std::vector<ggml_tensor *> sources;
    for (ggml_tensor ** tensor : expert_tensors(args)) {
        sources.push_back(*tensor);
    }
    return sources;
}

std::string fate_engine::refuse(llama_moe_args & args) const {
    for (const ggml_tensor * tensor : sources_of(args)) {
        const std::string why = tensor ? fate_pool::refuse(tensor, args.down->ne[2]) : "";
        if (!why.empty()) {
            return why;
        }
    }
    ggml_backend_dev_t dev = device_of(args);
    const std::string  why = dev ? fate_device_refuse(dev) : "";
    return why.empty() ? "" : fate_format("layer %d: %s", args.il, why.c_str());
}

// The GPU that runs the layer, null: the CPU.
ggml_backend_dev_t fate_engine::device_of(const llama_moe_args & args) const {
    const llama_model & model = ctx_.get_model();
    if (args.il < 0 || args.il >= static_cast<int>(model.hparams.n_layer_all)) {
        return nullptr;
    }
    ggml_backend_dev_t dev = model.dev_layer(args.il);
    return dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU ? dev : nullptr;
}

void fate_engine::find(llama_moe_args & args) {
    const auto it = block_of_.find(args.down);
    if (it != block_of_.end()) {
        if (it->second->sources != sources_of(args)) {
            it->second->refused = fate_format("%s is shared by two MoE blocks that differ", args.down->name);
        }
        return;
    }
    auto b       = std::make_unique<block>();
    b->sources   = sources_of(args);
    b->n_experts = static_cast<int32_t>(args.down->ne[2]);
    b->k         = static_cast<int32_t>(args.ids->ne[0]);
    b->refused   = refuse(args);
    b->dev       = device_of(args);
    if (b->dev && args.gate_inp && args.gate_inp->buffer && !ggml_backend_buffer_is_host(args.gate_inp->buffer)) {
        b->route_dev = b->dev;
    }
    for (const ggml_tensor * weights : { args.up, args.gate, args.down, args.gate_up }) {
        if (weights && b->dev && b->refused.empty()) {
            b->max_rows = std::min(b->max_rows, fate_device_max_rows(b->dev, weights->type));
        }
    }

    find_gate(*b, args);

    const int32_t layer  = static_cast<int32_t>(blocks_.size());
    b->pool_op           = { this, layer, FATE_PATH_POOL };
    b->other_op          = { this, layer, static_cast<uint8_t>(b->dev ? FATE_PATH_STAGED : FATE_PATH_BYPASS) };
    b->route_op          = { this, layer, FATE_PATH_NOT_RUN };
    b->bulk_op           = { this, layer, FATE_PATH_STAGED };
    block_of_[args.down] = b.get();
    pool_.add_layer(b->sources, b->n_experts, b->dev);
    for (int32_t part = 0; part < static_cast<int32_t>(pool_.tensors(layer).size()); ++part) {
        b->part_ops.push_back({ this, layer, FATE_PATH_STAGED, part });
    }
    blocks_.push_back(std::move(b));
}

void fate_engine::build_moe(ggml_context * ctx0, ggml_cgraph * gf, llama_moe_args & args) {
    if (stage_ == stage::FINDING) {
        find(args);
        return;
    }
    const auto it = block_of_.find(args.down);
    if (it == block_of_.end() || it->second->sources != sources_of(args)) {
        return;
    }
    block & b = *it->second;
    if (b.is_whole) {
        for (ggml_tensor ** tensor : expert_tensors(args)) {
            *tensor = *tensor ? pool_.slots_of(b.pool_op.layer, *tensor) : nullptr;
        }
    }
    if (ctx_.get_cparams().warmup) {
        return;
    }
    const int64_t k      = args.ids->ne[0];
    const int64_t n_rows = args.ids->ne[1];
    if (k != b.k) {
        return; // a warm-up with all experts
    }
    replay(ctx0, b, args);
    if (b.n_slots == 0) {
        return;
    }

    const bool    pooled  = k * n_rows <= b.n_slots && n_rows <= b.max_rows && !(b.device && config_.stage_all);
    ggml_tensor * anchor  = b.device ? pool_.slots_of(b.pool_op.layer, args.down) : nullptr;
    ggml_tensor * weights = nullptr;
    if (config_.weights && args.weights && args.weights->type == GGML_TYPE_F32 && args.weights->ne[1] == k) {
        weights = args.weights;
    }
    if (!pooled && !b.device) {
        ggml_tensor * note = add_op(ctx0, 1, 1, args.ids, anchor, weights, b.other_op);
        ggml_format_name(note, "fate_note-%d", args.il);
        ggml_build_forward_expand(gf, note);
        return;
    }

    // between products that upstream fuses no op may stand: it does so up to max_rows
    const bool is_bulk = !pooled && n_rows > b.max_rows && b.device->is_bulk(b.at, static_cast<int32_t>(n_rows));
    b.n_bulk_rows      = is_bulk ? static_cast<int32_t>(n_rows) : 0;
    if (is_bulk) {
        stage_in_parts(ctx0, b, args, anchor, weights);
        return;
    }

    // beside layers that are split a staged op may have to wait for the copy engine, which no capture can
    const bool is_eager = !pooled && record_[current_].n_tokens() > b.max_rows;
    args.ids            = add_op(ctx0, k, n_rows, args.ids, anchor, weights, pooled ? b.pool_op : b.other_op, is_eager);
    ggml_format_name(args.ids, pooled ? "fate_slots-%d" : "fate_staged-%d", args.il);
    if (pooled && sees(b.pool_op.layer) && shows(args)) {
        args.ids->src[3] = args.cur;
    }
    for (ggml_tensor ** tensor : expert_tensors(args)) {
#if defined(FATE_FAULT_BIAS_NOT_POOLED)
        if (tensor == &args.up_b || tensor == &args.gate_b || tensor == &args.down_b || tensor == &args.gate_up_b) {
            continue;
        }
#endif
        if (*tensor) {
            *tensor = pooled ? pool_.slots_of(b.pool_op.layer, *tensor) : pool_.staging_of(b.pool_op.layer, *tensor);
        }
    }
}

// Each large tensor is the result of an op of its own, which comes right before the product that reads it.
void fate_engine::stage_in_parts(ggml_context * ctx0, block & b, llama_moe_args & args, ggml_tensor * anchor, ggml_tensor * weights) {
    const int32_t layer = b.bulk_op.layer;
    args.ids            = add_op(ctx0, args.ids->ne[0], args.ids->ne[1], args.ids, anchor, weights, b.bulk_op, true);
    ggml_format_name(args.ids, "fate_bulk-%d", args.il);
    const auto & tensors = pool_.tensors(layer);
    for (ggml_tensor ** tensor : expert_tensors(args)) {
        if (!*tensor) {
            continue;
        }
        const auto t = std::find_if(tensors.begin(), tensors.end(), [&](const fate_pool_tensor & one) { return one.source == *tensor; });
        *tensor      = t->staging;
        if (t->is_weight()) {
            op & self = b.part_ops[t - tensors.begin()];
            *tensor   = ggml_custom_inplace(ctx0, t->staging, &args.ids, 1, run_op, 1, &self);
            mark(*tensor, self, true);
            ggml_format_name(*tensor, "%.46s (part)", t->source->name);
        }
    }
}

void fate_engine::replay(ggml_context * ctx0, block & b, llama_moe_args & args) {
    if (!b.router) {
        return;
    }
    ggml_tensor * anchor = b.route_dev ? args.gate_inp : nullptr;
    args.ids             = add_op(ctx0, args.ids->ne[0], args.ids->ne[1], args.ids, anchor, nullptr, b.route_op);
    ggml_format_name(args.ids, "fate_routed-%d", args.il);
}

// In op_params of an op that a GPU launches: behind what ggml and the backend keep there.
static const size_t OP_OFFSET = 56;

void fate_engine::mark(ggml_tensor * dst, op & self, bool is_eager) {
    const op * pointer = &self;
    fate_device_mark(dst, launch_op, is_eager);
    memcpy(reinterpret_cast<char *>(dst->op_params) + OP_OFFSET, &pointer, sizeof(pointer));
}

// src: ids, a weight of the GPU that holds the op there or null, router weights or null.
ggml_tensor * fate_engine::add_op(ggml_context * ctx0, int64_t k, int64_t n_rows, ggml_tensor * ids, ggml_tensor * anchor,
                                  ggml_tensor * weights, op & self, bool is_eager) {
    ggml_tensor * dst = ggml_custom_4d(ctx0, GGML_TYPE_I32, k, n_rows, 1, 1, &ids, 1, run_op, 1, &self);
    dst->src[1]       = anchor;
    dst->src[2]       = weights;
    if (anchor) {
        mark(dst, self, is_eager);
    }
    return dst;
}

void fate_engine::route(const op & self, ggml_tensor * dst, void * stream) {
    const block & b = *self.engine->blocks_[self.layer];
    b.router->launch(self.layer, b.is_first_routed, dst, stream);
}

// Called by the backend, through which nothing may be thrown.
void fate_engine::launch_op(ggml_tensor * dst, void * stream) {
    const op * self;
    memcpy(&self, reinterpret_cast<const char *>(dst->op_params) + OP_OFFSET, sizeof(self));
    fate_engine & engine = *self->engine;
    const block & b      = *engine.blocks_[self->layer];
    try {
        engine.ran_ = engine.ran_ || self != &b.route_op;
        if (self == &b.route_op) {
            route(*self, dst, stream);
        } else if (self->part >= 0) {
            b.device->launch_part(b.at, self->part, b.next && b.next->n_bulk_rows > 0, stream);
        } else if (self == &b.bulk_op) {
            b.device->launch_bulk(b.at, dst, stream);
        } else {
            b.device->launch(b.at, self->path, dst, stream);
        }
        if (const int64_t n = fate_device_captured_nodes(stream)) {
            engine.graph_nodes_ = n;
        }
    } catch (const std::exception & e) {
        engine.error_ = e.what();
    }
}

// Runs among ggml's threads, through which nothing may be thrown.
void fate_engine::run_op(ggml_tensor * dst, int ith, int nth, void * userdata) {
    (void) nth;
    if (ith != 0) {
        return;
    }
    const op *    self = static_cast<const op *>(userdata);
    const block & b    = *self->engine->blocks_[self->layer];
    try {
        if (self == &b.route_op) {
            route(*self, dst, nullptr);
        } else if (b.device) {
            throw fate_error(FATE_STATUS_DECODE, "an op of a layer on a GPU was given to the CPU");
        } else {
            self->engine->run(self->layer, self->path, dst);
        }
    } catch (const std::exception & e) {
        self->engine->error_ = e.what();
    }
}

void fate_engine::run(int32_t layer, uint8_t path, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const fate_ids      ids = { static_cast<const char *>(src->data), static_cast<int64_t>(src->nb[1]), static_cast<int32_t>(src->ne[1]),
                                static_cast<int32_t>(src->ne[0]) };
    fate_layer &        l   = *blocks_[layer]->layer;
    fate_record &       r   = record_[current_];

    ran_                 = true;
    const size_t n_pairs = static_cast<size_t>(ids.n_rows) * ids.k;
    hits_.assign(n_pairs, 0);
    if (path == FATE_PATH_POOL) {
        fate_engine_io io(*this, layer);
        int32_t *      slots = static_cast<int32_t *>(dst->data);
        l.resolve(ids, callback_, io, slots, hits_.data());
#if defined(FATE_FAULT_WRONG_SLOT)
        if (n_pairs > 1) {
            std::swap(slots[0], slots[1]);
        }
#endif
        if (dst->src[3]) {
            look_on(layer, static_cast<const float *>(dst->src[3]->data));
        }
    } else {
        l.bypass(ids);
    }
    if (!wants_steps_) {
        return;
    }

    const ggml_tensor * weights = dst->src[2];
    for (int32_t row = 0; row < ids.n_rows; ++row) {
        const int32_t token = r.token_of_row(row, ids.n_rows);
        if (token < 0) {
            break; // not one of the step's tokens: left out of the record
        }
        r.set_row(token, layer, path);
        int32_t * out = r.ids(token, layer);
        for (int32_t rank = 0; rank < ids.k; ++rank) {
            out[rank] = ids.at(row, rank);
        }
        std::copy_n(hits_.data() + static_cast<size_t>(row) * ids.k, ids.k, r.hits(token, layer));
        float * out_weights = r.weights(token, layer);
        if (weights && out_weights) {
            for (int32_t rank = 0; rank < ids.k; ++rank) {
                out_weights[rank] = *reinterpret_cast<const float *>(static_cast<const char *>(weights->data) + rank * weights->nb[1] +
                                                                     row * weights->nb[2]);
            }
        }
    }
}

void fate_engine::seed() {
    for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i]->layer) {
            fate_engine_io io(*this, static_cast<int32_t>(i));
            blocks_[i]->layer->seed(callback_, io);
        }
    }
}
