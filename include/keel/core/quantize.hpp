// SPDX-License-Identifier: MIT
//
// Encoders of the tensor types of quant.hpp: from f32 rows to blocks that decode to nearly the same values.
//
// Every encoder minimises sum w (x - decoded)^2 over each group of elements, with w the importance of the column, by
// trying a few scales around the one that maps the largest element to the end of the grid and fitting each by least
// squares (quantize_search.hpp); the types with quantised scales are in quantize_k.hpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/quantize_k.hpp>
#include <keel/core/quantize_search.hpp>
#include <keel/core/quantize_tile.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Fits one scale per block of 32 and calls f(block, its scale, its codes).
template <class Grid, class F>
void encode_scaled(const tile<32>& t, const sweep& positions, const float* from, index blocks, F&& f) {
    const lanes scale = fit_scale<Grid>(t, positions);
    lanes_of<f16> d;
    for (int l = 0; l < lane_count; ++l) d[l] = to_scale(scale[l] * t.unit[l]);
    for (int b = 0; b < blocks; ++b) {
        std::uint8_t codes[32];
        write_codes<Grid>(from + 32 * b, 32, reciprocal(to_float(d[b])), 0.0f, codes);
        f(b, d[b], codes);
    }
}

/// The same for a scale and a minimum. Who brings importance gets the longer search.
template <int high, class F>
void encode_affine(const tile<32>& t, const sweep& positions, const float* from, index blocks, F&& f) {
    const affine fit = fit_affine<high, false>(t, positions, t.weighted);
    lanes_of<f16> d, m;
    for (int l = 0; l < lane_count; ++l) {
        d[l] = to_scale(fit.scale[l] * t.unit[l]);
        m[l] = to_scale(fit.minimum[l] * t.unit[l] + t.origin[l]);
    }
    for (int b = 0; b < blocks; ++b) {
        std::uint8_t codes[32];
        write_codes<integers<0, high>>(from + 32 * b, 32, reciprocal(to_float(d[b])), to_float(m[b]), codes);
        f(b, d[b], m[b], codes);
    }
}

/// The fifth bits of 32 codes. The product moves bit 8 i of a word to bit 56 + i.
inline std::uint32_t fifth_bits(const std::uint8_t* codes) {
    std::uint32_t bits = 0;
    for (int i = 0; i < 32; i += 8) {
        const std::uint64_t word = (eight(codes + i) >> 4) & 0x0101010101010101;
        bits |= static_cast<std::uint32_t>((word * 0x0102040810204080) >> 56) << i;
    }
    return bits;
}

inline void encode(const tile<32>& t, const float* from, block_q8_0* to, index blocks) {
    encode_scaled<integers<-127, 127>>(t, {123.0f, 127.0f, 5}, from, blocks, [&](int b, f16 d, const auto& codes) {
        to[b].d.set(d);
        for (int i = 0; i < 32; ++i) to[b].qs[i] = static_cast<std::int8_t>(codes[i] - 127);
    });
}

inline void encode(const tile<32>& t, const float* from, block_q4_0* to, index blocks) {
    encode_scaled<integers<-8, 7>>(t, {-7.3f, -8.5f, 3}, from, blocks, [&](int b, f16 d, const auto& codes) {
        to[b].d.set(d);
        pack_nibbles(codes, codes + 16, 16, to[b].qs);
    });
}

inline void encode(const tile<32>& t, const float* from, block_q5_0* to, index blocks) {
    encode_scaled<integers<-16, 15>>(t, {-14.8f, -16.4f, 4}, from, blocks, [&](int b, f16 d, const auto& codes) {
        to[b].d.set(d);
        to[b].qh.set(fifth_bits(codes));
        pack_nibbles(codes, codes + 16, 16, to[b].qs);
    });
}

inline void encode(const tile<32>& t, const float* from, block_iq4_nl* to, index blocks) {
    encode_scaled<iq4_grid>(t, {-100.0f, -140.0f, 12}, from, blocks, [&](int b, f16 d, const auto& codes) {
        to[b].d.set(d);
        pack_nibbles(codes, codes + 16, 16, to[b].qs);
    });
}

inline void encode(const tile<32>& t, const float* from, block_q4_1* to, index blocks) {
    encode_affine<15>(t, {14.4f, 15.4f, 2}, from, blocks, [&](int b, f16 d, f16 m, const auto& codes) {
        to[b].d.set(d);
        to[b].m.set(m);
        pack_nibbles(codes, codes + 16, 16, to[b].qs);
    });
}

inline void encode(const tile<32>& t, const float* from, block_q5_1* to, index blocks) {
    encode_affine<31>(t, {30.4f, 31.4f, 2}, from, blocks, [&](int b, f16 d, f16 m, const auto& codes) {
        to[b].d.set(d);
        to[b].m.set(m);
        to[b].qh.set(fifth_bits(codes));
        pack_nibbles(codes, codes + 16, 16, to[b].qs);
    });
}

/// The scale of MXFP4 is a power of two: one of those that take the largest element to [4, 8), [8, 16) or [16, 32) on a
/// grid that ends at 12.
inline void encode(const tile<32>& t, const float* from, block_mxfp4* to, index blocks) {
    const auto power_of_two = [](int e) { return std::bit_cast<float>(static_cast<std::uint32_t>(e + 127) << 23); };
    lanes_of<int> exponent;  // of the largest element
    for (int l = 0; l < lane_count; ++l) {
        exponent[l] = static_cast<int>(std::bit_cast<std::uint32_t>(t.unit[l]) >> 23) - 127;
    }
    lanes_of<int> chosen = {};
    lanes best;
    best.fill(-std::numeric_limits<float>::infinity());
    for (const int below : {2, 3, 4}) {
        lanes inverse;
        for (int l = 0; l < lane_count; ++l) {
            inverse[l] = t.unit[l] >= smallest_unit ? t.unit[l] * power_of_two(below - exponent[l]) : 1.0f;
        }
        const scale_sums s = tally<mxfp4_grid>(t, inverse);
        for (int l = 0; l < lane_count; ++l) {
            const float scale = 1.0f / inverse[l];
            const float explained = scale * (2.0f * s.qx[l] - scale * s.qq[l]);
            chosen[l] = explained > best[l] ? exponent[l] - below : chosen[l];
            best[l] = explained > best[l] ? explained : best[l];
        }
    }
    for (int b = 0; b < blocks; ++b) {
        if (t.unit[b] >= smallest_unit) {
            std::uint8_t codes[32];
            write_codes<mxfp4_grid>(from + 32 * b, 32, power_of_two(-chosen[b]), 0.0f, codes);
            to[b].e = static_cast<std::uint8_t>(chosen[b] + 128);
            pack_nibbles(codes, codes + 16, 16, to[b].qs);
        } else {
            const bool finite = t.unit[b] == t.unit[b];
            to[b].e = finite ? 0 : 255;
            std::fill_n(to[b].qs, 16, static_cast<std::uint8_t>(finite ? 0 : 0x77));
        }
    }
}

/// Elements that share one scale.
template <class Block>
inline constexpr int group_size = 32;
template <>
inline constexpr int group_size<block_q2_k> = 16;
template <>
inline constexpr int group_size<block_q3_k> = 16;
template <>
inline constexpr int group_size<block_q6_k> = 16;

/// A large common offset would drown the differences, so that it is taken away first.
template <class Block>
inline constexpr bool from_least = false;
template <>
inline constexpr bool from_least<block_q4_1> = true;
template <>
inline constexpr bool from_least<block_q5_1> = true;

/// The importance of columns of mean 1, and a little for those that have none.
template <int N>
void load_importance(tile<N>& t, const float* importance, float inverse_mean, index columns) {
    for (int l = 0; l < lane_count; ++l) {
        for (int i = 0; i < N; ++i) {
            const index column = N * l + i;
            t.w[i][l] = 1e-6f + (column < columns ? importance[column] * inverse_mean : 0.0f);
        }
    }
}

template <class Block>
void encode_blocks(const float* from, Block* to, index blocks, const float* importance) {
    constexpr int N = group_size<Block>;
    constexpr index blocks_per_tile = lane_count * N / Block::elements;
    tile<N> t;
    t.weighted = importance != nullptr;
    double mean = 0.0;
    if (importance) {
        const index columns = blocks * Block::elements;
        for (index i = 0; i < columns; ++i) mean += static_cast<double>(importance[i]) / static_cast<double>(columns);
    }
    for (index b = 0; b < blocks; b += blocks_per_tile) {
        const index present = std::min(blocks_per_tile, blocks - b), column = b * Block::elements;
        load<from_least<Block>>(t, from + column, Block::elements, present);
        if (importance) {
            const float inverse_mean = mean > 1e-30 ? static_cast<float>(1.0 / mean) : 0.0f;
            load_importance(t, importance + column, inverse_mean, present * Block::elements);
        }
        encode(t, from + column, to + b, present);
    }
}

inline void encode_blocks(const float* from, block_f32* to, index n, const float*) {
    for (index i = 0; i < n; ++i) to[i].value.set(from[i]);
}

inline void encode_blocks(const float* from, block_f16* to, index n, const float*) {
    for (index i = 0; i < n; ++i) to[i].value.set(to_f16(from[i]));
}

inline void encode_blocks(const float* from, block_bf16* to, index n, const float*) {
    for (index i = 0; i < n; ++i) to[i].value.set(to_bf16(from[i]));
}

}  // namespace detail

/// Encodes a row of `columns` elements, a multiple of the type's block, into row_bytes(type, columns) bytes.
/// `importance`, if given, holds one non-negative, finite weight per column: how much an error there counts.
/// Without it rows that follow each other may be encoded as one.
///
/// The result depends on nothing but the arguments (and, in the choice between nearly equal scales, on whether the
/// compiler may use fma). Throws only for a type that is none, like visit_blocks. A block (32 or 256 elements) with a
/// NaN or an infinity decodes to NaN in all its elements, in MXFP4, which has no NaN, to huge values; other blocks are
/// not affected. Scales that f16 cannot hold saturate, and blocks whose scale would be less than the smallest f16
/// become zeros. F16 and BF16 round to nearest even; beyond the largest f16 that gives infinity.
inline void encode_row(dtype type, const float* from, std::byte* to, index columns, const float* importance = nullptr) {
    visit_blocks(type, [&]<class Block>() {
        detail::encode_blocks(from, reinterpret_cast<Block*>(to), columns / Block::elements, importance);
    });
}

}  // namespace keel::inline KEEL_ABI
