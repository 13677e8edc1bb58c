// SPDX-License-Identifier: MIT
//
// Operations that a backend may offer on top of the concept: larger pieces of the model in one. The model code finds
// them with `requires` and otherwise composes the operations of concept.hpp; both give the same.
#pragma once

#include <span>

#include <keel/backend/batch.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// kda_mix: all of a KDA layer behind its first products, for batches that mixes(batch) says yes to:
///   convolution, unit length, low-rank decay and gate, recurrence, gated norm;   x += W_out (that)
template <class Matrix>
struct kda_mix_args {
    view<const float, 2> q, k, v;                 // (n, C), before the convolution
    view<const float, 2> decay_low;               // (n, D)
    view<const float, 2> gate_low;                // (n, D)
    view<const float, 2> beta;                    // (n, H), before the sigmoid
    const Matrix& decay_up;                       // (C, D)
    const Matrix& gate_up;                        // (C, D)
    view<const float, 2> taps_q, taps_k, taps_v;  // (C, K)
    view<const float, 1> a;                       // (H)
    view<const float, 1> dt_bias;                 // (C)
    view<const float, 1> out_norm;                // (D)
    float epsilon;
    const Matrix& out;  // (hidden, C)
    index layer;        // among the KDA layers
    std::span<const segment> segments;
    const memory_layout& layout;
    view<float, 2> x;  // (n, hidden), the residual stream
};

/// latent_mix: all of an MLA layer behind its first products, for what mixes(latent_mix_args) says yes to:
/// latent_append, matmul_heads with key_up, latent_attend and matmul_heads with value_up;   x += W_out (that)
template <class Matrix>
struct latent_mix_args {
    view<const float, 3> q;       // (n, H, N + P)
    view<const float, 2> latent;  // (n, R + P), before the norm
    view<const float, 1> norm;    // (R)
    const Matrix& key_up;         // count H of (R, N)
    const Matrix& value_up;       // count H of (V, R)
    float epsilon;
    float scale;  // of the scores
    index layer;  // among the MLA layers
    std::span<const segment> segments;
    const memory_layout& layout;
    const Matrix& out;  // (hidden, H V)
    view<float, 2> x;   // (n, hidden), the residual stream
};

/// kda_inputs: all that prepares the inputs of the recurrence, in place:
///   q, k, v = silu(conv(.)), q and k of unit length;   g = a softplus(f + dt_bias);   beta = sigmoid(.)
struct kda_inputs_args {
    view<float, 2> q, k, v;                       // (n, C)
    view<const float, 2> taps_q, taps_k, taps_v;  // (C, K)
    view<float, 2> log_decay;                     // (n, C): f on entry
    view<float, 2> beta;                          // (n, H)
    view<const float, 1> a;                       // (H)
    view<const float, 1> dt_bias;                 // (C)
    float epsilon;                                // of the lengths
    index layer;                                  // among the KDA layers
    std::span<const segment> segments;
    const memory_layout& layout;
};

/// moe: a sparse layer with its residual, from the norm on:
///   h = rms_norm(x);   x += sum over the chosen experts e of w_e swiglu_e(h) + swiglu_shared(h)
template <class Matrix>
struct moe_args {
    view<float, 2> x;           // (n, hidden), the residual stream
    view<const float, 1> norm;  // (hidden)
    float epsilon;
    const Matrix& router;       // (X, hidden)
    view<const float, 1> bias;  // (X)
    float scale;
    index chosen;               // k
    const Matrix& gate;         // count X of (F, hidden)
    const Matrix& up;           // count X of (F, hidden)
    const Matrix& down;         // count X of (hidden, F)
    const Matrix* shared_gate;  // null if there is no shared expert
    const Matrix* shared_up;
    const Matrix* shared_down;
};

}  // namespace keel::inline KEEL_ABI
