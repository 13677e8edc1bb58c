// SPDX-License-Identifier: MIT
//
// Files with random weights and the shapes of a released model. Only a few thousand blocks of each type are encoded;
// matrices are made of them in random order, so that a file is written as fast as the disk takes it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include <keel/core/quantize.hpp>
#include <keel/io/gguf_writer.hpp>
#include <keel/model/checkpoint_config.hpp>
#include <keel/model/mixture.hpp>
#include <keel/model/weights.hpp>
#include <keel/text/tiktoken.hpp>

#include "commands.hpp"

namespace tool {

namespace {

using keel::index;

/// A backend that holds nothing: what for_each_tensor needs to list the tensors of a model.
struct listing {
    struct matrix {};
    struct vector {};
};

/// The layout of Kimi-Linear: three KDA layers to one MLA layer, and an MLA layer at the end of the whole model.
keel::config preset(const std::string& name, index layers) {
    keel::config c;
    c.architecture = "kimi-linear";
    c.name = name + " with random weights";
    c.context = 1 << 20;
    c.epsilon = 1e-5f;
    c.conv_kernel = 4;
    c.dense_layers = 1;
    c.shared_experts = 1;
    c.routed_scale = 2.446f;
    if (name == "kimi-linear-48b") {
        c.vocabulary = 163840;
        c.hidden = 2304;
        c.layers = 27;
        c.heads = 32;
        c.head_dim = c.own_dim = c.value_dim = 128;
        c.latent_rank = 512;
        c.position_dim = 64;
        c.dense_ff = 9216;
        c.experts = 256;
        c.chosen = 8;
        c.expert_ff = 1024;
    } else if (name == "small" || name == "tiny") {
        const bool small = name == "small";
        c.vocabulary = small ? 16384 : 1024;
        c.hidden = small ? 768 : 512;
        c.layers = small ? 8 : 4;
        c.heads = small ? 8 : 2;
        c.head_dim = c.own_dim = c.value_dim = small ? 128 : 64;
        c.latent_rank = small ? 512 : 256;
        c.position_dim = small ? 64 : 32;
        c.dense_ff = small ? 2048 : 512;
        c.experts = small ? 32 : 8;
        c.chosen = small ? 4 : 2;
        c.expert_ff = 256;
    } else {
        throw std::runtime_error("preset " + name + ": unknown; there are kimi-linear-48b, small and tiny");
    }
    if (layers > c.layers) {
        throw std::runtime_error("--layers " + std::to_string(layers) + ": " + name + " has " +
                                 std::to_string(c.layers));
    }
    for (index i = 0; i < c.layers; ++i) c.kda.push_back(i % 4 != 3 && i != 26);
    if (layers > 0) c.layers = layers;
    c.kda.resize(static_cast<std::size_t>(c.layers));
    return c;
}

/// Splitmix64, keyed by a seed and a name: the same numbers on every machine, whatever was drawn before.
class random_bits {
public:
    random_bits(std::uint64_t seed, std::string_view name) : state_(seed) {
        for (const char c : name) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
    }

    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    float uniform(float from, float to) { return from + (to - from) * static_cast<float>(next() >> 40) * 0x1p-24f; }
    /// Nearly normal: a sum of four uniform numbers.
    float bell() {
        const std::uint64_t b = next();
        const auto sum = (b & 0xFFFF) + (b >> 16 & 0xFFFF) + (b >> 32 & 0xFFFF) + (b >> 48);
        return (static_cast<float>(sum) - 131070.0f) * (1.7320508f / 65536.0f);
    }

private:
    std::uint64_t state_;
};

/// The deviation of a product with a matrix, for an input of deviation 1. Small where the product is added to the
/// residual stream: then tokens stay as different as their embeddings are, and choose different experts.
float gain(std::string_view name) {
    static constexpr std::pair<std::string_view, float> table[] = {
        {"attn_output.weight", 0.5f},    {"ffn_down.weight", 0.5f},     {"ffn_down_exps.weight", 0.3f},
        {"ffn_down_shexp.weight", 0.4f}, {"ffn_gate_inp.weight", 1.5f}, {"output.weight", 2.5f},
    };
    for (const auto& [suffix, value] : table) {
        if (name.ends_with(suffix)) return value;
    }
    return 1.2f;
}

std::vector<float> vector_values(std::string_view name, const keel::tensor_shape& shape, std::uint64_t seed) {
    random_bits random(seed, name);
    std::vector<float> values(static_cast<std::size_t>(shape.size()));
    const auto fill = [&](auto&& draw) {
        for (float& x : values) x = draw();
    };
    if (name.ends_with("ssm_a")) {
        fill([&] { return random.uniform(-16, -1); });
    } else if (name.ends_with("ssm_dt.bias")) {  // most channels remember for long, one in eight forgets at once
        fill([&] { return random.next() % 8 == 0 ? random.uniform(0, 3) : random.uniform(-6.9f, -2.25f); });
    } else if (name.ends_with("exp_probs_b.bias")) {
        fill([&] { return random.uniform(-0.02f, 0.02f); });
    } else if (name.find("ssm_conv1d") != std::string_view::npos) {
        fill([&] { return 0.45f * random.bell(); });
        const auto kernel = static_cast<std::size_t>(shape.extent[0]);
        for (std::size_t i = kernel - 1; i < values.size(); i += kernel) values[i] += 0.5f;
    } else {
        fill([&] { return 1.0f + 0.2f * random.bell(); });
    }
    return values;
}

/// Which matrices llama.cpp's mixture Q4_K_M stores in six bits: the output, and of the values' projections and of the
/// projections down those in the first and last eighth of the layers and in every third between. keel's own mixture
/// is another one, but a comparison of speed wants the same bytes as the peers' files have.
bool gets_six_bits(const keel::config& c, const std::string& name) {
    if (name == "output.weight") return true;
    if (!name.starts_with("blk.")) return false;
    const index layer = std::stoll(name.substr(4));
    const auto chosen = [](index i, index n) { return i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2; };
    if (name.find(".ffn_down") != name.npos) return chosen(layer, c.layers);
    return name.ends_with(".attn_v.weight") &&
           chosen(std::count(c.kda.begin(), c.kda.begin() + layer, true), c.kda_layers());
}

/// Encoded pieces of rows, of which matrices are put together.
class pieces {
public:
    pieces(keel::dtype type, float deviation, index elements, std::uint64_t seed)
        : bytes_(static_cast<std::size_t>(keel::row_bytes(type, elements))), store_(bytes_ * count) {
        random_bits random(seed, keel::info(type).name);
        std::vector<float> values(static_cast<std::size_t>(elements));
        for (std::size_t i = 0; i < count; ++i) {
            for (float& x : values) x = deviation * random.bell();
            keel::encode_row(type, values.data(), store_.data() + i * bytes_, elements);
        }
    }

    [[nodiscard]] std::span<const std::byte> draw(random_bits& random) const {
        return std::span(store_).subspan(random.next() % count * bytes_, bytes_);
    }

private:
    static constexpr std::size_t count = 4096;
    std::size_t bytes_;
    std::vector<std::byte> store_;
};

/// Byte tokens, then tokens of two to four letters with and without a space, then the special tokens of the released
/// vocabulary at the ids that they have there, as seen from its end.
void write_tokenizer(keel::gguf_writer& to, index vocabulary) {
    constexpr std::size_t special = 256;
    const auto ordinary = static_cast<std::size_t>(vocabulary) - special;
    std::vector<std::string> tokens, merges;
    for (const auto& [first, last] :
         {std::pair{0x21, 0x7E}, {0xA1, 0xAC}, {0xAE, 0xFF}, {0x00, 0x20}, {0x7F, 0xA0}, {0xAD, 0xAD}}) {
        for (int b = first; b <= last; ++b)
            tokens.push_back(keel::detail::printable(std::string(1, static_cast<char>(b))));
    }
    const auto add = [&](const std::string& left, const std::string& right) {
        if (tokens.size() == ordinary) return;
        tokens.push_back(left + right);
        merges.push_back(left + " " + right);
    };
    std::vector<std::string> letters, pairs;
    for (char c = 'a'; c <= 'z'; ++c) letters.emplace_back(1, c);
    for (const auto& a : letters) {
        for (const auto& b : letters) pairs.push_back(a + b);
    }
    const std::string space = keel::detail::printable(" ");
    for (const auto& a : letters) add(space, a);
    for (const auto& ab : pairs) add(ab.substr(0, 1), ab.substr(1));
    for (const auto& ab : pairs) add(space + ab.substr(0, 1), ab.substr(1));
    for (const auto& ab : pairs) {
        for (const auto& c : letters) add(ab, c);
    }
    for (const auto& ab : pairs) {
        for (const auto& c : letters) add(space + ab, c);
    }
    for (const auto& ab : pairs) {
        for (const auto& cd : pairs) add(ab, cd);
    }

    static const std::map<std::size_t, const char*> names = {
        {0, "[BOS]"},
        {1, "[EOS]"},
        {2, "<|im_end|>"},
        {3, "<|im_user|>"},
        {4, "<|im_assistant|>"},
        {6, "<|start_header_id|>"},
        {7, "<|end_header_id|>"},
        {9, "[EOT]"},
        {10, "<|im_system|>"},
        {11, "<|tool_calls_section_begin|>"},
        {12, "<|tool_calls_section_end|>"},
        {13, "<|tool_call_begin|>"},
        {14, "<|tool_call_argument_begin|>"},
        {15, "<|tool_call_end|>"},
        {17, "<|im_middle|>"},
        {254, "[UNK]"},
        {255, "[PAD]"},
    };
    std::vector<std::int32_t> types(tokens.size(), 1);  // normal
    for (std::size_t i = 0; i < special; ++i) {
        const auto name = names.find(i);
        tokens.push_back(name != names.end() ? name->second
                                             : "<|reserved_token_" + std::to_string(ordinary + i) + "|>");
        types.push_back(3);  // control
    }
    to.set("tokenizer.ggml.model", "gpt2");
    to.set("tokenizer.ggml.pre", "kimi-k2");
    to.set_array("tokenizer.ggml.tokens", tokens);
    to.set_array("tokenizer.ggml.token_type", types);
    to.set_array("tokenizer.ggml.merges", merges);
    const auto id = [&](const char* key, std::size_t i) { to.set(key, static_cast<std::uint32_t>(ordinary + i)); };
    id("tokenizer.ggml.bos_token_id", 0);
    id("tokenizer.ggml.eos_token_id", 1);
    id("tokenizer.ggml.unknown_token_id", 254);
    id("tokenizer.ggml.padding_token_id", 255);
    to.set("tokenizer.ggml.add_bos_token", false);
}

}  // namespace

void synth(const synth_options& options) {
    const bool mixed = options.type == "q4_k_m";
    keel::type_choice choice(mixed ? "q4_k" : options.type);
    const keel::config c = preset(options.preset, options.layers);
    const auto type_of = [&](const std::string& name, const keel::tensor_shape& shape) {
        if (mixed && gets_six_bits(c, name)) return keel::dtype::q6_k;
        const keel::dtype type = choice(name, shape.extent);
        return mixed && type == keel::dtype::iq4_nl ? keel::dtype::q5_0 : type;  // llama.cpp's choice for short rows
    };
    keel::gguf_writer writer(options.out);
    keel::write_config(writer, c);
    writer.set("general.type", "model");
    writer.set("general.file_type", mixed ? std::uint32_t{15} : choice.file_type());
    writer.set("general.quantization_version", std::uint32_t{2});
    write_tokenizer(writer, c.vocabulary);

    auto weights = keel::make_layers<listing>(c);
    std::uint64_t total = 0;
    keel::for_each_tensor(c, weights, [&](const std::string& name, const keel::tensor_shape& shape, auto&) {
        const keel::dtype type = type_of(name, shape);
        index rank = 4;
        while (rank > 1 && shape.extent[static_cast<std::size_t>(rank) - 1] == 1) --rank;
        writer.declare(name, type, std::span(shape.extent).first(static_cast<std::size_t>(rank)));
        total += static_cast<std::uint64_t>(keel::row_bytes(type, shape.size()));
    });

    std::uint64_t done = 0;
    const auto write = [&](const std::string& name, std::span<const std::byte> bytes) {
        if (options.tell && !options.tell("write", done, total)) throw std::runtime_error("interrupted");
        writer.write(name, bytes);
        done += bytes.size();
    };
    std::map<std::tuple<keel::dtype, float, index>, pieces> encoded;
    std::vector<std::byte> buffer;
    keel::for_each_tensor(c, weights, [&](const std::string& name, const keel::tensor_shape& shape, auto& to) {
        if constexpr (std::is_same_v<std::decay_t<decltype(to)>, listing::vector>) {
            const std::vector<float> values = vector_values(name, shape, options.seed);
            write(name, std::as_bytes(std::span(values)));
        } else {
            const keel::dtype type = type_of(name, shape);
            const index columns = shape.extent[0];
            const float deviation =
                name == "token_embd.weight" ? 1.0f : gain(name) / std::sqrt(static_cast<float>(columns));
            const index elements = std::max<index>(32, keel::info(type).block_elements);
            const pieces& from =
                encoded.try_emplace({type, deviation, elements}, type, deviation, elements, options.seed).first->second;
            random_bits random(options.seed, name);
            const index count = shape.size() / elements;
            for (index i = 0; i < count; ++i) {
                const auto piece = from.draw(random);
                buffer.insert(buffer.end(), piece.begin(), piece.end());
                if (buffer.size() < std::size_t{1} << 22 && i + 1 < count) continue;
                write(name, buffer);
                buffer.clear();
            }
        }
    });
    writer.finish();
    if (options.tell) options.tell("write", total, total);
    std::printf("%s: %.3f GiB, %s\n", options.out.c_str(), static_cast<double>(total) / 0x1p30, options.type.c_str());
}

}  // namespace tool
