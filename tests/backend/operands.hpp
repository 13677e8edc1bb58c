// SPDX-License-Identifier: MIT
//
// What the tests of operations share: random arrays, sequences with their memory, comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <random>
#include <span>
#include <vector>

#include "catch.hpp"

#include <keel/backend/batch.hpp>
#include <keel/backend/host_memory.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::testing {

/// An array that owns its memory; its copies are independent.
class array {
public:
    array() = default;
    explicit array(index n) : values(static_cast<std::size_t>(n)) {}
    explicit array(std::vector<float> v) : values(std::move(v)) {}

    template <class... Extents>
    view<float, static_cast<int>(sizeof...(Extents))> as(Extents... extents) {
        REQUIRE((extents * ...) == static_cast<index>(values.size()));
        return {values.data(), extents...};
    }

    std::vector<float> values;
};

class random_numbers {
public:
    explicit random_numbers(std::uint32_t seed) : engine_(seed) {}

    array normal(index n, float deviation = 1.0f) {
        std::normal_distribution<float> distribution(0.0f, deviation);
        return fill(n, distribution);
    }
    array uniform(index n, float from, float to) {
        std::uniform_real_distribution<float> distribution(from, to);
        return fill(n, distribution);
    }
    index between(index from, index to) { return std::uniform_int_distribution<index>(from, to)(engine_); }

private:
    template <class Distribution>
    array fill(index n, Distribution& distribution) {
        array a(n);
        for (float& x : a.values) x = distribution(engine_);
        return a;
    }

    std::mt19937 engine_;
};

/// |a - b| / |b|; infinite where something is not finite, so that a comparison with it fails.
inline double relative_error(std::span<const float> a, std::span<const float> b) {
    if (a.size() != b.size() || b.empty()) return INFINITY;
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
        size += std::pow(static_cast<double>(b[i]), 2);
    }
    const double error = std::sqrt(difference / std::max(size, 1e-60));
    return std::isfinite(error) ? error : INFINITY;
}
inline double relative_error(const array& a, const array& b) { return relative_error(a.values, b.values); }

/// Sequences in one batch, with memory of their own; copies are independent.
class sequences {
public:
    struct shape {
        index rows, position;
    };

    /// States and histories are random, the latent rows before each position too.
    sequences(memory_layout layout, const std::vector<shape>& shapes, random_numbers& random) : layout_(layout) {
        index first = 0;
        for (const shape& s : shapes) {
            host_buffer recurrent(layout.recurrent_bytes());
            const array state = random.normal(layout.recurrent_bytes() / 4, 0.2f);
            std::copy(state.values.begin(), state.values.end(), reinterpret_cast<float*>(recurrent.data()));
            recurrent_.push_back(recurrent);
            std::vector<host_buffer> blocks;
            for (index p = 0; p < s.position + s.rows; p += memory_layout::block_rows) {
                host_buffer block(layout.block_bytes());
                const index n = layout.block_bytes() / layout.cache_element_bytes();
                const array rows = random.normal(n);
                for (index i = 0; i < n; ++i) {
                    const float x = rows.values[static_cast<std::size_t>(i)];
                    if (layout.cache == dtype::f32) reinterpret_cast<float*>(block.data())[i] = x;
                    if (layout.cache == dtype::f16) reinterpret_cast<f16*>(block.data())[i] = to_f16(x);
                }
                blocks.push_back(block);
            }
            blocks_.push_back(blocks);
            shapes_.push_back({s.rows, s.position});
            first += s.rows;
        }
        rows_ = first;
    }

    [[nodiscard]] const memory_layout& layout() const { return layout_; }
    [[nodiscard]] index rows() const { return rows_; }

    /// The sequences' rows from `skip` on, at most `most` of each; valid until the next call.
    std::span<const segment> segments(index skip = 0, index most = 1 << 30) {
        segments_.clear();
        addresses_.assign(blocks_.size(), {});
        index first = 0;
        for (std::size_t i = 0; i < shapes_.size(); ++i) {
            for (const host_buffer& block : blocks_[i]) addresses_[i].push_back(block.data());
            const index rows = std::clamp(shapes_[i].rows - skip, index{0}, most);
            if (rows > 0) {
                segments_.push_back(
                    {first + skip, rows, shapes_[i].position + skip, recurrent_[i].data(), addresses_[i].data()});
            }
            first += shapes_[i].rows;
        }
        return segments_;
    }

    /// All recurrent memory, one sequence after another.
    [[nodiscard]] std::vector<float> recurrent() const {
        std::vector<float> all;
        for (const host_buffer& memory : recurrent_) {
            const float* const from = reinterpret_cast<const float*>(memory.data());
            all.insert(all.end(), from, from + memory.size() / 4);
        }
        return all;
    }

    /// All latent rows that a sequence holds after this batch, as floats.
    [[nodiscard]] std::vector<float> latents(index layer) const {
        std::vector<float> all;
        for (std::size_t i = 0; i < shapes_.size(); ++i) {
            std::vector<std::byte*> addresses;
            for (const host_buffer& block : blocks_[i]) addresses.push_back(block.data());
            for (index p = 0; p < shapes_[i].position + shapes_[i].rows; ++p) {
                const std::byte* const row = layout_.latent_row(addresses.data(), layer, p);
                for (index c = 0; c < layout_.latent_width; ++c) {
                    all.push_back(layout_.cache == dtype::f32 ? reinterpret_cast<const float*>(row)[c]
                                                              : to_float(reinterpret_cast<const f16*>(row)[c]));
                }
            }
        }
        return all;
    }

    /// Overwrites the state of layer 0 of a sequence.
    void set_state(std::size_t sequence, std::span<const float> state) {
        std::copy(state.begin(), state.end(), layout_.state(recurrent_[sequence].data(), 0).data);
    }
    [[nodiscard]] std::vector<float> state(std::size_t sequence) const {
        const auto s = layout_.state(recurrent_[sequence].data(), 0);
        return {s.data, s.data + s.size()};
    }

private:
    memory_layout layout_;
    std::vector<host_buffer> recurrent_;
    std::vector<std::vector<host_buffer>> blocks_;
    std::vector<shape> shapes_;
    index rows_ = 0;
    std::vector<segment> segments_;
    std::vector<std::vector<std::byte*>> addresses_;
};

/// A workspace of exactly as many bytes as an operation says that it takes.
class scratch {
public:
    explicit scratch(index bytes) : memory_(bytes), arena_(memory_.data(), bytes) {}
    operator arena&() { return arena_; }

private:
    host_buffer memory_;
    arena arena_;
};

}  // namespace keel::testing
