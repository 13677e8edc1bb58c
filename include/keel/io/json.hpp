// SPDX-License-Identifier: MIT
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/mapped_file.hpp>
#include <keel/io/name_index.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {
class json_parser;
}

/// A value read from JSON (RFC 8259), strictly: one value, valid UTF-8, no comments, no trailing commas, no duplicate
/// keys, no nesting deeper than 128. Immutable; members keep their order.
///
/// All errors are errc::format and name the file and the byte; the as_... functions throw for another kind.
class json {
public:
    struct member;

    /// `subject` is what messages call the text.
    static json parse(std::string_view text, std::string_view subject);

    /// Throws errc::file if the file cannot be read.
    static json parse_file(const std::filesystem::path& path) {
        const mapped_file file(path);
        const auto bytes = file.bytes();
        return parse({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path.string());
    }

    [[nodiscard]] bool is_null() const noexcept { return std::holds_alternative<std::nullptr_t>(value_); }
    [[nodiscard]] bool is_bool() const noexcept { return std::holds_alternative<bool>(value_); }
    [[nodiscard]] bool is_number() const noexcept { return std::holds_alternative<number>(value_); }
    [[nodiscard]] bool is_string() const noexcept { return std::holds_alternative<std::string>(value_); }
    [[nodiscard]] bool is_array() const noexcept { return std::holds_alternative<std::vector<json>>(value_); }
    [[nodiscard]] bool is_object() const noexcept {
        return std::holds_alternative<std::shared_ptr<const object>>(value_);
    }

    [[nodiscard]] bool as_bool() const { return get<bool>("a boolean"); }
    [[nodiscard]] double as_double() const { return get<number>("a number").value; }
    /// A number written without fraction and exponent that fits; exact.
    [[nodiscard]] std::int64_t as_int() const {
        const auto& exact = get<number>("an integer").exact;
        if (!exact) fail("is not an integer of 64 bits");
        return *exact;
    }
    /// UTF-8; may hold NUL.
    [[nodiscard]] std::string_view as_string() const { return get<std::string>("a string"); }
    [[nodiscard]] std::span<const json> as_array() const { return get<std::vector<json>>("an array"); }
    [[nodiscard]] std::span<const member> as_object() const;

    /// The value of a key of this object, or null.
    [[nodiscard]] const json* find(std::string_view key) const;

    /// The value of a key that this object must have.
    [[nodiscard]] const json& require(std::string_view key) const {
        const json* value = find(key);
        if (value == nullptr) fail("has no key " + std::string(key));
        return *value;
    }

    /// Throws errc::format about this value; for checks that its reader knows about.
    [[noreturn]] void fail(std::string_view what) const {
        throw error(errc::format, *subject_, "value at byte " + std::to_string(position_) + " " + std::string(what));
    }

private:
    friend class detail::json_parser;

    struct number {
        double value;
        std::optional<std::int64_t> exact;
    };
    struct object;

    template <class T>
    [[nodiscard]] const T& get(std::string_view kind) const {
        const T* value = std::get_if<T>(&value_);
        if (value == nullptr) fail("is not " + std::string(kind));
        return *value;
    }

    json(std::shared_ptr<const std::string> subject, std::size_t position)
        : subject_(std::move(subject)), position_(position) {}

    std::variant<std::nullptr_t, bool, number, std::string, std::vector<json>, std::shared_ptr<const object>> value_;
    std::shared_ptr<const std::string> subject_;
    std::size_t position_;
};

struct json::member {
    std::string key;
    json value;
};

struct json::object {
    std::vector<member> members;
    name_index<member, &member::key> by_key;
};

inline std::span<const json::member> json::as_object() const {
    return get<std::shared_ptr<const object>>("an object")->members;
}

inline const json* json::find(std::string_view key) const {
    const auto& self = *get<std::shared_ptr<const object>>("an object");
    const auto* found = self.by_key.find(self.members, key);
    return found != nullptr ? &found->value : nullptr;
}

namespace detail {

class json_parser {
public:
    json_parser(std::string_view text, std::string_view subject)
        : text_(text), subject_(std::make_shared<const std::string>(subject)) {}

    json document() {
        json root = value(0);
        skip_space();
        if (position_ != text_.size()) fail("unexpected text after the value");
        return root;
    }

private:
    static constexpr int deepest = 128;

    [[noreturn]] void fail(std::string_view what) const {
        throw error(errc::format, *subject_, std::string(what) + " at byte " + std::to_string(position_));
    }

    [[nodiscard]] bool at(char c) const { return position_ < text_.size() && text_[position_] == c; }

    [[nodiscard]] bool at_digit() const {
        return position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9';
    }

    bool accept(char c) {
        const bool there = at(c);
        if (there) ++position_;
        return there;
    }

    void expect(char c, std::string_view what) {
        if (!accept(c)) fail(what);
    }

    void skip_space() {
        while (at(' ') || at('\n') || at('\r') || at('\t')) ++position_;
    }

    json value(int depth) {
        if (depth > deepest) fail("nested too deeply");
        skip_space();
        json v(subject_, position_);
        if (at('{')) {
            v.value_ = object(depth);
        } else if (at('[')) {
            v.value_ = array(depth);
        } else if (at('"')) {
            v.value_ = string();
        } else if (at('-') || at_digit()) {
            v.value_ = number();
        } else if (accept_word("true")) {
            v.value_ = true;
        } else if (accept_word("false")) {
            v.value_ = false;
        } else if (!accept_word("null")) {
            fail("a value is expected");
        }
        return v;
    }

    bool accept_word(std::string_view word) {
        const bool there = text_.substr(position_).starts_with(word);
        if (there) position_ += word.size();
        return there;
    }

    std::shared_ptr<const json::object> object(int depth) {
        auto made = std::make_shared<json::object>();
        ++position_;
        skip_space();
        if (!accept('}')) {
            do {
                skip_space();
                if (!at('"')) fail("a key in quotes is expected");
                std::string key = string();
                skip_space();
                expect(':', "a colon is expected");
                made->members.push_back({std::move(key), value(depth + 1)});
                skip_space();
            } while (accept(','));
            expect('}', "a comma or a closing brace is expected");
        }
        made->by_key = decltype(made->by_key)(made->members);
        if (const auto* twice = made->by_key.duplicate(made->members))
            fail("key " + twice->key + " occurs twice in the object that ends");
        return made;
    }

    std::vector<json> array(int depth) {
        std::vector<json> made;
        ++position_;
        skip_space();
        if (accept(']')) return made;
        do {
            made.push_back(value(depth + 1));
            skip_space();
        } while (accept(','));
        expect(']', "a comma or a closing bracket is expected");
        return made;
    }

    json::number number() {
        const std::size_t start = position_;
        accept('-');
        if (!accept('0')) digits();
        bool integer = true;
        if (accept('.')) {
            integer = false;
            digits();
        }
        if (accept('e') || accept('E')) {
            integer = false;
            if (!accept('+')) accept('-');
            digits();
        }
        const char* first = text_.data() + start;
        const char* last = text_.data() + position_;
        json::number n{};
        if (std::from_chars(first, last, n.value).ec != std::errc{}) fail("a number that no double can hold ends");
        std::int64_t exact = 0;
        if (integer && std::from_chars(first, last, exact).ec == std::errc{}) n.exact = exact;
        return n;
    }

    void digits() {
        if (!at_digit()) fail("a digit is expected");
        while (at_digit()) ++position_;
    }

    std::string string() {
        std::string out;
        ++position_;
        while (!accept('"')) {
            if (position_ == text_.size()) fail("a string without an end");
            const auto c = static_cast<unsigned char>(text_[position_]);
            if (c < 0x20) fail("a control character in a string");
            if (c == '\\') {
                ++position_;
                escape(out);
            } else if (c < 0x80) {
                out.push_back(text_[position_++]);
            } else {
                out.append(multibyte());
            }
        }
        return out;
    }

    /// The UTF-8 sequence of two or more bytes here.
    std::string_view multibyte() {
        const auto lead = static_cast<unsigned char>(text_[position_]);
        const std::size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        const auto sequence = text_.substr(position_, size);
        if (lead < 0xC2 || lead > 0xF4 || sequence.size() < size) fail("invalid UTF-8");
        std::uint32_t code = lead & (0x7Fu >> size);
        for (const char c : sequence.substr(1)) {
            if ((static_cast<unsigned char>(c) & 0xC0u) != 0x80u) fail("invalid UTF-8");
            code = code << 6 | (static_cast<unsigned char>(c) & 0x3Fu);
        }
        const std::uint32_t smallest = size == 2 ? 0x80u : size == 3 ? 0x800u : 0x10000u;
        if (code < smallest || code > 0x10FFFFu || (code >= 0xD800u && code < 0xE000u)) fail("invalid UTF-8");
        position_ += size;
        return sequence;
    }

    void escape(std::string& out) {
        constexpr std::string_view letters = "\"\\/bfnrt";
        constexpr std::string_view meanings = "\"\\/\b\f\n\r\t";
        if (accept('u')) return append_utf8(out, code_point());
        const std::size_t which = position_ < text_.size() ? letters.find(text_[position_]) : letters.npos;
        if (which == letters.npos) fail("an unknown escape");
        out.push_back(meanings[which]);
        ++position_;
    }

    /// What follows a backslash and u: four hexadecimal digits, or two such escapes that form a surrogate pair.
    std::uint32_t code_point() {
        const std::uint32_t high = code_unit();
        if (high < 0xD800u || high >= 0xE000u) return high;
        if (high >= 0xDC00u || !accept('\\') || !accept('u')) fail("half of a surrogate pair");
        const std::uint32_t low = code_unit();
        if (low < 0xDC00u || low >= 0xE000u) fail("half of a surrogate pair");
        return 0x10000u + ((high - 0xD800u) << 10) + (low - 0xDC00u);
    }

    std::uint32_t code_unit() {
        const auto hex = text_.substr(position_, 4);
        std::uint32_t unit = 0;
        const auto [end, failure] = std::from_chars(hex.data(), hex.data() + hex.size(), unit, 16);
        if (failure != std::errc{} || end != hex.data() + 4) fail("four hexadecimal digits are expected");
        position_ += 4;
        return unit;
    }

    static void append_utf8(std::string& out, std::uint32_t code) {
        const auto put = [&](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
        if (code < 0x80u) return put(code);
        if (code < 0x800u) {
            put(0xC0u | code >> 6);
        } else {
            if (code < 0x10000u) {
                put(0xE0u | code >> 12);
            } else {
                put(0xF0u | code >> 18);
                put(0x80u | (code >> 12 & 0x3Fu));
            }
            put(0x80u | (code >> 6 & 0x3Fu));
        }
        put(0x80u | (code & 0x3Fu));
    }

    std::string_view text_;
    std::shared_ptr<const std::string> subject_;
    std::size_t position_ = 0;
};

}  // namespace detail

inline json json::parse(std::string_view text, std::string_view subject) {
    return detail::json_parser(text, subject).document();
}

}  // namespace keel::inline KEEL_ABI
