// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#if !defined(_WIN32)
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <csignal>
#endif

#include <keel/io/mapped_file.hpp>
#include <keel/model/convert.hpp>
#include <keel/text/tiktoken.hpp>

#include "catch.hpp"
#include "checkpoint.hpp"
#include "io/support.hpp"

using keel::errc;
using keel::testing::checkpoint;
using keel_test::expect_error;
using keel_test::scratch_folder;

namespace {

const keel::gguf& tiny() {
    static const auto file = keel::gguf::open(KEEL_TEST_DATA "/models/tiny-f32.gguf");
    return file;
}

std::vector<std::filesystem::path> convert(const std::filesystem::path& folder, const std::filesystem::path& target,
                                           const keel::convert_options& options) {
    const auto path = (folder / "tiktoken.model").string();
    const auto vocabulary = keel::read_tiktoken(keel_test::read_file(path), path);
    return keel::convert_checkpoint(folder, vocabulary.tokens, vocabulary.merges, target, options);
}

std::vector<float> values(const keel::tensor_info& t) {
    std::vector<float> all(static_cast<std::size_t>(t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3]));
    keel::decode_row(static_cast<keel::dtype>(t.type_id), t.data.data(), all.data(),
                     static_cast<keel::index>(all.size()));
    return all;
}

/// The same tensors, and the same values after `expected`; -exp(log(-x)) may round.
void check_tensors(const keel::gguf& made, const std::function<float(float)>& expected) {
    CHECK(made.tensors().size() == tiny().tensors().size());
    for (const keel::tensor_info& t : tiny().tensors()) {
        CAPTURE(t.name);
        const keel::tensor_info& copy = made.require(t.name);
        CHECK(std::equal(t.dims, t.dims + 4, copy.dims));
        const std::vector<float> want = values(t), got = values(copy);
        double worst = 0;
        for (std::size_t i = 0; i < std::min(want.size(), got.size()); ++i) {
            const bool as_it_is = t.name.ends_with("bias") || t.name.ends_with("ssm_a");
            const float w = as_it_is ? want[i] : expected(want[i]);
            worst = std::max(worst, std::fabs(static_cast<double>(w) - static_cast<double>(got[i])) /
                                        (t.name.ends_with("ssm_a") ? 1e6 * std::fabs(static_cast<double>(w)) : 1.0));
        }
        CHECK(worst <= (t.name.ends_with("ssm_a") ? 1e-12 : 0.0));
    }
}

/// Converting the checkpoint after a change fails with this code; the message holds the words, and no file is left.
void fails(errc code, std::initializer_list<std::string_view> words, const std::function<void(checkpoint&)>& change,
           const std::function<void(const std::filesystem::path&)>& damage = {}, std::size_t shards = 1) {
    const scratch_folder scratch;
    checkpoint made(tiny());
    change(made);
    made.write(scratch / "hf", shards);
    if (damage) damage(scratch / "hf");
    expect_error(code, words, [&] { convert(scratch / "hf", scratch / "out.gguf", {.type = "f32"}); });
    CHECK(scratch.files() == 1);
}

const auto unchanged = [](checkpoint&) {};

}  // namespace

TEST_CASE("a converted checkpoint is the model that it was made from") {
    const scratch_folder scratch;
    const std::size_t shards = GENERATE(std::size_t{1}, std::size_t{3});
    checkpoint(tiny()).write(scratch / "tiny-f32", shards);
    const auto paths = convert(scratch / "tiny-f32" / "", scratch / "out.gguf", {.type = "f32"});
    REQUIRE(paths.size() == 1);
    const auto made = keel::gguf::open(paths[0]);
    check_tensors(made, [](float x) { return x; });

    // Of the keys only those that hold no information are left out.
    for (const keel::gguf_value& value : tiny().values()) {
        const auto key = value.key();
        if (key == "general.type" || key.ends_with("rope.freq_base") || key.ends_with("expert_group_used_count"))
            continue;
        CAPTURE(key);
        const auto* const copy = made.find_value(key);
        REQUIRE(copy != nullptr);
        CHECK(std::ranges::equal(copy->raw(), value.raw()));
    }
}

TEST_CASE("bf16 tensors keep their exact values") {
    const scratch_folder scratch;
    checkpoint(tiny(), "BF16").write(scratch / "hf");
    convert(scratch / "hf", scratch / "out.gguf", {.type = "bf16"});
    const auto made = keel::gguf::open(scratch / "out.gguf");
    check_tensors(made, [](float x) {
        std::uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits &= 0xFFFF0000u;
        std::memcpy(&x, &bits, 4);
        return x;
    });
    CHECK(made.require("blk.1.ffn_up_exps.weight").type->name == "BF16");
    for (const char* name : {"blk.0.attn_norm.weight", "blk.0.ssm_conv1d_q.weight", "blk.0.ssm_a", "blk.0.ssm_dt.bias",
                             "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias"}) {
        CAPTURE(name);
        CHECK(made.require(name).type->name == "F32");
    }
}

TEST_CASE("F8_E4M3 is read with the factors of its blocks") {
    const scratch_folder scratch;
    checkpoint hf(tiny());
    auto& t = hf.tensors.at("model.layers.0.mlp.down_proj.weight");  // 64 x 128: one block
    t.dtype = "F8_E4M3";
    t.bytes.assign(64 * 128, '\x38');  // 1
    t.bytes[0] = '\x01';               // 2^-9
    t.bytes[1] = '\xFE';               // -448
    t.bytes[130] = '\x4C';             // 3 * 2^0... 0 1001 100: 1.5 * 2^2
    const float factor = 0.25f;
    hf.tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] = keel::testing::hf_floats({&factor, 1}, {1, 1}, "F32");
    hf.write(scratch / "hf");
    convert(scratch / "hf", scratch / "out.gguf", {.type = "f32"});
    const auto made = keel::gguf::open(scratch / "out.gguf");
    const auto got = values(made.require("blk.0.ffn_down.weight"));
    CHECK(got[0] == 0.25f / 512);
    CHECK(got[1] == -112.0f);
    CHECK(got[2] == 0.25f);
    CHECK(got[130] == 1.5f);
}

TEST_CASE("packed MXFP4 experts are read, and written as MXFP4 without a change") {
    const scratch_folder scratch;
    checkpoint hf(tiny());
    const std::string name = "model.layers.1.block_sparse_moe.experts.5.w1.weight";  // 32 x 64
    hf.tensors.erase(name);
    keel::testing::hf_tensor packed{"U8", {32, 32}, std::string(32 * 32, '\0')}, scale{"U8", {32, 2}, {}};
    for (std::size_t i = 0; i < packed.bytes.size(); ++i) packed.bytes[i] = static_cast<char>(i * 37 + i / 7);
    for (int i = 0; i < 64; ++i) scale.bytes.push_back(static_cast<char>(120 + i % 5));
    hf.tensors[name + "_packed"] = packed;
    hf.tensors[name + "_scale"] = scale;
    hf.write(scratch / "hf");
    for (const char* type : {"f32", "bf16", "mxfp4"}) {
        CAPTURE(type);
        convert(scratch / "hf", scratch / (std::string(type) + ".gguf"), {.type = type});
        const auto made = keel::gguf::open(scratch / (std::string(type) + ".gguf"));
        const auto got = values(made.require("blk.1.ffn_gate_exps.weight"));
        constexpr float e2m1[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        bool same = true;
        for (std::size_t i = 0; i < 32 * 64; ++i) {
            const unsigned pair = static_cast<unsigned char>(packed.bytes[i / 2]),
                           code = i % 2 == 0 ? pair & 15 : pair >> 4;
            const float magnitude = std::ldexp(e2m1[code & 7], static_cast<unsigned char>(scale.bytes[i / 32]) - 127);
            same = same && got[5 * 32 * 64 + i] == (code & 8 ? -magnitude : magnitude);
        }
        CHECK(same);
    }
}

TEST_CASE("the output is the same whatever the order of the work, and in one file or several") {
    const scratch_folder scratch;
    checkpoint(tiny()).write(scratch / "hf");
    convert(scratch / "hf", scratch / "a.gguf", {.type = "q4_k_m"});
    convert(scratch / "hf", scratch / "b.gguf",
            {.type = "q4_k_m", .run = [](keel::index count, const std::function<void(keel::index)>& job) {
                 for (keel::index i = count; i-- > 0;) job(i);
             }});
    CHECK(keel_test::read_file(scratch / "a.gguf") == keel_test::read_file(scratch / "b.gguf"));

    const auto paths = convert(scratch / "hf", scratch / "split.gguf", {.type = "f32", .split_size = 400'000});
    CHECK(paths.size() > 2);
    check_tensors(keel::gguf::open(paths[0]), [](float x) { return x; });
}

TEST_CASE("vocabulary: names, roles, ends of an answer") {
    const scratch_folder scratch;
    checkpoint hf(tiny());
    hf.tokenizer.erase("chat_template");
    hf.generation = {{"eos_token_id", 482}};
    hf.write(scratch / "hf");
    keel_test::write_file(scratch / "hf" / "chat_template.jinja", "the template");
    convert(scratch / "hf", scratch / "out.gguf", {.type = "f32"});
    const auto made = keel::gguf::open(scratch / "out.gguf");
    CHECK(made.require_string("tokenizer.chat_template") == "the template");
    CHECK(made.require_uint("tokenizer.ggml.eot_token_id") == 482);

    hf.generation = nullptr;
    hf.config["eos_token_id"] = 483;
    hf.config["bos_token_id"] = 484;
    hf.tokenizer.erase("eos_token");
    hf.tokenizer.erase("bos_token");
    hf.tokenizer.erase("add_bos_token");
    std::filesystem::remove(scratch / "hf" / "generation_config.json");
    hf.write(scratch / "hf");
    convert(scratch / "hf", scratch / "other.gguf", {.type = "f32"});
    const auto other = keel::gguf::open(scratch / "other.gguf");
    CHECK(other.require_uint("tokenizer.ggml.eos_token_id") == 483);
    CHECK(other.require_uint("tokenizer.ggml.bos_token_id") == 484);
    CHECK(other.find_value("tokenizer.ggml.eot_token_id") == nullptr);
    CHECK(other.find_value("tokenizer.ggml.add_bos_token") == nullptr);
}

TEST_CASE("tensors that are missing, of another shape or type, or too many are named") {
    const std::string down = "model.layers.2.block_sparse_moe.experts.3.w2.weight";
    fails(errc::format, {down, "is missing"}, [&](checkpoint& c) { c.tensors.erase(down); });
    fails(errc::format, {"model.layers.3.self_attn.kv_b_proj.weight", "is missing"},
          [](checkpoint& c) { c.tensors.erase("model.layers.3.self_attn.kv_b_proj.weight"); });
    fails(errc::format, {down, "has shape [32, 64], expected [64, 32]"},
          [&](checkpoint& c) { std::swap(c.tensors.at(down).shape[0], c.tensors.at(down).shape[1]); });
    fails(errc::unsupported, {down, "I32"}, [&](checkpoint& c) { c.tensors.at(down).dtype = "I32"; });
    fails(errc::unsupported, {down, "Q3"}, [&](checkpoint& c) { c.tensors.at(down).dtype = "Q3"; });
    fails(errc::unsupported, {"model.layers.9.extra", "no place"}, [](checkpoint& c) {
        c.tensors["model.layers.9.extra"] = {"F32", {1}, std::string(4, '\0')};
    });
    fails(errc::numeric, {"blk.0.attn_q.weight", "finite"}, [](checkpoint& c) {
        c.tensors.at("model.layers.0.self_attn.q_proj.weight").bytes.replace(8, 4, "\x00\x00\xC0\x7F", 4);
    });
}

TEST_CASE("damaged files of a checkpoint are named") {
    const auto change_header = [](std::string_view from, std::string_view to) {
        return [=](const std::filesystem::path& folder) {
            auto bytes = keel_test::read_file(folder / "model.safetensors");
            const auto at = bytes.find(from);
            REQUIRE(at != bytes.npos);
            bytes.replace(at, from.size(), to);
            keel_test::write_file(folder / "model.safetensors", bytes);
        };
    };
    fails(
        errc::file, {"model-00002-of-00003.safetensors", "missing"}, unchanged,
        [](const std::filesystem::path& folder) {
            std::filesystem::remove(folder / "model-00002-of-00003.safetensors");
        },
        3);
    fails(errc::format, {"model.safetensors", "header"}, unchanged, [](const std::filesystem::path& folder) {
        auto bytes = keel_test::read_file(folder / "model.safetensors");
        bytes[6] = '\x7F';
        keel_test::write_file(folder / "model.safetensors", bytes);
    });
    fails(errc::format, {"lm_head.weight", "offsets"}, unchanged,
          change_header("\"data_offsets\":[0,131072]", "\"data_offsets\":[0,931072]"));
    fails(errc::format, {"model.safetensors", "lm_head.weight"}, unchanged,
          change_header("\"data_offsets\":[0,131072]", "\"data_offsets\":[4,131076]"));
    for (const char* name : {"config.json", "tokenizer_config.json", "model.safetensors"}) {
        fails(errc::file, {name}, unchanged,
              [=](const std::filesystem::path& folder) { std::filesystem::remove(folder / name); });
    }
}

TEST_CASE("keys of config.json that are missing or cannot be are named") {
    const auto set = [](const char* key, const nlohmann::ordered_json& value) {
        return [=](checkpoint& c) { c.config[key] = value; };
    };
    for (const char* key :
         {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "kv_lora_rank",
          "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts", "num_experts_per_token",
          "moe_intermediate_size", "routed_scaling_factor", "linear_attn_config", "intermediate_size", "model_type"}) {
        fails(errc::format, {"config.json", key, "is missing"}, [=](checkpoint& c) { c.config.erase(key); });
        fails(errc::format, {"config.json", key}, set(key, {{"not", "this"}}));
    }
    for (const char* key : {"head_dim", "num_heads", "short_conv_kernel_size", "kda_layers", "full_attn_layers"}) {
        fails(errc::format, {"config.json", "linear_attn_config", key},
              [=](checkpoint& c) { c.config["linear_attn_config"].erase(key); });
        fails(errc::format, {"config.json", "linear_attn_config", key},
              [=](checkpoint& c) { c.config["linear_attn_config"][key] = "text"; });
    }
    for (const char* key : {"model_max_length", "first_k_dense_replace", "num_shared_experts", "moe_layer_freq",
                            "num_expert_group", "q_lora_rank", "mla_use_nope", "tie_word_embeddings", "hidden_act",
                            "moe_router_activation_func", "moe_renormalize"}) {
        fails(errc::format, {"config.json", key}, set(key, {{"not", "this"}}));
    }
    fails(errc::format, {"hidden_size", "is not an integer"}, set("hidden_size", 64.5));
    fails(errc::format, {"hidden_size", "expected 1 to"}, set("hidden_size", -64));
    fails(errc::format, {"hidden_size", "expected 1 to"}, set("hidden_size", 1e300));
    fails(errc::format, {"num_experts_per_token", "expected 1 to 8"}, set("num_experts_per_token", 9));
    fails(errc::format, {"rms_norm_eps"}, set("rms_norm_eps", 0));
    fails(errc::format, {"tie_word_embeddings"}, set("tie_word_embeddings", "no"));
    fails(errc::format, {"full_attn_layers", "layer 2"}, [](checkpoint& c) {
        c.config["linear_attn_config"]["full_attn_layers"] = {2, 4};
    });
    fails(errc::format, {"full_attn_layers", "layer 4"},
          [](checkpoint& c) { c.config["linear_attn_config"]["full_attn_layers"] = nlohmann::json::array(); });

    fails(errc::unsupported, {"model_type", "llama"}, set("model_type", "llama"));
    fails(errc::unsupported, {"q_lora_rank"}, set("q_lora_rank", 1536));
    fails(errc::unsupported, {"mla_use_nope"}, set("mla_use_nope", false));
    fails(errc::unsupported, {"tie_word_embeddings"}, set("tie_word_embeddings", true));
    fails(errc::unsupported, {"moe_router_activation_func"}, set("moe_router_activation_func", "softmax"));
    fails(errc::unsupported, {"num_expert_group"}, set("num_expert_group", 8));
}

TEST_CASE("vocabularies that cannot be are named") {
    fails(errc::format, {"tiktoken.model", "300"}, [](checkpoint& c) { c.ranks.erase(c.ranks.begin() + 300); });
    fails(errc::format, {"tiktoken.model", "repeats the rank 299"},
          [](checkpoint& c) { c.ranks[300].replace(c.ranks[300].find(' '), std::string::npos, " 299"); });
    fails(errc::format, {"tiktoken.model", "vocab_size"}, [](checkpoint& c) { c.config["vocab_size"] = 400; });
    fails(errc::format, {"embed_tokens", "shape"}, [](checkpoint& c) { c.config["vocab_size"] = 600; });
    fails(errc::format, {"tokenizer_config.json", "added_tokens_decoder", "12"}, [](checkpoint& c) {
        c.tokenizer["added_tokens_decoder"]["12"] = {{"content", "x"}};
    });
    fails(errc::format, {"tokenizer_config.json", "added_tokens_decoder", "512"}, [](checkpoint& c) {
        c.tokenizer["added_tokens_decoder"]["512"] = {{"content", "x"}};
    });
    fails(errc::format, {"tokenizer_config.json", "added_tokens_decoder", "4x"}, [](checkpoint& c) {
        c.tokenizer["added_tokens_decoder"]["4x"] = {{"content", "x"}};
    });
    fails(errc::format, {"tokenizer_config.json", "490", "content"}, [](checkpoint& c) {
        c.tokenizer["added_tokens_decoder"]["490"] = {{"text", "x"}};
    });
    fails(errc::format, {"tokenizer_config.json", "[BOS]"}, [](checkpoint& c) {
        c.tokenizer["added_tokens_decoder"]["490"] = {{"content", "[BOS]"}};
    });
    fails(errc::format, {"tokenizer_config.json", "bos_token"},
          [](checkpoint& c) { c.tokenizer["bos_token"] = "<nobody>"; });
    fails(errc::format, {"generation_config.json", "eos_token_id"},
          [](checkpoint& c) { c.generation["eos_token_id"] = 512; });
}

TEST_CASE("options that cannot be are refused before anything is written") {
    const scratch_folder scratch;
    checkpoint(tiny()).write(scratch / "hf");
    const auto attempt = [&](const keel::convert_options& options) {
        return [&, options] { convert(scratch / "hf", scratch / "out.gguf", options); };
    };
    expect_error(errc::argument, {"q9_z", "q4_k_m"}, attempt({.type = "q9_z"}));
    expect_error(errc::argument, {"*.nothing"}, attempt({.overrides = {{"*.nothing", keel::dtype::q8_0}}}));
    expect_error(errc::cancelled, {}, attempt({.tell = [](const keel::progress_report& r) { return r.done == 0; }}));
    CHECK(scratch.files() == 1);

    keel_test::write_file(scratch / "out.gguf", "precious");
    expect_error(errc::file, {"out.gguf", "exists"}, attempt({}));
    CHECK(keel_test::read_file(scratch / "out.gguf") == "precious");
    attempt({.policy = keel::existing_file::replace})();
    CHECK(keel::gguf::open(scratch / "out.gguf").tensors().size() == tiny().tensors().size());
}

TEST_CASE("a disk that is too small is noticed before anything is written") {
    const scratch_folder scratch;
    const auto target = scratch / "out.gguf";
    keel::detail::check_free_space(target, 1);
    expect_error(errc::file, {"out.gguf", "needs 1099511627776 MiB", "MiB left"},
                 [&] { keel::detail::check_free_space(target, keel::index{1} << 60); });
}

#if !defined(_WIN32)

TEST_CASE("a disk that fills up leaves nothing behind") {
    const scratch_folder scratch;
    checkpoint(tiny()).write(scratch / "hf");
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit small{200'000, before.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &small);
    expect_error(errc::file, {"out.gguf"}, [&] { convert(scratch / "hf", scratch / "out.gguf", {.type = "f32"}); });
    ::setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
    CHECK(scratch.files() == 1);
}

TEST_CASE("a conversion that is killed leaves no file that looks whole") {
    const scratch_folder scratch;
    checkpoint(tiny()).write(scratch / "hf");
    const pid_t child = ::fork();
    if (child == 0) {
        const auto half_way = [](const keel::progress_report& r) {
            if (2 * r.done > r.total) ::kill(::getpid(), SIGKILL);
            return true;
        };
        convert(scratch / "hf", scratch / "out.gguf", {.type = "f32", .tell = half_way});
        ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status));
    CHECK_FALSE(std::filesystem::exists(scratch / "out.gguf"));
    convert(scratch / "hf", scratch / "out.gguf", {.type = "f32"});  // what is left of it is in nobody's way
    CHECK(keel::gguf::open(scratch / "out.gguf").tensors().size() == tiny().tensors().size());
}

#endif
