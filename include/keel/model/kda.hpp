// SPDX-License-Identifier: MIT
#pragma once

#include <span>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/model/config.hpp>
#include <keel/model/project.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// A token's share of a KDA layer before tokens are mixed. Everything that a replay of the layer's state needs.
struct kda_inputs {
    view<float, 2> q, k, v;    // (n, C), before the convolution
    view<float, 2> decay_low;  // (n, D)
    view<float, 2> beta;       // (n, H), before the sigmoid
};

/// The recurrence of a KDA layer and all that prepares its inputs, which are overwritten (Kimi Linear report, section
/// 4):
///   q, k, v = silu(conv(.)), q and k of unit length;   g = a softplus(W_up decay_low + dt_bias);   beta = sigmoid(.)
///   out = KDA(q, k, v, g, beta), (n, C)
/// `layer` counts the KDA layers; the sequences' states of that layer are updated in place.
template <backend B>
void kda_recurrence(B& b, const config& c, const kda_weights<B>& w, const kda_inputs& in, index layer,
                    const batch& rows, view<float, 2> out) {
    const arena::scope scope(b.workspace());
    const auto decay = b.workspace().template take<float>(in.q.extent[0], c.channels());
    b.matmul(in.decay_low, {{w.decay_up, decay}});

    const auto heads = [&](view<float, 2> of) { return of.split(c.head_dim); };
    if constexpr (requires(kda_inputs_args fused) { b.kda_inputs(fused); }) {
        b.kda_inputs({in.q, in.k, in.v, w.taps(w.conv_q, c), w.taps(w.conv_k, c), w.taps(w.conv_v, c), decay, in.beta,
                      w.a, w.dt_bias, c.epsilon, layer, rows.segments, *rows.layout});
    } else {
        b.short_conv({in.q, w.taps(w.conv_q, c), 0, layer, rows.segments, *rows.layout});
        b.short_conv({in.k, w.taps(w.conv_k, c), 1, layer, rows.segments, *rows.layout});
        b.short_conv({in.v, w.taps(w.conv_v, c), 2, layer, rows.segments, *rows.layout});
        b.l2_norm({heads(in.q), c.epsilon});
        b.l2_norm({heads(in.k), c.epsilon});
        b.kda_gates({heads(decay), in.beta, w.a, w.dt_bias});
    }

    const auto recur = [&](std::span<const segment> segments) -> kda_args {
        return {heads(in.q), heads(in.k), heads(in.v),  heads(decay), in.beta,
                layer,       segments,    *rows.layout, heads(out)};
    };
    if (const auto steps = rows.shorter_than(b.prefill_from()); !steps.empty()) b.kda_step(recur(steps));
    if (const auto chunks = rows.at_least(b.prefill_from()); !chunks.empty()) b.kda_chunk(recur(chunks));
}

/// A Kimi Delta Attention layer with its residual (Kimi Linear report, figure 3 and section 4):
///   x += W_out (rms_norm(recurrence(W x)) sigmoid(W_gate x)),   with x normed first on the right-hand side
template <backend B>
void kda(B& b, const config& c, const kda_weights<B>& w, view<const float, 1> norm, index layer, const batch& rows,
         view<float, 2> x) {
    arena& memory = b.workspace();
    const arena::scope scope(memory);
    const index n = rows.rows();
    const kda_inputs in{memory.take<float>(n, c.channels()), memory.take<float>(n, c.channels()),
                        memory.take<float>(n, c.channels()), memory.take<float>(n, c.head_dim),
                        memory.take<float>(n, c.heads)};
    const auto gate_low = memory.take<float>(n, c.head_dim);
    project(b, x, norm, c.epsilon,
            {{w.q, in.q},
             {w.k, in.k},
             {w.v, in.v},
             {w.decay_down, in.decay_low},
             {w.gate_down, gate_low},
             {w.beta, in.beta}});
    if constexpr (requires(keep_args kept) { b.keep(kept); }) {
        b.keep({in.q, in.k, in.v, in.decay_low, in.beta, layer, rows.segments, *rows.layout});
    }
    if constexpr (requires(kda_mix_args<typename B::matrix> fused) { b.kda_mix(fused); }) {
        if (b.mixes(rows)) {
            b.kda_mix({in.q,
                       in.k,
                       in.v,
                       in.decay_low,
                       gate_low,
                       in.beta,
                       w.decay_up,
                       w.gate_up,
                       w.taps(w.conv_q, c),
                       w.taps(w.conv_k, c),
                       w.taps(w.conv_v, c),
                       w.a,
                       w.dt_bias,
                       w.out_norm,
                       c.epsilon,
                       w.out,
                       layer,
                       rows.segments,
                       *rows.layout,
                       x});
            return;
        }
    }
    const auto out = memory.take<float>(n, c.channels());
    const auto gate = memory.take<float>(n, c.channels());
    kda_recurrence(b, c, w, in, layer, rows, out);
    b.matmul(gate_low, {{w.gate_up, gate}});
    b.gated_norm({out.split(c.head_dim), w.out_norm, gate.split(c.head_dim), c.epsilon});
    b.matmul(out, {{w.out, x, true}});
}

}  // namespace keel::inline KEEL_ABI
