// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <keel/backend/concept.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/model/config.hpp>
#include <keel/model/project.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// The feed-forward network of the leading dense layers, with its residual: x += swiglu(x), x normed first.
template <backend B>
void dense(B& b, const config& c, const swiglu_weights<B>& w, view<const float, 1> norm, view<float, 2> x) {
    const arena::scope scope(b.workspace());
    const auto h = b.workspace().template take<float>(x.extent[0], c.hidden);
    b.rms_norm({x, norm, c.epsilon, h});
    b.swiglu({h, w.gate, w.up, w.down, x, true});
}

/// The sparse mixture of experts with its residual (DeepSeek-V3 section 2.1.2, sigmoid router with a selection bias):
///   x += sum over the chosen experts of w_e swiglu_e(x) + swiglu_shared(x), x normed first
template <backend B>
void moe(B& b, const config& c, const moe_weights<B>& w, view<const float, 1> norm, view<float, 2> x) {
    if constexpr (requires(moe_args<typename B::matrix> fused) { b.moe(fused); }) {
        const bool shared = c.shared_experts > 0;
        b.moe({x, norm, c.epsilon, w.router, w.bias, c.routed_scale, c.chosen, w.experts.gate, w.experts.up,
               w.experts.down, shared ? &w.shared.gate : nullptr, shared ? &w.shared.up : nullptr,
               shared ? &w.shared.down : nullptr});
        return;
    }
    arena& memory = b.workspace();
    const arena::scope scope(memory);
    const index n = x.extent[0];
    const auto h = memory.take<float>(n, c.hidden);
    const auto logits = memory.take<float>(n, c.experts);
    const auto chosen = memory.take<std::int32_t>(n, c.chosen);
    const auto share = memory.take<float>(n, c.chosen);
    const auto y = memory.take<float>(n, c.hidden);
    b.rms_norm({x, norm, c.epsilon, h});
    b.matmul(h, {{w.router, logits}});
    b.route({logits, w.bias, c.routed_scale, chosen, share});
    b.experts({h, chosen, share, w.experts.gate, w.experts.up, w.experts.down, y});
    if (c.shared_experts > 0) b.swiglu({h, w.shared.gate, w.shared.up, w.shared.down, y, true});
    b.add({x, y});
}

}  // namespace keel::inline KEEL_ABI
