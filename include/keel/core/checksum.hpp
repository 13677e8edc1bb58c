// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
        while (!bytes.empty()) {
            const std::size_t n = std::min(bytes.size(), block - filled_);
            if (filled_ == 0 && n == block) {  // straight from the source
                mix(bytes.data());
            } else {
                std::memcpy(held_ + filled_, bytes.data(), n);
                filled_ = (filled_ + n) % block;
                if (filled_ == 0) mix(held_);
            }
            bytes = bytes.subspan(n);
        }
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
    static constexpr std::size_t lanes = 8;
    static constexpr std::size_t block = lanes * sizeof(std::uint64_t);

    static constexpr std::uint64_t scramble(std::uint64_t x) {
        x *= 0x9E3779B97F4A7C15u;  // odd, so invertible
        return x ^ x >> 29;
    }

    void mix(const std::byte* from) {
        for (std::size_t i = 0; i < lanes; ++i) {
            std::uint64_t word;
            std::memcpy(&word, from + i * sizeof word, sizeof word);
            lanes_[i] = scramble(std::rotl(lanes_[i], 5) ^ word);
        }
    }

    std::uint64_t lanes_[lanes] = {1, 2, 3, 4, 5, 6, 7, 8};
    std::byte held_[block] = {};
    std::size_t filled_ = 0;
    std::uint64_t length_ = 0;
};

}  // namespace keel::inline KEEL_ABI
