// SPDX-License-Identifier: MIT
//
// The metadata of a GGUF file: keys with typed values.
//
// On disk an entry is
//
//     key    string
//     type   u32        one of gguf_type
//     value             a scalar:  its bytes, little-endian; a bool is one byte, 0 or 1
//                       a string:  length u64, then that many bytes, no terminator
//                       an array:  element type u32, count u64, then the elements packed one after the other
//
// Nothing is aligned. Arrays of arrays exist in the written specification only; no reader takes them.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

static_assert(std::endian::native == std::endian::little, "keel reads little-endian files in place");

/// Type of a metadata value; the values are the ids in the file.
enum class gguf_type : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

constexpr std::string_view to_string(gguf_type type) {
    constexpr std::string_view names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                          "bool", "string", "array", "u64", "i64", "f64"};
    return names[static_cast<std::uint32_t>(type)];
}

/// A C++ type that a metadata scalar can have.
template <class T>
concept gguf_scalar = std::same_as<T, bool> || std::same_as<T, float> || std::same_as<T, double> ||
    (std::integral<T> && !std::same_as<T, char> && !std::same_as<T, wchar_t> && !std::same_as<T, char8_t> &&
     !std::same_as<T, char16_t> && !std::same_as<T, char32_t>);

template <gguf_scalar T>
constexpr gguf_type gguf_type_of() {
    constexpr bool is_signed = std::signed_integral<T>;
    if constexpr (std::same_as<T, bool>) return gguf_type::boolean;
    if constexpr (std::floating_point<T>) return sizeof(T) == 4 ? gguf_type::f32 : gguf_type::f64;
    if constexpr (sizeof(T) == 1) return is_signed ? gguf_type::i8 : gguf_type::u8;
    if constexpr (sizeof(T) == 2) return is_signed ? gguf_type::i16 : gguf_type::u16;
    if constexpr (sizeof(T) == 4) return is_signed ? gguf_type::i32 : gguf_type::u32;
    return is_signed ? gguf_type::i64 : gguf_type::u64;
}

/// Calls f with a value of the C++ type of `type`: f(std::type_identity<std::uint8_t>{}) and so on; for a string or an
/// array f(std::type_identity<void>{}).
template <class F>
constexpr decltype(auto) visit_scalar_type(gguf_type type, F&& f) {
    switch (type) {
        case gguf_type::u8:
            return f(std::type_identity<std::uint8_t>{});
        case gguf_type::i8:
            return f(std::type_identity<std::int8_t>{});
        case gguf_type::u16:
            return f(std::type_identity<std::uint16_t>{});
        case gguf_type::i16:
            return f(std::type_identity<std::int16_t>{});
        case gguf_type::u32:
            return f(std::type_identity<std::uint32_t>{});
        case gguf_type::i32:
            return f(std::type_identity<std::int32_t>{});
        case gguf_type::f32:
            return f(std::type_identity<float>{});
        case gguf_type::boolean:
            return f(std::type_identity<bool>{});
        case gguf_type::u64:
            return f(std::type_identity<std::uint64_t>{});
        case gguf_type::i64:
            return f(std::type_identity<std::int64_t>{});
        case gguf_type::f64:
            return f(std::type_identity<double>{});
        case gguf_type::string:
        case gguf_type::array:
            break;
    }
    return f(std::type_identity<void>{});
}

/// Bytes of a scalar; 0 for strings and arrays.
constexpr std::size_t scalar_bytes(gguf_type type) {
    return visit_scalar_type(type, []<class T>(std::type_identity<T>) -> std::size_t {
        if constexpr (std::is_void_v<T>)
            return 0;
        else
            return sizeof(T);
    });
}

class gguf_array;

namespace detail {
class gguf_reader;
}

/// One entry of the metadata. Owned by the gguf it comes from; what it returns points into the mapped file.
/// The as_... functions throw errc::format, naming file and key, if the value is of another kind or out of range.
class gguf_value {
public:
    [[nodiscard]] std::string_view key() const noexcept { return key_; }
    [[nodiscard]] gguf_type type() const noexcept { return type_; }

    /// The encoded value, without key and type: what a writer copies to keep it exactly.
    [[nodiscard]] std::span<const std::byte> raw() const noexcept { return raw_; }

    /// Any integer type, not negative, at most `max`.
    [[nodiscard]] std::uint64_t as_uint(std::uint64_t max = std::numeric_limits<std::uint64_t>::max()) const {
        const std::uint64_t value = number<std::uint64_t>(type_, raw_.data());
        if (value > max) fail("is " + std::to_string(value) + ", more than the allowed " + std::to_string(max));
        return value;
    }
    /// Any integer type.
    [[nodiscard]] std::int64_t as_int() const { return number<std::int64_t>(type_, raw_.data()); }
    /// f32 (exact) or f64.
    [[nodiscard]] double as_float() const { return number<double>(type_, raw_.data()); }
    [[nodiscard]] bool as_bool() const { return number<bool>(type_, raw_.data()); }
    /// UTF-8 by convention only; may hold any byte.
    [[nodiscard]] std::string_view as_string() const {
        if (type_ != gguf_type::string) fail_kind("a string");
        return {reinterpret_cast<const char*>(raw_.data()) + 8, raw_.size() - 8};
    }
    [[nodiscard]] gguf_array as_array() const;

    /// What it takes besides the bytes of the file.
    [[nodiscard]] std::size_t memory_bytes() const noexcept {
        return sizeof *this + strings_.capacity() * sizeof(std::string_view);
    }

    /// Throws errc::format about this key; for checks that its reader knows about.
    [[noreturn]] void fail(std::string_view what) const {
        throw error(errc::format, *file_, std::string("key ").append(key_).append(" ").append(what));
    }

private:
    friend class gguf_array;
    friend class detail::gguf_reader;

    [[noreturn]] void fail_kind(std::string_view needed) const {
        const auto kind = type_ == gguf_type::array ? "an array of " + std::string(to_string(element_type_))
                                                    : "of type " + std::string(to_string(type_));
        fail("is " + kind + ", " + std::string(needed) + " is needed");
    }

    /// The scalar of type `stored` at `at`, as a To.
    template <class To>
    [[nodiscard]] To number(gguf_type stored, const std::byte* at) const {
        return visit_scalar_type(stored, [&]<class T>(std::type_identity<T>) -> To {
            constexpr bool integers = std::integral<T> && std::integral<To> && !std::same_as<T, bool>;
            if constexpr (std::same_as<To, bool> ? std::same_as<T, bool>
                                                 : integers || (std::floating_point<T> && std::floating_point<To>)) {
                T value;
                std::memcpy(&value, at, sizeof value);
                if constexpr (integers) {
                    if (!std::in_range<To>(value)) {
                        fail("holds " + std::to_string(value) + ", which is " +
                             (std::cmp_less(value, 0) ? "negative" : "too large"));
                    }
                }
                return static_cast<To>(value);
            } else {
                fail_kind(std::same_as<To, bool>       ? "a bool"
                          : std::floating_point<To>    ? "a floating-point number"
                          : std::unsigned_integral<To> ? "a non-negative integer"
                                                       : "an integer");
            }
        });
    }

    std::string_view key_;
    gguf_type type_ = gguf_type::u8;
    gguf_type element_type_ = gguf_type::u8;  // of an array
    std::span<const std::byte> raw_;
    std::vector<std::string_view> strings_;  // of an array of strings
    const std::string* file_ = nullptr;
};

/// The elements of an array value. A pointer: copy it freely; valid as long as the storage of its gguf.
/// Access to an element throws errc::format, naming file and key, for another kind or a value out of range, and
/// errc::argument for a position outside of the array.
class gguf_array {
public:
    [[nodiscard]] gguf_type element_type() const noexcept { return value_->element_type_; }
    [[nodiscard]] index size() const noexcept {
        std::uint64_t count;
        std::memcpy(&count, value_->raw_.data() + 4, sizeof count);
        return static_cast<index>(count);
    }

    [[nodiscard]] std::uint64_t uint_at(index i) const { return number<std::uint64_t>(i); }
    [[nodiscard]] std::int64_t int_at(index i) const { return number<std::int64_t>(i); }
    [[nodiscard]] double float_at(index i) const { return number<double>(i); }
    [[nodiscard]] bool bool_at(index i) const { return number<bool>(i); }
    /// All strings of an array of strings; none is copied.
    [[nodiscard]] std::span<const std::string_view> strings() const {
        if (element_type() != gguf_type::string) value_->fail_kind("an array of strings");
        return value_->strings_;
    }

private:
    friend class gguf_value;
    explicit gguf_array(const gguf_value& value) : value_(&value) {}

    template <class To>
    [[nodiscard]] To number(index i) const {
        if (i < 0 || i >= size()) {
            throw error(errc::argument, value_->key_, "has no element " + std::to_string(i));
        }
        const std::size_t step = scalar_bytes(element_type());
        return value_->number<To>(element_type(), value_->raw_.data() + 12 + static_cast<std::size_t>(i) * step);
    }

    const gguf_value* value_;
};

inline gguf_array gguf_value::as_array() const {
    if (type_ != gguf_type::array) fail_kind("an array");
    return gguf_array(*this);
}

}  // namespace keel::inline KEEL_ABI
