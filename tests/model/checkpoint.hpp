// SPDX-License-Identifier: MIT
//
// A Hugging Face checkpoint made from a GGUF file, by the inverse of what the converter does, written here a second
// time and from the specification.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <keel/core/quant.hpp>
#include <keel/io/gguf.hpp>
#include <keel/text/byte_pairs.hpp>

namespace keel::testing {

struct hf_tensor {
    std::string dtype;
    std::vector<index> shape;  // slowest first
    std::string bytes;
};

/// F32, or BF16 by cutting off what does not fit.
inline hf_tensor hf_floats(std::span<const float> values, std::vector<index> shape, const std::string& dtype) {
    hf_tensor t{dtype, std::move(shape), {}};
    for (const float x : values) {
        char raw[4];
        std::memcpy(raw, &x, 4);
        dtype == "BF16" ? t.bytes.append(raw + 2, 2) : t.bytes.append(raw, 4);
    }
    return t;
}

inline std::string base64(std::string_view bytes) {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    for (std::size_t i = 0; i < bytes.size(); i += 3) {
        std::uint32_t group = 0;
        for (std::size_t j = 0; j < 3; ++j) {
            group = group << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0u);
        }
        for (std::size_t j = 0; j < 4; ++j) {
            out.push_back(i + j > bytes.size() ? '=' : digits[group >> (18 - 6 * j) & 63]);
        }
    }
    return out;
}

/// Everything in the folder of a checkpoint; change it, then write it.
struct checkpoint {
    nlohmann::ordered_json config, tokenizer, generation;
    std::vector<std::string> ranks;  // lines of tiktoken.model
    std::map<std::string, hf_tensor> tensors;

    explicit checkpoint(const gguf& from, const std::string& dtype = "F32") {
        read_config(from);
        read_tokenizer(from);
        const auto floats = [&](const tensor_info& t) {
            std::vector<float> values(static_cast<std::size_t>(t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3]));
            decode_row(static_cast<dtype_id>(t.type_id), t.data.data(), values.data(),
                       static_cast<index>(values.size()));
            return values;
        };
        for (const tensor_info& t : from.tensors()) {
            const std::vector<float> values = floats(t);
            const std::string name(t.name);
            if (!name.starts_with("blk.")) {
                const char* const to = name == "token_embd.weight"    ? "model.embed_tokens.weight"
                                       : name == "output_norm.weight" ? "model.norm.weight"
                                                                      : "lm_head.weight";
                tensors[to] = hf_floats(values, turned(t), dtype);
                continue;
            }
            const std::size_t dot = name.find('.', 4);
            const std::string layer = "model.layers." + name.substr(4, dot - 3), what = name.substr(dot + 1);
            if (what == "ssm_a") {
                std::vector<float> logs;
                for (const float x : values) logs.push_back(std::log(-x));
                tensors[layer + "self_attn.A_log"] = hf_floats(logs, {1, 1, t.dims[1], 1}, "F32");
            } else if (what == "attn_k_b.weight") {
                const tensor_info& v = from.require(name.substr(0, dot + 1) + "attn_v_b.weight");
                tensors[layer + "self_attn.kv_b_proj.weight"] = joint(t, values, v, floats(v), dtype);
            } else if (what.ends_with("_exps.weight")) {
                const char* const w = what.starts_with("ffn_gate") ? "w1" : what.starts_with("ffn_up") ? "w3" : "w2";
                const std::size_t size = static_cast<std::size_t>(t.dims[0] * t.dims[1]);
                for (index e = 0; e < t.dims[2]; ++e) {
                    tensors[layer + "block_sparse_moe.experts." + std::to_string(e) + "." + w + ".weight"] =
                        hf_floats(std::span(values).subspan(static_cast<std::size_t>(e) * size, size),
                                  {t.dims[1], t.dims[0]}, dtype);
                }
            } else if (what != "attn_v_b.weight") {
                const bool conv = what.starts_with("ssm_conv1d");
                tensors[layer + renamed(what)] =
                    hf_floats(values, conv ? std::vector<index>{t.dims[2], 1, t.dims[0]} : turned(t),
                              what.ends_with("bias") ? "F32" : dtype);
            }
        }
    }

    /// As one file, or as `shards` files with an index.
    void write(const std::filesystem::path& folder, std::size_t shards = 1) const {
        std::filesystem::create_directories(folder);
        std::ofstream(folder / "config.json") << config;
        std::ofstream(folder / "tokenizer_config.json") << tokenizer;
        if (!generation.is_null()) std::ofstream(folder / "generation_config.json") << generation;
        std::ofstream lines(folder / "tiktoken.model");
        for (const std::string& line : ranks) lines << line << '\n';
        nlohmann::ordered_json weight_map;
        for (std::size_t s = 0; s < shards; ++s) {
            const std::string name = shards == 1 ? "model.safetensors"
                                                 : "model-0000" + std::to_string(s + 1) + "-of-0000" +
                                                       std::to_string(shards) + ".safetensors";
            nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
            std::string data;
            std::size_t i = 0;
            for (const auto& [key, t] : tensors) {
                if (i++ % shards != s) continue;
                header[key] = {{"dtype", t.dtype},
                               {"shape", t.shape},
                               {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
                data += t.bytes;
                weight_map[key] = name;
            }
            const std::string text = header.dump();
            const std::uint64_t length = text.size();
            std::ofstream file(folder / name, std::ios::binary);
            file.write(reinterpret_cast<const char*>(&length), 8);
            file << text << data;
        }
        if (shards > 1) {
            std::ofstream(folder / "model.safetensors.index.json") << nlohmann::json{{"weight_map", weight_map}};
        }
    }

private:
    using dtype_id = keel::dtype;

    static std::vector<index> turned(const tensor_info& t) {
        if (t.dims[1] == 1) return {t.dims[0]};
        return {t.dims[1], t.dims[0]};
    }

    static std::string renamed(const std::string& what) {
        static const std::map<std::string, std::string> names = {
            {"attn_norm", "input_layernorm"},
            {"ffn_norm", "post_attention_layernorm"},
            {"attn_q", "self_attn.q_proj"},
            {"attn_k", "self_attn.k_proj"},
            {"attn_v", "self_attn.v_proj"},
            {"attn_output", "self_attn.o_proj"},
            {"ssm_conv1d_q", "self_attn.q_conv1d"},
            {"ssm_conv1d_k", "self_attn.k_conv1d"},
            {"ssm_conv1d_v", "self_attn.v_conv1d"},
            {"ssm_f_a", "self_attn.f_a_proj"},
            {"ssm_f_b", "self_attn.f_b_proj"},
            {"ssm_g_a", "self_attn.g_a_proj"},
            {"ssm_g_b", "self_attn.g_b_proj"},
            {"ssm_beta", "self_attn.b_proj"},
            {"ssm_norm", "self_attn.o_norm"},
            {"attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"},
            {"attn_kv_a_norm", "self_attn.kv_a_layernorm"},
            {"ffn_gate", "mlp.gate_proj"},
            {"ffn_up", "mlp.up_proj"},
            {"ffn_down", "mlp.down_proj"},
            {"ffn_gate_inp", "block_sparse_moe.gate"},
            {"ffn_gate_shexp", "block_sparse_moe.shared_experts.gate_proj"},
            {"ffn_up_shexp", "block_sparse_moe.shared_experts.up_proj"},
            {"ffn_down_shexp", "block_sparse_moe.shared_experts.down_proj"}};
        if (what == "ssm_dt.bias") return "self_attn.dt_bias";
        if (what == "exp_probs_b.bias") return "block_sparse_moe.gate.e_score_correction_bias";
        return names.at(what.substr(0, what.find('.'))) + ".weight";
    }

    /// Per head the rows of the keys, then those of the values, each of `rank` columns.
    static hf_tensor joint(const tensor_info& k, const std::vector<float>& keys, const tensor_info& v,
                           const std::vector<float>& values, const std::string& dtype) {
        const index own = k.dims[0], rank = k.dims[1], heads = k.dims[2], value_dim = v.dims[1];
        std::vector<float> rows;
        for (index h = 0; h < heads; ++h) {
            for (index d = 0; d < own; ++d) {
                for (index r = 0; r < rank; ++r)
                    rows.push_back(keys[static_cast<std::size_t>((h * rank + r) * own + d)]);
            }
            const auto head = values.begin() + static_cast<std::ptrdiff_t>(h * value_dim * rank);
            rows.insert(rows.end(), head, head + static_cast<std::ptrdiff_t>(value_dim * rank));
        }
        return hf_floats(rows, {heads * (own + value_dim), rank}, dtype);
    }

    void read_config(const gguf& from) {
        const auto n = [&](const char* key) { return from.require_uint(std::string("kimi-linear.") + key); };
        const auto kv_heads = from.require_array("kimi-linear.attention.head_count_kv");
        std::vector<index> kda, full;
        for (index i = 0; i < kv_heads.size(); ++i) (kv_heads.uint_at(i) == 0 ? kda : full).push_back(i + 1);
        config = {{"architectures", {"KimiLinearForCausalLM"}},
                  {"model_type", "kimi_linear"},
                  {"hidden_size", n("embedding_length")},
                  {"num_hidden_layers", n("block_count")},
                  {"num_attention_heads", n("attention.head_count")},
                  {"intermediate_size", n("feed_forward_length")},
                  {"moe_intermediate_size", n("expert_feed_forward_length")},
                  {"num_experts", n("expert_count")},
                  {"num_experts_per_token", n("expert_used_count")},
                  {"num_shared_experts", n("expert_shared_count")},
                  {"first_k_dense_replace", n("leading_dense_block_count")},
                  {"moe_router_activation_func", "sigmoid"},
                  {"routed_scaling_factor", 2.446},
                  {"kv_lora_rank", n("attention.kv_lora_rank")},
                  {"q_lora_rank", nullptr},
                  {"qk_nope_head_dim", n("attention.key_length_mla") - n("rope.dimension_count")},
                  {"qk_rope_head_dim", n("rope.dimension_count")},
                  {"v_head_dim", n("attention.value_length_mla")},
                  {"mla_use_nope", true},
                  {"rms_norm_eps", 1e-5},
                  {"tie_word_embeddings", false},
                  {"vocab_size", n("vocab_size")},
                  {"model_max_length", n("context_length")},
                  {"linear_attn_config",
                   {{"full_attn_layers", full},
                    {"kda_layers", kda},
                    {"head_dim", n("kda.head_dim")},
                    {"num_heads", n("attention.head_count")},
                    {"short_conv_kernel_size", n("ssm.conv_kernel")}}}};
    }

    void read_tokenizer(const gguf& from) {
        const auto tokens = from.require_array("tokenizer.ggml.tokens").strings();
        const auto types = from.require_array("tokenizer.ggml.token_type");
        for (std::size_t i = 0; i < tokens.size(); ++i) {
            if (types.int_at(static_cast<index>(i)) == 1) {
                std::string bytes;
                detail::append_bytes(tokens[i], bytes);
                ranks.push_back(base64(bytes) + " " + std::to_string(i));
            } else if (tokens[i].find("reserved_token") == tokens[i].npos) {
                tokenizer["added_tokens_decoder"][std::to_string(i)] = {{"content", tokens[i]}, {"special", true}};
            }
        }
        const auto name = [&](const char* key) { return tokens[from.require_uint(key)]; };
        tokenizer["bos_token"] = name("tokenizer.ggml.bos_token_id");
        tokenizer["eos_token"] = {{"content", name("tokenizer.ggml.eos_token_id")}, {"lstrip", false}};
        tokenizer["pad_token"] = name("tokenizer.ggml.padding_token_id");
        tokenizer["unk_token"] = name("tokenizer.ggml.unknown_token_id");
        tokenizer["add_bos_token"] = from.require_bool("tokenizer.ggml.add_bos_token");
        tokenizer["chat_template"] = from.require_string("tokenizer.chat_template");
        generation = {{"eos_token_id", {from.require_uint("tokenizer.ggml.eot_token_id")}}};
    }
};

}  // namespace keel::testing
