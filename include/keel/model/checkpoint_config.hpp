// SPDX-License-Identifier: MIT
//
// The hyper-parameters of a Hugging Face checkpoint: from its config.json to a config, and from there to GGUF keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf_writer.hpp>
#include <keel/io/json.hpp>
#include <keel/model/config.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Reads the keys of a JSON object and names file and key in errors. A null counts as absent.
class json_keys {
public:
    json_keys(const json& object, std::string file, std::string prefix = "")
        : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

    [[nodiscard]] const json* find(std::string_view key) const {
        const json* const value = object_.find(key);
        return value == nullptr || value->is_null() ? nullptr : value;
    }
    [[nodiscard]] const json& require(std::string_view key) const {
        const json* const value = find(key);
        if (value == nullptr) fail(key, "is missing");
        return *value;
    }

    [[nodiscard]] index number(std::string_view key, index smallest, index largest) const {
        return integer(key, require(key), smallest, largest);
    }
    [[nodiscard]] index number_or(std::string_view key, index absent, index smallest, index largest) const {
        return find(key) != nullptr ? number(key, smallest, largest) : absent;
    }
    [[nodiscard]] std::vector<index> numbers(std::string_view key, index smallest, index largest) const {
        const json& value = require(key);
        if (!value.is_array()) fail(key, "is not an array");
        std::vector<index> all;
        for (const json& element : value.as_array()) all.push_back(integer(key, element, smallest, largest));
        return all;
    }
    [[nodiscard]] double real(std::string_view key) const {
        const json& value = require(key);
        if (!value.is_number()) fail(key, "is not a number");
        return value.as_double();
    }
    [[nodiscard]] std::optional<bool> flag(std::string_view key) const {
        const json* const value = find(key);
        if (value == nullptr) return std::nullopt;
        if (!value->is_bool()) fail(key, "is not true or false");
        return value->as_bool();
    }
    [[nodiscard]] std::optional<std::string_view> text(std::string_view key) const {
        const json* const value = find(key);
        if (value == nullptr) return std::nullopt;
        if (!value->is_string()) fail(key, "is not a string");
        return value->as_string();
    }
    [[nodiscard]] json_keys inner(std::string_view key) const {
        const json& value = require(key);
        if (!value.is_object()) fail(key, "is not an object");
        return {value, file_, prefix_ + std::string(key) + "."};
    }

    [[noreturn]] void fail(std::string_view key, std::string_view what, errc code = errc::format) const {
        throw error(code, file_, std::string("key ").append(prefix_).append(key).append(" ").append(what));
    }

    /// For what a checkpoint may ask for and keel does not do.
    void need(bool fine, std::string_view key, std::string_view what) const {
        if (!fine) fail(key, what, errc::unsupported);
    }

private:
    [[nodiscard]] index integer(std::string_view key, const json& value, index smallest, index largest) const {
        if (!value.is_number()) fail(key, "is not a number");
        const double x = value.as_double();
        if (x != std::floor(x)) fail(key, "is not an integer");
        if (x < static_cast<double>(smallest) || x > static_cast<double>(largest)) {
            fail(key, "is " + std::to_string(x) + ", expected " + std::to_string(smallest) + " to " +
                          std::to_string(largest));
        }
        return static_cast<index>(x);
    }

    const json& object_;
    std::string file_;
    std::string prefix_;
};

}  // namespace detail

/// The shape that a checkpoint's config.json describes; `file` is what messages call it.
/// Throws errc::unsupported for another model_type and for features that no released Kimi-Linear has, errc::format
/// for keys that are missing, of another kind or impossible; file and key are named.
inline config read_checkpoint_config(const json& document, const std::string& file) {
    if (!document.is_object()) throw error(errc::format, file, "is not a JSON object");
    const detail::json_keys keys(document, file);
    const std::string type(keys.text("model_type").value_or(""));
    if (type != "kimi_linear") {
        keys.fail("model_type", type.empty() ? "is missing" : "is \"" + type + "\"; keel converts: kimi_linear",
                  type.empty() ? errc::format : errc::unsupported);
    }
    keys.need(keys.number_or("q_lora_rank", 0, 0, 1 << 20) == 0, "q_lora_rank", "asks for low-rank queries");
    keys.need(keys.flag("mla_use_nope").value_or(false), "mla_use_nope", "is not true: there are no rotary embeddings");
    keys.need(!keys.flag("tie_word_embeddings").value_or(false), "tie_word_embeddings", "is true");
    keys.need(keys.text("hidden_act").value_or("silu") == "silu", "hidden_act", "is not silu");

    constexpr index wide = 1 << 20;
    config c;
    c.architecture = "kimi-linear";
    c.context = keys.number(keys.find("model_max_length") != nullptr ? "model_max_length" : "max_position_embeddings",
                            1, index{1} << 40);
    c.vocabulary = keys.number("vocab_size", 1, index{1} << 30);
    c.hidden = keys.number("hidden_size", 1, wide);
    c.layers = keys.number("num_hidden_layers", 1, 512);
    c.heads = keys.number("num_attention_heads", 1, 1024);
    c.epsilon = static_cast<float>(keys.real("rms_norm_eps"));
    if (!(c.epsilon > 0 && c.epsilon < 1)) keys.fail("rms_norm_eps", "is not between 0 and 1");

    const detail::json_keys linear = keys.inner("linear_attn_config");
    c.head_dim = linear.number("head_dim", 1, 4096);
    c.conv_kernel = linear.number("short_conv_kernel_size", 1, 64);
    linear.need(linear.number("num_heads", 1, 1024) == c.heads, "num_heads", "is not num_attention_heads");
    // The lists count layers from 1, and every layer is in one of them.
    std::vector<int> listed(static_cast<std::size_t>(c.layers));
    c.kda.assign(static_cast<std::size_t>(c.layers), false);
    for (const char* const list : {"kda_layers", "full_attn_layers"}) {
        for (const index layer : linear.numbers(list, 1, c.layers)) {
            const auto i = static_cast<std::size_t>(layer - 1);
            if (++listed[i] > 1) linear.fail(list, "has layer " + std::to_string(layer) + ", which is listed already");
            c.kda[i] = list[0] == 'k';
        }
    }
    const auto missing = std::find(listed.begin(), listed.end(), 0);
    if (missing != listed.end()) {
        linear.fail("full_attn_layers",
                    "and kda_layers do not have layer " + std::to_string(missing - listed.begin() + 1));
    }

    c.latent_rank = keys.number("kv_lora_rank", 1, wide);
    c.position_dim = keys.number("qk_rope_head_dim", 0, wide);
    c.own_dim = keys.number("qk_nope_head_dim", 1, wide);
    c.value_dim = keys.number("v_head_dim", 1, wide);

    c.dense_layers = keys.number_or("first_k_dense_replace", 0, 0, c.layers);
    if (c.dense_layers > 0) c.dense_ff = keys.number("intermediate_size", 1, wide);
    if (c.dense_layers < c.layers) {
        c.experts = keys.number("num_experts", 1, 1024);
        c.chosen = keys.number("num_experts_per_token", 1, c.experts);
        c.expert_ff = keys.number("moe_intermediate_size", 1, wide);
        c.shared_experts = keys.number_or("num_shared_experts", 0, 0, 64);
        c.routed_scale = static_cast<float>(keys.real("routed_scaling_factor"));
        if (!(c.routed_scale > 0 && c.routed_scale < 1e6f)) keys.fail("routed_scaling_factor", "is no sensible scale");
        keys.need(keys.number_or("moe_layer_freq", 1, 1, c.layers) == 1, "moe_layer_freq", "is not 1");
        keys.need(keys.number_or("num_expert_group", 1, 0, 1024) <= 1, "num_expert_group", "is not 1");
        keys.need(keys.text("moe_router_activation_func").value_or("sigmoid") == "sigmoid",
                  "moe_router_activation_func", "is not sigmoid");
        keys.need(keys.flag("moe_renormalize").value_or(true), "moe_renormalize", "is false");
    }
    return c;
}

/// Writes the keys that read_config reads.
inline void write_config(gguf_writer& to, const config& c) {
    to.set("general.architecture", c.architecture);
    if (!c.name.empty()) to.set("general.name", c.name);
    const auto key = [&](std::string_view name) { return c.architecture + "." + std::string(name); };
    const auto number = [&](std::string_view name, index n) { to.set(key(name), static_cast<std::uint32_t>(n)); };

    number("vocab_size", c.vocabulary);
    number("context_length", c.context);
    number("embedding_length", c.hidden);
    number("block_count", c.layers);
    number("feed_forward_length", c.dense_ff);
    number("attention.head_count", c.heads);
    std::vector<std::int32_t> kv_heads;
    for (const bool kda : c.kda) kv_heads.push_back(kda ? 0 : 1);
    to.set_array(key("attention.head_count_kv"), kv_heads);
    to.set(key("attention.layer_norm_rms_epsilon"), c.epsilon);
    number("kda.head_dim", c.head_dim);
    number("ssm.conv_kernel", c.conv_kernel);
    number("attention.kv_lora_rank", c.latent_rank);
    number("rope.dimension_count", c.position_dim);
    number("attention.key_length", c.latent_width());  // of the cache, as the absorbed form sees it
    number("attention.value_length", c.latent_rank);
    number("attention.key_length_mla", c.own_dim + c.position_dim);
    number("attention.value_length_mla", c.value_dim);
    number("leading_dense_block_count", c.dense_layers);
    if (c.dense_layers < c.layers) {
        number("expert_count", c.experts);
        number("expert_used_count", c.chosen);
        number("expert_feed_forward_length", c.expert_ff);
        number("expert_shared_count", c.shared_experts);
        number("expert_gating_func", 2);  // sigmoid
        to.set(key("expert_weights_scale"), c.routed_scale);
    }
}

}  // namespace keel::inline KEEL_ABI
