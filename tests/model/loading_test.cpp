// SPDX-License-Identifier: MIT
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <keel/backend/reference.hpp>
#include <keel/engine.hpp>

#include "catch.hpp"
#include "rewrite.hpp"

using keel::errc;
using keel::testing::changes;

namespace {

const std::string tiny = KEEL_TEST_DATA "/models/tiny-f32.gguf";
const std::string legacy = KEEL_TEST_DATA "/models/tiny-legacy.gguf";

/// Loading the file fails with this code, and the message holds all of `words`.
void fails(const std::filesystem::path& path, errc code, const std::vector<std::string>& words) {
    std::string message = "nothing was thrown";
    try {
        keel::basic_engine<keel::reference>::open(path);
    } catch (const keel::error& e) {
        CHECK(e.code() == code);
        message = e.what();
    }
    CAPTURE(message);
    for (const std::string& word : words) CHECK(message.find(word) != std::string::npos);
}

void fails(const changes& what, errc code, std::vector<std::string> words) {
    const auto path = keel::testing::rewrite(tiny, what);
    words.push_back(path.string());
    fails(path, code, words);
}

std::vector<std::string> tensors_of(const std::string& path) {
    std::vector<std::string> names;
    const auto file = keel::gguf::open(path);
    for (const auto& t : file.tensors()) names.emplace_back(t.name);
    return names;
}

}  // namespace

TEST_CASE("a file that is missing is named") { fails("/nowhere/model.gguf", errc::file, {"/nowhere/model.gguf"}); }

TEST_CASE("an unchanged copy loads") {
    const auto copy = keel::testing::rewrite(tiny, {});
    CHECK(keel::basic_engine<keel::reference>::open(copy).shape().layers == 4);
}

TEST_CASE("every tensor that is missing is named") {
    for (const std::string& name : tensors_of(tiny)) {
        fails({.drop_tensors = {name}}, errc::format, {"tensor " + name, "is missing"});
    }
}

TEST_CASE("every tensor of a wrong shape is named, with both shapes") {
    for (const std::string& name : tensors_of(tiny)) {
        fails({.reshape = name}, errc::format, {"tensor " + name, "has shape [", "expected ["});
    }
}

TEST_CASE("a joint tensor of a wrong shape is named") {
    const auto path = keel::testing::rewrite(legacy, {.reshape = "blk.3.attn_kv_b.weight"});
    fails(path, errc::format, {"blk.3.attn_kv_b.weight", "has shape"});
}

TEST_CASE("every key that is needed is named when it is missing") {
    for (const std::string key :
         {"general.architecture", "kimi-linear.context_length", "kimi-linear.embedding_length",
          "kimi-linear.block_count", "kimi-linear.attention.head_count", "kimi-linear.attention.head_count_kv",
          "kimi-linear.attention.layer_norm_rms_epsilon", "kimi-linear.kda.head_dim", "kimi-linear.ssm.conv_kernel",
          "kimi-linear.attention.kv_lora_rank", "kimi-linear.rope.dimension_count", "kimi-linear.feed_forward_length",
          "kimi-linear.expert_count", "kimi-linear.expert_used_count", "kimi-linear.expert_feed_forward_length",
          "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"}) {
        fails({.drop_keys = {key}}, errc::format, {"key " + key, "is missing"});
    }
}

TEST_CASE("keys with impossible values are named") {
    const auto with = [](const std::string& key, auto value) {
        return changes{.set_keys = [=](keel::gguf_writer& w) { w.set(key, value); }};
    };
    const auto bad = [&](const std::string& key, auto value) {
        fails(with("kimi-linear." + key, value), errc::format, {"key kimi-linear." + key});
    };
    bad("block_count", std::uint32_t{0});
    bad("block_count", std::uint32_t{513});
    bad("embedding_length", std::uint64_t{1} << 40);
    bad("attention.head_count", std::int32_t{-1});
    bad("attention.layer_norm_rms_epsilon", 0.0f);
    bad("attention.layer_norm_rms_epsilon", std::uint32_t{1});
    bad("expert_used_count", std::uint32_t{9});
    bad("expert_gating_func", std::uint32_t{1});
    bad("expert_weights_scale", -1.0f);
    bad("leading_dense_block_count", std::uint32_t{5});
    bad("attention.q_lora_rank", std::uint32_t{16});
    bad("rope.dimension_count", std::uint32_t{24});
    bad("vocab_size", std::uint32_t{511});
    fails({.set_keys =
               [](keel::gguf_writer& w) {
                   w.set_array("kimi-linear.attention.head_count_kv", std::vector<std::int32_t>{0, 0, 1});
               }},
          errc::format, {"kimi-linear.attention.head_count_kv", "3 entries for 4 layers"});
    fails({.set_keys =
               [](keel::gguf_writer& w) {
                   w.set_array("kimi-linear.attention.head_count_kv", std::vector<std::int32_t>{0, 0, 0, 7});
               }},
          errc::format, {"kimi-linear.attention.head_count_kv", "holds 7"});
}

TEST_CASE("an unknown architecture is named, with the supported ones") {
    fails({.set_keys = [](keel::gguf_writer& w) { w.set("general.architecture", std::string_view("llama")); }},
          errc::unsupported, {"\"llama\"", "kimi-linear"});
}

TEST_CASE("a vocabulary that does not match the embedding is refused") {
    fails({.drop_keys = {"kimi-linear.vocab_size", "tokenizer.ggml.padding_token_id"},
           .set_keys =
               [](keel::gguf_writer& w) {
                   const auto file = keel::gguf::open(tiny);
                   auto tokens = file.require_array("tokenizer.ggml.tokens").strings();
                   w.set_array("tokenizer.ggml.tokens",
                               std::vector<std::string_view>(tokens.begin(), tokens.end() - 1));
               }},
          errc::format, {"token_embd.weight", "[64, 512]", "[64, 511]"});
}

TEST_CASE("a damaged tokenizer is reported with the file's name") {
    fails({.set_keys = [](keel::gguf_writer& w) { w.set("tokenizer.ggml.eos_token_id", std::uint32_t{100'000}); }},
          errc::format, {"tokenizer", "eos_token_id is 100000"});
}

TEST_CASE("loading reports its progress and can be cancelled") {
    std::uint64_t calls = 0, last = 0, total = 0;
    const keel::progress count = [&](const keel::progress_report& r) {
        CHECK(r.stage == "load");
        CHECK(r.done >= last);
        last = r.done;
        total = r.total;
        ++calls;
        return true;
    };
    keel::basic_engine<keel::reference>::open(tiny, {.tell = count});
    CHECK(last == total);
    CHECK(total == tensors_of(tiny).size());
    CHECK(calls > 2);
    try {
        keel::basic_engine<keel::reference>::open(tiny,
                                                  {.tell = [](const keel::progress_report& r) { return r.done < 3; }});
        FAIL("was not cancelled");
    } catch (const keel::error& e) {
        CHECK(e.code() == errc::cancelled);
    }
}
