// SPDX-License-Identifier: MIT
//
// Reader of tiktoken.model, the vocabulary of Kimi's Hugging Face checkpoints: one line "BASE64 RANK" per ordinary
// token. The ranks are the ids; whoever has the lower rank is merged first.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/text/byte_pairs.hpp>

namespace keel::inline KEEL_ABI {

/// The ordinary tokens of a vocabulary as GGUF files store them, in printable form.
struct byte_pair_vocabulary {
    std::vector<std::string> tokens;  ///< by id
    std::vector<std::string> merges;  ///< "left right", by priority
};

namespace detail {

/// Appends what padded base64 stands for; false if it is not that.
inline bool append_base64(std::string_view text, std::string& out) {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (text.empty() || text.size() % 4 != 0) return false;
    const std::size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < text.size() - padding; ++i) {
        const std::size_t digit = digits.find(text[i]);
        if (digit == digits.npos) return false;
        bits = bits << 6 | static_cast<std::uint32_t>(digit);
        // Of four digits, each but the first completes a byte and leaves 4, 2 or 0 bits over.
        if (i % 4 > 0) out.push_back(static_cast<char>(bits >> (6 - 2 * (i % 4)) & 0xFFu));
    }
    return true;
}

/// Appends bytes in printable form: the inverse of append_bytes.
inline void append_printable(std::string_view bytes, std::string& out) {
    static constexpr auto character_of_byte = [] {
        std::array<std::uint16_t, 256> table{};
        for (std::size_t c = 0; c < byte_of_character.size(); ++c) {
            if (byte_of_character[c] >= 0)
                table[static_cast<std::size_t>(byte_of_character[c])] = static_cast<std::uint16_t>(c);
        }
        return table;
    }();
    for (const char byte : bytes) {
        const unsigned c = character_of_byte[static_cast<unsigned char>(byte)];
        if (c < 0x80) {
            out.push_back(static_cast<char>(c));
        } else {
            out.push_back(static_cast<char>(0xC0u | c >> 6));
            out.push_back(static_cast<char>(0x80u | (c & 0x3Fu)));
        }
    }
}

inline std::string printable(std::string_view bytes) {
    std::string out;
    append_printable(bytes, out);
    return out;
}

/// The bytes of all tokens, by rank.
inline std::vector<std::string> tiktoken_bytes(std::string_view text, std::string_view subject) {
    std::vector<std::string> tokens;
    std::size_t lines = 0;
    for (std::size_t begin = 0; begin < text.size();) {
        const std::size_t end = std::min(text.find('\n', begin), text.size());
        std::string_view line = text.substr(begin, end - begin);
        begin = end + 1;
        ++lines;
        if (line.ends_with('\r')) line.remove_suffix(1);
        if (line.empty()) continue;

        const auto refuse = [&](std::string_view what) {
            throw error(errc::format, subject, "line " + std::to_string(lines) + " " + std::string(what));
        };
        const std::size_t space = line.find(' ');
        std::string bytes;
        if (space == line.npos || !append_base64(line.substr(0, space), bytes)) {
            refuse("does not begin with a token in base64");
        }
        const std::string_view digits = line.substr(space + 1);
        std::uint32_t rank = 0;
        const auto [rest, failure] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
        if (failure != std::errc{} || rest != digits.data() + digits.size()) refuse("does not end in a rank");

        // A file lists n tokens in at least 3 n bytes, so that this bounds what is allocated.
        if (rank >= text.size()) refuse("has the rank " + std::string(digits) + ", which leaves gaps");
        if (rank >= tokens.size()) tokens.resize(rank + 1);
        if (!tokens[rank].empty()) refuse("repeats the rank " + std::string(digits));
        tokens[rank] = std::move(bytes);
    }
    return tokens;
}

}  // namespace detail

/// Reads a tiktoken file that is in memory; `subject` is what messages call it. A merge is derived for every token
/// that the merges before it build from two parts, which is all of them in the released vocabularies.
/// Throws errc::format for lines that are damaged, ranks with gaps or duplicates, equal tokens, and bytes without a
/// token.
inline byte_pair_vocabulary read_tiktoken(std::string_view text, std::string_view subject) {
    const auto refuse = [&](const std::string& what) { throw error(errc::format, subject, what); };
    const std::vector<std::string> bytes = detail::tiktoken_bytes(text, subject);
    if (bytes.empty()) refuse("holds no tokens");

    byte_pair_vocabulary out;
    out.tokens.reserve(bytes.size());
    detail::token_texts texts;
    detail::token_index by_text(bytes.size());
    for (std::size_t rank = 0; rank < bytes.size(); ++rank) {
        if (bytes[rank].empty()) refuse("has no token of rank " + std::to_string(rank) + ", but higher ones");
        texts.add([&](std::string& buffer) { buffer += bytes[rank]; });
        const token id = static_cast<token>(rank);
        if (const token same = by_text.insert(id, texts); same != id) {
            refuse("ranks " + std::to_string(same) + " and " + std::to_string(id) + " are the same token");
        }
        out.tokens.push_back(detail::printable(bytes[rank]));
    }
    std::array<token, 256> byte_tokens;
    for (std::size_t byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(byte);
        byte_tokens[byte] = by_text.find({&c, 1}, texts);
        if (byte_tokens[byte] < 0) refuse("has no token for the byte " + std::to_string(byte));
    }

    detail::merge_table merges(bytes.size());
    detail::pair_merger merger;
    std::vector<token> parts;
    for (token id = 0; id < static_cast<token>(bytes.size()); ++id) {
        parts.clear();
        merger.merge(texts[id], byte_tokens, merges, parts);
        if (parts.size() != 2) continue;
        merges.add(parts[0], parts[1], id);
        out.merges.push_back(out.tokens[static_cast<std::size_t>(parts[0])] + " " +
                             out.tokens[static_cast<std::size_t>(parts[1])]);
    }
    return out;
}

}  // namespace keel::inline KEEL_ABI
