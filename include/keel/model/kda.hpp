// SPDX-License-Identifier: MIT
#pragma once

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/model/config.hpp>
#include <keel/model/project.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// A Kimi Delta Attention layer with its residual (Kimi Linear report, figure 3 and section 4):
///   q, k, v = silu(conv(W x)), q and k of unit length;   g = a softplus(W_up W_down x + dt_bias);   beta =
///   sigmoid(W_beta x) x += W_out (rms_norm(KDA(q, k, v, g, beta)) sigmoid(W_gate x)),   with x normed first on the
///   right-hand side
/// `layer` counts the KDA layers; the sequences' states of that layer are updated in place.
template <backend B>
void kda(B& b, const config& c, const kda_weights<B>& w, view<const float, 1> norm, index layer, const batch& rows,
         view<float, 2> x) {
    arena& memory = b.workspace();
    const arena::scope scope(memory);
    const index n = rows.rows();
    const auto q = memory.take<float>(n, c.channels());
    const auto k = memory.take<float>(n, c.channels());
    const auto v = memory.take<float>(n, c.channels());
    const auto decay_low = memory.take<float>(n, c.head_dim);
    const auto gate_low = memory.take<float>(n, c.head_dim);
    const auto beta = memory.take<float>(n, c.heads);
    project(b, x, norm, c.epsilon,
            {{w.q, q}, {w.k, k}, {w.v, v}, {w.decay_down, decay_low}, {w.gate_down, gate_low}, {w.beta, beta}});

    const auto decay = memory.take<float>(n, c.channels());
    const auto gate = memory.take<float>(n, c.channels());
    b.matmul(decay_low, {{w.decay_up, decay}});
    b.matmul(gate_low, {{w.gate_up, gate}});

    const auto taps = [&](view<const float, 1> conv) { return conv.split(c.conv_kernel); };
    b.short_conv({q, taps(w.conv_q), 0, layer, rows.segments, *rows.layout});
    b.short_conv({k, taps(w.conv_k), 1, layer, rows.segments, *rows.layout});
    b.short_conv({v, taps(w.conv_v), 2, layer, rows.segments, *rows.layout});

    const auto heads = [&](view<float, 2> of) { return of.split(c.head_dim); };
    b.l2_norm({heads(q), c.epsilon});
    b.l2_norm({heads(k), c.epsilon});
    b.kda_gates({heads(decay), beta, w.a, w.dt_bias});

    const auto out = memory.take<float>(n, c.channels());
    kda_args mix{heads(q),     heads(k),  heads(v), heads(decay), beta, layer, rows.shorter_than(b.prefill_from()),
                 *rows.layout, heads(out)};
    if (!mix.segments.empty()) b.kda_step(mix);
    mix.segments = rows.at_least(b.prefill_from());
    if (!mix.segments.empty()) b.kda_chunk(mix);

    b.gated_norm({heads(out), w.out_norm, heads(gate), c.epsilon});
    b.matmul(out, {{w.out, x, true}});
}

}  // namespace keel::inline KEEL_ABI
