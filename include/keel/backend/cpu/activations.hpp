// SPDX-License-Identifier: MIT
//
// Activations as integers of 16 bits in two signed bytes: 32 columns share a float scale,
//   x = scale (code + rest / 256),   |code| <= 127, |rest| <= 127.
// Most weights are multiplied with the codes alone, for their own rounding is coarser than that: an error of at most
// half a scale, |largest of the 32| / 254. Weights of 8 bits are as fine as the codes. Where rows are so few that it is
// the weights that take time, these are multiplied with the rests, too.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// How many rows are few in this sense.
inline constexpr index rows_with_rests = 8;

/// Up to how many rows of activations each row of weights is used as it lies; from there on tiles of weights are
/// unpacked first.
inline constexpr index few_rows = 4;

/// What 1 stands for in sums of products of codes.
template <bool Rests>
inline constexpr float unit_of_sums = Rests ? 1.0f / 256 : 1.0f;

/// The scale of 32 values, their codes and rests; the sums of scale * code of each half, and that of scale * rest /
/// 256. A value that is not finite makes the scale so, and with it every product.
struct quantised_part {
    float scale;
    float half_sum[2];
    float rest_sum;
};
inline quantised_part quantise_part(const float* x, std::int8_t* code, std::int8_t* rest) {
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
    __m256i q[4], r[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 scaled = _mm256_mul_ps(v[i], inverse);
        q[i] = _mm256_cvtps_epi32(scaled);
        const __m256 left = _mm256_mul_ps(_mm256_sub_ps(scaled, _mm256_cvtepi32_ps(q[i])), _mm256_set1_ps(256.0f));
        r[i] = _mm256_max_epi32(_mm256_min_epi32(_mm256_cvtps_epi32(left), _mm256_set1_epi32(127)),
                                _mm256_set1_epi32(-127));
    }
    const auto store = [](std::int8_t* to, const __m256i(&of)[4]) {
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(of[0], of[1]), _mm256_packs_epi32(of[2], of[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
    };
    const auto sum = [](__m256i of) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(of), _mm256_extracti128_si256(of, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
    };
    store(code, q);
    store(rest, r);
    const int total[2] = {sum(_mm256_add_epi32(q[0], q[1])), sum(_mm256_add_epi32(q[2], q[3]))};
    const int left = sum(_mm256_add_epi32(_mm256_add_epi32(r[0], r[1]), _mm256_add_epi32(r[2], r[3])));
#else
    std::uint32_t most = 0;  // bits of magnitudes order as the magnitudes, a NaN above all
    for (int i = 0; i < part_columns; ++i) most = std::max(most, std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFFu);
    const float largest = std::bit_cast<float>(most);
    const float inverse = largest > 0x1p-100f && std::isfinite(largest) ? 127.0f / largest : 0.0f;
    int total[2] = {0, 0}, left = 0;
    for (int i = 0; i < part_columns; ++i) {
        const float scaled = std::isfinite(x[i]) ? x[i] * inverse : 1.0f;
        const float q = std::nearbyint(scaled), r = std::clamp(std::nearbyint((scaled - q) * 256.0f), -127.0f, 127.0f);
        code[i] = static_cast<std::int8_t>(q);
        rest[i] = static_cast<std::int8_t>(r);
        total[i / 16] += code[i];
        left += rest[i];
    }
#endif
    const float scale = largest / 127.0f;
    const auto times_scale = [&](int codes) { return scale * static_cast<float>(codes); };
    return {scale, {times_scale(total[0]), times_scale(total[1])}, times_scale(left) / 256.0f};
}

/// Rows of activations as integers. Per row and part of 32 columns: codes, rests, scale, and the sum of the values that
/// stand for the part: without the rests, for each half without them, and with them.
struct byte_rows {
    view<std::int8_t, 2> code;  // (n, columns)
    view<std::int8_t, 2> rest;  // (n, columns)
    view<float, 2> scale;       // (n, columns / 32)
    view<float, 2> part_sum;    // (n, columns / 32)
    view<float, 2> half_sum;    // (n, columns / 16)
    view<float, 2> full_sum;    // (n, columns / 32)

    static byte_rows take(arena& memory, index n, index columns) {
        const index parts = columns / part_columns;
        return {memory.take<std::int8_t>(n, columns), memory.take<std::int8_t>(n, columns),
                memory.take<float>(n, parts),         memory.take<float>(n, parts),
                memory.take<float>(n, 2 * parts),     memory.take<float>(n, parts)};
    }
    /// Bytes that take() takes, at most.
    static constexpr index bytes(index n, index columns) {
        return n * (2 * columns + columns / part_columns * 20) + 6 * arena::alignment;
    }

    void quantise(index row, const float* x) const {
        for (index p = 0; p < scale.extent[1]; ++p) {
            const index at = p * part_columns;
            const quantised_part q = quantise_part(x + at, &code(row, at), &rest(row, at));
            scale(row, p) = q.scale;
            half_sum(row, 2 * p) = q.half_sum[0];
            half_sum(row, 2 * p + 1) = q.half_sum[1];
            part_sum(row, p) = q.half_sum[0] + q.half_sum[1];
            full_sum(row, p) = q.half_sum[0] + q.half_sum[1] + q.rest_sum;
        }
    }

    /// The sums that the minimums of a type's weights are multiplied with.
    template <class Block>
    [[nodiscard]] view<float, 2> minimum_factors() const {
        return codes<Block>::group == 16 ? half_sum : takes_rests<Block> ? full_sum : part_sum;
    }
};

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
