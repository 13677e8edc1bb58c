// SPDX-License-Identifier: MIT
//
// The hyper-parameters of a model, read from the keys of its GGUF file and checked. Names follow the Kimi Linear
// report; the letter of the formulas stands beside each. Which layer is KDA and which MLA is a per-layer list.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf.hpp>

namespace keel::inline KEEL_ABI {

/// Kimi-Linear's shape. Everything is positive and small enough that products of two fit an index.
struct config {
    std::string architecture;  ///< "kimi-linear"
    std::string name;
    index context = 0;  ///< tokens that the model was trained for
    index vocabulary = 0;
    index hidden = 0;  ///< E
    index layers = 0;
    index heads = 0;        ///< H, of both mixers
    std::vector<bool> kda;  ///< per layer: KDA, else MLA
    float epsilon = 0;      ///< of every norm

    index head_dim = 0;     ///< D, of KDA's keys and values
    index conv_kernel = 0;  ///< K, taps of the short convolutions

    index latent_rank = 0;   ///< R, what the cache keeps of keys and values
    index position_dim = 0;  ///< P, the part of a key that all heads share (never rotated)
    index own_dim = 0;       ///< N, the part of a key that each head has for itself
    index value_dim = 0;     ///< V

    index dense_layers = 0;  ///< leading layers with a dense FFN
    index dense_ff = 0;
    index experts = 0;         ///< X
    index chosen = 0;          ///< k, experts per token
    index expert_ff = 0;       ///< F
    index shared_experts = 0;  ///< always active, fused into one of shared_experts * expert_ff
    float routed_scale = 1;    ///< s

    [[nodiscard]] index channels() const { return heads * head_dim; }                // C
    [[nodiscard]] index latent_width() const { return latent_rank + position_dim; }  // R + P
    [[nodiscard]] index shared_ff() const { return shared_experts * expert_ff; }
    [[nodiscard]] bool is_kda(index layer) const { return kda[static_cast<std::size_t>(layer)]; }
    [[nodiscard]] bool is_dense(index layer) const { return layer < dense_layers; }
    [[nodiscard]] index kda_layers() const { return std::count(kda.begin(), kda.end(), true); }
    [[nodiscard]] index mla_layers() const { return layers - kda_layers(); }

    /// How a sequence of this model lies in memory, with a latent cache of f32 (exact) or f16 (fast).
    [[nodiscard]] memory_layout memory(precision p) const {
        return {.kda_layers = kda_layers(),
                .heads = heads,
                .head_dim = head_dim,
                .taps = conv_kernel - 1,
                .mla_layers = mla_layers(),
                .latent_width = latent_width(),
                .cache = p == precision::exact ? dtype::f32 : dtype::f16};
    }

    /// What a backend must be ready for with batches of `rows` rows and sequences of `context` tokens.
    [[nodiscard]] workspace_limits limits(index rows, index context_length) const {
        return {
            .rows = rows,
            .columns = std::max({hidden, channels(), heads * value_dim, dense_layers > 0 ? dense_ff : 0, shared_ff()}),
            .experts = experts,
            .chosen = chosen,
            .expert_ff = expert_ff,
            .heads = heads,
            .head_dim = head_dim,
            .taps = conv_kernel - 1,
            .latent_width = latent_width(),
            .latent_rank = latent_rank,
            .mla_key = own_dim + position_dim,
            .mla_value = value_dim,
            .context = context_length,
            .vocabulary = vocabulary};
    }
};

namespace detail {

/// Reads the keys of one architecture: "kimi-linear.block_count" is number("block_count", ...).
class config_reader {
public:
    config_reader(const gguf& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

    [[nodiscard]] index number(std::string_view key, index smallest, index largest) const {
        return checked(key, file_.require_uint(full(key)), smallest, largest);
    }

    [[nodiscard]] index number_or(std::string_view key, index absent, index smallest, index largest) const {
        const auto value = file_.find_uint(full(key));
        return value ? checked(key, *value, smallest, largest) : absent;
    }

    [[nodiscard]] double real(std::string_view key) const { return file_.require_float(full(key)); }
    [[nodiscard]] double real_or(std::string_view key, double absent) const {
        return file_.find_float(full(key)).value_or(absent);
    }

    [[noreturn]] void fail(std::string_view key, std::string_view what) const {
        throw error(errc::format, file_.path().string(), "key " + full(key) + " " + std::string(what));
    }

    [[nodiscard]] std::string full(std::string_view key) const { return prefix_ + "." + std::string(key); }

private:
    [[nodiscard]] index checked(std::string_view key, std::uint64_t value, index smallest, index largest) const {
        if (value < static_cast<std::uint64_t>(smallest) || value > static_cast<std::uint64_t>(largest)) {
            fail(key, "is " + std::to_string(value) + ", expected " + std::to_string(smallest) + " to " +
                          std::to_string(largest));
        }
        return static_cast<index>(value);
    }

    const gguf& file_;
    std::string prefix_;
};

}  // namespace detail

/// Reads and checks the configuration of a Kimi-Linear file. Throws errc::unsupported for another architecture (naming
/// it and those that keel runs), errc::format for keys that are missing or cannot be.
inline config read_config(const gguf& file) {
    config c;
    c.architecture = file.require_string("general.architecture");
    if (c.architecture != "kimi-linear") {
        throw error(errc::unsupported, file.path().string(),
                    "architecture \"" + c.architecture + "\" is not supported; keel runs: kimi-linear");
    }
    c.name = file.find_string("general.name").value_or("");
    const detail::config_reader keys(file, c.architecture);
    constexpr index wide = 1 << 20;  // no dimension of a model comes near it, and products of two stay small

    c.context = keys.number("context_length", 1, index{1} << 40);
    c.hidden = keys.number("embedding_length", 1, wide);
    c.layers = keys.number("block_count", 1, 512);
    c.heads = keys.number("attention.head_count", 1, 1024);
    c.epsilon = static_cast<float>(keys.real("attention.layer_norm_rms_epsilon"));
    if (!(c.epsilon > 0 && c.epsilon < 1)) keys.fail("attention.layer_norm_rms_epsilon", "is not between 0 and 1");

    // A layer is KDA if and only if it has no key-value heads; older files hold the number of heads instead of 1 for
    // MLA.
    const gguf_array kv_heads = file.require_array(keys.full("attention.head_count_kv"));
    if (kv_heads.size() != c.layers) {
        keys.fail("attention.head_count_kv",
                  "has " + std::to_string(kv_heads.size()) + " entries for " + std::to_string(c.layers) + " layers");
    }
    for (index i = 0; i < kv_heads.size(); ++i) {
        const std::uint64_t n = kv_heads.uint_at(i);
        if (n > 1 && n != static_cast<std::uint64_t>(c.heads)) {
            keys.fail("attention.head_count_kv",
                      "holds " + std::to_string(n) + ", expected 0, 1 or the number of heads");
        }
        c.kda.push_back(n == 0);
    }

    c.head_dim = keys.number("kda.head_dim", 1, 4096);
    c.conv_kernel = keys.number("ssm.conv_kernel", 1, 64);

    c.latent_rank = keys.number("attention.kv_lora_rank", 1, wide);
    c.position_dim = keys.number("rope.dimension_count", 0, wide);
    if (keys.number_or("attention.q_lora_rank", 0, 0, wide) != 0) {
        keys.fail("attention.q_lora_rank", "is set: low-rank queries are not supported for kimi-linear");
    }
    // Legacy files have no *_mla keys (or 0) and put an expanded head's widths into the plain ones.
    const auto width = [&](const char* mla, const char* plain) {
        const index n = keys.number_or(mla, 0, 0, wide);
        return n > 0 ? n : keys.number(plain, 1, wide);
    };
    const index key_dim = width("attention.key_length_mla", "attention.key_length");
    c.value_dim = width("attention.value_length_mla", "attention.value_length");
    c.own_dim = key_dim - c.position_dim;
    if (c.own_dim <= 0)
        keys.fail("rope.dimension_count", "leaves nothing of the key length " + std::to_string(key_dim));

    c.dense_layers = keys.number_or("leading_dense_block_count", 0, 0, c.layers);
    if (c.dense_layers > 0) c.dense_ff = keys.number("feed_forward_length", 1, wide);
    if (c.dense_layers < c.layers) {
        c.experts = keys.number("expert_count", 1, 1024);
        c.chosen = keys.number("expert_used_count", 1, c.experts);
        c.expert_ff = keys.number("expert_feed_forward_length", 1, wide);
        c.shared_experts = keys.number_or("expert_shared_count", 0, 0, 64);
        if (keys.number_or("expert_gating_func", 2, 0, 255) != 2) keys.fail("expert_gating_func", "is not 2 (sigmoid)");
        if (keys.number_or("expert_group_count", 1, 0, 1024) > 1)
            keys.fail("expert_group_count", "is not 1: groups are not supported");
        const double scale = keys.real_or("expert_weights_scale", 0);
        if (!(scale >= 0 && scale < 1e6)) keys.fail("expert_weights_scale", "is not a sensible scale");
        if (scale > 0) c.routed_scale = static_cast<float>(scale);
    }

    const gguf_array tokens = file.require_array("tokenizer.ggml.tokens");
    c.vocabulary = keys.number_or("vocab_size", tokens.size(), 1, index{1} << 30);
    if (c.vocabulary != tokens.size()) {
        keys.fail("vocab_size", "is " + std::to_string(c.vocabulary) + ", but the vocabulary has " +
                                    std::to_string(tokens.size()) + " tokens");
    }
    return c;
}

}  // namespace keel::inline KEEL_ABI
