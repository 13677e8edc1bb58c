// SPDX-License-Identifier: MIT
//
// The part of Unicode that tokenising needs: strict UTF-8 and seven properties of code points.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

#include <keel/core/compiler.hpp>
#include <keel/text/unicode_tables.hpp>

namespace keel::inline KEEL_ABI {

/// General category, white space and script of a code point, as far as the pre-tokenizer asks for them.
struct unicode_properties {
    enum : std::uint8_t {
        upper_bit = 1,         // Lu, Lt
        lower_bit = 2,         // Ll
        caseless_bit = 4,      // Lm, Lo
        mark_bit = 8,          // Mn, Mc, Me
        number_bit = 16,       // Nd, Nl, No
        white_space_bit = 32,  // property White_Space
        han_bit = 64,          // script Han
    };

    std::uint8_t bits = 0;

    constexpr bool upper() const { return (bits & upper_bit) != 0; }
    constexpr bool lower() const { return (bits & lower_bit) != 0; }
    constexpr bool letter() const { return (bits & (upper_bit | lower_bit | caseless_bit)) != 0; }
    constexpr bool mark() const { return (bits & mark_bit) != 0; }
    constexpr bool number() const { return (bits & number_bit) != 0; }
    constexpr bool white_space() const { return (bits & white_space_bit) != 0; }
    constexpr bool han() const { return (bits & han_bit) != 0; }
};

namespace detail {

constexpr unicode_properties search_properties(char32_t code_point) {
    const auto* next = std::upper_bound(std::begin(unicode_ranges), std::end(unicode_ranges),
                                        static_cast<std::uint32_t>(code_point) << 8 | 0xFFu);
    return {static_cast<std::uint8_t>(*(next - 1) & 0xFFu)};
}

// Latin text, and the Greek and Cyrillic alphabets, do without the search.
inline constexpr auto first_properties = [] {
    std::array<unicode_properties, 0x500> table{};
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = search_properties(static_cast<char32_t>(i));
    return table;
}();

}  // namespace detail

/// Unicode 15.0; unassigned code points have no property.
constexpr unicode_properties properties_of(char32_t code_point) {
    if (code_point < detail::first_properties.size()) return detail::first_properties[code_point];
    return detail::search_properties(code_point);
}

inline constexpr char32_t replacement_character = 0xFFFD;

/// What a position of a text holds: a well-formed UTF-8 sequence, or bytes that are not one.
struct utf8_unit {
    enum kind : std::uint8_t {
        valid,
        invalid,    // the bytes cannot begin any well-formed sequence that the text continues with
        truncated,  // the text ends within a sequence that could still become well-formed
    };

    char32_t code_point = replacement_character;
    std::uint8_t length = 1;  ///< bytes; of an ill-formed unit, those that one U+FFFD stands for when shown
    kind what = invalid;
};

/// Decodes strictly (no overlong forms, no surrogates, nothing above U+10FFFF); `at` < text.size().
constexpr utf8_unit decode_utf8(std::string_view text, std::size_t at) {
    const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
    const std::uint8_t lead = byte(at);
    if (lead < 0x80) return {lead, 1, utf8_unit::valid};
    if (lead < 0xC2 || lead > 0xF4) return {};

    const std::uint8_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    char32_t code_point = lead & (0x7Fu >> length);
    // The lead byte narrows the range of the second one; that alone rules out what strict decoding must refuse.
    std::uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    std::uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (std::uint8_t i = 1; i < length; ++i) {
        if (text.size() - at == i) return {replacement_character, i, utf8_unit::truncated};
        if (byte(at + i) < low || byte(at + i) > high) return {replacement_character, i, utf8_unit::invalid};
        code_point = code_point << 6 | (byte(at + i) & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    return {code_point, length, utf8_unit::valid};
}

}  // namespace keel::inline KEEL_ABI
