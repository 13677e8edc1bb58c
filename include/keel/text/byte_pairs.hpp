// SPDX-License-Identifier: MIT
//
// The parts of byte-level byte-pair encoding: the printable form of bytes, the table of token texts, and the merges.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/text/unicode.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

inline constexpr token no_token = -1;

// Vocabulary files write bytes as printable characters (GPT-2's map): 21-7E, A1-AC and AE-FF stand for themselves; the
// other 68, in increasing order, are U+0100 to U+0143. This is the way back; -1 marks the code points between.
inline constexpr auto byte_of_character = [] {
    std::array<std::int16_t, 256 + 68> table{};
    table.fill(-1);
    std::size_t next = 256;
    for (std::int16_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
        table[printable ? static_cast<std::size_t>(byte) : next++] = byte;
    }
    return table;
}();

/// Appends the bytes that a text in printable form stands for; false if it holds a character that stands for none.
inline bool append_bytes(std::string_view printable, std::string& out) {
    for (std::size_t i = 0; i < printable.size();) {
        const utf8_unit unit = decode_utf8(printable, i);  // U+FFFD, if ill-formed, is outside the table
        if (unit.code_point >= byte_of_character.size() || byte_of_character[unit.code_point] < 0) return false;
        out.push_back(static_cast<char>(byte_of_character[unit.code_point]));
        i += unit.length;
    }
    return true;
}

/// The texts of all tokens, one after the other in one buffer.
class token_texts {
public:
    void reserve(std::size_t tokens, std::size_t bytes) {
        ends_.reserve(tokens + 1);
        bytes_.reserve(bytes);
    }

    /// The text of the next token is what `append(buffer)` leaves behind in the buffer.
    template <class Append>
    void add(Append append) {
        append(bytes_);
        ends_.push_back(bytes_.size());
    }

    std::string_view operator[](token id) const {
        const auto i = static_cast<std::size_t>(id);
        return std::string_view(bytes_).substr(ends_[i], ends_[i + 1] - ends_[i]);
    }

    std::size_t memory_bytes() const { return bytes_.capacity() + ends_.capacity() * sizeof ends_[0]; }

private:
    std::string bytes_;
    std::vector<std::size_t> ends_{0};
};

/// A multiplicative hash, eight bytes at a time; the upper and the lower half are both well mixed.
inline std::uint64_t hash_of(std::string_view key) {
    constexpr std::uint64_t odd = 0x9E3779B97F4A7C15u;
    const auto mix = [](std::uint64_t x) {
        x *= odd;
        return x ^ x >> 32;
    };
    std::uint64_t hash = key.size();
    for (; key.size() >= 8; key.remove_prefix(8)) {
        std::uint64_t word;
        std::memcpy(&word, key.data(), 8);
        hash = mix(hash ^ word);
    }
    std::uint64_t rest = 0;
    for (const char c : key) rest = rest << 8 | static_cast<unsigned char>(c);
    return mix(mix(hash ^ rest));
}

/// From a text to its token: open addressing over a power of two of slots, no text is stored twice.
class token_index {
public:
    explicit token_index(std::size_t most_tokens) : slots_(std::bit_ceil(most_tokens + most_tokens / 2 + 1)) {}

    /// Enters a token under its own text unless one with that text is there; answers the one that is there now.
    token insert(token id, const token_texts& texts) {
        const std::uint64_t hash = hash_of(texts[id]);
        slot& place = slots_[find_slot(texts[id], hash, texts)];
        if (place.id == no_token) place = {tag_of(hash), id};
        return place.id;
    }

    token find(std::string_view text, const token_texts& texts) const {
        return slots_[find_slot(text, hash_of(text), texts)].id;
    }

    std::size_t memory_bytes() const { return slots_.size() * sizeof slots_[0]; }

private:
    struct slot {
        std::uint32_t tag = 0;  // of the hash, so that most comparisons of texts are not made
        token id = no_token;
    };

    static std::uint32_t tag_of(std::uint64_t hash) { return static_cast<std::uint32_t>(hash >> 32); }

    /// The slot that holds the text, or the free one where it belongs.
    std::size_t find_slot(std::string_view text, std::uint64_t hash, const token_texts& texts) const {
        const std::size_t mask = slots_.size() - 1;
        for (std::size_t i = hash & mask;; i = (i + 1) & mask) {
            const slot& candidate = slots_[i];
            if (candidate.id == no_token) return i;
            if (candidate.tag == tag_of(hash) && texts[candidate.id] == text) return i;
        }
    }

    std::vector<slot> slots_;
};

/// Which adjacent tokens become one, and which of them first: the rank of a merge is its place in the order of adding.
class merge_table {
public:
    static constexpr std::uint32_t no_rank = 0xFFFFFFFFu;

    explicit merge_table(std::size_t most_merges) : slots_(std::bit_ceil(most_merges + most_merges / 2 + 1)) {
        merged_.reserve(most_merges);
    }

    /// False if the pair is there already.
    bool add(token left, token right, token merged) {
        slot& place = slots_[find_slot(left, right)];
        if (place.rank != no_rank) return false;
        place = {left, right, static_cast<std::uint32_t>(merged_.size())};
        merged_.push_back(merged);
        return true;
    }

    std::uint32_t rank(token left, token right) const { return slots_[find_slot(left, right)].rank; }
    token merged(std::uint32_t rank) const { return merged_[rank]; }

    std::size_t memory_bytes() const {
        return slots_.size() * sizeof slots_[0] + merged_.capacity() * sizeof merged_[0];
    }

private:
    struct slot {
        token left = no_token;
        token right = no_token;
        std::uint32_t rank = no_rank;
    };

    std::size_t find_slot(token left, token right) const {
        const std::uint64_t key = static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
        const std::uint64_t hash = key * 0x9E3779B97F4A7C15u;
        const std::size_t mask = slots_.size() - 1;
        for (std::size_t i = (hash ^ hash >> 32) & mask;; i = (i + 1) & mask) {
            const slot& candidate = slots_[i];
            if (candidate.rank == no_rank || (candidate.left == left && candidate.right == right)) return i;
        }
    }

    std::vector<slot> slots_;
    std::vector<token> merged_;  // by rank
};

/// Merges the bytes of a piece: always the pair of lowest rank, the leftmost of equals. A linked list of what is left
/// and a heap of candidates make it n log n, also for a piece of a million bytes. The memory is kept for the next one.
class pair_merger {
public:
    void merge(std::string_view piece, const std::array<token, 256>& byte_tokens, const merge_table& merges,
               std::vector<token>& out) {
        if (piece.size() >= end_of_list) throw error(errc::capacity, "text", "a piece of 4 GiB or more");
        const auto size = static_cast<std::uint32_t>(piece.size());
        symbols_.resize(size);
        for (std::uint32_t i = 0; i < size; ++i) {
            symbols_[i] = {byte_tokens[static_cast<unsigned char>(piece[i])], i == 0 ? end_of_list : i - 1,
                           i + 1 == size ? end_of_list : i + 1, merge_table::no_rank};
        }

        candidates_.clear();
        for (std::uint32_t i = 0; i < size; ++i) rank_pair(i, merges);
        std::make_heap(candidates_.begin(), candidates_.end(), std::greater<>());

        while (!candidates_.empty()) {
            std::pop_heap(candidates_.begin(), candidates_.end(), std::greater<>());
            const auto rank = static_cast<std::uint32_t>(candidates_.back() >> 32);
            const auto i = static_cast<std::uint32_t>(candidates_.back());
            candidates_.pop_back();
            symbol& left = symbols_[i];
            if (left.rank != rank) continue;  // one of the pair has been merged otherwise since

            symbol& right = symbols_[left.next];
            left.id = merges.merged(rank);
            left.next = right.next;
            right.rank = merge_table::no_rank;
            if (left.next != end_of_list) symbols_[left.next].previous = i;
            for (const std::uint32_t changed : {left.previous, i}) {
                if (changed == end_of_list) continue;
                const std::size_t before = candidates_.size();
                rank_pair(changed, merges);
                if (candidates_.size() != before) {
                    std::push_heap(candidates_.begin(), candidates_.end(), std::greater<>());
                }
            }
        }
        for (std::uint32_t i = 0; i < size; i = symbols_[i].next) out.push_back(symbols_[i].id);
    }

private:
    static constexpr std::uint32_t end_of_list = 0xFFFFFFFFu;

    struct symbol {
        token id;
        std::uint32_t previous;
        std::uint32_t next;
        std::uint32_t rank;  // of the pair with the next one; none also if merged into the previous one
    };

    /// Updates the rank of the pair that begins at `i`, and makes it a candidate if there is one.
    void rank_pair(std::uint32_t i, const merge_table& merges) {
        symbol& s = symbols_[i];
        s.rank = s.next == end_of_list ? merge_table::no_rank : merges.rank(s.id, symbols_[s.next].id);
        if (s.rank != merge_table::no_rank) candidates_.push_back(static_cast<std::uint64_t>(s.rank) << 32 | i);
    }

    std::vector<symbol> symbols_;            // by the position of their first byte
    std::vector<std::uint64_t> candidates_;  // rank, then position
};

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
