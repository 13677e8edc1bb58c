// SPDX-License-Identifier: MIT
//
// A batch: rows (tokens) of several sequences that go through the model together, and where each sequence's memory
// lies.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// How the memory of one sequence is laid out, the same on every backend: copying its bytes copies the state.
///
///   recurrent part   per KDA layer: S (heads, head_dim of the key, head_dim of the value) f32, then the last taps rows
///   of the
///                    projected q, k and v before their convolution (3, taps, channels) f32, oldest first
///   latent blocks    per block: (MLA layers, block_rows, latent_width) of `cache`; row p of a layer is in block
///                    p / block_rows and holds the normed latent c, then the position part kappa
struct memory_layout {
    static constexpr index block_rows = 256;

    index kda_layers = 0;
    index heads = 0;
    index head_dim = 0;  ///< D
    index taps = 0;      ///< rows that the convolution looks back: kernel - 1
    index mla_layers = 0;
    index latent_width = 0;    ///< R + P
    dtype cache = dtype::f32;  ///< f32 or f16

    [[nodiscard]] KEEL_HD constexpr index channels() const { return heads * head_dim; }
    [[nodiscard]] KEEL_HD constexpr index state_floats() const { return heads * head_dim * head_dim; }
    [[nodiscard]] KEEL_HD constexpr index layer_floats() const { return state_floats() + 3 * taps * channels(); }
    [[nodiscard]] KEEL_HD constexpr index recurrent_bytes() const {
        return kda_layers * layer_floats() * static_cast<index>(sizeof(float));
    }
    [[nodiscard]] KEEL_HD constexpr index cache_element_bytes() const { return cache == dtype::f32 ? 4 : 2; }
    [[nodiscard]] KEEL_HD constexpr index latent_row_bytes() const { return latent_width * cache_element_bytes(); }
    [[nodiscard]] KEEL_HD constexpr index block_bytes() const { return mla_layers * block_rows * latent_row_bytes(); }

    /// Blocks that hold the latent rows of `positions` tokens.
    [[nodiscard]] constexpr std::size_t blocks(index positions) const {
        return mla_layers == 0 ? 0 : static_cast<std::size_t>((positions + block_rows - 1) / block_rows);
    }

    /// Floats that a replay needs of a token and KDA layer: its q, k, v before the convolution, the low-rank decay,
    /// beta.
    [[nodiscard]] KEEL_HD constexpr index kept_floats() const { return 3 * channels() + head_dim + heads; }

    /// S of KDA layer `layer` (counted among the KDA layers): (heads, D key, D value).
    [[nodiscard]] KEEL_HD view<float, 3> state(std::byte* recurrent, index layer) const {
        return {reinterpret_cast<float*>(recurrent) + layer * layer_floats(), heads, head_dim, head_dim};
    }

    /// The convolution's history of KDA layer `layer`: (3 for q, k, v; taps; channels).
    [[nodiscard]] KEEL_HD view<float, 3> history(std::byte* recurrent, index layer) const {
        return {reinterpret_cast<float*>(recurrent) + layer * layer_floats() + state_floats(), 3, taps, channels()};
    }

    /// Row `position` of MLA layer `layer` (counted among the MLA layers): latent_width elements of `cache`.
    [[nodiscard]] KEEL_HD std::byte* latent_row(std::byte* const* blocks, index layer, index position) const {
        return blocks[position / block_rows] + (layer * block_rows + position % block_rows) * latent_row_bytes();
    }
};

/// Consecutive rows of a batch that continue one sequence.
struct segment {
    index first_row = 0;  ///< in the batch
    index rows = 0;
    index position = 0;                  ///< tokens that the sequence already holds
    std::byte* recurrent = nullptr;      ///< backend memory, memory_layout::recurrent_bytes()
    std::byte* const* blocks = nullptr;  ///< host array of backend memory, enough blocks for position + rows
    float* kept = nullptr;    ///< backend memory (KDA layers, kept_capacity, kept_floats()) for replays, or none
    index kept_capacity = 0;  ///< row `position` is kept in slot position % kept_capacity
};

/// What one pass through the model works on. The segments cover the rows in order and without gaps, those with the
/// fewest rows first, so that the ones to be decoded and the ones to be prefilled are two ranges.
struct batch {
    std::span<const token> tokens;  ///< one per row
    std::span<const segment> segments;
    std::span<const index> wanted;  ///< the rows whose logits are wanted, ascending
    const memory_layout* layout = nullptr;

    [[nodiscard]] index rows() const { return static_cast<index>(tokens.size()); }

    /// The segments with fewer than `rows` rows.
    [[nodiscard]] std::span<const segment> shorter_than(index rows) const { return segments.first(boundary(rows)); }

    /// The segments with `rows` rows or more.
    [[nodiscard]] std::span<const segment> at_least(index rows) const { return segments.subspan(boundary(rows)); }

private:
    [[nodiscard]] std::size_t boundary(index rows) const {
        const auto first = std::ranges::find_if(segments, [&](const segment& s) { return s.rows >= rows; });
        return static_cast<std::size_t>(first - segments.begin());
    }
};

/// Rows from the first of `segments` to the last, which follow each other: {first row, number of rows}.
struct row_range {
    index first = 0;
    index count = 0;
};
inline row_range rows_of(std::span<const segment> segments) {
    if (segments.empty()) return {};
    const index first = segments.front().first_row;
    return {first, segments.back().first_row + segments.back().rows - first};
}

}  // namespace keel::inline KEEL_ABI
