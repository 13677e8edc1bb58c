// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/model/config.hpp>
#include <keel/model/project.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// A multi-head latent attention layer with its residual (DeepSeek-V2 section 2.1; Kimi Linear uses it without rotary
/// embedding). The cache keeps one row (c, kappa) per token for all heads. Long segments expand it to keys and values
/// per head; short ones absorb the expansion into the query and the output instead, and read the cache as it is:
///   x += W_out concat_h( V_h sum_i softmax_i((q_h K_h c_i + q'_h kappa_i) / sqrt(N + P)) c_i ),   with x normed first
/// `layer` counts the MLA layers; the rows are appended to the sequences' caches of that layer.
template <backend B>
void mla(B& b, const config& c, const mla_weights<B>& w, view<const float, 1> norm, index layer, const batch& rows,
         view<float, 2> x) {
    arena& memory = b.workspace();
    const arena::scope scope(memory);
    const index n = rows.rows();
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.own_dim + c.position_dim));
    const auto queries = memory.take<float>(n, c.heads * (c.own_dim + c.position_dim));
    const auto latent = memory.take<float>(n, c.latent_width());
    project(b, x, norm, c.epsilon, {{w.q, queries}, {w.latent, latent}});
    const auto q = queries.split(c.own_dim + c.position_dim);
    if constexpr (requires(latent_mix_args<typename B::matrix> fused) { b.latent_mix(fused); }) {
        const latent_mix_args<typename B::matrix> all{q,     latent, w.latent_norm, w.key_up,     w.value_up, c.epsilon,
                                                      scale, layer,  rows.segments, *rows.layout, w.out,      x};
        if (b.mixes(all)) return b.latent_mix(all);
    }
    const auto out = memory.take<float>(n, c.heads, c.value_dim);
    b.latent_append({latent, w.latent_norm, c.epsilon, layer, rows.segments, *rows.layout});

    if (const auto short_ones = rows.shorter_than(b.prefill_from()); !short_ones.empty()) {
        const auto [first, count] = rows_of(short_ones);
        const auto q_latent = memory.take<float>(n, c.heads, c.latent_rank);
        const auto mixed = memory.take<float>(n, c.heads, c.latent_rank);
        b.matmul_heads({w.key_up, q.columns(0, c.own_dim).rows(first, count), q_latent.rows(first, count)});
        b.latent_attend(
            {q_latent, q.columns(c.own_dim, c.position_dim), scale, layer, short_ones, *rows.layout, mixed});
        b.matmul_heads({w.value_up, mixed.rows(first, count), out.rows(first, count)});
    }
    if (const auto long_ones = rows.at_least(b.prefill_from()); !long_ones.empty()) {
        b.expanded_attend({q, w.key_up, w.value_up, scale, layer, long_ones, *rows.layout, out});
    }
    b.matmul(view<const float, 2>{out.data, n, c.heads * c.value_dim}, {{w.out, x, true}});
}

}  // namespace keel::inline KEEL_ABI
