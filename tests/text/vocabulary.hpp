// SPDX-License-Identifier: MIT
//
// Vocabularies for tests: the demonstration model's, read from its rank file, and a small one to damage.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/error.hpp>
#include <keel/text/tokenizer.hpp>

#include "catch.hpp"

namespace keel::test {

inline std::string utf8(char32_t c) {
    const auto byte = [](std::uint32_t bits) { return static_cast<char>(static_cast<unsigned char>(bits)); };
    if (c < 0x80) return {byte(c)};
    if (c < 0x800) return {byte(0xC0 | c >> 6), byte(0x80 | (c & 63))};
    if (c < 0x10000) return {byte(0xE0 | c >> 12), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
    return {byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 63)), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
}

/// The printable form of bytes that vocabulary files use.
inline std::string printable(std::string_view bytes) {
    const auto stands_for_itself = [](int b) { return (b > 0x20 && b < 0x7F) || (b > 0xA0 && b < 0x100 && b != 0xAD); };
    std::string out;
    for (const char c : bytes) {
        const int byte = static_cast<unsigned char>(c);
        int shifted = 0x100;
        for (int b = 0; b < byte; ++b) shifted += stands_for_itself(b) ? 0 : 1;
        out += utf8(static_cast<char32_t>(stands_for_itself(byte) ? byte : shifted));
    }
    return out;
}

/// A tokenizer_data with its strings, to be changed and then made into a tokenizer.
struct vocabulary {
    std::vector<std::string> tokens;
    std::vector<std::int32_t> types;
    std::vector<std::string> merges;
    tokenizer_data rest;

    token add(std::string text, token_type type) {
        tokens.push_back(std::move(text));
        types.push_back(static_cast<std::int32_t>(type));
        return static_cast<token>(tokens.size() - 1);
    }

    [[nodiscard]] tokenizer make() const {
        const std::vector<std::string_view> token_views(tokens.begin(), tokens.end());
        const std::vector<std::string_view> merge_views(merges.begin(), merges.end());
        tokenizer_data data = rest;
        data.tokens = token_views;
        data.types = types;
        data.merges = merge_views;
        return tokenizer(data);
    }
};

inline constexpr const char* demo_control_tokens[] = {"[BOS]",
                                                      "[EOS]",
                                                      "<|im_end|>",
                                                      "<|im_user|>",
                                                      "<|im_assistant|>",
                                                      "<|start_header_id|>",
                                                      "<|end_header_id|>",
                                                      "[EOT]",
                                                      "<|im_system|>",
                                                      "<|tool_calls_section_begin|>",
                                                      "<|tool_calls_section_end|>",
                                                      "<|tool_call_begin|>",
                                                      "<|tool_call_argument_begin|>",
                                                      "<|tool_call_end|>",
                                                      "<|im_middle|>",
                                                      "[UNK]",
                                                      "[PAD]"};

/// The demonstration model's vocabulary: 4079 ranks, one "base64 rank" a line, and 17 control tokens. No merges.
inline vocabulary demo_vocabulary() {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    vocabulary demo;
    std::ifstream file(KEEL_TEST_DATA "/tokenizer/demo.tiktoken");
    std::string base64;
    std::size_t rank = 0;
    while (file >> base64 >> rank) {
        REQUIRE(rank == demo.tokens.size());
        std::string bytes;
        std::uint32_t bits = 0;
        int held = 0;
        for (const char c : base64) {
            if (c == '=') break;
            bits = bits << 6 | static_cast<std::uint32_t>(digits.find(c));
            held += 6;
            if (held < 8) continue;
            held -= 8;
            bytes += static_cast<char>(static_cast<unsigned char>(bits >> held));
        }
        demo.add(printable(bytes), token_type::normal);
    }
    REQUIRE(demo.tokens.size() == 4079);
    for (const char* name : demo_control_tokens) demo.add(name, token_type::control);
    return demo;
}

/// All bytes, "ab" (256), "abc" (257) with their merges, and [EOS] (258).
inline vocabulary small_vocabulary() {
    vocabulary small;
    for (int byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(static_cast<unsigned char>(byte));
        small.add(printable({&c, 1}), token_type::normal);
    }
    small.add("ab", token_type::normal);
    small.add("abc", token_type::normal);
    small.add("[EOS]", token_type::control);
    small.merges = {"a b", "ab c"};
    return small;
}

/// Runs f and checks that it throws a keel::error of this code whose message contains all of `parts`.
template <class F>
void check_error(errc code, std::initializer_list<std::string_view> parts, F&& f) {
    try {
        f();
    } catch (const error& e) {
        INFO(e.what());
        CHECK(e.code() == code);
        for (const std::string_view part : parts) {
            CAPTURE(part);
            CHECK(std::string_view(e.what()).find(part) != std::string_view::npos);
        }
        return;
    }
    FAIL_CHECK("no error was thrown");
}

}  // namespace keel::test
