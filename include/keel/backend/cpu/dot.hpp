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

/// out[n][r] = row r of the weights times row x_row[n] of the activations, in bytes. The rows of weights begin with
/// *w and are `stride` blocks apart.
template <class Block, int R, int N>
void dot_bytes(const Block* w, index stride, index columns, const byte_rows& x, const index* x_row,
               float (&out)[N][R]) {
    using simd::floats8;
    constexpr bool halves = codes<Block>::group == 16;
    floats8 sums[R][N], minimums[R][N];
    const std::int8_t* code[N];
    const float *scale[N], *code_sum[N];
    for (int n = 0; n < N; ++n) {
        code[n] = x.code[x_row[n]].data;
        scale[n] = x.scale[x_row[n]].data;
        code_sum[n] = halves ? x.half_sum[x_row[n]].data : x.part_sum[x_row[n]].data;
        for (int r = 0; r < R; ++r) sums[r][n] = minimums[r][n] = simd::splat8(0.0f);
    }
    alignas(32) float factor[R][16], least[R][16], product[R][N][8];

    const index spans = columns / span_columns;
    for (index s = 0; s < spans; ++s, w += span_columns / Block::elements) {
        for (int r = 0; r < R; ++r) {
            span_factors(w + r * stride, span_parts, factor[r], least[r]);
            for (int n = 0; n < N; ++n) {
                if constexpr (!halves) {
                    simd::store_floats8(product[r][n],
                                        simd::load_floats8(factor[r]) * simd::load_floats8(scale[n] + s * span_parts));
                }
                if constexpr (has_minimums<Block>) {
                    constexpr int count = span_columns / codes<Block>::group;
                    for (int k = 0; k < count; k += 8) {
                        minimums[r][n] = simd::fma(simd::load_floats8(least[r] + k),
                                                   simd::load_floats8(code_sum[n] + s * count + k), minimums[r][n]);
                    }
                }
            }
        }
        unrolled<span_parts>([&]<int P>() {
            for (int r = 0; r < R; ++r) {
                const simd::bytes32 weights = span_codes<Block, P>(w + r * stride);
                for (int n = 0; n < N; ++n) {
                    const simd::bytes32 values = simd::load_bytes(code[n] + s * span_columns + P * part_columns);
                    const floats8 dots =
                        simd::to_floats(simd::dot4<has_signed_codes<Block>>(simd::no_sums(), weights, values));
                    if constexpr (halves) {
                        const floats8 both =
                            simd::splat8(scale[n][s * span_parts + P]) * simd::splat4(factor[r] + 2 * P);
                        sums[r][n] = simd::fma(dots, both, sums[r][n]);
                    } else {
                        sums[r][n] = simd::fma(dots, simd::splat8(product[r][n][P]), sums[r][n]);
                    }
                }
            }
        });
    }
    float rest[R][N] = {};  // minimums of the columns that fill no span
    if constexpr (Block::elements == part_columns) {
        for (index p = spans * span_parts; p < columns / part_columns; ++p, ++w) {
            for (int r = 0; r < R; ++r) {
                span_factors(w + r * stride, 1, factor[r], least[r]);
                const simd::bytes32 weights = span_codes<Block, 0>(w + r * stride);
                for (int n = 0; n < N; ++n) {
                    const floats8 dots = simd::to_floats(simd::dot4<has_signed_codes<Block>>(
                        simd::no_sums(), weights, simd::load_bytes(code[n] + p * part_columns)));
                    sums[r][n] = simd::fma(dots, simd::splat8(factor[r][0] * scale[n][p]), sums[r][n]);
                    if constexpr (has_minimums<Block>) rest[r][n] += least[r][0] * code_sum[n][p];
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            out[n][r] = simd::sum(sums[r][n]);
            if constexpr (has_minimums<Block>) out[n][r] -= simd::sum(minimums[r][n]) + rest[r][n];
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
