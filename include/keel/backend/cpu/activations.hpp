// SPDX-License-Identifier: MIT
//
// Activations as signed bytes: 32 columns share a float scale, x = scale code, |code| <= 127. The error is at most half
// a scale, that is |largest of the 32| / 254.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Rounded to f16 where that keeps 11 bits, as Q8_0 stores it: activations then round as they do for llama.cpp and for
/// the oracle, whose greedy continuations are only comparable at equal rounding.
inline float stored_scale(float scale) {
    return scale >= 0x1p-14f && scale < 65504.0f ? to_float(to_f16(scale)) : scale;
}

/// The scale of 32 values, their codes, and scale * (sum of codes) of each half. A value that is not finite makes the
/// scale so, and with it every product.
struct quantised_part {
    float scale;
    float half_sum[2];
};
inline quantised_part quantise_part(const float* x, std::int8_t* code) {
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256 v[4];
    __m256i most = _mm256_setzero_si256();  // bits of magnitudes order as the magnitudes, a NaN above all
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    }
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4E));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xB1));
    const float largest = std::bit_cast<float>(_mm_cvtsi128_si32(top));
    const __m256 inverse = _mm256_set1_ps(largest > 0x1p-100f ? 127.0f / largest : 0.0f);
    __m256i q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    const __m256i sums[2] = {_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3])};
    const __m256i shorts[2] = {_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])};
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(code),
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(shorts[0], shorts[1]), order));
    int total[2];
    for (int h = 0; h < 2; ++h) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums[h]), _mm256_extracti128_si256(sums[h], 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
        total[h] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
    }
#else
    std::uint32_t most = 0;  // bits of magnitudes order as the magnitudes, a NaN above all
    for (int i = 0; i < part_columns; ++i) most = std::max(most, std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFFu);
    const float largest = std::bit_cast<float>(most);
    const float inverse = largest > 0x1p-100f && std::isfinite(largest) ? 127.0f / largest : 0.0f;
    int total[2] = {0, 0};
    for (int i = 0; i < part_columns; ++i) {
        const int q = std::isfinite(x[i]) ? static_cast<int>(std::nearbyint(x[i] * inverse)) : 1;
        code[i] = static_cast<std::int8_t>(q);
        total[i / 16] += q;
    }
#endif
    const float scale = stored_scale(largest / 127.0f);
    return {scale, {scale * static_cast<float>(total[0]), scale * static_cast<float>(total[1])}};
}

/// Rows of activations as bytes. Per row and part of 32 columns: codes, scale, scale * (sum of codes) of the part and
/// of its halves.
struct byte_rows {
    view<std::int8_t, 2> code;  // (n, columns)
    view<float, 2> scale;       // (n, columns / 32)
    view<float, 2> part_sum;    // (n, columns / 32)
    view<float, 2> half_sum;    // (n, columns / 16)

    static byte_rows take(arena& memory, index n, index columns) {
        const index parts = columns / part_columns;
        return {memory.take<std::int8_t>(n, columns), memory.take<float>(n, parts), memory.take<float>(n, parts),
                memory.take<float>(n, 2 * parts)};
    }
    /// Bytes that take() takes, at most.
    static constexpr index bytes(index n, index columns) {
        return n * (columns + columns / part_columns * 16) + 4 * arena::alignment;
    }

    void quantise(index row, const float* x) const {
        for (index p = 0; p < scale.extent[1]; ++p)
            set(row, p, quantise_part(x + p * part_columns, &code(row, p * part_columns)));
    }

    void set(index row, index p, const quantised_part& q) const {
        scale(row, p) = q.scale;
        part_sum(row, p) = q.half_sum[0] + q.half_sum[1];
        half_sum(row, 2 * p) = q.half_sum[0];
        half_sum(row, 2 * p + 1) = q.half_sum[1];
    }
};

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
