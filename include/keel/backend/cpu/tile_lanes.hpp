// SPDX-License-Identifier: MIT
//
// The arithmetic of a tile of weight rows, which lie side by side in the lanes of a register: 32 rows with AVX-512's
// byte products, 8 otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/intrinsics.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
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
    /// One of each kind per row: unsigned and signed bytes, f16.
    static floats floats_of(const std::uint8_t* p) {
        const auto half = [](const void* from) {
            return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
        };
        return {half(p), half(p + 16)};
    }
    static floats floats_of(const std::int8_t* p) {
        const auto half = [](const void* from) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
        };
        return {half(p), half(p + 16)};
    }
    static floats floats_of_halves(const std::uint8_t* p) {
        return {_mm512_cvtph_ps(load(p)), _mm512_cvtph_ps(load(p + 32))};
    }
    static codes load_codes(const std::uint8_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)}; }
    /// As in bytes.hpp.
    template <int Shift, int Mask>
    static codes field(codes x) {
        return {field_of<Shift, Mask>(x.low), field_of<Shift, Mask>(x.high)};
    }
    template <int LowShift, int LowMask, int HighShift, int HighMask>
    static codes join(codes low, codes high) {
        return {join_of<LowShift, LowMask, HighShift, HighMask>(low.low, high.low),
                join_of<LowShift, LowMask, HighShift, HighMask>(low.high, high.high)};
    }
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

    template <int Shift>
    static __m512i shifted(__m512i x) {
        if constexpr (Shift > 0) return _mm512_srli_epi16(x, Shift);
        if constexpr (Shift < 0) return _mm512_slli_epi16(x, -Shift);
        return x;
    }
    template <int Shift, int Mask>
    static __m512i field_of(__m512i x) {
        return _mm512_and_si512(shifted<Shift>(x), _mm512_set1_epi8(Mask));
    }
    template <int LowShift, int LowMask, int HighShift, int HighMask>
    static __m512i join_of(__m512i low, __m512i high) {
        const __m512i either = _mm512_ternarylogic_epi32(_mm512_set1_epi8(LowMask), shifted<LowShift>(low),
                                                         shifted<HighShift>(high), 0xCA);  // low where the mask is
        return _mm512_and_si512(either, _mm512_set1_epi8(LowMask | HighMask));
    }

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
    template <class Byte>
    static floats floats_of(const Byte* p) {
        return simd::floats_of(p);
    }
    static floats floats_of_halves(const std::uint8_t* p) {
        return simd::floats_of_halves([&](int i) {
            f16 half;
            std::memcpy(&half, p + 2 * i, sizeof(half));
            return half;
        });
    }
    static codes load_codes(const std::uint8_t* p) { return simd::load_bytes(p); }
    template <int Shift, int Mask>
    static codes field(codes x) {
        return simd::field<Shift, Mask>(x);
    }
    template <int LowShift, int LowMask, int HighShift, int HighMask>
    static codes join(codes low, codes high) {
        return simd::join<LowShift, LowMask, HighShift, HighMask>(low, high);
    }
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

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
