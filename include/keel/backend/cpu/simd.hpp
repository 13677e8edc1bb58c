// SPDX-License-Identifier: MIT
//
// Vectors of floats. The only place that includes xsimd; what differs between its versions 8 and 14 ends here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include <keel/backend/cpu/intrinsics.hpp>  // first, see there

#include <xsimd/xsimd.hpp>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace simd {

/// As many floats as the instruction set that this is compiled for has in a register.
using floats = xsimd::batch<float>;
inline constexpr index lanes = static_cast<index>(floats::size);

inline floats load(const float* p) { return floats::load_unaligned(p); }
inline void store(float* p, floats x) { x.store_unaligned(p); }

inline void store_first(float* p, floats x, index n) {
    alignas(64) float padded[floats::size];
    x.store_aligned(padded);
    std::memcpy(p, padded, static_cast<std::size_t>(n) * sizeof(float));
}

inline floats load(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    alignas(64) float wide[floats::size];
    for (index i = 0; i < lanes; ++i) wide[i] = to_float(p[i]);
    return floats::load_aligned(wide);
#endif
}

inline floats load(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
    alignas(64) float wide[floats::size];
    for (index i = 0; i < lanes; ++i) wide[i] = to_float(p[i]);
    return floats::load_aligned(wide);
#endif
}

/// The first n < lanes elements, and zeros.
template <class T>
floats load_first(const T* p, index n) {
    T padded[floats::size] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
    return load(padded);
}

/// Nearest, ties to even.
inline void store(f16* p, floats x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    alignas(64) float wide[floats::size];
    x.store_aligned(wide);
    for (index i = 0; i < lanes; ++i) p[i] = to_f16(wide[i]);
#endif
}

/// a b + c
inline floats fma(floats a, floats b, floats c) { return xsimd::fma(a, b, c); }

/// The sum of the lanes, always in the same order.
inline float sum(floats x) {
#if XSIMD_VERSION_MAJOR < 10
    return xsimd::hadd(x);
#else
    return xsimd::reduce_add(x);
#endif
}

inline float largest(floats x) {
    alignas(64) float lane[floats::size];
    x.store_aligned(lane);
    float most = lane[0];
    for (index i = 1; i < lanes; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
}

inline floats exp(floats x) { return xsimd::exp(x); }

/// 1 / (1 + exp(-x)); only exponents <= 0 are exponentiated, so that nothing overflows.
inline floats sigmoid(floats x) {
    const floats e = xsimd::exp(-xsimd::abs(x));
    return xsimd::select(x >= floats(0.0f), floats(1.0f), e) / (floats(1.0f) + e);
}

/// x sigmoid(x)
inline floats silu(floats x) { return x * sigmoid(x); }

/// log(1 + exp(x)) for any x.
inline floats softplus(floats x) { return xsimd::max(x, floats(0.0f)) + xsimd::log1p(xsimd::exp(-xsimd::abs(x))); }

/// Calls f(first, load, store) for the columns [0, n), `lanes` at a time, then for what is left; load(p) and store(p,
/// x) touch only columns that exist.
template <class F>
void for_lanes(index n, F&& f) {
    index i = 0;
    for (; i + lanes <= n; i += lanes) {
        f(
            i, [](const float* p) { return load(p); }, [](float* p, floats x) { store(p, x); });
    }
    if (const index rest = n - i; rest > 0) {
        f(
            i, [&](const float* p) { return load_first(p, rest); },
            [&](float* p, floats x) { store_first(p, x, rest); });
    }
}

/// Sum of a[i] b[i], always in the same order for the same n.
inline float dot(const float* a, const float* b, index n) {
    floats even(0.0f), odd(0.0f);
    index i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
        even = fma(load(a + i), load(b + i), even);
        odd = fma(load(a + i + lanes), load(b + i + lanes), odd);
    }
    if (i + lanes <= n) {
        even = fma(load(a + i), load(b + i), even);
        i += lanes;
    }
    if (i < n) odd = fma(load_first(a + i, n - i), load_first(b + i, n - i), odd);
    return sum(even + odd);
}

/// While it lives, this thread's arithmetic takes denormal numbers for zero: what a strong decay leaves behind would
/// otherwise cost a hundred cycles each time it is touched.
class flush_denormals {
public:
#if defined(__SSE__)
    flush_denormals() { _mm_setcsr(saved_ | 0x8040u); }  // flush to zero, denormals are zero
    ~flush_denormals() { _mm_setcsr(saved_); }
#else
    flush_denormals() = default;
#endif
    flush_denormals(const flush_denormals&) = delete;
    flush_denormals& operator=(const flush_denormals&) = delete;

#if defined(__SSE__)
private:
    unsigned saved_ = _mm_getcsr();
#endif
};

}  // namespace simd
}  // namespace keel::inline KEEL_ABI
