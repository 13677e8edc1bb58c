// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include <nlohmann/json.hpp>

#include "support.hpp"

#include <keel/io/json.hpp>

using keel::errc;
using keel::json;
using namespace keel_test;

namespace {

json parse(std::string_view text) { return json::parse(text, "config.json"); }

void expect_refused(std::string_view text, std::size_t byte, std::string_view what = "") {
    CAPTURE(text);
    expect_error(errc::format, {"config.json: ", "at byte " + std::to_string(byte), what}, [&] { (void)parse(text); });
}

/// The same value as another reader sees it; keel's numbers become doubles unless they are exact.
bool same(const json& a, const nlohmann::ordered_json& b) {
    if (a.is_null()) return b.is_null();
    if (a.is_bool()) return b.is_boolean() && a.as_bool() == b.get<bool>();
    if (a.is_string()) return b.is_string() && a.as_string() == b.get<std::string>();
    if (a.is_number()) {
        if (b.is_number_integer() && a.as_int() != b.get<std::int64_t>()) return false;
        return b.is_number() && a.as_double() == b.get<double>();
    }
    if (a.is_array()) {
        if (!b.is_array() || a.as_array().size() != b.size()) return false;
        for (std::size_t i = 0; i < b.size(); ++i) {
            if (!same(a.as_array()[i], b[i])) return false;
        }
        return true;
    }
    if (!b.is_object() || a.as_object().size() != b.size()) return false;
    auto other = b.begin();
    for (const auto& [key, value] : a.as_object()) {
        if (key != other.key() || !same(value, other.value()) || !same(*a.find(key), other.value())) return false;
        ++other;
    }
    return true;
}

}  // namespace

TEST_CASE("json is read as another reader reads it, members in order") {
    for (const std::string text : {
             "null",
             "true",
             "false",
             "0",
             "-0",
             "1",
             "-1.5",
             "1e3",
             "1E+3",
             "0.1e-7",
             "123456789012345678",
             "\"\"",
             "[]",
             "{}",
             " \t\r\n[ ] \n",
             "{ \"z\" : 1 , \"a\" : [ 2 , { \"\" : null } ] , \"m\" : \"x\" }",
             R"("\"\\\/\b\f\n\r\t")",
             R"("\u0041\u00e9\u20AC\ud83d\ude00\uDBFF\uDFFF")",
             "\"caf\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80 \x7F\"",
             R"([1, [2, [3, [4]]], {"a": {"b": {"c": []}}}])",
             R"({"rope_theta": 10000.0, "eps": 1e-05, "n": -27})",
         }) {
        CAPTURE(text);
        CHECK(same(parse(text), nlohmann::ordered_json::parse(text)));
    }
}

TEST_CASE("numbers are exact where they can be") {
    CHECK(parse("9223372036854775807").as_int() == std::numeric_limits<std::int64_t>::max());
    CHECK(parse("-9223372036854775808").as_int() == std::numeric_limits<std::int64_t>::min());
    CHECK(parse("9007199254740993").as_int() == 9007199254740993);  // no double
    CHECK(parse("0.1").as_double() == 0.1);
    CHECK(parse("1.7976931348623157e308").as_double() == std::numeric_limits<double>::max());
    CHECK(std::signbit(parse("-0").as_double()));
    CHECK(parse("9223372036854775808").as_double() == 0x1p63);
    for (const std::string_view text : {"9223372036854775808", "-9223372036854775809", "1.0", "1e2"}) {
        expect_error(errc::format, {"config.json", "not an integer of 64 bits"}, [&] { (void)parse(text).as_int(); });
    }
    expect_refused("[1e999]", 6, "no double can hold");
}

TEST_CASE("access to json of another kind is refused by place") {
    const auto document = parse(R"({"a": {"b": [1, "x", 2.5]}, "c": true})");
    const auto& list = document.require("a").require("b");
    REQUIRE(list.as_array().size() == 3);
    CHECK(list.as_array()[1].as_string() == "x");
    CHECK(document.find("b") == nullptr);
    CHECK(document.require("c").as_bool());
    const auto refused = [&](std::string_view where, std::string_view what, auto access) {
        expect_error(errc::format, {"config.json: value at byte ", where, what}, [&] { (void)access(); });
    };
    refused("byte 0 ", "has no key b", [&] { return &document.require("b"); });
    refused("byte 6 ", "has no key x", [&] { return &document.require("a").require("x"); });
    refused("byte 12 ", "is not an object", [&] { return list.find("x"); });
    refused("byte 12 ", "is not a string", [&] { return list.as_string(); });
    refused("byte 16 ", "is not a number", [&] { return list.as_array()[1].as_double(); });
    refused("byte 16 ", "is not an integer", [&] { return list.as_array()[1].as_int(); });
    refused("byte 21 ", "is not an integer", [&] { return list.as_array()[2].as_int(); });
    refused("byte 21 ", "is not a boolean", [&] { return list.as_array()[2].as_bool(); });
    refused("byte 33 ", "is not an array", [&] { return document.require("c").as_array(); });
    refused("byte 33 ", "is not an object", [&] { return document.require("c").as_object(); });
}

TEST_CASE("what is not json is refused with its position") {
    expect_refused("", 0, "value is expected");
    expect_refused("  ", 2);
    expect_refused("\xEF\xBB\xBF{}", 0);
    expect_refused("nul", 0);
    expect_refused("nulls", 4, "after the value");
    expect_refused("{} {}", 3, "after the value");
    expect_refused("[1,]", 3);
    expect_refused("[1 2]", 3, "comma or a closing bracket");
    expect_refused("[1", 2);
    expect_refused("]", 0);
    expect_refused("{\"a\" 1}", 5, "colon");
    expect_refused("{\"a\":1,}", 7, "key in quotes");
    expect_refused("{a:1}", 1);
    expect_refused("{\"a\":1 \"b\":2}", 7, "closing brace");
    expect_refused("{\"a\":}", 5);
    expect_refused("{\"a\":1,\"b\":2,\"a\":3}", 19, "key a occurs twice");
    expect_refused("{\"a\":1,\"\\u0061\":2}", 18, "key a occurs twice");
    expect_refused("// no\n1", 0);
    expect_refused("'a'", 0);
    for (const std::string_view text : {"01", "00"}) expect_refused(text, 1);
    for (const std::string_view text : {"-", "1.", "1e", "1e+", "-x", "1.e3", "-.5"}) {
        CAPTURE(text);
        expect_error(errc::format, {"digit is expected at byte"}, [&] { (void)parse(text); });
    }
    for (const std::string_view text : {".5", "+1", "NaN", "Infinity", "True"}) expect_refused(text, 0);
    expect_refused("-Infinity", 1);
    expect_refused("0x10", 1);
}

TEST_CASE("bad strings are refused with their position") {
    expect_refused("\"abc", 4, "without an end");
    expect_refused("\"a\nb\"", 2, "control character");
    expect_refused(std::string_view("\"a\0b\"", 5), 2, "control character");
    expect_refused("\"\\x41\"", 2, "unknown escape");
    expect_refused("\"\\", 2, "unknown escape");
    expect_refused("\"\\u12", 3, "hexadecimal");
    expect_refused("\"\\u12G4\"", 3, "hexadecimal");
    expect_refused("\"\\u-123\"", 3, "hexadecimal");
    for (const std::string_view text :
         {"\"\\uD800\"", "\"\\uDC00\"", "\"\\uD800x\"", "\"\\uD800\\n\"", "\"\\uD800\\uD800\"", "\"\\uD800\\u0041\"",
          "\"\\uDFFF\\uD800\"", "\"\\uDC00\\uDC00\""}) {
        CAPTURE(text);
        expect_error(errc::format, {"surrogate"}, [&] { (void)parse(text); });
    }
    // Continuation without lead, overlong forms, surrogates, beyond Unicode, cut short, bad continuation.
    for (const std::string_view text :
         {"\"\x80\"", "\"\xBF\"", "\"\xC0\x80\"", "\"\xC1\xBF\"", "\"\xE0\x9F\xBF\"", "\"\xED\xA0\x80\"",
          "\"\xED\xBF\xBF\"", "\"\xF0\x8F\xBF\xBF\"", "\"\xF4\x90\x80\x80\"", "\"\xF5\x80\x80\x80\"", "\"\xFF\"",
          "\"\xC3", "\"\xE2\x82", "\"\xF0\x9F\x98", "\"\xC3\"\"", "\"\xE2\x28\xA1\""}) {
        expect_refused(text, 1, "invalid UTF-8");
    }
    CHECK(parse("\"\\u0000\"").as_string() == std::string_view("\0", 1));
    for (const std::string_view text :
         {"\xED\x9F\xBF", "\xEE\x80\x80", "\xF4\x8F\xBF\xBF", "\xC2\x80", "\xE0\xA0\x80"}) {
        CHECK(parse("\"" + std::string(text) + "\"").as_string() == text);
    }
}

TEST_CASE("nesting is limited") {
    const auto nested = [](std::size_t n) { return std::string(n, '[') + std::string(n, ']'); };
    CHECK(parse(nested(129)).is_array());  // the innermost array is 128 deep
    expect_refused(nested(130), 129, "nested too deeply");
    expect_refused(std::string(1'000'000, '['), 129, "nested too deeply");
    std::string objects;
    for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
    expect_error(errc::format, {"nested too deeply"}, [&] { (void)parse(objects); });
}

TEST_CASE("json is read from files") {
    const scratch_folder folder;
    write_file(folder / "config.json", R"({"a": 1})");
    CHECK(json::parse_file(folder / "config.json").require("a").as_int() == 1);
    write_file(folder / "bad.json", R"({"a": 1)");
    expect_error(errc::format, {"bad.json", "at byte 7"}, [&] { (void)json::parse_file(folder / "bad.json"); });
    expect_error(errc::file, {"absent.json"}, [&] { (void)json::parse_file(folder / "absent.json"); });
}

TEST_CASE("a value outlives its document") {
    const auto value = parse(R"({"a": {"b": "text"}})").require("a");
    CHECK(value.require("b").as_string() == "text");
}

TEST_CASE("random damage to json is read as another reader reads it, or refused") {
    const std::string whole = R"({"a": [1, -2.5e3, true, null], "b\u00e9\ud83d\ude00": {"c": "caf)"
                              "\xC3\xA9"
                              R"(", "d": {}}})";
    std::mt19937 random(20252);
    int accepted = 0;
    for (int i = 0; i < 5000; ++i) {
        const auto damaged = mutated(whole, random);
        CAPTURE(damaged);
        const auto other = nlohmann::ordered_json::parse(damaged, nullptr, false);
        try {
            const auto value = parse(damaged);
            CHECK_FALSE(other.is_discarded());
            CHECK(same(value, other));
            ++accepted;
        } catch (const keel::error& e) {
            const bool duplicate = std::string_view(e.what()).find("twice") != std::string_view::npos;
            CHECK((other.is_discarded() || duplicate));
        }
    }
    CHECK(accepted > 50);
}
