// SPDX-License-Identifier: MIT
//
// Products of weight rows with few activation rows: each weight is read once, in place, and used at once.
#pragma once

#include <cstddef>

#include <keel/backend/cpu/activations.hpp>
#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Asks for the memory of what a row's stream will come to after a span; it need not exist. Processors foresee such
/// streams by themselves, but not across the ends of pages.
template <class Block>
void prefetch_after(const Block* b) {
    constexpr int ahead = 1024;
    prefetch_span<Block>(reinterpret_cast<const char*>(b) + ahead);
}

/// Eight sums of four products each, of the 32 activations from column `at` of a row on; see unit_of_sums.
template <class Block>
simd::floats8 dot_part(simd::bytes32 weights, const std::int8_t* code, const std::int8_t* rest, index at) {
    const auto add = [&](simd::ints8 sums, const std::int8_t* values) {
        return simd::dot4<has_signed_codes<Block>>(sums, weights, simd::load_bytes(values + at));
    };
    const simd::ints8 dots = add(simd::no_sums(), code);
    if constexpr (!takes_rests<Block>) return simd::to_floats(dots);
    return simd::to_floats(add(simd::times256(dots), rest));
}

/// out[n][r] = row r of the weights times row x_row[n] of the activations, in bytes. The rows of weights begin with
/// *w and are `stride` blocks apart.
template <class Block, int R, int N>
void dot_bytes(const Block* w, index stride, index columns, const byte_rows& x, const index* x_row,
               float (&out)[N][R]) {
    using simd::floats8;
    constexpr bool halves = codes<Block>::group == 16;
    floats8 sums[R][N], minimums[R][N];
    const std::int8_t *code[N], *rest[N];
    const float *scale[N], *code_sum[N];
    for (int n = 0; n < N; ++n) {
        code[n] = x.code[x_row[n]].data;
        rest[n] = x.rest[x_row[n]].data;
        scale[n] = x.scale[x_row[n]].data;
        code_sum[n] = x.template minimum_factors<Block>()[x_row[n]].data;
        for (int r = 0; r < R; ++r) sums[r][n] = minimums[r][n] = simd::splat8(0.0f);
    }
    constexpr int factors = span_columns / codes<Block>::group;
    alignas(32) float factor[16], least[16], product[R][N][span_parts];
    floats8 half_product[R][N][2];

    const index spans = columns / span_columns;
    for (index s = 0; s < spans; ++s, w += span_columns / Block::elements) {
        for (int r = 0; r < R; ++r) {
            prefetch_after(w + r * stride);
            span_factors(w + r * stride, factor, least);
            for (int n = 0; n < N; ++n) {
                const floats8 own =
                    simd::load_floats8(scale[n] + s * span_parts) * simd::splat8(unit_of_sums<takes_rests<Block>>);
                if constexpr (halves) {
                    half_product[r][n][0] = simd::load_floats8(factor) * simd::twice_low(own);
                    half_product[r][n][1] = simd::load_floats8(factor + 8) * simd::twice_high(own);
                } else {
                    simd::store_floats8(product[r][n], simd::load_floats8(factor) * own);
                }
                if constexpr (has_minimums<Block>) {
                    for (int k = 0; k < factors; k += 8) {
                        minimums[r][n] = simd::fma(simd::load_floats8(least + k),
                                                   simd::load_floats8(code_sum[n] + s * factors + k), minimums[r][n]);
                    }
                }
            }
        }
        unrolled<span_parts>([&]<int P>() {
            for (int r = 0; r < R; ++r) {
                const simd::bytes32 weights = span_codes<Block, P>(w + r * stride);
                for (int n = 0; n < N; ++n) {
                    const floats8 dots =
                        dot_part<Block>(weights, code[n], rest[n], s * span_columns + P * part_columns);
                    const floats8 by =
                        halves ? simd::splat4<P % 4>(half_product[r][n][P / 4]) : simd::splat8(product[r][n][P]);
                    sums[r][n] = simd::fma(dots, by, sums[r][n]);
                }
            }
        });
    }
    float last[R][N] = {};  // minimums of the columns that fill no span
    if constexpr (Block::elements == part_columns) {
        for (index p = spans * span_parts; p < columns / part_columns; ++p, ++w) {
            for (int r = 0; r < R; ++r) {
                part_factors(w[r * stride], factor[0], least[0]);
                const simd::bytes32 weights = span_codes<Block, 0>(w + r * stride);
                for (int n = 0; n < N; ++n) {
                    const floats8 dots = dot_part<Block>(weights, code[n], rest[n], p * part_columns);
                    const float by = factor[0] * scale[n][p] * unit_of_sums<takes_rests<Block>>;
                    sums[r][n] = simd::fma(dots, simd::splat8(by), sums[r][n]);
                    if constexpr (has_minimums<Block>) last[r][n] += least[0] * code_sum[n][p];
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            out[n][r] = simd::sum(sums[r][n]);
            if constexpr (has_minimums<Block>) out[n][r] -= simd::sum(minimums[r][n]) + last[r][n];
        }
    }
}

/// out[n][r] = row w[r] of float weights times x[n]. The order of summation depends on nothing but `columns`.
template <class T, int R, int N>
void dot_floats(const T* const (&w)[R], const float* const (&x)[N], index columns, float (&out)[N][R]) {
    simd::floats sums[R][N];
    for (auto& row : sums) {
        for (simd::floats& sum : row) sum = simd::floats(0.0f);
    }
    index i = 0;
    for (; i + simd::lanes <= columns; i += simd::lanes) {
        simd::floats weights[R];
        for (int r = 0; r < R; ++r) weights[r] = simd::load(w[r] + i);
        for (int n = 0; n < N; ++n) {
            const simd::floats values = simd::load(x[n] + i);
            for (int r = 0; r < R; ++r) sums[r][n] = simd::fma(weights[r], values, sums[r][n]);
        }
    }
    if (const index rest = columns - i; rest > 0) {
        for (int r = 0; r < R; ++r) {
            const simd::floats weights = simd::load_first(w[r] + i, rest);
            for (int n = 0; n < N; ++n) sums[r][n] = simd::fma(weights, simd::load_first(x[n] + i, rest), sums[r][n]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) out[n][r] = simd::sum(sums[r][n]);
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
