// SPDX-License-Identifier: MIT
//
// Products of weight rows with many activation rows, in bytes: a tile of weight rows is unpacked once, its rows side by
// side in the lanes of a register, and then meets the activations of one panel after another, a value at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <keel/backend/cpu/activations.hpp>
#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/backend/cpu/tile_lanes.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Rows of a quantised matrix, unpacked. Per part of 32 columns: codes (8, rows, 4), scales and minimums (1 or 2
/// groups, rows).
struct weight_tile {
    static constexpr index code_bytes = part_columns * tile_lanes::rows;

    std::uint8_t* code;
    float* scale;
    float* min;

    static weight_tile take(arena& memory, index columns) {
        const index parts = columns / part_columns;
        return {memory.take<std::uint8_t>(parts * code_bytes).data,
                memory.take<float>(parts * 2 * tile_lanes::rows).data,
                memory.take<float>(parts * 2 * tile_lanes::rows).data};
    }
    static constexpr index bytes(index columns) {
        const index parts = columns / part_columns;
        return parts * (code_bytes + 4 * tile_lanes::rows * static_cast<index>(sizeof(float))) + 3 * arena::alignment;
    }

    /// Unpacks `rows` rows (at most tile_lanes::rows; the rest of the tile repeats the last), the first at *w, `stride`
    /// blocks apart.
    template <class Block>
    void unpack(const Block* w, index stride, int rows, index columns) const {
        const auto row = [&](int lane, index first_column) {
            return w + std::min(lane, rows - 1) * stride + first_column / Block::elements;
        };
        index p = 0;
        for (; (p + span_parts) * part_columns <= columns; p += span_parts) {
            unpack_span<Block>([&](int lane) { return row(lane, p * part_columns); }, tile_lanes::rows * stride, p);
        }
        if constexpr (Block::elements == part_columns) {
            for (; p * part_columns < columns; ++p) {
                alignas(64) std::uint8_t codes[tile_lanes::rows][part_columns];
                for (int lane = 0; lane < tile_lanes::rows; ++lane) {
                    const Block* const b = row(lane, p * part_columns);
                    part_factors(*b, scale[p * tile_lanes::rows + lane], min[p * tile_lanes::rows + lane]);
                    simd::store_bytes(codes[lane], span_codes<Block, 0>(b));
                }
                tile_lanes::transpose(codes[0], code + p * code_bytes);
            }
        }
    }

private:
    template <class Block, class F>
    void unpack_span(F&& row, index next_tile, index first) const {
        constexpr int groups = part_columns / codes<Block>::group;
        alignas(64) std::uint8_t part_codes[span_parts][tile_lanes::rows][part_columns];
        alignas(64) float factor[groups][tile_lanes::rows][span_parts], least[groups][tile_lanes::rows][span_parts];
        for (int lane = 0; lane < tile_lanes::rows; ++lane) {
            const Block* const b = row(lane);
            prefetch_span<Block, 2>(b + next_tile);  // into the second cache: the first one is full of this tile
            alignas(32) float all[16], all_least[16];
            span_factors(b, all, all_least);
            for (int g = 0; g < groups; ++g) {
                simd::store_floats8(factor[g][lane], simd::load_floats8(all + g * span_parts));
                if constexpr (has_minimums<Block>) {
                    simd::store_floats8(least[g][lane], simd::load_floats8(all_least + g * span_parts));
                }
            }
            unrolled<span_parts>([&]<int P>() { simd::store_bytes(part_codes[P][lane], span_codes<Block, P>(b)); });
        }
        for (int p = 0; p < span_parts; ++p) {
            tile_lanes::transpose(part_codes[p][0], code + (first + p) * code_bytes);
        }
        for (int g = 0; g < groups; ++g) {
            const index at = (first * groups + g * span_parts) * tile_lanes::rows;
            tile_lanes::transpose(factor[g][0], scale + at);
            if constexpr (has_minimums<Block>) tile_lanes::transpose(least[g][0], min + at);
        }
    }
};

/// Rows of activations as integers, in panels of 16 rows. Per panel and part of 32 columns what byte_rows has: codes
/// and rests (16, 32), scales and sums (16), sums of halves (2, 16).
struct byte_panels {
    static constexpr int rows = 16;

    index parts;
    std::int8_t* code;
    std::int8_t* rest;
    float* scale;
    float* part_sum;
    float* half_sum;
    float* full_sum;

    static constexpr index count(index n) { return (n + rows - 1) / rows; }

    static byte_panels take(arena& memory, index n, index columns) {
        const index parts = columns / part_columns, slots = count(n) * rows;
        const auto codes = [&] { return memory.take<std::int8_t>(slots * columns).data; };
        const auto floats = [&](index each) { return memory.take<float>(slots * parts * each).data; };
        return {parts, codes(), codes(), floats(1), floats(1), floats(2), floats(1)};
    }
    static constexpr index bytes(index n, index columns) { return byte_rows::bytes(count(n) * rows, columns); }

    /// The panels from number `first` on.
    [[nodiscard]] byte_panels from(index first) const {
        const index slots = first * rows * parts, columns = slots * part_columns;
        return {parts,           code + columns, rest + columns, scale + slots, part_sum + slots, half_sum + 2 * slots,
                full_sum + slots};
    }

    /// Fills panel `p` with rows source(0), ..., source(n - 1).
    template <class F>
    void fill(index p, int n, F&& source) const {
        const byte_panels to = from(p);
        for (int slot = 0; slot < n; ++slot) {
            const float* const x = source(slot);
            for (index i = 0; i < parts; ++i) {
                const index at = i * rows + slot, column = at * part_columns;
                to.set(slot, i, quantise_part(x + i * part_columns, to.code + column, to.rest + column));
            }
        }
    }

    /// Of row `t`, in part `p`.
    [[nodiscard]] const std::int8_t* codes_of(int t, index p) const { return code + (p * rows + t) * part_columns; }
    [[nodiscard]] const std::int8_t* rests_of(int t, index p) const { return rest + (p * rows + t) * part_columns; }
    [[nodiscard]] float scale_of(int t, index p) const { return scale[p * rows + t]; }
    /// As in byte_rows, in group `g` of the columns that share a minimum.
    template <class Block, bool Rests>
    [[nodiscard]] float minimum_factor(int t, index g) const {
        return (codes<Block>::group == 16 ? half_sum : Rests ? full_sum : part_sum)[g * rows + t];
    }

private:
    void set(int slot, index p, const quantised_part& q) const {
        scale[p * rows + slot] = q.scale;
        half_sum[2 * p * rows + slot] = q.half_sum[0];
        half_sum[(2 * p + 1) * rows + slot] = q.half_sum[1];
        part_sum[p * rows + slot] = q.half_sum[0] + q.half_sum[1];
        full_sum[p * rows + slot] = q.half_sum[0] + q.half_sum[1] + q.rest_sum;
    }
};

using tile_sums = float[byte_panels::rows][tile_lanes::rows];

/// Reads a tile, part after part: for group K of the part their codes, four columns a step, and the factors;
/// weight = factor code - least.
template <class Block>
class unpacked_reader {
public:
    explicit unpacked_reader(const weight_tile& tile) : tile_(tile) {}

    void enter(index part) { part_ = part; }

    template <int K, int Steps>
    void read(tile_lanes::codes* codes, tile_lanes::floats& factor, tile_lanes::floats& least) const {
        constexpr index groups = part_columns / detail::codes<Block>::group, rows = tile_lanes::rows;
        const index g = part_ * groups + K;
        for (int s = 0; s < Steps; ++s) codes[s] = tile_lanes::load_codes(tile_.code + (g * Steps + s) * 4 * rows);
        factor = tile_lanes::load(tile_.scale + g * rows);
        if constexpr (has_minimums<Block>) least = tile_lanes::load(tile_.min + g * rows);
    }

private:
    const weight_tile& tile_;
    index part_ = 0;
};

/// sums[t][r] += weight row r times activation row t, of the columns of the parts [first, last) and the first `count`
/// rows of x, with their rests or not.
template <class Block, bool Rests, class Reader, class Rows>
void multiply_parts(Reader& w, const Rows& x, index first, index last, int count, tile_sums& sums) {
    using lanes = tile_lanes;
    constexpr int groups = part_columns / codes<Block>::group;
    constexpr int steps = part_columns / 4 / groups;
    for (index part = first; part < last; ++part) {
        w.enter(part);
        // In registers: what is stored below could be the bytes that they come from.
        lanes::codes weights[groups * steps];
        lanes::floats factor[groups], least[groups];
        unrolled<groups>([&]<int K>() {
            w.template read<K, steps>(weights + K * steps, factor[K], least[K]);
            if constexpr (Rests) factor[K] = lanes::multiply(factor[K], lanes::splat(unit_of_sums<Rests>));
        });
        for (int t = 0; t < count; ++t) {
            lanes::floats total = lanes::load(sums[t]), scaled;
            unrolled<groups>([&]<int K>() {
                const auto add = [&](auto dots, const std::int8_t* values) {
                    for (int s = 0; s < steps; ++s) {
                        const std::int8_t* const four = values + (K * steps + s) * 4;
                        dots = lanes::template dot<has_signed_codes<Block>>(dots, weights[K * steps + s], four);
                    }
                    return dots;
                };
                auto dots = add(lanes::no_sums(), x.codes_of(t, part));
                if constexpr (Rests) dots = add(lanes::times256(dots), x.rests_of(t, part));
                const lanes::floats product = lanes::to_floats(dots);
                scaled = K == 0 ? lanes::multiply(product, factor[K]) : lanes::fma(product, factor[K], scaled);
                if constexpr (has_minimums<Block>) {
                    const float own = x.template minimum_factor<Block, Rests>(t, part * groups + K);
                    total = lanes::fnma(least[K], lanes::splat(own), total);
                }
            });
            lanes::store(sums[t], lanes::fma(scaled, lanes::splat(x.scale_of(t, part)), total));
        }
    }
}

/// sums[t][r] = weight row r times activation row t, for the first `count` rows of the panel.
template <class Block, bool Rests>
void multiply_panel(const weight_tile& w, const byte_panels& x, int count, tile_sums& sums) {
    for (int t = 0; t < count; ++t) tile_lanes::store(sums[t], tile_lanes::zero());
    unpacked_reader<Block> reader(w);
    multiply_parts<Block, Rests>(reader, x, 0, x.parts, count, sums);
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
