// SPDX-License-Identifier: MIT
//
// The pre-tokenizer of the Kimi family (GGUF: tokenizer.ggml.pre = "kimi-k2"): cuts a text into the pieces that
// byte-pair merging never crosses. The vendor's pattern is a regular expression of eight alternatives; the first one
// that matches at a position wins, and every text is matched without a gap:
//
//   1  [\p{Han}]+
//   2  [^\r\n\p{L}\p{N}]? U* W+ (?i:'s|'t|'re|'ve|'m|'ll|'d)?
//   3  [^\r\n\p{L}\p{N}]? U+ W* (?i:'s|'t|'re|'ve|'m|'ll|'d)?
//   4  \p{N}{1,3}
//   5   ?[^\s\p{L}\p{N}]+[\r\n]*
//   6  \s*[\r\n]+
//   7  \s+(?!\S)
//   8  \s+
//
// with U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] and W = [\p{Ll}\p{Lm}\p{Lo}\p{M}], both without Han. A letter without case
// and a mark are in both. Here it is a scanner that looks at each character a bounded number of times.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/text/unicode.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Finds the end of one piece. Bytes that are not UTF-8 count, each for itself, as a symbol.
class piece_scanner {
public:
    explicit piece_scanner(std::string_view text) : text_(text) {}

    /// The end of the piece that begins at `start`, which lies before the end of the text.
    std::size_t piece_end(std::size_t start) const {
        const character first = at(start);
        if (first.han()) return skip(start, [](character c) { return c.han(); });

        // A word, with one character before it that is neither letter nor number nor line break, or without one.
        // A mark may serve as that character, but may begin the word just as well.
        const bool can_lead = !first.letter() && !first.number() && !first.line_break();
        const word led = can_lead ? word_at(first.end) : word{};
        if (led.has_tail) return contraction_end(led.end);
        const word bare = first.in_head() || first.in_tail() ? word_at(start) : word{};
        if (bare.has_tail) return contraction_end(bare.end);
        if (led.end != 0) return contraction_end(led.end);
        if (bare.end != 0) return contraction_end(bare.end);

        if (first.number()) return number_end(first);

        // Symbols, with one space before them or without.
        const auto symbol = [](character c) { return c.symbol(); };
        const std::size_t symbols = first.code_point == U' ' ? first.end : start;
        if (symbols < text_.size() && at(symbols).symbol()) {
            return skip(skip(symbols, symbol), [](character c) { return c.line_break(); });
        }
        return white_space_end(start);
    }

private:
    struct character : unicode_properties {
        char32_t code_point;
        std::size_t end;

        bool line_break() const { return code_point == U'\r' || code_point == U'\n'; }
        bool symbol() const {
            return (bits & (white_space_bit | upper_bit | lower_bit | caseless_bit | number_bit)) == 0;
        }
        bool in_head() const { return !han() && (bits & (upper_bit | caseless_bit | mark_bit)) != 0; }  // U
        bool in_tail() const { return !han() && (bits & (lower_bit | caseless_bit | mark_bit)) != 0; }  // W
    };

    /// The letters of a word: alternative 2 if it has a tail, otherwise alternative 3, or nothing if `end` is 0.
    struct word {
        std::size_t end = 0;
        bool has_tail = false;
    };

    character at(std::size_t i) const {
        const utf8_unit unit = decode_utf8(text_, i);
        return {properties_of(unit.code_point), unit.code_point,
                i + (unit.what == utf8_unit::valid ? unit.length : 1u)};
    }

    template <class Predicate>
    std::size_t skip(std::size_t i, Predicate belongs) const {
        while (i < text_.size()) {
            const character c = at(i);
            if (!belongs(c)) break;
            i = c.end;
        }
        return i;
    }

    /// U* W+, or else U+. Greedy U* takes letters that are in both classes too and must give back as few as it can:
    /// the tail is then the last of them alone, because what follows it in the run is in U only.
    word word_at(std::size_t start) const {
        std::size_t i = start;
        std::size_t last_tail = 0;
        while (i < text_.size()) {
            const character c = at(i);
            if (!c.in_head()) {
                if (c.in_tail()) return {skip(c.end, [](character t) { return t.in_tail(); }), true};
                break;
            }
            i = c.end;
            if (c.in_tail()) last_tail = i;
        }
        if (last_tail != 0) return {last_tail, true};
        return {i > start ? i : 0, false};
    }

    /// Past 's, 't, 're, 've, 'm, 'll or 'd in any case, if one begins at `i`. U+017F, the long s, folds to s.
    std::size_t contraction_end(std::size_t i) const {
        if (i >= text_.size() || text_[i] != '\'') return i;
        const auto lower = [&](std::size_t k) {
            return i + k < text_.size() ? static_cast<char>(static_cast<unsigned char>(text_[i + k]) | 0x20u) : '\0';
        };
        const char a = lower(1);
        const char b = lower(2);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 3;
        if (text_.substr(i + 1, 2) == "\xC5\xBF") return i + 3;
        return i;
    }

    std::size_t number_end(character c) const {
        for (int digits = 1; digits < 3 && c.end < text_.size(); ++digits) {
            const character next = at(c.end);
            if (!next.number()) break;
            c = next;
        }
        return c.end;
    }

    /// Up to the last line break of the run; without one, all of it at the end of the text, and otherwise all but its
    /// last character, which belongs to what follows.
    std::size_t white_space_end(std::size_t start) const {
        std::size_t i = start;
        std::size_t last = start;  // where the run's last character begins
        std::size_t line_end = 0;
        while (i < text_.size()) {
            const character c = at(i);
            if (!c.white_space()) break;
            last = i;
            i = c.end;
            if (c.line_break()) line_end = i;
        }
        if (line_end != 0) return line_end;
        return i == text_.size() || last == start ? i : last;
    }

    std::string_view text_;
};

}  // namespace detail

/// Calls f(piece) for the pieces of `text` in order; they are views of it, none is empty, and joined they are `text`.
/// Linear time, no allocation.
template <class F>
void for_each_piece(std::string_view text, F&& f) {
    const detail::piece_scanner scanner(text);
    for (std::size_t begin = 0, end = 0; begin < text.size(); begin = end) {
        end = scanner.piece_end(begin);
        f(text.substr(begin, end - begin));
    }
}

/// The pieces as a list; for display and tests.
inline std::vector<std::string_view> pieces_of(std::string_view text) {
    std::vector<std::string_view> pieces;
    for_each_piece(text, [&](std::string_view piece) { pieces.push_back(piece); });
    return pieces;
}

/// The vendor's encoder cuts its input before it applies the pattern: into blocks of 400,000 characters, and these so
/// that no run of white space, and no run of anything else, is longer than 25,000 characters. Calls f(chunk) for these
/// parts. Passing each to for_each_piece gives exactly the vendor's pieces where for_each_piece alone, which keel
/// uses, differs: around very long runs and at block ends.
template <class F>
void for_each_vendor_chunk(std::string_view text, F&& f) {
    constexpr int longest_run = 25'000;
    constexpr int longest_block = 400'000;
    std::size_t begin = 0;
    int run = 0;
    int block = 0;
    bool run_is_space = false;
    for (std::size_t i = 0; i < text.size();) {
        const utf8_unit unit = decode_utf8(text, i);
        const bool is_space = properties_of(unit.code_point).white_space() ||
                              (unit.code_point >= 0x1C && unit.code_point <= 0x1F);  // Python's str.isspace
        if (block == longest_block) {
            f(text.substr(begin, i - begin));
            begin = i;
            block = run = 0;
        }
        if (run == 0 || is_space != run_is_space) {
            run = 0;
            run_is_space = is_space;
        } else if (run == longest_run) {
            f(text.substr(begin, i - begin));
            begin = i;
            run = 0;
        }
        ++run;
        ++block;
        i += unit.what == utf8_unit::valid ? unit.length : 1u;
    }
    if (begin < text.size()) f(text.substr(begin));
}

}  // namespace keel::inline KEEL_ABI
