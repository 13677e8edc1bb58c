// SPDX-License-Identifier: MIT
//
// What a backend must be able to do: the operations of the model, each with its formula, its argument struct and its
// shapes.
//
// Shapes are slowest first. Activations are f32 in memory of the backend; n is the number of rows of the batch, H
// heads, D head_dim of KDA, C = H D channels; R latent rank, P position part, N and V the parts of an MLA head; X
// experts, k chosen. References: [KL] "Kimi Linear: An Expressive, Efficient Attention Architecture" (2025); [DS]
// "DeepSeek-V2" (2024), for latent attention; [V3] "DeepSeek-V3 Technical Report" (2024), for the router. llama.cpp's
// variants are named where they differ.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/shortlist.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// What the host asks of the arithmetic.
enum class precision {
    exact,  ///< activations stay f32; one path and one order of summation: how rows are split or batched changes no bit
    fast,   ///< activations may be rounded to 8 or 16 bits, long segments take the chunked and expanded forms
};

/// What a backend is made from. Not every field means something to every backend.
struct backend_options {
    keel::precision precision = precision::fast;
    int threads = 0;          ///< CPU threads; 0: one per physical core
    int device = 0;           ///< which GPU
    bool interleave = false;  ///< CPU: copy quantised weights into an order that is faster to read, instead of using
                              ///< them where the file is mapped; not for precision::exact
};

/// The largest batch that a workspace must serve; a backend derives its own scratch memory from it.
struct workspace_limits {
    index rows = 0;          ///< of a batch
    index columns = 0;       ///< widest input of a matrix
    index experts = 0;       ///< X
    index chosen = 0;        ///< k
    index expert_ff = 0;     ///< width of an expert
    index heads = 0;         ///< H
    index head_dim = 0;      ///< D
    index taps = 0;          ///< of the convolution: kernel - 1
    index latent_width = 0;  ///< R + P
    index latent_rank = 0;   ///< R
    index mla_key = 0;       ///< N + P
    index mla_value = 0;     ///< V
    index context = 0;       ///< positions of the longest sequence
    index vocabulary = 0;
};

/// One of several products with the same input: out = W x, or out += W x.
template <class Matrix>
struct linear {
    const Matrix& weight;     // (columns of out, columns of x)
    view<float, 2> out;       // (n, rows of W)
    bool accumulate = false;  // add to what `out` holds: the residual stream
};

template <class Matrix>
struct embed_args {
    const Matrix& table;            // (vocabulary, hidden)
    std::span<const token> tokens;  // n, in host memory
    view<float, 2> out;             // (n, hidden)
};

/// y = x / sqrt(mean(x^2) + epsilon) * weight, per row.
struct rms_norm_args {
    view<const float, 2> x;       // (n, columns)
    view<const float, 1> weight;  // (columns)
    float epsilon;
    view<float, 2> out;  // (n, columns); may be x
};

/// y_h = W_h x_h: one small matrix per head.
template <class Matrix>
struct matmul_heads_args {
    const Matrix& weight;    // count H of (rows of out, columns of x)
    view<const float, 3> x;  // (n, H, columns)
    view<float, 3> out;      // (n, H, rows)
};

/// Depthwise causal convolution and SiLU ([KL] section 4): y_t[c] = silu(sum_j taps[c][j] x_{t-K+1+j}[c]), K = taps
/// + 1. Rows before a segment come from its history, which then holds the last K-1 inputs.
struct short_conv_args {
    view<float, 2> x;           // (n, C), overwritten by y
    view<const float, 2> taps;  // (C, K); the last tap is the current token's
    int which;                  // 0, 1, 2 for q, k, v: the part of the history
    index layer;                // among the KDA layers
    std::span<const segment> segments;
    const memory_layout& layout;
};

/// Copies what a replay needs of the rows to the memory of the segments that keep it (segment::kept), in the order
/// q, k, v (C each), decay_low (D), beta (H).
struct keep_args {
    view<const float, 2> q, k, v;    // (n, C), before the convolution
    view<const float, 2> decay_low;  // (n, D)
    view<const float, 2> beta;       // (n, H), before the sigmoid
    index layer;                     // among the KDA layers
    std::span<const segment> segments;
    const memory_layout& layout;
};

/// y = x / max(|x|, epsilon), per head. (The training code divides by sqrt(|x|^2 + 1e-6); GGUF runtimes agree on this
/// form.)
struct l2_norm_args {
    view<float, 3> x;  // (n, H, D), in place
    float epsilon;
};

/// The decay and the step of the delta rule ([KL] eq. 10 and section 4):
///   g = a softplus(f + dt_bias), never positive;   beta = sigmoid(b)
struct kda_gates_args {
    view<float, 3> log_decay;      // (n, H, D): f on entry, g on return
    view<float, 2> beta;           // (n, H): b on entry, beta on return
    view<const float, 1> a;        // (H): -exp(A_log)
    view<const float, 1> dt_bias;  // (C)
};

/// Kimi Delta Attention ([KL] eq. 1), token by token (kda_step) or in chunks ([KL] eq. 6-9; kda_chunk); both give the
/// same:
///   S <- diag(exp(g)) S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q / sqrt(D)
/// Only exponents that are not positive are ever exponentiated, so no lower bound of g is assumed.
struct kda_args {
    view<const float, 3> q, k, v;    // (n, H, D); q and k have unit length
    view<const float, 3> log_decay;  // (n, H, D), never positive
    view<const float, 2> beta;       // (n, H), in (0, 1)
    index layer;                     // among the KDA layers; S is read and written there
    std::span<const segment> segments;
    const memory_layout& layout;
    view<float, 3> out;  // (n, H, D)
};

/// y = rms_norm(x; weight) sigmoid(gate), per head ([KL] section 4, output gate).
struct gated_norm_args {
    view<float, 3> x;             // (n, H, D), in place
    view<const float, 1> weight;  // (D), shared by the heads
    view<const float, 3> gate;    // (n, H, D), before the sigmoid
    float epsilon;
};

/// Norms the latent part of each row and appends the row to the cache ([DS] section 2.1.2).
struct latent_append_args {
    view<float, 2> rows;          // (n, R + P): [c' | kappa] on entry, [c | kappa] on return, c = rms_norm(c'; weight)
    view<const float, 1> weight;  // (R)
    float epsilon;
    index layer;  // among the MLA layers
    std::span<const segment> segments;
    const memory_layout& layout;
};

/// Absorbed latent attention ([DS] section 2.1.2): every head attends to the same rows, position t to all rows i <= t.
///   score_i = (q_latent c_i + q_position kappa_i) scale;   out = sum_i softmax(score)_i c_i
struct latent_attend_args {
    view<const float, 3> q_latent;    // (n, H, R)
    view<const float, 3> q_position;  // (n, H, P)
    float scale;                      // 1 / sqrt(N + P)
    index layer;                      // among the MLA layers
    std::span<const segment> segments;
    const memory_layout& layout;
    view<float, 3> out;  // (n, H, R)
};

/// Expanded latent attention, the same function with 3.4 times less arithmetic for many rows ([DS] eq. 9-15):
///   key_i = [K_h c_i | kappa_i], value_i = V_h c_i per head;   out = sum_i softmax(q key_i scale) value_i
template <class Matrix>
struct expanded_attend_args {
    view<const float, 3> q;  // (n, H, N + P)
    const Matrix& key_up;    // count H of (R, N): the transpose of K_h, as the absorbed form wants it
    const Matrix& value_up;  // count H of (V, R)
    float scale;             // 1 / sqrt(N + P)
    index layer;             // among the MLA layers
    std::span<const segment> segments;
    const memory_layout& layout;
    view<float, 3> out;  // (n, H, V)
};

/// out += W_down (silu(W_gate x) * (W_up x)), or = .
template <class Matrix>
struct swiglu_args {
    view<const float, 2> x;  // (n, hidden)
    const Matrix& gate;      // (ff, hidden)
    const Matrix& up;        // (ff, hidden)
    const Matrix& down;      // (hidden, ff)
    view<float, 2> out;      // (n, hidden)
    bool accumulate = false;
};

/// Which experts, and how much of each ([V3] eq. 16, without groups): p = sigmoid(logits), the k largest of p + bias
/// are chosen (the lower index on a tie), w_e = scale p_e / max(sum of the chosen p, 2^-14). The bias only chooses.
struct route_args {
    view<const float, 2> logits;  // (n, X)
    view<const float, 1> bias;    // (X)
    float scale;
    view<std::int32_t, 2> chosen;  // (n, k), by falling p + bias
    view<float, 2> weights;        // (n, k)
};

/// out = sum over the chosen experts e of w_e swiglu_e(x).
template <class Matrix>
struct experts_args {
    view<const float, 2> x;              // (n, hidden)
    view<const std::int32_t, 2> chosen;  // (n, k)
    view<const float, 2> weights;        // (n, k)
    const Matrix& gate;                  // count X of (F, hidden)
    const Matrix& up;                    // count X of (F, hidden)
    const Matrix& down;                  // count X of (hidden, F)
    view<float, 2> out;                  // (n, hidden)
};

/// x += y.
struct add_args {
    view<float, 2> x;
    view<const float, 2> y;
};

/// out[i] = x[rows[i]].
struct gather_args {
    view<const float, 2> x;
    std::span<const index> rows;  // in host memory
    view<float, 2> out;
};

/// rows[i] = x[i], where rows[i] is not null.
struct scatter_args {
    view<const float, 2> x;
    std::span<float* const> rows;  // in host memory, of pointers to (columns) each
};

/// lists[i] is the shortlist of logits[i].
struct shortlist_args {
    view<const float, 2> logits;  // (n, vocabulary)
    view<shortlist, 1> lists;     // (n)
};

/// A backend instance executes one batch at a time: it holds the workspace, and a share in the device (threads, a GPU).
/// Operations may be asynchronous; download() waits. Weights, buffers and the device are shared between instances
/// freely.
///
/// Optional, found with `requires` by the model code:
///   norm_matmul(x, norm, epsilon, products)   rms_norm and then matmul
///   kda_inputs(kda_inputs_args)               what the recurrence needs, in one, see fused.hpp
///   kda_mix(kda_mix_args), mixes(batch)       a KDA layer behind its first products, and for which batches
///   latent_mix(latent_mix_args), mixes(latent_mix_args)   an MLA layer behind its first products, and for
///                                             which of them
///   moe(moe_args)                             a sparse layer, from its norm on
///   keep(keep_args)                           keeping rows, which rewinding by replay needs
///   shortlist(shortlist_args), scatter(scatter_args)   leaving logits where they are until a sampler needs them all
///   record_bytes(type, columns)               bytes that it repacks a row of a quantised matrix to
///   interleave(matrix_view)                   a copy of weights that only matmul, swiglu and experts read, in an order
///                                             that suits them, or nothing: then bind() is asked
///   interleaved_bytes(matrix_view, options)   bytes of that copy, or 0
///   graph(batch, pass)                        runs pass(), or replays a recording of it
///   enter_layer(i)                            is told which layer the next operations belong to
template <class B>
concept backend = requires(B& b, const B& cb, const typename B::matrix& w, const typename B::buffer& memory,
                           std::byte* bytes, const std::byte* from, index n, std::shared_ptr<const void> owner) {
    // Memory. A buffer owns backend memory, filled with zeros when it is made; copying a buffer copies the bytes.
    typename B::device;  // what instances share; made once from backend_options
    { b.allocate(n) } -> std::same_as<typename B::buffer>;
    { memory.data() } -> std::same_as<std::byte*>;
    { memory.size() } -> std::same_as<index>;
    b.upload(bytes, from, n);    // host to backend
    b.download(bytes, from, n);  // backend to host, after all operations so far
    { b.workspace() } -> std::same_as<arena&>;
    {
        B::scratch_bytes(workspace_limits{}, backend_options{})
        } -> std::same_as<index>;  // taken from the arena inside operations

    // Weights. A matrix keeps `owner` alive if it refers to the source's bytes instead of copying them.
    { b.bind(matrix_view{}, owner) } -> std::same_as<typename B::matrix>;
    { b.bind(std::vector<float>{}) } -> std::same_as<typename B::vector>;

    // From how many rows on a segment takes the chunked and expanded forms; the largest index if it never does.
    { cb.prefill_from() } -> std::same_as<index>;

    // Operations.
    b.embed(embed_args<typename B::matrix>{w, {}, {}});
    b.rms_norm(rms_norm_args{});
    b.matmul(view<const float, 2>{}, {linear<typename B::matrix>{w, {}}});
    b.matmul_heads(matmul_heads_args<typename B::matrix>{w, {}, {}});
    b.swiglu(swiglu_args<typename B::matrix>{{}, w, w, w, {}});
    b.experts(experts_args<typename B::matrix>{{}, {}, {}, w, w, w, {}});
    b.l2_norm(l2_norm_args{});
    b.kda_gates(kda_gates_args{});
    b.gated_norm(gated_norm_args{});
    b.route(route_args{});
    b.add(add_args{});
    b.gather(gather_args{});
    requires requires(short_conv_args conv, kda_args kda, latent_append_args append, latent_attend_args attend,
                      expanded_attend_args<typename B::matrix> expanded) {
        b.short_conv(conv);
        b.kda_step(kda);
        b.kda_chunk(kda);
        b.latent_append(append);
        b.latent_attend(attend);
        b.expanded_attend(expanded);
    };
};

}  // namespace keel::inline KEEL_ABI
