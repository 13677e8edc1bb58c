// SPDX-License-Identifier: MIT
#include <cstddef>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include <keel/text/tiktoken.hpp>
#include <keel/text/tokenizer.hpp>

#include "catch.hpp"

namespace {

const std::string& file() {
    static const std::string text = [] {
        std::ifstream in(KEEL_TEST_DATA "/tokenizer/demo.tiktoken", std::ios::binary);
        return std::string{std::istreambuf_iterator<char>(in), {}};
    }();
    return text;
}

/// The file with the first occurrence of `from` replaced.
std::string changed(std::string_view from, std::string_view to) {
    std::string text = file();
    const auto at = text.find(from);
    REQUIRE(at != text.npos);
    return text.replace(at, from.size(), to);
}

void fails(const std::string& text, std::initializer_list<std::string_view> words) {
    std::string message = "nothing was thrown";
    try {
        keel::read_tiktoken(text, "the file");
    } catch (const keel::error& e) {
        CHECK(e.code() == keel::errc::format);
        message = e.what();
    }
    CAPTURE(message);
    CHECK(message.starts_with("the file: "));
    for (const auto word : words) CHECK(message.find(word) != message.npos);
}

}  // namespace

TEST_CASE("a tiktoken file gives tokens in printable form and a merge for each of several bytes") {
    const auto v = keel::read_tiktoken(file(), "the file");
    REQUIRE(v.tokens.size() == 4079);
    REQUIRE(v.merges.size() == 4079 - 256);
    CHECK(v.tokens[0] == "!");
    CHECK(v.tokens[256] == "\xC4\xA0t");  // " t"
    CHECK(v.merges[0] == "\xC4\xA0 t");
    CHECK(v.tokens[4076] == "\xC4\xA0hint");
    for (std::size_t i = 0; i < v.merges.size(); ++i) {  // merge i makes token 256 + i
        std::string joined = v.merges[i];
        joined.erase(joined.find(' '), 1);
        REQUIRE(joined == v.tokens[256 + i]);
    }
    std::string all_bytes, back;
    for (int byte = 0; byte < 256; ++byte) all_bytes.push_back(static_cast<char>(byte));
    CHECK(keel::detail::append_bytes(keel::detail::printable(all_bytes), back));
    CHECK(back == all_bytes);
}

TEST_CASE("base64 of every length") {
    const auto decoded = [](std::string_view text) {
        std::string out;
        return keel::detail::append_base64(text, out) ? out : "refused";
    };
    CHECK(decoded("Zg==") == "f");  // the vectors of RFC 4648
    CHECK(decoded("Zm8=") == "fo");
    CHECK(decoded("Zm9v") == "foo");
    CHECK(decoded("Zm9vYg==") == "foob");
    CHECK(decoded("Zm9vYmE=") == "fooba");
    CHECK(decoded("Zm9vYmFy") == "foobar");
    for (const char* bad : {"", "Zg", "Zg=", "====", "Z===", "Zg!=", "Zm9vYg=a", "Zg==Zg=="}) {
        CAPTURE(bad);
        CHECK(decoded(bad) == "refused");
    }
}

TEST_CASE("damaged tiktoken files are refused by line or rank") {
    fails("", {"no tokens"});
    fails(changed("Ig== 1\n", ""), {"no token of rank 1"});
    fails(changed("Ig== 1\n", "Ig== 2\n"), {"line 3", "repeats the rank 2"});
    fails(changed("Ig== 1\n", "Ig== 4000000000\n"), {"line 2", "4000000000"});
    fails(changed("Ig== 1\n", "Ig== 99999999999999\n"), {"line 2", "rank"});
    fails(changed("Ig== 1\n", "Ig== -1\n"), {"line 2", "rank"});
    fails(changed("Ig== 1\n", "Ig==\n"), {"line 2", "base64"});
    fails(changed("Ig== 1\n", "I*== 1\n"), {"line 2", "base64"});
    fails(changed("Ig== 1\n", "IQ== 1\n"), {"ranks 0 and 1"});
    fails("IQ== 0\nIg== 1\n", {"byte 0"});
    CHECK(keel::read_tiktoken(changed("Ig== 1\n", "Ig== 1\r\n\n"), "the file").tokens[1] == "\"");
}
