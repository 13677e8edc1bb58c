// SPDX-License-Identifier: MIT
//
// Products of f32 matrices on Intel's matrix unit, which multiplies bf16. An operand is split in two, x = high + low,
// 16 bits of mantissa together, and high high, high low and low high are added up in f32: an error of about 2^-16,
// where a single bf16 would give 2^-8.
#pragma once

#include <keel/backend/cpu/intrinsics.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

#if defined(KEEL_AMX)

#include <sys/syscall.h>
#include <unistd.h>

namespace keel::inline KEEL_ABI {
namespace amx {

/// Sides of the blocks that products come in: rows and columns of the result, and what is summed over.
inline constexpr index block = 32;

/// Rows of a tile, and of 64 bytes each.
inline constexpr index tile_rows = 16;

/// Asks the system, once, to let this process use the matrix unit; false if it does not.
inline bool permitted() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool answer = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return answer;
}

/// GCC does not know that tiles are loaded from memory, and stored to it: what was written before must be there.
inline void finish_stores() { asm volatile("" : : : "memory"); }

/// 32 floats as bf16.
inline __m512i halves_of(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

namespace detail {

/// Eight tiles of 16 rows of 64 bytes. A constant, because GCC does not know that all of it is read.
struct alignas(64) tile_shape {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr tile_shape tiles;

}  // namespace detail

/// While it lives, this thread may use the matrix unit.
class session {
public:
    session() { _tile_loadconfig(&detail::tiles); }
    ~session() { _tile_release(); }
    session(const session&) = delete;
    session& operator=(const session&) = delete;
};

/// The two halves of a matrix. As left operand: row by row. As right operand: pairs of rows, (rows / 2, columns, 2).
struct split {
    bf16* high;
    bf16* low;

    [[nodiscard]] split from(index offset) const { return {high + offset, low + offset}; }
};

namespace detail {

struct halves {
    __m256i high, low;
};

inline halves halve(__m512 x) {
    const auto high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    return {high, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(x, rounded)))};
}

}  // namespace detail

/// A row of a left operand; n is a multiple of 16.
inline void split_row(const float* x, index n, split to) {
    for (index i = 0; i < n; i += 16) {
        const detail::halves h = detail::halve(_mm512_loadu_ps(x + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.high + i), h.high);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.low + i), h.low);
    }
}

/// Two rows of a right operand; n is a multiple of 16.
inline void split_pair(const float* even, const float* odd, index n, split to) {
    const auto join = [](__m256i a, __m256i b) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    };
    for (index i = 0; i < n; i += 16) {
        const detail::halves a = detail::halve(_mm512_loadu_ps(even + i)), b = detail::halve(_mm512_loadu_ps(odd + i));
        _mm512_storeu_si512(to.high + 2 * i, join(a.high, b.high));
        _mm512_storeu_si512(to.low + 2 * i, join(a.low, b.low));
    }
}

/// to(j, i) = from(i, j) for 16 x 16 floats.
inline void transpose(const float* from, index from_row, float* to, index to_row) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_row);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + k]: column k (+ 4 per 128 bits) of rows i to i + 3
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
    for (int k = 0; k < 4; ++k) {
        const __m512 low = _mm512_shuffle_f32x4(a[k], a[k + 4], 0x88),
                     high = _mm512_shuffle_f32x4(a[k], a[k + 4], 0xDD);
        const __m512 low2 = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0x88);
        const __m512 high2 = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0xDD);
        _mm512_storeu_ps(to + k * to_row, _mm512_shuffle_f32x4(low, low2, 0x88));
        _mm512_storeu_ps(to + (k + 4) * to_row, _mm512_shuffle_f32x4(high, high2, 0x88));
        _mm512_storeu_ps(to + (k + 8) * to_row, _mm512_shuffle_f32x4(low, low2, 0xDD));
        _mm512_storeu_ps(to + (k + 12) * to_row, _mm512_shuffle_f32x4(high, high2, 0xDD));
    }
}

/// Two rows of 16 halves each as pairs, x = high + low exactly: bf16 keeps the upper 8 of their 11 bits, and of the
/// other 3 everything.
inline void pair_halves(const f16* even, const f16* odd, bf16* high, bf16* low) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
    const auto read = [](const f16* x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    };
    const auto join = [](__m512 a, __m512 b) {
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
    };
    const __m512 a = read(even), b = read(odd);
    const __m512 a_high = _mm512_and_ps(a, upper), b_high = _mm512_and_ps(b, upper);
    _mm512_store_si512(high, join(a_high, b_high));
    _mm512_store_si512(low, join(_mm512_sub_ps(a, a_high), _mm512_sub_ps(b, b_high)));
}

/// A block of a result, c = or += sum of a b, which lies in tiles 0 to 3 while it lives. Needs a session.
template <bool Accumulate>
class block_sum {
public:
    block_sum(float* c, index c_row) : c_(c), below_(c + tile_rows * c_row), row_bytes_(c_row * 4) {
        if constexpr (Accumulate) {
            finish_stores();
            _tile_loadd(0, c_, row_bytes_);
            _tile_loadd(1, c_ + 16, row_bytes_);
            _tile_loadd(2, below_, row_bytes_);
            _tile_loadd(3, below_ + 16, row_bytes_);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    ~block_sum() {
        _tile_stored(0, c_, row_bytes_);
        _tile_stored(1, c_ + 16, row_bytes_);
        _tile_stored(2, below_, row_bytes_);
        _tile_stored(3, below_ + 16, row_bytes_);
    }
    block_sum(const block_sum&) = delete;
    block_sum& operator=(const block_sum&) = delete;

    /// `a` is (block, block), rows a_row apart; `b` is (block / 2, block, 2), pairs of rows b_row apart.
    void add(split a, index a_row, split b, index b_row) {
        finish_stores();
        const split a_below = a.from(tile_rows * a_row), b_right = b.from(block);
        a_row *= 2, b_row *= 2;  // in bytes
        const auto multiply = [] {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        };
        _tile_loadd(4, a.high, a_row);
        _tile_loadd(5, a_below.high, a_row);
        _tile_loadd(6, b.low, b_row);
        _tile_loadd(7, b_right.low, b_row);
        multiply();
        _tile_loadd(6, b.high, b_row);
        _tile_loadd(7, b_right.high, b_row);
        multiply();
        _tile_loadd(4, a.low, a_row);
        _tile_loadd(5, a_below.low, a_row);
        multiply();
    }

private:
    float* c_;
    float* below_;
    index row_bytes_;
};

/// c (+)= a b; rows, columns and depth are multiples of `block`. Needs a session.
struct product {
    index rows, columns, depth;
    split a;  // (rows, depth), rows a_row apart
    index a_row;
    split b;  // (depth / 2, columns, 2), pairs of rows b_row apart
    index b_row;
    float* c;
    index c_row;
};

template <bool Accumulate>
void multiply(const product& p) {
    for (index j = 0; j < p.columns; j += block) {
        for (index i = 0; i < p.rows; i += block) {
            block_sum<Accumulate> sum(p.c + i * p.c_row + j, p.c_row);
            for (index d = 0; d < p.depth; d += block) {
                sum.add(p.a.from(i * p.a_row + d), p.a_row, p.b.from(d / 2 * p.b_row + 2 * j), p.b_row);
            }
        }
    }
}

}  // namespace amx
}  // namespace keel::inline KEEL_ABI

#endif
