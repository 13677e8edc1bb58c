// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>

#include <keel/core/compiler.hpp>

namespace keel::inline KEEL_ABI {

/// A 64-bit checksum of a stream of bytes, at the speed of memory. Every step is a bijection of its lane, so that a
/// change within a single 8-byte word, a flipped bit for example, always changes the sum. Against accidents, not
/// against attackers.
class checksum {
public:
    void add(std::span<const std::byte> bytes) {
        length_ += bytes.size();
        if (filled_ > 0) hold(bytes);
        const std::size_t whole = bytes.size() / block * block;
        mix(bytes.first(whole));  // straight from the source
        bytes = bytes.subspan(whole);
        hold(bytes);
    }

    [[nodiscard]] std::uint64_t value() const {
        checksum rest = *this;
        std::fill(rest.held_ + rest.filled_, rest.held_ + block, std::byte{0});
        rest.mix(rest.held_);
        std::uint64_t sum = length_;
        for (const std::uint64_t lane : rest.lanes_) sum = scramble(sum + lane);
        return sum;
    }

private:
    // As many as hide how long a multiplication takes.
    static constexpr std::size_t lanes = 32;
    static constexpr std::size_t block = lanes * sizeof(std::uint64_t);

    static constexpr std::uint64_t scramble(std::uint64_t x) {
        x *= 0x9E3779B97F4A7C15u;  // odd, so invertible
        return x ^ x >> 29;
    }

    /// Takes bytes from the front until a block is full, which is mixed then.
    void hold(std::span<const std::byte>& bytes) {
        const std::size_t n = std::min(bytes.size(), block - filled_);
        std::copy_n(bytes.begin(), n, held_ + filled_);
        bytes = bytes.subspan(n);
        filled_ = (filled_ + n) % block;
        if (filled_ == 0 && n > 0) mix(held_);
    }

    /// Whole blocks. The lanes stay in registers meanwhile.
    void mix(std::span<const std::byte> blocks) {
        std::array<std::uint64_t, lanes> now = lanes_;
        for (; !blocks.empty(); blocks = blocks.subspan(block)) {
            for (std::size_t i = 0; i < lanes; ++i) {
                std::uint64_t word;
                std::memcpy(&word, blocks.data() + i * sizeof word, sizeof word);
                now[i] = scramble(std::rotl(now[i], 5) ^ word);
            }
        }
        lanes_ = now;
    }

    std::array<std::uint64_t, lanes> lanes_ = [] {
        std::array<std::uint64_t, lanes> first{};
        std::iota(first.begin(), first.end(), std::uint64_t{1});
        return first;
    }();
    std::byte held_[block] = {};
    std::size_t filled_ = 0;
    std::uint64_t length_ = 0;
};

}  // namespace keel::inline KEEL_ABI
