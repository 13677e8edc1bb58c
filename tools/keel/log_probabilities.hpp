// SPDX-License-Identifier: MIT
//
// Files of log probabilities, in the format of llama-perplexity, so that models of both can be compared:
//
//     "_logits_"   context, vocabulary, chunks (i32 each)   tokens (i32, chunks x context)
//     then, for every scored position: scale, least (f32 each), codes (u16, one per token, padded to an even number);
//     the log probability of a token is scale * code + least
//
// The scored positions of a chunk are context / 2 to context - 2: those with half a context before them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <keel/io/mapped_file.hpp>
#include <keel/io/output_file.hpp>

namespace tool {

/// What the text of a perplexity is cut into.
struct text_chunks {
    std::int32_t context = 0;
    std::int32_t vocabulary = 0;
    std::int32_t count = 0;
    std::vector<std::int32_t> tokens;  ///< count x context

    [[nodiscard]] std::size_t scored() const { return static_cast<std::size_t>(context - 1 - context / 2); }
};

/// The logarithm of the sum of all exponentials.
inline double log_sum(std::span<const float> logits) {
    const float largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float x : logits) sum += static_cast<double>(std::exp(x - largest));
    return static_cast<double>(largest) + std::log(sum);
}

/// log softmax.
inline std::vector<double> log_probabilities(std::span<const float> logits) {
    const double total = log_sum(logits);
    std::vector<double> all(logits.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<double>(logits[i]) - total;
    return all;
}

class log_probability_writer {
public:
    log_probability_writer(const std::string& path, const text_chunks& text, keel::existing_file policy)
        : file_(path, policy) {
        file_.write(std::as_bytes(std::span("_logits_", 8)));
        for (const std::int32_t n : {text.context, text.vocabulary, text.count}) put(n);
        file_.write(std::as_bytes(std::span(text.tokens)));
    }

    void add(std::span<const double> log_p) {
        constexpr double range = 16;  // what is less likely by e^-16 than the likeliest is all the same
        const auto [low, high] = std::minmax_element(log_p.begin(), log_p.end());
        const double least = std::max(*low, *high - range);
        const double scale = (*high - least) / 65535;
        put(static_cast<float>(scale));
        put(static_cast<float>(least));
        std::vector<std::uint16_t> codes((log_p.size() + 1) / 2 * 2);
        for (std::size_t i = 0; scale > 0 && i < log_p.size(); ++i) {
            codes[i] = static_cast<std::uint16_t>(std::lround(std::max(0.0, (log_p[i] - least) / scale)));
        }
        file_.write(std::as_bytes(std::span(codes)));
    }

    void commit() { file_.commit(); }

private:
    template <class T>
    void put(T value) {
        file_.write(std::as_bytes(std::span(&value, 1)));
    }

    keel::output_file file_;
};

class log_probability_reader {
public:
    explicit log_probability_reader(const std::string& path) : file_(path) {
        const auto bytes = file_.bytes();
        const auto refuse = [&](const char* what) { throw std::runtime_error(path + ": " + what); };
        if (bytes.size() < 20 || std::memcmp(bytes.data(), "_logits_", 8) != 0) refuse("is no file of logits");
        std::memcpy(&text_.context, bytes.data() + 8, 4);
        std::memcpy(&text_.vocabulary, bytes.data() + 12, 4);
        std::memcpy(&text_.count, bytes.data() + 16, 4);
        if (text_.context < 4 || text_.context > 1 << 24 || text_.vocabulary < 2 || text_.vocabulary > 1 << 24 ||
            text_.count < 1 || text_.count > 1 << 24) {
            refuse("has impossible dimensions");
        }
        row_bytes_ = 8 + (static_cast<std::size_t>(text_.vocabulary) + 1) / 2 * 4;
        const std::size_t tokens = static_cast<std::size_t>(text_.count) * static_cast<std::size_t>(text_.context);
        const std::size_t rows = static_cast<std::size_t>(text_.count) * text_.scored();
        rows_at_ = 20 + 4 * tokens;
        if (bytes.size() < rows_at_ || (bytes.size() - rows_at_) / row_bytes_ < rows) refuse("is incomplete");
        text_.tokens.resize(tokens);
        std::memcpy(text_.tokens.data(), bytes.data() + 20, 4 * tokens);
        for (const std::int32_t t : text_.tokens) {
            if (t < 0 || t >= text_.vocabulary) refuse("has a token outside of its vocabulary");
        }
    }

    [[nodiscard]] const text_chunks& text() const { return text_; }

    /// The log probabilities of scored position `row`, counted through all chunks; minus infinity for tokens so
    /// unlikely that the file does not know how much.
    void read(std::size_t row, std::vector<double>& log_p) const {
        const std::byte* const at = file_.bytes().data() + rows_at_ + row * row_bytes_;
        float scale, least;
        std::memcpy(&scale, at, 4);
        std::memcpy(&least, at + 4, 4);
        log_p.resize(static_cast<std::size_t>(text_.vocabulary));
        for (std::size_t i = 0; i < log_p.size(); ++i) {
            std::uint16_t code;
            std::memcpy(&code, at + 8 + 2 * i, 2);
            log_p[i] = code == 0 && scale > 0 ? -std::numeric_limits<double>::infinity()
                                              : static_cast<double>(scale) * code + static_cast<double>(least);
        }
    }

private:
    keel::mapped_file file_;
    text_chunks text_;
    std::size_t row_bytes_ = 0, rows_at_ = 0;
};

}  // namespace tool
