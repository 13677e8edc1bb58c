// SPDX-License-Identifier: MIT
//
// The weights of a model. for_each_tensor lists every tensor exactly once, with its name in a GGUF file, its shape and
// the place it goes to; loading, counting, planning and writing files all walk that list.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/progress.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf.hpp>
#include <keel/model/config.hpp>

namespace keel::inline KEEL_ABI {

/// Kimi Delta Attention. Matrices are (out, in); C = heads * head_dim.
template <class B>
struct kda_weights {
    typename B::matrix q, k, v;                 // (C, hidden)
    typename B::vector conv_q, conv_k, conv_v;  // (C, K)
    typename B::matrix decay_down, decay_up;    // (D, hidden), (C, D): the low-rank path to the log decay
    typename B::matrix beta;                    // (H, hidden)
    typename B::matrix gate_down, gate_up;      // (D, hidden), (C, D): the low-rank path to the output gate
    typename B::vector a;                       // (H): -exp(A_log)
    typename B::vector dt_bias;                 // (C)
    typename B::vector out_norm;                // (D)
    typename B::matrix out;                     // (hidden, C)

    /// A convolution's weights as (C, K).
    static view<const float, 2> taps(const typename B::vector& conv, const config& c) {
        return view<const float, 1>(conv).split(c.conv_kernel);
    }
};

/// Multi-head latent attention.
template <class B>
struct mla_weights {
    typename B::matrix q;            // (H (N + P), hidden), per head own part, then position part
    typename B::matrix latent;       // (R + P, hidden): latent, then position part
    typename B::vector latent_norm;  // (R)
    typename B::matrix key_up;       // H of (R, N): transposed, as the absorbed form multiplies it
    typename B::matrix value_up;     // H of (V, R)
    typename B::matrix out;          // (hidden, H V)
};

template <class B>
struct swiglu_weights {
    typename B::matrix gate, up;  // (ff, hidden)
    typename B::matrix down;      // (hidden, ff)
};

template <class B>
struct moe_weights {
    typename B::matrix router;  // (X, hidden), f32
    typename B::vector bias;    // (X), only chooses
    swiglu_weights<B> experts;  // X of each
    swiglu_weights<B> shared;   // of width shared_ff; unused if the model has no shared expert
};

template <class B>
struct layer_weights {
    typename B::vector mixer_norm;  // (hidden)
    std::variant<kda_weights<B>, mla_weights<B>> mixer;
    typename B::vector ffn_norm;  // (hidden)
    std::variant<swiglu_weights<B>, moe_weights<B>> ffn;
};

template <class B>
struct weights {
    typename B::matrix embedding;  // (vocabulary, hidden)
    std::vector<layer_weights<B>> layers;
    typename B::vector output_norm;  // (hidden)
    typename B::matrix output;       // (vocabulary, hidden)
};

/// A tensor's dimensions in GGUF's order, fastest first, padded with ones.
struct tensor_shape {
    std::array<index, 4> extent = {1, 1, 1, 1};

    constexpr tensor_shape(std::initializer_list<index> fastest_first) {
        std::size_t i = 0;
        for (const index n : fastest_first) extent[i++] = n;
    }
    explicit constexpr tensor_shape(const index (&fastest_first)[4])
        : extent{fastest_first[0], fastest_first[1], fastest_first[2], fastest_first[3]} {}

    friend constexpr bool operator==(const tensor_shape&, const tensor_shape&) = default;

    [[nodiscard]] constexpr index size() const { return extent[0] * extent[1] * extent[2] * extent[3]; }

    /// Without its dimensions of 1, which writers of small tensors add and drop.
    [[nodiscard]] constexpr tensor_shape squeezed() const {
        tensor_shape s{};
        std::size_t i = 0;
        for (const index n : extent) {
            if (n != 1) s.extent[i++] = n;
        }
        return s;
    }

    [[nodiscard]] std::string text() const {
        std::string s = "[";
        int last = 3;
        while (last > 0 && extent[static_cast<std::size_t>(last)] == 1) --last;
        for (int d = 0; d <= last; ++d) s += (d > 0 ? ", " : "") + std::to_string(extent[static_cast<std::size_t>(d)]);
        return s + "]";
    }
};

/// Calls visit(name, shape, destination) once for every tensor of the model, in the order of a pass through it.
/// The destination is a B::matrix or a B::vector of `w`, whose layers must exist (see make_layers).
template <class B, class F>
void for_each_tensor(const config& c, weights<B>& w, F&& visit) {
    const index E = c.hidden, H = c.heads, D = c.head_dim, C = c.channels(), K = c.conv_kernel;
    const index R = c.latent_rank, P = c.position_dim, N = c.own_dim, V = c.value_dim;
    const index X = c.experts, F_ = c.expert_ff;

    visit(std::string("token_embd.weight"), tensor_shape{E, c.vocabulary}, w.embedding);
    for (index i = 0; i < c.layers; ++i) {
        const auto tensor = [&](const char* name, tensor_shape shape, auto& to) {
            visit("blk." + std::to_string(i) + "." + name, shape, to);
        };
        layer_weights<B>& layer = w.layers[static_cast<std::size_t>(i)];
        tensor("attn_norm.weight", {E}, layer.mixer_norm);
        if (auto* kda = std::get_if<kda_weights<B>>(&layer.mixer)) {
            tensor("attn_q.weight", {E, C}, kda->q);
            tensor("attn_k.weight", {E, C}, kda->k);
            tensor("attn_v.weight", {E, C}, kda->v);
            tensor("ssm_conv1d_q.weight", {K, 1, C}, kda->conv_q);
            tensor("ssm_conv1d_k.weight", {K, 1, C}, kda->conv_k);
            tensor("ssm_conv1d_v.weight", {K, 1, C}, kda->conv_v);
            tensor("ssm_f_a.weight", {E, D}, kda->decay_down);
            tensor("ssm_f_b.weight", {D, C}, kda->decay_up);
            tensor("ssm_beta.weight", {E, H}, kda->beta);
            tensor("ssm_a", {1, H}, kda->a);
            tensor("ssm_dt.bias", {C}, kda->dt_bias);
            tensor("ssm_g_a.weight", {E, D}, kda->gate_down);
            tensor("ssm_g_b.weight", {D, C}, kda->gate_up);
            tensor("ssm_norm.weight", {D}, kda->out_norm);
            tensor("attn_output.weight", {C, E}, kda->out);
        } else {
            auto& mla = std::get<mla_weights<B>>(layer.mixer);
            tensor("attn_q.weight", {E, H * (N + P)}, mla.q);
            tensor("attn_kv_a_mqa.weight", {E, R + P}, mla.latent);
            tensor("attn_kv_a_norm.weight", {R}, mla.latent_norm);
            tensor("attn_k_b.weight", {N, R, H}, mla.key_up);
            tensor("attn_v_b.weight", {R, V, H}, mla.value_up);
            tensor("attn_output.weight", {H * V, E}, mla.out);
        }
        tensor("ffn_norm.weight", {E}, layer.ffn_norm);
        if (auto* dense = std::get_if<swiglu_weights<B>>(&layer.ffn)) {
            tensor("ffn_gate.weight", {E, c.dense_ff}, dense->gate);
            tensor("ffn_up.weight", {E, c.dense_ff}, dense->up);
            tensor("ffn_down.weight", {c.dense_ff, E}, dense->down);
        } else {
            auto& moe = std::get<moe_weights<B>>(layer.ffn);
            tensor("ffn_gate_inp.weight", {E, X}, moe.router);
            tensor("exp_probs_b.bias", {X}, moe.bias);
            tensor("ffn_gate_exps.weight", {E, F_, X}, moe.experts.gate);
            tensor("ffn_up_exps.weight", {E, F_, X}, moe.experts.up);
            tensor("ffn_down_exps.weight", {F_, E, X}, moe.experts.down);
            if (c.shared_experts > 0) {
                tensor("ffn_gate_shexp.weight", {E, c.shared_ff()}, moe.shared.gate);
                tensor("ffn_up_shexp.weight", {E, c.shared_ff()}, moe.shared.up);
                tensor("ffn_down_shexp.weight", {c.shared_ff(), E}, moe.shared.down);
            }
        }
    }
    visit(std::string("output_norm.weight"), tensor_shape{E}, w.output_norm);
    visit(std::string("output.weight"), tensor_shape{E, c.vocabulary}, w.output);
}

/// Layers of the right kinds, with empty tensors.
template <class B>
weights<B> make_layers(const config& c) {
    weights<B> w;
    w.layers.resize(static_cast<std::size_t>(c.layers));
    for (index i = 0; i < c.layers; ++i) {
        layer_weights<B>& layer = w.layers[static_cast<std::size_t>(i)];
        if (!c.is_kda(i)) layer.mixer.template emplace<mla_weights<B>>();
        if (!c.is_dense(i)) layer.ffn.template emplace<moe_weights<B>>();
    }
    return w;
}

/// Whether only matmul, swiglu and experts read the matrix of this name.
inline bool is_only_multiplied(std::string_view name) {
    return name != "token_embd.weight" && name.find(".attn_k_b.") == name.npos &&
           name.find(".attn_v_b.") == name.npos && name.find(".attn_kv_b.") == name.npos;
}

namespace detail {

/// Takes tensors out of a file, by name, type and shape.
template <class B>
class binder {
public:
    binder(B& b, const gguf& file) : b_(b), file_(file) {}

    void bind(const std::string& name, const tensor_shape& shape, typename B::matrix& to) {
        if (const tensor_info* t = file_.find(name)) {
            const matrix_view source = rows_of(*t, shape);
            if constexpr (requires { b_.interleave(source); }) {
                if (auto copy = is_only_multiplied(name) ? b_.interleave(source) : std::nullopt) {
                    to = std::move(*copy);
                    file_.release(*t);
                    return;
                }
            }
            to = b_.bind(source, file_.storage());
        } else if (!bind_part_of_joint(name, shape, to)) {
            fail(name, "is missing");
        }
    }

    void bind(const std::string& name, const tensor_shape& shape, typename B::vector& to) {
        const tensor_info* const t = file_.find(name);
        if (t == nullptr) fail(name, "is missing");
        check_shape(name, tensor_shape(t->dims).squeezed(), shape.squeezed());
        std::vector<float> values(static_cast<std::size_t>(shape.size()));
        decode_row(type_of(*t), t->data.data(), values.data(), shape.size());
        to = b_.bind(std::move(values));
    }

private:
    [[noreturn]] void fail(std::string_view name, std::string_view what) const {
        throw error(errc::format, file_.path().string(), std::string("tensor ").append(name).append(" ").append(what));
    }

    void check_shape(std::string_view name, const tensor_shape& found, const tensor_shape& wanted) const {
        if (found != wanted) fail(name, "has shape " + found.text() + ", expected " + wanted.text());
    }

    [[nodiscard]] dtype type_of(const tensor_info& t) const {
        if (!t.type->supported) {
            throw error(errc::unsupported, file_.path().string(),
                        std::string("tensor ")
                            .append(t.name)
                            .append(" has type ")
                            .append(t.type->name)
                            .append(", which keel does not compute with"));
        }
        return static_cast<dtype>(t.type->id);
    }

    [[nodiscard]] matrix_view rows_of(const tensor_info& t, const tensor_shape& shape) const {
        check_shape(t.name, tensor_shape(t.dims), shape);
        return {t.data.data(), type_of(t), shape.extent[2], shape.extent[1], shape.extent[0]};
    }

    /// Older files hold attn_kv_b [R, H (N + V)], per head the rows of K, then those of V. The values' rows are copied
    /// as they are; the keys' are transposed, which a block type cannot follow, so they become f32.
    bool bind_part_of_joint(const std::string& name, const tensor_shape& shape, typename B::matrix& to) {
        const bool keys = name.ends_with("attn_k_b.weight");
        if (!keys && !name.ends_with("attn_v_b.weight")) return false;
        const tensor_info* const t = file_.find(name.substr(0, name.rfind("attn_")) + "attn_kv_b.weight");
        if (t == nullptr) return false;

        const index rank = keys ? shape.extent[1] : shape.extent[0];
        const index own = keys ? shape.extent[0] : t->dims[1] / shape.extent[2] - shape.extent[1];
        const index heads = shape.extent[2];
        const index per_head = t->dims[1] / heads;
        if (own < 1 || own >= per_head) check_shape(t->name, tensor_shape(t->dims), {rank, heads * (own + 1)});
        const matrix_view joint = rows_of(*t, {rank, heads * per_head});

        matrix_view part{nullptr, keys ? dtype::f32 : joint.type, heads, shape.extent[1], shape.extent[0]};
        const auto bytes = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(part.bytes()));
        std::vector<float> row(static_cast<std::size_t>(rank));
        for (index h = 0; h < heads; ++h) {
            std::byte* const head = bytes->data() + h * part.matrix_bytes();
            if (keys) {
                for (index d = 0; d < own; ++d) {
                    decode_row(joint.type, joint.row(h * per_head + d), row.data(), rank);
                    for (index r = 0; r < rank; ++r)
                        reinterpret_cast<float*>(head)[r * own + d] = row[static_cast<std::size_t>(r)];
                }
            } else {
                std::memcpy(head, joint.row(h * per_head + own), static_cast<std::size_t>(part.matrix_bytes()));
            }
        }
        part.data = bytes->data();
        to = b_.bind(part, bytes);
        return true;
    }

    B& b_;
    const gguf& file_;
};

}  // namespace detail

/// Binds every tensor of the model by name, type and shape. Throws errc::format or errc::unsupported naming file and
/// tensor, errc::cancelled if `tell` answers no (stage "load", counted in tensors).
template <backend B>
weights<B> load_weights(B& b, const gguf& file, const config& c, const progress& tell = {}) {
    weights<B> w = make_layers<B>(c);
    std::uint64_t total = 0;
    for_each_tensor(c, w, [&](const std::string&, const tensor_shape&, auto&) { ++total; });
    detail::binder<B> from(b, file);
    std::uint64_t done = 0;
    for_each_tensor(c, w, [&](const std::string& name, const tensor_shape& shape, auto& to) {
        report(tell, "load", done++, total);
        from.bind(name, shape, to);
    });
    report(tell, "load", total, total);
    return w;
}

}  // namespace keel::inline KEEL_ABI
