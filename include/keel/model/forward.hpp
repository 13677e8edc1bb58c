// SPDX-License-Identifier: MIT
#pragma once

#include <variant>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/model/config.hpp>
#include <keel/model/kda.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/mla.hpp>
#include <keel/model/moe.hpp>
#include <keel/model/project.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// The model: tokens to the hidden rows that want logits, (rows.wanted.size(), hidden), in the workspace. The
/// states of the sequences advance by their rows.
template <backend B>
view<float, 2> forward(B& b, const config& c, const weights<B>& w, const batch& rows) {
    const auto x = b.workspace().template take<float>(rows.rows(), c.hidden);  // the residual stream
    b.embed({w.embedding, rows.tokens, x});

    index kda_layer = 0, mla_layer = 0;
    for (const layer_weights<B>& layer : w.layers) {
        if constexpr (requires { b.enter_layer(index{}); }) b.enter_layer(kda_layer + mla_layer);
        if (const auto* delta = std::get_if<kda_weights<B>>(&layer.mixer)) {
            kda(b, c, *delta, layer.mixer_norm, kda_layer++, rows, x);
        } else {
            mla(b, c, std::get<mla_weights<B>>(layer.mixer), layer.mixer_norm, mla_layer++, rows, x);
        }
        if (const auto* experts = std::get_if<moe_weights<B>>(&layer.ffn)) {
            moe(b, c, *experts, layer.ffn_norm, x);
        } else {
            dense(b, c, std::get<swiglu_weights<B>>(layer.ffn), layer.ffn_norm, x);
        }
    }

    if constexpr (requires { b.enter_layer(index{}); }) b.enter_layer(-1);
    // Taken even where it is not needed: workspace_bytes() counts it with a batch that wants all rows.
    const auto wanted = b.workspace().template take<float>(static_cast<index>(rows.wanted.size()), c.hidden);
    if (wanted.extent[0] == rows.rows()) return x;
    b.gather({x, rows.wanted, wanted});
    return wanted;
}

/// Rows of forward() to logits, their norm included.
template <backend B>
void project_logits(B& b, const config& c, const weights<B>& w, view<const float, 2> hidden, const projected& out) {
    project(b, hidden, w.output_norm, c.epsilon, {{w.output, out.logits}});
    if constexpr (makes_shortlists<B>) b.shortlist({out.logits, out.lists});
}

}  // namespace keel::inline KEEL_ABI
