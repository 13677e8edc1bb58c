// SPDX-License-Identifier: MIT
//
// From the argument structs of concept.hpp to those of launch.hpp. For the host compiler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <string_view>

#include <cuda_runtime_api.h>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/memory.hpp>
#include <keel/backend/cuda/upload.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// What the classes that start kernels have in common.
class cuda_arguments {
protected:
    /// Throws errc::capacity for what kernels cannot count.
    static int number(index n) {
        if (n > std::numeric_limits<int>::max())
            throw error(errc::capacity, "batch", "too large for the GPU's kernels");
        return static_cast<int>(n);
    }

    static cuda_launch::memory plain(const memory_layout& l) {
        return {number(l.heads),      number(l.head_dim),     number(l.taps),
                number(l.mla_layers), number(l.latent_width), l.cache == dtype::f16 ? 1 : 0,
                l.layer_floats()};
    }

    /// Rows of the longest segment.
    static index longest_of(std::span<const segment> segments) {
        index longest = 0;
        for (const segment& s : segments) longest = std::max(longest, s.rows);
        return longest;
    }

    static cuda_launch::activation_rows rows(view<float, 2> x) { return {x.data, x.stride[0]}; }

    /// Room for what lies before the tiles of `parts` convolutions of n rows, if there is more than one tile.
    static float* conv_edges(arena& workspace, index longest, index n, index parts, const memory_layout& layout) {
        if (longest <= cuda_launch::short_conv_tile) return nullptr;
        return workspace.take<float>(parts * cuda_launch::short_conv_edges(number(n)), layout.taps, layout.channels())
            .data;
    }

    /// Throws what starting an operation's kernels returned.
    static void call(std::string_view operation, cudaError_t result) {
        if (result == cudaErrorInvalidValue || result == cudaErrorNotSupported) {
            cudaGetLastError();
            throw error(errc::unsupported, operation, "the GPU's kernels do not serve these shapes");
        }
        detail::check(result, operation);
    }

    /// Calls run(list, count) for the products, as many at a time as kernels take.
    template <class Run>
    static void for_each_list(std::initializer_list<linear<cuda_matrix>> products, Run&& run) {
        cuda_launch::product list[cuda_launch::matvec_args::most];
        for (auto p = products.begin(); p != products.end();) {
            int count = 0;
            for (; p != products.end() && count < cuda_launch::matvec_args::most; ++p) {
                list[count++] = {p->weight.on_device, p->out.data, p->out.stride[0], 0, p->accumulate ? 1 : 0};
            }
            run(list, count);
        }
    }

    /// One gated feed-forward network.
    static cuda_launch::networks network(const swiglu_args<cuda_matrix>& a) {
        cuda_launch::networks to;
        to.x = a.x.data;
        to.x_row = a.x.stride[0];
        to.rows = number(a.x.extent[0]);
        to.gate = a.gate.on_device;
        to.up = a.up.on_device;
        to.down = a.down.on_device;
        to.out = a.out.data;
        to.out_row = a.out.stride[0];
        to.accumulate = a.accumulate ? 1 : 0;
        return to;
    }

    /// The chosen ones of many.
    static cuda_launch::networks chosen_networks(const swiglu_args<cuda_matrix>& a, view<const std::int32_t, 2> chosen,
                                                 view<const float, 2> weights) {
        cuda_launch::networks to = network(a);
        to.chosen = chosen.data;
        to.weights = weights.data;
        to.chosen_row = chosen.stride[0];
        to.weights_row = weights.stride[0];
        to.k = number(chosen.extent[1]);
        return to;
    }

    static cuda_launch::rms_norm_args arguments(const rms_norm_args& a) {
        return {a.x.data,
                a.weight.data,
                a.out.data,
                a.x.stride[0],
                a.out.stride[0],
                number(a.x.extent[0]),
                number(a.x.extent[1]),
                a.epsilon};
    }

    static cuda_launch::add_args arguments(const add_args& a) {
        return {a.x.data, a.y.data, a.x.stride[0], a.y.stride[0], number(a.x.extent[0]), number(a.x.extent[1])};
    }

    static cuda_launch::short_conv_args arguments(const short_conv_args& a, const cuda_launch::segment* segments,
                                                  index longest, float* edges) {
        return {rows(a.x), a.taps.data,     segments,       number(std::ssize(a.segments)), number(longest), edges,
                a.which,   number(a.layer), plain(a.layout)};
    }

    static cuda_launch::kda_inputs_args arguments(const kda_inputs_args& a, const cuda_launch::segment* segments,
                                                  index longest, float* edges) {
        return {{rows(a.q), rows(a.k), rows(a.v)},
                {a.taps_q.data, a.taps_k.data, a.taps_v.data},
                rows(a.log_decay),
                rows(a.beta),
                a.a.data,
                a.dt_bias.data,
                a.epsilon,
                segments,
                number(std::ssize(a.segments)),
                number(longest),
                edges,
                number(a.q.extent[0]),
                number(a.layer),
                plain(a.layout)};
    }

    static cuda_launch::keep_args arguments(const keep_args& a, const cuda_launch::segment* segments, index most_rows) {
        const auto part = [](view<const float, 2> v) -> cuda_launch::keep_args::part {
            return {v.data, v.stride[0], number(v.extent[1])};
        };
        return {{part(a.q), part(a.k), part(a.v), part(a.decay_low), part(a.beta)},
                segments,
                number(std::ssize(a.segments)),
                number(most_rows),
                number(a.layer)};
    }

    static cuda_launch::kda_args arguments(const kda_args& a, const cuda_launch::segment* segments) {
        const auto& g = a.log_decay;
        return {a.q.data,
                a.k.data,
                a.v.data,
                g.data,
                a.beta.data,
                a.q.stride[0],
                a.q.stride[1],
                a.k.stride[0],
                a.k.stride[1],
                a.v.stride[0],
                a.v.stride[1],
                g.stride[0],
                g.stride[1],
                a.beta.stride[0],
                a.out.data,
                a.out.stride[0],
                a.out.stride[1],
                segments,
                number(std::ssize(a.segments)),
                number(a.layer),
                plain(a.layout)};
    }

    /// Without where the results go.
    static cuda_launch::kda_mix_args arguments(const kda_mix_args<cuda_matrix>& a,
                                               const cuda_launch::segment* segments) {
        return {a.q.data,
                a.k.data,
                a.v.data,
                a.decay_low.data,
                a.gate_low.data,
                a.beta.data,
                a.q.stride[0],
                a.k.stride[0],
                a.v.stride[0],
                a.decay_low.stride[0],
                a.gate_low.stride[0],
                a.beta.stride[0],
                a.decay_up.on_device,
                a.gate_up.on_device,
                a.taps_q.data,
                a.taps_k.data,
                a.taps_v.data,
                a.a.data,
                a.dt_bias.data,
                a.out_norm.data,
                a.epsilon,
                nullptr,
                nullptr,
                0,
                nullptr,
                segments,
                number(std::ssize(a.segments)),
                number(a.layer),
                plain(a.layout)};
    }

    static cuda_launch::latent_mix_args arguments(const latent_mix_args<cuda_matrix>& a,
                                                  const cuda_launch::segment* segments) {
        return {a.q.data,
                a.latent.data,
                a.norm.data,
                a.q.stride[0],
                a.q.stride[1],
                a.latent.stride[0],
                a.key_up.on_device,
                a.value_up.on_device,
                segments,
                number(std::ssize(a.segments)),
                number(a.layer),
                plain(a.layout),
                a.epsilon,
                a.scale,
                nullptr,
                nullptr,
                0};
    }

    /// Without which rows, and how they are split.
    static cuda_launch::latent_attend_args arguments(const latent_attend_args& a,
                                                     const cuda_launch::segment* segments) {
        return {a.q_latent.data,
                a.q_position.data,
                a.q_latent.stride[0],
                a.q_latent.stride[1],
                a.q_position.stride[0],
                a.q_position.stride[1],
                a.out.data,
                a.out.stride[0],
                a.out.stride[1],
                a.scale,
                0,
                number(a.q_latent.extent[1]),
                number(a.q_latent.extent[2]),
                number(a.layer),
                segments,
                number(std::ssize(a.segments)),
                0,
                0,
                nullptr,
                0,
                plain(a.layout)};
    }

    /// The router of a sparse layer, without where its choice goes.
    static cuda_launch::route_args arguments(const moe_args<cuda_matrix>& a, view<const float, 2> logits) {
        cuda_launch::route_args to{};
        to.logits = logits.data;
        to.logits_row = logits.stride[0];
        to.bias = a.bias.data;
        to.rows = number(logits.extent[0]);
        to.experts = number(logits.extent[1]);
        to.k = number(a.chosen);
        to.scale = a.scale;
        return to;
    }

    /// The shared network of a sparse layer, if there is one.
    template <class To>
    static void take_shared(const moe_args<cuda_matrix>& a, To& to) {
        if (a.shared_gate == nullptr) return;
        to.shared_gate = a.shared_gate->on_device;
        to.shared_up = a.shared_up->on_device;
        to.shared_down = a.shared_down->on_device;
    }

    /// One small matrix per head, for the mat-vec kernels or those of many rows. Without how many products there are.
    template <class To>
    static To per_head(const matmul_heads_args<cuda_matrix>& a) {
        To to{};
        to.x = a.x.data;
        to.x_row = a.x.stride[0];
        to.x_head = a.x.stride[1];
        to.rows = number(a.x.extent[0]);
        to.columns = number(a.x.extent[2]);
        to.heads = number(a.x.extent[1]);
        to.list[0] = {a.weight.on_device, a.out.data, a.out.stride[0], a.out.stride[1], 0};
        return to;
    }

    static cuda_launch::l2_norm_args arguments(const l2_norm_args& a) {
        return {
            a.x.data, a.x.stride[0], a.x.stride[1], number(a.x.extent[0]), number(a.x.extent[1]), number(a.x.extent[2]),
            a.epsilon};
    }

    static cuda_launch::kda_gates_args arguments(const kda_gates_args& a) {
        return {a.log_decay.data,
                a.beta.data,
                a.a.data,
                a.dt_bias.data,
                a.log_decay.stride[0],
                a.log_decay.stride[1],
                a.beta.stride[0],
                number(a.log_decay.extent[0]),
                number(a.log_decay.extent[1]),
                number(a.log_decay.extent[2])};
    }

    static cuda_launch::gated_norm_args arguments(const gated_norm_args& a) {
        return {a.x.data,         a.weight.data,    a.gate.data,           a.x.stride[0],         a.x.stride[1],
                a.gate.stride[0], a.gate.stride[1], number(a.x.extent[0]), number(a.x.extent[1]), number(a.x.extent[2]),
                a.epsilon};
    }
};

}  // namespace keel::inline KEEL_ABI
