// SPDX-License-Identifier: MIT
#include <keel/text/text_stream.hpp>

#include <string>
#include <string_view>
#include <vector>

#include "catch.hpp"
#include "text/vocabulary.hpp"

namespace keel::test {

namespace {

// In the small vocabulary the first 256 tokens are the bytes.
const tokenizer& bytes_only() {
    static const tokenizer made = small_vocabulary().make();
    return made;
}

std::vector<std::string> push_bytes(text_stream& stream, std::string_view bytes) {
    std::vector<std::string> parts;
    for (const char c : bytes) parts.emplace_back(stream.push(static_cast<unsigned char>(c)));
    return parts;
}

std::string shown(std::string_view bytes) {
    text_stream stream(bytes_only());
    std::string out;
    for (const std::string& part : push_bytes(stream, bytes)) out += part;
    out += stream.flush();
    return out;
}

}  // namespace

TEST_CASE("characters come out whole, with their last byte") {
    text_stream stream(bytes_only());
    const auto parts = push_bytes(stream, "a\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80!");
    CHECK(parts == std::vector<std::string>{"a", "", "é", "", "", "中", "", "", "", "😀", "!"});
    CHECK(stream.flush().empty());
}

TEST_CASE("each part is valid by itself and joined they are the text") {
    const std::string text = "Schöne Grüße, 你好世界, Привет 👨‍👩‍👧 \xEF\xBF\xBD\x00end";
    text_stream stream(bytes_only());
    std::string joined;
    for (const std::string& part : push_bytes(stream, text)) {
        for (std::size_t i = 0; i < part.size();) {
            const utf8_unit unit = decode_utf8(part, i);
            CHECK(unit.what == utf8_unit::valid);
            i += unit.length;
        }
        joined += part;
    }
    CHECK(joined == text);
}

TEST_CASE("bytes that cannot become a character are replaced as soon as that is certain") {
    const std::string r = "\uFFFD";
    CHECK(shown("\x80") == r);
    CHECK(shown("a\xFFz") == "a" + r + "z");
    CHECK(shown("\xC0\xAF") == r + r);                  // overlong
    CHECK(shown("\xED\xA0\x80") == r + r + r);          // surrogate
    CHECK(shown("\xF4\x90\x80\x80") == r + r + r + r);  // above U+10FFFF
    // The example of the Unicode standard, section 3.9 (replacement of maximal subparts).
    CHECK(shown("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41") == r + r + r + r + "A");

    text_stream stream(bytes_only());
    CHECK(push_bytes(stream,
                     "\xF0\x9F"
                     "a") == std::vector<std::string>{"", "", r + "a"});
    CHECK(push_bytes(stream, "\xE4\xE4\xB8\xAD") == std::vector<std::string>{"", r, "", "中"});
}

TEST_CASE("flushing gives up on what is incomplete and starts anew") {
    text_stream stream(bytes_only());
    CHECK(push_bytes(stream, "x\xF0\x9F\x98") == std::vector<std::string>{"x", "", "", ""});
    CHECK(stream.flush() == "\uFFFD");
    CHECK(stream.flush().empty());
    CHECK(push_bytes(stream, "\x80") == std::vector<std::string>{"\uFFFD"});
}

TEST_CASE("control tokens are silent, or shown on request, and do not break a character") {
    text_stream silent(bytes_only());
    CHECK(silent.push(258).empty());
    CHECK(silent.push(0xC3).empty());
    CHECK(silent.push(258).empty());
    CHECK(silent.push(0xA9) == "é");

    text_stream loud(bytes_only(), true);
    CHECK(loud.push(258) == "[EOS]");
    CHECK(loud.push(257) == "abc");
    check_error(errc::argument, {"token 259"}, [&] { (void)loud.push(259); });
}

}  // namespace keel::test
