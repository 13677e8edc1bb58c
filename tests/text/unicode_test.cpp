// SPDX-License-Identifier: MIT
#include <keel/text/unicode.hpp>

#include <cstdint>
#include <string>

#include "catch.hpp"
#include "text/vocabulary.hpp"

namespace keel::test {

namespace {

struct set_size {
    int code_points = 0;
    int ranges = 0;

    friend bool operator==(const set_size&, const set_size&) = default;
};

/// Code points of a set and the runs that they form.
template <class Contains>
set_size size_of_set(Contains contains) {
    set_size size;
    bool inside = false;
    for (char32_t c = 0; c < 0x110000; ++c) {
        const bool in = contains(properties_of(c));
        size.code_points += in;
        size.ranges += in && !inside;
        inside = in;
    }
    return size;
}

bool cased_head(unicode_properties p) {
    return (p.upper() || (p.letter() && !p.upper() && !p.lower()) || p.mark()) && !p.han();
}
bool cased_tail(unicode_properties p) { return ((p.letter() && !p.upper()) || p.mark()) && !p.han(); }

}  // namespace

TEST_CASE("the sets have the sizes of Unicode 15.0") {
    CHECK(size_of_set([](unicode_properties p) { return p.letter(); }) == set_size{136'104, 659});
    CHECK(size_of_set([](unicode_properties p) { return p.number(); }) == set_size{1'831, 137});
    CHECK(size_of_set([](unicode_properties p) { return p.mark(); }) == set_size{2'450, 310});
    CHECK(size_of_set([](unicode_properties p) { return p.han(); }) == set_size{98'408, 21});
    CHECK(size_of_set([](unicode_properties p) { return p.white_space(); }) == set_size{25, 10});
    CHECK(size_of_set(cased_head) == set_size{38'256, 1'252});
    CHECK(size_of_set(cased_tail) == set_size{38'627, 1'237});
}

TEST_CASE("properties of code points that are easily taken for something else") {
    CHECK(properties_of(U'々').han());
    CHECK(properties_of(U'々').letter());
    CHECK(properties_of(U'〇').han());
    CHECK(properties_of(U'〇').number());
    CHECK_FALSE(properties_of(U'ー').han());
    CHECK_FALSE(properties_of(U'〆').han());
    CHECK(properties_of(0x1C5).upper());  // Dž, a title-case letter
    CHECK(properties_of(0xA0).white_space());
    for (const char32_t c : {U'\x1C', U'\u180E', U'\u200B', U'\u2060', U'\uFEFF'})
        CHECK_FALSE(properties_of(c).white_space());
    for (const char32_t c : {U'\u0378', U'\uFFFD', U'\uE000', U'\U0010FFFF'}) CHECK(properties_of(c).bits == 0);
}

TEST_CASE("every code point survives encoding and decoding, except surrogates") {
    bool right = true;
    for (char32_t c = 0; c < 0x110000; ++c) {
        const std::string text = utf8(c) + "x";
        const utf8_unit unit = decode_utf8(text, 0);
        const bool surrogate = c >= 0xD800 && c < 0xE000;
        right &= surrogate
                     ? unit.what == utf8_unit::invalid
                     : unit.what == utf8_unit::valid && unit.code_point == c && unit.length + 1 == int(text.size());
    }
    CHECK(right);
}

TEST_CASE("decoding accepts exactly the shortest forms of scalar values") {
    // Every four bytes from the borders of the ranges that matter, against a decoder that only counts leading ones.
    constexpr unsigned char borders[] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF,
                                         0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF8, 0xFF};
    int wrong = 0;
    for (const unsigned char a : borders) {
        for (const unsigned char b : borders) {
            for (const unsigned char c : borders) {
                for (const unsigned char d : borders) {
                    const unsigned char bytes[] = {a, b, c, d};
                    const std::string text(std::begin(bytes), std::end(bytes));
                    const std::size_t length = a < 0x80 ? 1 : a < 0xE0 ? 2 : a < 0xF0 ? 3 : 4;
                    char32_t value = length == 1 ? a : a & (0xFFu >> (length + 1));
                    for (std::size_t i = 1; i < length; ++i) value = value << 6 | (bytes[i] & 63u);
                    const bool scalar = value < 0xD800 || (value >= 0xE000 && value < 0x110000);
                    const bool good = scalar && utf8(value) == text.substr(0, length);
                    const utf8_unit unit = decode_utf8(text, 0);
                    if (good) {
                        wrong += unit.what != utf8_unit::valid || unit.code_point != value || unit.length != length;
                    } else {
                        wrong += unit.what != utf8_unit::invalid || unit.code_point != replacement_character;
                    }
                }
            }
        }
    }
    CHECK(wrong == 0);
}

TEST_CASE("a text that ends within a character is told from one that is wrong") {
    for (const char* text : {"\xC3", "\xE4", "\xE4\xBD", "\xF0", "\xF0\x9F", "\xF0\x9F\x98", "\xED\x9F", "\xF4\x8F"}) {
        const utf8_unit unit = decode_utf8(text, 0);
        CHECK(unit.what == utf8_unit::truncated);
        CHECK(unit.length == std::string(text).size());
    }
    for (const char* text : {"\x80", "\xC0", "\xC1", "\xE0\x9F", "\xED\xA0", "\xF0\x8F", "\xF4\x90", "\xF5", "\xFF"}) {
        const utf8_unit unit = decode_utf8(text, 0);
        CHECK(unit.what == utf8_unit::invalid);
        CHECK(unit.length == 1);
    }
    CHECK(decode_utf8("\xF0\x9F\x98 ", 0).length == 3);  // one U+FFFD for the whole beginning
}

}  // namespace keel::test
