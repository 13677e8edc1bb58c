// SPDX-License-Identifier: MIT
//
// Vectors of 32 bytes, eight integers and eight floats: as many as a block of quantised weights and its products want,
// whatever the width of the registers. With AVX2 these are registers; otherwise arrays that the compiler vectorises.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <keel/backend/cpu/intrinsics.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace simd {

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct bytes32 {
    __m256i v;
};
struct floats8 {
    __m256 v;
};
struct ints8 {
    __m256i v;
};

inline bytes32 load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void store_bytes(void* p, bytes32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x.v); }

/// The low nibbles of 16 bytes, then their high nibbles.
inline bytes32 nibbles(const std::uint8_t* p) {
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1);
    return {_mm256_and_si256(both, _mm256_set1_epi8(15))};
}

/// (x >> Shift) & Mask, per byte.
template <int Shift, int Mask>
bytes32 field(bytes32 x) {
    const __m256i shifted = Shift == 0 ? x.v : _mm256_srli_epi16(x.v, Shift);
    return {_mm256_and_si256(shifted, _mm256_set1_epi8(Mask))};
}

/// ((low >> LowShift) & LowMask) | ((high >> HighShift) & HighMask), per byte. HighShift may be negative.
template <int LowShift, int LowMask, int HighShift, int HighMask>
bytes32 join(bytes32 low, bytes32 high) {
    const __m256i a = LowShift == 0 ? low.v : _mm256_srli_epi16(low.v, LowShift);
    const __m256i b = HighShift == 0  ? high.v
                      : HighShift > 0 ? _mm256_srli_epi16(high.v, HighShift > 0 ? HighShift : 0)
                                      : _mm256_slli_epi16(high.v, HighShift < 0 ? -HighShift : 0);
#if defined(__AVX512VL__)
    const __m256i either = _mm256_ternarylogic_epi32(_mm256_set1_epi8(LowMask), a, b, 0xCA);  // a where the mask is
    return {_mm256_and_si256(either, _mm256_set1_epi8(LowMask | HighMask))};
#else
    return {_mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8(LowMask)),
                            _mm256_and_si256(b, _mm256_set1_epi8(HighMask)))};
#endif
}

/// x + Value for the bytes i whose bit i is set.
template <int Value>
bytes32 add_where(bytes32 x, std::uint32_t bits) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return {_mm256_mask_add_epi8(x.v, bits, x.v, _mm256_set1_epi8(Value))};
#else
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
    return {_mm256_add_epi8(x.v, _mm256_and_si256(set, _mm256_set1_epi8(Value)))};
#endif
}

/// table[x], per byte; x < 16.
inline bytes32 lookup(const std::int8_t (&table)[16], bytes32 x) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), x.v)};
}

inline floats8 load_floats8(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store_floats8(float* p, floats8 x) { _mm256_storeu_ps(p, x.v); }
inline floats8 splat8(float x) { return {_mm256_set1_ps(x)}; }
/// Four times element 2 Pair, four times the next.
template <int Pair>
floats8 splat4(floats8 x) {
    constexpr int a = 2 * Pair, b = 2 * Pair + 1;
    return {_mm256_permutevar8x32_ps(x.v, _mm256_setr_epi32(a, a, a, a, b, b, b, b))};
}
inline floats8 operator*(floats8 a, floats8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline floats8 operator+(floats8 a, floats8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline floats8 fma(floats8 a, floats8 b, floats8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
/// c - a b
inline floats8 fnma(floats8 a, floats8 b, floats8 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline float sum(floats8 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/// Eight bytes, or signed bytes, as floats.
inline floats8 floats_of(const std::uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline floats8 floats_of(const std::int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
/// The eight bytes of a word, the lowest first, as floats.
inline floats8 floats_of(std::uint64_t bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes))))};
}
/// Eight fields of 4 bits plus eight of 2 bits above them, the lowest first, as floats.
inline floats8 floats_of(std::uint32_t low, std::uint32_t high) {
    const __m256i first =
        _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(low)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i second =
        _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(high)), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const __m256i joined = _mm256_or_si256(_mm256_and_si256(first, _mm256_set1_epi32(15)),
                                           _mm256_slli_epi32(_mm256_and_si256(second, _mm256_set1_epi32(3)), 4));
    return {_mm256_cvtepi32_ps(joined)};
}
/// Eight numbers of 16 bits, got by f(0) to f(7), as floats.
template <class F>
floats8 floats_of_halves(F&& f) {
    const auto bits = [&](int i) { return static_cast<short>(f(i).bits); };
    return {_mm256_cvtph_ps(_mm_setr_epi16(bits(0), bits(1), bits(2), bits(3), bits(4), bits(5), bits(6), bits(7)))};
}
/// The first four, or the last four, each twice.
inline floats8 twice_low(floats8 x) {
    return {_mm256_permutevar8x32_ps(x.v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))};
}
inline floats8 twice_high(floats8 x) {
    return {_mm256_permutevar8x32_ps(x.v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}

/// Whether codes of full range are multiplied unsigned (with 128 added) or signed; see dot4.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline constexpr bool biased_codes = true;
#else
inline constexpr bool biased_codes = false;
#endif

inline ints8 no_sums() { return {_mm256_setzero_si256()}; }
inline floats8 to_floats(ints8 x) { return {_mm256_cvtepi32_ps(x.v)}; }
inline ints8 times256(ints8 x) { return {_mm256_slli_epi32(x.v, 8)}; }

/// Four bytes, eight times.
inline bytes32 repeat4(const std::int8_t* p) {
    std::int32_t four;
    std::memcpy(&four, p, sizeof(four));
    return {_mm256_set1_epi32(four)};
}

/// Adds to eight sums four products w x each. w: unsigned, or signed if SignedWeights; x: signed, never -128. Without
/// VNNI unsigned w must be below 128, because pairs of products meet in 16 bits.
template <bool SignedWeights>
ints8 dot4(ints8 sums, bytes32 w, bytes32 x) {
    const __m256i a = SignedWeights ? _mm256_abs_epi8(w.v) : w.v;
    const __m256i b = SignedWeights ? _mm256_sign_epi8(x.v, w.v) : x.v;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return {_mm256_dpbusd_epi32(sums.v, a, b)};
#else
    return {_mm256_add_epi32(sums.v, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))};
#endif
}

/// Signed bytes plus 128, as unsigned ones.
inline bytes32 biased(bytes32 x) { return {_mm256_xor_si256(x.v, _mm256_set1_epi8(-128))}; }

inline float float_of(f16 h) { return _cvtsh_ss(h.bits); }

#else

struct bytes32 {
    std::uint8_t v[32];
};
struct floats8 {
    float v[8];
};
struct ints8 {
    std::int32_t v[8];
};

template <class F>
bytes32 make_bytes(F&& f) {
    bytes32 x;
    for (int i = 0; i < 32; ++i) x.v[i] = static_cast<std::uint8_t>(f(i));
    return x;
}
template <class F>
floats8 make_floats(F&& f) {
    floats8 x;
    for (int i = 0; i < 8; ++i) x.v[i] = f(i);
    return x;
}

inline bytes32 load_bytes(const void* p) {
    bytes32 x;
    std::memcpy(x.v, p, sizeof(x.v));
    return x;
}
inline void store_bytes(void* p, bytes32 x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline bytes32 nibbles(const std::uint8_t* p) {
    return make_bytes([&](int i) { return i < 16 ? p[i] & 15 : p[i - 16] >> 4; });
}
template <int Shift, int Mask>
bytes32 field(bytes32 x) {
    return make_bytes([&](int i) { return (x.v[i] >> Shift) & Mask; });
}
template <int LowShift, int LowMask, int HighShift, int HighMask>
bytes32 join(bytes32 low, bytes32 high) {
    return make_bytes([&](int i) {
        const int above = HighShift < 0 ? high.v[i] << (HighShift < 0 ? -HighShift : 0)
                                        : high.v[i] >> (HighShift < 0 ? 0 : HighShift);
        return ((low.v[i] >> LowShift) & LowMask) | (above & HighMask);
    });
}
template <int Value>
bytes32 add_where(bytes32 x, std::uint32_t bits) {
    return make_bytes([&](int i) { return x.v[i] + ((bits >> i) & 1u) * Value; });
}
inline bytes32 lookup(const std::int8_t (&table)[16], bytes32 x) {
    return make_bytes([&](int i) { return table[x.v[i]]; });
}

inline floats8 load_floats8(const float* p) {
    return make_floats([&](int i) { return p[i]; });
}
inline void store_floats8(float* p, floats8 x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline floats8 splat8(float x) {
    return make_floats([&](int) { return x; });
}
template <int Pair>
floats8 splat4(floats8 x) {
    return make_floats([&](int i) { return x.v[2 * Pair + i / 4]; });
}
inline floats8 operator*(floats8 a, floats8 b) {
    return make_floats([&](int i) { return a.v[i] * b.v[i]; });
}
inline floats8 operator+(floats8 a, floats8 b) {
    return make_floats([&](int i) { return a.v[i] + b.v[i]; });
}
inline floats8 fma(floats8 a, floats8 b, floats8 c) { return a * b + c; }
inline floats8 fnma(floats8 a, floats8 b, floats8 c) {
    return make_floats([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
}
inline float sum(floats8 x) {
    return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
}
template <class Byte>
floats8 floats_of(const Byte* p) {
    return make_floats([&](int i) { return static_cast<float>(p[i]); });
}
inline floats8 floats_of(std::uint64_t bytes) {
    return make_floats([&](int i) { return static_cast<float>((bytes >> (8 * i)) & 255u); });
}
inline floats8 floats_of(std::uint32_t low, std::uint32_t high) {
    return make_floats(
        [&](int i) { return static_cast<float>(((low >> (4 * i)) & 15u) | ((high >> (2 * i)) & 3u) << 4); });
}
template <class F>
floats8 floats_of_halves(F&& f) {
    return make_floats([&](int i) { return to_float(f(i)); });
}
inline floats8 twice_low(floats8 x) {
    return make_floats([&](int i) { return x.v[i / 2]; });
}
inline floats8 twice_high(floats8 x) {
    return make_floats([&](int i) { return x.v[4 + i / 2]; });
}

inline constexpr bool biased_codes = false;

inline ints8 no_sums() { return {}; }
inline floats8 to_floats(ints8 x) {
    return make_floats([&](int i) { return static_cast<float>(x.v[i]); });
}
inline ints8 times256(ints8 x) {
    for (std::int32_t& sum : x.v) sum *= 256;
    return x;
}
inline bytes32 repeat4(const std::int8_t* p) {
    bytes32 x;
    for (int i = 0; i < 32; i += 4) std::memcpy(x.v + i, p, 4);
    return x;
}
/// All bytes are signed here: unsigned w is below 128. Pairs of bytes are seen as numbers of 16 bits and pairs of those
/// as numbers of 32, so that no byte has to leave its place, and any vector unit will do.
template <bool SignedWeights>
ints8 dot4(ints8 sums, bytes32 w, bytes32 x) {
    using shorts [[gnu::vector_size(16)]] = std::int16_t;
    using ints [[gnu::vector_size(16)]] = std::int32_t;
    for (int half = 0; half < 2; ++half) {
        shorts a, b;
        ints sum;
        std::memcpy(&a, w.v + 16 * half, sizeof(a));
        std::memcpy(&b, x.v + 16 * half, sizeof(b));
        std::memcpy(&sum, sums.v + 4 * half, sizeof(sum));
        const shorts even = ((a << 8) >> 8) * ((b << 8) >> 8), odd = (a >> 8) * (b >> 8);
        const ints pairs = reinterpret_cast<ints>(even + odd);  // at most 2 * 128 * 127: 16 bits hold it
        sum += ((pairs << 16) >> 16) + (pairs >> 16);
        std::memcpy(sums.v + 4 * half, &sum, sizeof(sum));
    }
    return sums;
}
inline bytes32 biased(bytes32 x) {
    return make_bytes([&](int i) { return x.v[i] ^ 128; });
}

inline float float_of(f16 h) { return to_float(h); }

#endif

}  // namespace simd
}  // namespace keel::inline KEEL_ABI
