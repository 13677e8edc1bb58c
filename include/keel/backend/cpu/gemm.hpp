// SPDX-License-Identifier: MIT
//
// Products of weight rows with many activation rows, in bytes: a tile of weight rows is unpacked once, its rows side by
// side in the lanes of a register, and then meets the activations of one panel after another, a value at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <keel/backend/cpu/activations.hpp>
#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)

/// The arithmetic of a tile: one lane per weight row, in two registers, so that a value that is loaded serves both.
struct tile_lanes {
    static constexpr int rows = 32;
    struct floats {
        __m512 low, high;
    };
    struct ints {
        __m512i low, high;
    };
    using codes = ints;

    static floats load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
    static void store(float* p, floats x) {
        _mm512_storeu_ps(p, x.low);
        _mm512_storeu_ps(p + 16, x.high);
    }
    static floats splat(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }
    static floats zero() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
    static floats multiply(floats a, floats b) { return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)}; }
    static floats fma(floats a, floats b, floats c) {
        return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
    }
    static floats fnma(floats a, floats b, floats c) {
        return {_mm512_fnmadd_ps(a.low, b.low, c.low), _mm512_fnmadd_ps(a.high, b.high, c.high)};
    }
    static codes load_codes(const std::uint8_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)}; }
    static ints no_sums() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static ints times256(ints x) { return {_mm512_slli_epi32(x.low, 8), _mm512_slli_epi32(x.high, 8)}; }
    static floats to_floats(ints x) { return {_mm512_cvtepi32_ps(x.low), _mm512_cvtepi32_ps(x.high)}; }

    /// Adds to each lane the products of its four codes with four activations.
    template <bool Signed>
    static ints dot(ints sums, codes weights, const std::int8_t* x) {
        static_assert(!Signed);
        std::int32_t four;
        std::memcpy(&four, x, sizeof(four));
        const __m512i values = _mm512_set1_epi32(four);
        return {_mm512_dpbusd_epi32(sums.low, weights.low, values),
                _mm512_dpbusd_epi32(sums.high, weights.high, values)};
    }

    /// From the tile's rows of 8 times 4 bytes to 8 columns of a row each.
    static void transpose(const void* rows_of_8, void* columns) {
        const auto* const from = static_cast<const std::uint8_t*>(rows_of_8);
        auto* const to = static_cast<std::uint8_t*>(columns);
        for (int half = 0; half < 2; ++half) transpose_half(from + half * 16 * 32, to + half * 64);
    }

private:
    static __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    /// 16 rows. A column is 128 bytes, of which these are 64.
    static void transpose_half(const std::uint8_t* from, std::uint8_t* to) {
        __m512i x[8], y[8];
        for (int i = 0; i < 8; ++i) {  // rows 0-3 with 4-7 in the upper half; rows 8-11 with 12-15
            const int row = i < 4 ? i : i + 4;
            x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load(from + 32 * row)), load(from + 32 * (row + 4)), 1);
        }
        for (int i = 0; i < 8; i += 4) {
            const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
            const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
            y[i] = _mm512_unpacklo_epi64(a, c);
            y[i + 1] = _mm512_unpackhi_epi64(a, c);
            y[i + 2] = _mm512_unpacklo_epi64(b, d);
            y[i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        for (int i = 0; i < 4; ++i) {  // 128 bits: columns i and i + 4 of rows 0-3, then of 4-7; and 8-11, 12-15
            _mm512_storeu_si512(to + 128 * i, _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88));
            _mm512_storeu_si512(to + 128 * (i + 4), _mm512_shuffle_i32x4(y[i], y[i + 4], 0xDD));
        }
    }
};

#else

struct tile_lanes {
    static constexpr int rows = 8;
    using floats = simd::floats8;
    using codes = simd::bytes32;

    static floats load(const float* p) { return simd::load_floats8(p); }
    static void store(float* p, floats x) { simd::store_floats8(p, x); }
    static floats splat(float x) { return simd::splat8(x); }
    static floats zero() { return simd::splat8(0.0f); }
    static floats multiply(floats a, floats b) { return a * b; }
    static floats fma(floats a, floats b, floats c) { return simd::fma(a, b, c); }
    static floats fnma(floats a, floats b, floats c) { return simd::fnma(a, b, c); }
    static codes load_codes(const std::uint8_t* p) { return simd::load_bytes(p); }
    static simd::ints8 no_sums() { return simd::no_sums(); }
    static simd::ints8 times256(simd::ints8 x) { return simd::times256(x); }
    static floats to_floats(simd::ints8 x) { return simd::to_floats(x); }

    template <bool Signed>
    static simd::ints8 dot(simd::ints8 sums, codes weights, const std::int8_t* x) {
        return simd::dot4<Signed>(sums, weights, simd::repeat4(x));
    }

    static void transpose(const void* rows_of_8, void* to) {
        const auto* const from = static_cast<const std::uint8_t*>(rows_of_8);
        for (int c = 0; c < 8; ++c) {
            for (int r = 0; r < rows; ++r) {
                std::memcpy(static_cast<std::uint8_t*>(to) + (c * rows + r) * 4, from + 32 * r + 4 * c, 4);
            }
        }
    }
};

#endif

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

    /// As in byte_rows, per group of columns that share a minimum (16).
    template <class Block, bool Rests>
    [[nodiscard]] const float* minimum_factors() const {
        return codes<Block>::group == 16 ? half_sum : Rests ? full_sum : part_sum;
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

/// sums[t][r] = weight row r times activation row t, for the first `count` rows of the panel, with their rests or not.
template <class Block, bool Rests>
void multiply_panel(const weight_tile& w, const byte_panels& x, int count, tile_sums& sums) {
    using lanes = tile_lanes;
    constexpr int groups = part_columns / codes<Block>::group;
    constexpr int steps = part_columns / 4 / groups;
    for (int t = 0; t < count; ++t) lanes::store(sums[t], lanes::zero());
    const float* const code_sum = x.template minimum_factors<Block, Rests>();
    for (index g = 0; g < x.parts * groups; ++g) {
        const index part = g / groups;
        const index first = part * byte_panels::rows * part_columns + g % groups * steps * 4;
        const float* const scale = x.scale + part * byte_panels::rows;
        const float* const own_sum = code_sum + g * byte_panels::rows;
        lanes::codes weights[steps];  // in registers: what is stored below could be the bytes that they come from
        for (int s = 0; s < steps; ++s) weights[s] = lanes::load_codes(w.code + (g * steps + s) * 4 * lanes::rows);
        const lanes::floats factor =
            lanes::multiply(lanes::load(w.scale + g * lanes::rows), lanes::splat(unit_of_sums<Rests>));
        const lanes::floats least = has_minimums<Block> ? lanes::load(w.min + g * lanes::rows) : lanes::zero();
        for (int t = 0; t < count; ++t) {
            const auto add = [&](auto dots, const std::int8_t* values) {
                for (int s = 0; s < steps; ++s) {
                    const std::int8_t* const four = values + first + t * part_columns + s * 4;
                    dots = lanes::template dot<has_signed_codes<Block>>(dots, weights[s], four);
                }
                return dots;
            };
            auto dots = add(lanes::no_sums(), x.code);
            if constexpr (Rests) dots = add(lanes::times256(dots), x.rest);
            lanes::floats total = lanes::load(sums[t]);
            if constexpr (has_minimums<Block>) total = lanes::fnma(least, lanes::splat(own_sum[t]), total);
            const lanes::floats by = lanes::multiply(factor, lanes::splat(scale[t]));
            lanes::store(sums[t], lanes::fma(lanes::to_floats(dots), by, total));
        }
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
