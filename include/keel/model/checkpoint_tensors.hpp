// SPDX-License-Identifier: MIT
//
// The tensors of a Kimi-Linear checkpoint under their GGUF names. What differs between the two:
//
//     A_log                    becomes -exp(A_log)
//     kv_b_proj                is split per head into the rows of the keys, transposed, and those of the values
//     experts.E.w1, w2, w3     are stacked over E
//     everything else          has the same bytes under another name, its dimensions listed the other way round
//
// Three codes of elements: plain floats; F8_E4M3 with one factor per 128 x 128 elements (NAME_scale_inv); MXFP4 as
// Kimi K3 packs it (NAME_packed: two codes per byte, even column low; NAME_scale: one E8M0 per 32 columns).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>
#include <keel/io/safetensors.hpp>
#include <keel/model/config.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Four bits of exponent (bias 7), three of mantissa, no infinity.
inline float from_f8_e4m3(std::uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7F) == 0x7F) return std::bit_cast<float>(0x7FC00000u);
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                          : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return bits & 0x80 ? -magnitude : magnitude;
}

/// A tensor of a checkpoint, read as floats.
class checkpoint_tensor {
public:
    /// `wanted`: the dimensions, slowest first; those of 1 do not matter.
    checkpoint_tensor(const safetensors& from, const std::string& file, std::string name,
                      const std::vector<index>& wanted)
        : name_(std::move(name)), file_(file), columns_(wanted.back()) {
        const index rows =
            std::accumulate(wanted.begin(), wanted.end() - 1, index{1}, [](index a, index b) { return a * b; });
        const auto stem = name_.substr(0, name_.size() - std::string_view(".weight").size());
        if (const auto* packed = name_.ends_with(".weight") ? from.find(stem + ".weight_packed") : nullptr) {
            code_ = code::mxfp4;
            values_ = packed;
            scales_ = from.find(stem + ".weight_scale");
            if (scales_ == nullptr) fail(stem + ".weight_scale", "is missing");
            expect_type(*values_, safetensors_dtype::u8);
            expect_shape(*values_, {rows, columns_ / 2});
            if (scales_->type->id != safetensors_dtype::f8_e8m0) expect_type(*scales_, safetensors_dtype::u8);
            if (columns_ % 32 != 0) fail(name_, "has rows that are no multiple of 32");
            expect_shape(*scales_, {rows, columns_ / 32});
            return;
        }
        values_ = from.find(name_);
        if (values_ == nullptr) fail(name_, "is missing");
        expect_shape(*values_, wanted);
        switch (values_->type->id) {
            case safetensors_dtype::f32:
                code_ = code::f32;
                break;
            case safetensors_dtype::f16:
                code_ = code::f16;
                break;
            case safetensors_dtype::bf16:
                code_ = code::bf16;
                break;
            case safetensors_dtype::f8_e4m3:
                code_ = code::f8;
                scales_ = from.find(name_ + "_scale_inv");
                if (scales_ == nullptr) break;
                expect_type(*scales_, safetensors_dtype::f32);
                expect_shape(*scales_, {(rows + 127) / 128, (columns_ + 127) / 128});
                break;
            default:
                throw error(errc::unsupported, file_,
                            "tensor " + name_ + " has type " + std::string(values_->type->name) +
                                ", expected a floating-point type");
        }
    }

    /// Elements [first, first + count) in the order of the file.
    void read(index first, index count, float* to) const {
        const std::byte* const at = values_->data.data();
        switch (code_) {
            case code::f32:
                std::memcpy(to, at + first * 4, static_cast<std::size_t>(count) * 4);
                break;
            case code::f16:
                decode_row(dtype::f16, at + first * 2, to, count);
                break;
            case code::bf16:
                decode_row(dtype::bf16, at + first * 2, to, count);
                break;
            case code::f8:
                for (index i = 0; i < count; ++i) {
                    const index row = (first + i) / columns_, column = (first + i) % columns_;
                    to[i] = from_f8_e4m3(std::to_integer<std::uint8_t>(at[first + i])) * factor(row, column);
                }
                break;
            case code::mxfp4:
                for (index i = 0; i < count; ++i) {
                    const auto pair = std::to_integer<unsigned>(at[(first + i) / 2]);
                    const auto e =
                        std::to_integer<std::uint8_t>(scales_->data[static_cast<std::size_t>((first + i) / 32)]);
                    to[i] = std::bit_cast<float>(e8m0_half_bits(e)) *
                            static_cast<float>(mxfp4_values[(first + i) % 2 == 0 ? pair & 15 : pair >> 4]);
                }
                break;
        }
    }

    /// The tensors of the checkpoint that this one is made of.
    template <class F>
    void for_each_source(F&& f) const {
        f(*values_);
        if (scales_ != nullptr) f(*scales_);
    }

private:
    enum class code { f32, f16, bf16, f8, mxfp4 };

    [[noreturn]] void fail(std::string_view name, const std::string& what) const {
        throw error(errc::format, file_, std::string("tensor ").append(name).append(" ").append(what));
    }

    void expect_type(const safetensors_tensor& t, safetensors_dtype wanted) const {
        if (t.type->id == wanted) return;
        const auto* row = std::ranges::find(safetensors_dtype_table, wanted, &safetensors_dtype_info::id);
        fail(t.name, "has type " + std::string(t.type->name) + ", expected " + std::string(row->name));
    }

    void expect_shape(const safetensors_tensor& t, const std::vector<index>& wanted) const {
        const auto above_one = [](const std::vector<index>& shape) {
            std::vector<index> kept;
            std::ranges::copy_if(shape, std::back_inserter(kept), [](index n) { return n != 1; });
            return kept;
        };
        const auto text = [](const std::vector<index>& shape) {
            std::string s = "[";
            for (std::size_t i = 0; i < shape.size(); ++i) s += (i > 0 ? ", " : "") + std::to_string(shape[i]);
            return s + "]";
        };
        if (above_one(t.shape) != above_one(wanted)) {
            fail(t.name, "has shape " + text(t.shape) + ", expected " + text(wanted));
        }
    }

    [[nodiscard]] float factor(index row, index column) const {
        if (scales_ == nullptr) return 1.0f;
        float x;
        std::memcpy(&x, scales_->data.data() + 4 * (row / 128 * ((columns_ + 127) / 128) + column / 128), sizeof x);
        return x;
    }

    std::string name_;
    const std::string& file_;
    index columns_;
    code code_ = code::f32;
    const safetensors_tensor* values_ = nullptr;
    const safetensors_tensor* scales_ = nullptr;
};

/// How a GGUF tensor comes from a checkpoint.
enum class origin_kind { same, decay, key_rows, value_rows, stacked };

struct tensor_origin {
    std::string_view gguf;  // behind "blk.N." where there is one
    std::string_view name;  // behind "model.layers.N."; "{}" is the expert
    origin_kind kind = origin_kind::same;
};

inline constexpr tensor_origin tensor_origins[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
    {"attn_norm.weight", "input_layernorm.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"},
    {"ssm_conv1d_q.weight", "self_attn.q_conv1d.weight"},
    {"ssm_conv1d_k.weight", "self_attn.k_conv1d.weight"},
    {"ssm_conv1d_v.weight", "self_attn.v_conv1d.weight"},
    {"ssm_f_a.weight", "self_attn.f_a_proj.weight"},
    {"ssm_f_b.weight", "self_attn.f_b_proj.weight"},
    {"ssm_beta.weight", "self_attn.b_proj.weight"},
    {"ssm_a", "self_attn.A_log", origin_kind::decay},
    {"ssm_dt.bias", "self_attn.dt_bias"},
    {"ssm_g_a.weight", "self_attn.g_a_proj.weight"},
    {"ssm_g_b.weight", "self_attn.g_b_proj.weight"},
    {"ssm_norm.weight", "self_attn.o_norm.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"},
    {"attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"},
    {"attn_k_b.weight", "self_attn.kv_b_proj.weight", origin_kind::key_rows},
    {"attn_v_b.weight", "self_attn.kv_b_proj.weight", origin_kind::value_rows},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
    {"ffn_gate_inp.weight", "block_sparse_moe.gate.weight"},
    {"exp_probs_b.bias", "block_sparse_moe.gate.e_score_correction_bias"},
    {"ffn_gate_exps.weight", "block_sparse_moe.experts.{}.w1.weight", origin_kind::stacked},
    {"ffn_up_exps.weight", "block_sparse_moe.experts.{}.w3.weight", origin_kind::stacked},
    {"ffn_down_exps.weight", "block_sparse_moe.experts.{}.w2.weight", origin_kind::stacked},
    {"ffn_gate_shexp.weight", "block_sparse_moe.shared_experts.gate_proj.weight"},
    {"ffn_up_shexp.weight", "block_sparse_moe.shared_experts.up_proj.weight"},
    {"ffn_down_shexp.weight", "block_sparse_moe.shared_experts.down_proj.weight"},
};

/// A GGUF tensor whose rows come out of a checkpoint.
class converted_tensor {
public:
    /// `name` and `shape` are those of for_each_tensor; `file` names the checkpoint in messages and outlives the
    /// object, as `from` does. Throws errc::format or errc::unsupported, naming the checkpoint's tensor.
    converted_tensor(const safetensors& from, const std::string& file, const config& c, const std::string& name,
                     const tensor_shape& shape)
        : columns_(shape.extent[0]), rows_(shape.extent[1]) {
        std::string_view kind = name;
        std::string prefix;
        if (kind.starts_with("blk.")) {
            kind.remove_prefix(4);
            const std::size_t dot = kind.find('.');
            prefix = "model.layers." + std::string(kind.substr(0, dot + 1));
            kind.remove_prefix(dot + 1);
        }
        const auto* const origin = std::ranges::find(tensor_origins, kind, &tensor_origin::gguf);
        kind_ = origin->kind;
        const std::string theirs = prefix + std::string(origin->name);
        const auto add = [&](const std::string& part, const std::vector<index>& wanted) {
            parts_.emplace_back(from, file, part, wanted);
        };
        if (kind_ == origin_kind::stacked) {
            const std::size_t hole = theirs.find("{}");
            for (index e = 0; e < shape.extent[2]; ++e) {
                add(theirs.substr(0, hole) + std::to_string(e) + theirs.substr(hole + 2), {rows_, columns_});
            }
        } else if (kind_ == origin_kind::key_rows || kind_ == origin_kind::value_rows) {
            per_head_ = c.own_dim + c.value_dim;
            first_of_head_ = kind_ == origin_kind::key_rows ? 0 : c.own_dim;
            rank_ = c.latent_rank;
            add(theirs, {c.heads * per_head_, rank_});
        } else {
            std::vector<index> slowest_first(shape.extent.rbegin(), shape.extent.rend());
            while (slowest_first.size() > 1 && slowest_first.front() == 1) slowest_first.erase(slowest_first.begin());
            add(theirs, slowest_first);
        }
    }

    /// Rows [first, first + count) of one of the matrices.
    void read(index matrix, index first, index count, float* to) const {
        switch (kind_) {
            case origin_kind::stacked:
                parts_[static_cast<std::size_t>(matrix)].read(first * columns_, count * columns_, to);
                break;
            case origin_kind::value_rows:
                parts_[0].read((matrix * per_head_ + first_of_head_ + first) * rank_, count * rank_, to);
                break;
            case origin_kind::key_rows: {  // row r is column r of the head's key rows
                std::vector<float> strip(static_cast<std::size_t>(count));
                for (index d = 0; d < columns_; ++d) {
                    parts_[0].read((matrix * per_head_ + d) * rank_ + first, count, strip.data());
                    for (index r = 0; r < count; ++r) to[r * columns_ + d] = strip[static_cast<std::size_t>(r)];
                }
                break;
            }
            case origin_kind::same:
            case origin_kind::decay:
                parts_[0].read((matrix * rows_ + first) * columns_, count * columns_, to);
                if (kind_ == origin_kind::decay) {
                    for (index i = 0; i < count * columns_; ++i) {
                        to[i] = static_cast<float>(-std::exp(static_cast<double>(to[i])));
                    }
                }
                break;
        }
    }

    [[nodiscard]] const std::vector<checkpoint_tensor>& parts() const { return parts_; }

private:
    index columns_, rows_;
    index per_head_ = 0, first_of_head_ = 0, rank_ = 0;
    origin_kind kind_ = origin_kind::same;
    std::vector<checkpoint_tensor> parts_;
};

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
