// SPDX-License-Identifier: MIT
//
// What every measurement needs: a clock, tokens, the middle of several values.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace bench {

/// How long f takes.
template <class F>
double seconds(F&& f) {
    const auto begun = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

/// The middle one, or the mean of the two middle ones.
inline double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const std::size_t half = values.size() / 2;
    return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

/// Tokens that no cache of experts or embeddings has seen: evenly from the vocabulary, the same in every run.
class random_tokens {
public:
    explicit random_tokens(std::int64_t vocabulary) : vocabulary_(vocabulary) {}

    std::vector<std::int32_t> draw(std::int64_t count) {
        std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
        for (std::int32_t& t : tokens) {
            state_ = state_ * 6364136223846793005u + 1442695040888963407u;
            t = static_cast<std::int32_t>((state_ >> 33) % static_cast<std::uint64_t>(vocabulary_));
        }
        return tokens;
    }

private:
    std::int64_t vocabulary_;
    std::uint64_t state_ = 1;
};

}  // namespace bench
