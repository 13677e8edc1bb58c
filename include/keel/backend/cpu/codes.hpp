// SPDX-License-Identifier: MIT
//
// The quantised blocks of GGUF as kernels want them: byte codes and float factors, for spans of 256 columns.
//
//   weight = scale (code - offset) - min
//
// codes<Block> has, for 8 parts of 32 columns each:
//   group          columns that share a scale (and a min): 16 or 32
//   is_signed      whether codes are signed bytes; then offset is 0
//   offset         of all codes of the type
//   has_min
//   part<P>(b)     the 32 codes of part P of the span that begins with block *b
//   scales(b, s)   256 / group scales; mins(b, m) likewise
// Types with blocks of 32 columns also have, for columns that fill no span: scale(b), min(b) of one block.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include <keel/backend/cpu/bytes.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

inline constexpr int span_columns = 256;
inline constexpr int part_columns = 32;
inline constexpr int span_parts = span_columns / part_columns;

/// Calls f.template operator()<0>() ... f.template operator()<N - 1>().
template <int N, class F>
void unrolled(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) { (f.template operator()<I>(), ...); }
    (std::make_integer_sequence<int, N>{});
}

/// Blocks of 32 columns with one f16 scale.
template <class Block>
struct codes_of_32 {
    static constexpr int group = 32;
    static constexpr bool is_signed = false, has_min = false;
    static constexpr int offset = 0;

    static float scale(const Block& b) { return simd::float_of(b.d.get()); }
    static float min(const Block& b) { return -simd::float_of(b.m.get()); }
};

template <class Block>
struct codes;

template <>
struct codes<block_q8_0> : codes_of_32<block_q8_0> {
    static constexpr bool is_signed = true;

    template <int P>
    static simd::bytes32 part(const block_q8_0* b) {
        return simd::load_bytes(b[P].qs);
    }
};

template <>
struct codes<block_q4_0> : codes_of_32<block_q4_0> {
    static constexpr int offset = 8;

    template <int P>
    static simd::bytes32 part(const block_q4_0* b) {
        return simd::nibbles(b[P].qs);
    }
};

template <>
struct codes<block_q4_1> : codes_of_32<block_q4_1> {
    static constexpr bool has_min = true;

    template <int P>
    static simd::bytes32 part(const block_q4_1* b) {
        return simd::nibbles(b[P].qs);
    }
};

template <>
struct codes<block_q5_0> : codes_of_32<block_q5_0> {
    static constexpr int offset = 16;

    template <int P>
    static simd::bytes32 part(const block_q5_0* b) {
        return simd::nibbles(b[P].qs) | simd::shift_left<4>(simd::spread_bits(b[P].qh.get()));
    }
};

template <>
struct codes<block_q5_1> : codes_of_32<block_q5_1> {
    static constexpr bool has_min = true;

    template <int P>
    static simd::bytes32 part(const block_q5_1* b) {
        return simd::nibbles(b[P].qs) | simd::shift_left<4>(simd::spread_bits(b[P].qh.get()));
    }
};

template <>
struct codes<block_iq4_nl> : codes_of_32<block_iq4_nl> {
    static constexpr bool is_signed = true;

    template <int P>
    static simd::bytes32 part(const block_iq4_nl* b) {
        return simd::lookup(iq4_values, simd::nibbles(b[P].qs));
    }
};

template <>
struct codes<block_mxfp4> : codes_of_32<block_mxfp4> {
    static constexpr bool is_signed = true;

    template <int P>
    static simd::bytes32 part(const block_mxfp4* b) {
        return simd::lookup(mxfp4_values, simd::nibbles(b[P].qs));
    }
    static float scale(const block_mxfp4& b) { return std::bit_cast<float>(e8m0_half_bits(b.e)); }
};

/// The eight scales and the eight minimums of packed_scales as bytes.
inline void unpack_scales(const packed_scales& packed, std::uint8_t (&scales)[8], std::uint8_t (&mins)[8]) {
    std::uint32_t word[3];
    std::memcpy(word, packed.raw, sizeof(word));
    const std::uint32_t scale_words[2] = {word[0] & 0x3F3F3F3Fu,
                                          (word[2] & 0x0F0F0F0Fu) | ((word[0] >> 2) & 0x30303030u)};
    const std::uint32_t min_words[2] = {word[1] & 0x3F3F3F3Fu,
                                        ((word[2] >> 4) & 0x0F0F0F0Fu) | ((word[1] >> 2) & 0x30303030u)};
    std::memcpy(scales, scale_words, sizeof(scales));
    std::memcpy(mins, min_words, sizeof(mins));
}

/// Q4_K and Q5_K: eight scales and minimums of 32 columns.
template <class Block>
struct codes_with_packed_scales {
    static constexpr int group = 32, offset = 0;
    static constexpr bool is_signed = false, has_min = true;

    static void scales_and_mins(const Block* b, float* scale, float* min) {
        alignas(8) std::uint8_t scales[8], mins[8];
        unpack_scales(b->scales, scales, mins);
        simd::store_floats8(scale, simd::floats_of(scales) * simd::splat8(simd::float_of(b->d.get())));
        simd::store_floats8(min, simd::floats_of(mins) * simd::splat8(simd::float_of(b->dmin.get())));
    }
};

template <>
struct codes<block_q4_k> : codes_with_packed_scales<block_q4_k> {
    template <int P>
    static simd::bytes32 part(const block_q4_k* b) {
        return simd::field<P % 2 * 4, 15>(simd::load_bytes(b->qs + P / 2 * 32));
    }
};

template <>
struct codes<block_q5_k> : codes_with_packed_scales<block_q5_k> {
    template <int P>
    static simd::bytes32 part(const block_q5_k* b) {
        const simd::bytes32 high = simd::field<P, 1>(simd::load_bytes(b->qh));
        return simd::field<P % 2 * 4, 15>(simd::load_bytes(b->qs + P / 2 * 32)) | simd::shift_left<4>(high);
    }
};

template <>
struct codes<block_q2_k> {
    static constexpr int group = 16, offset = 0;
    static constexpr bool is_signed = false, has_min = true;

    template <int P>
    static simd::bytes32 part(const block_q2_k* b) {
        return simd::field<P % 4 * 2, 3>(simd::load_bytes(b->qs + P / 4 * 32));
    }
    static void scales_and_mins(const block_q2_k* b, float* scale, float* min) {
        std::uint8_t scales[16], mins[16];
        for (int k = 0; k < 16; ++k) {
            scales[k] = b->scales[k] & 15;
            mins[k] = b->scales[k] >> 4;
        }
        const simd::floats8 d = simd::splat8(simd::float_of(b->d.get()));
        const simd::floats8 dmin = simd::splat8(simd::float_of(b->dmin.get()));
        for (int k = 0; k < 16; k += 8) {
            simd::store_floats8(scale + k, simd::floats_of(scales + k) * d);
            simd::store_floats8(min + k, simd::floats_of(mins + k) * dmin);
        }
    }
};

/// Sixteen signed scales times d.
inline void scale_all(const std::int8_t (&scales)[16], f16 d, float* scale) {
    const simd::floats8 all = simd::splat8(simd::float_of(d));
    for (int k = 0; k < 16; k += 8) simd::store_floats8(scale + k, simd::floats_of(scales + k) * all);
}

template <>
struct codes<block_q3_k> {
    static constexpr int group = 16, offset = 4;
    static constexpr bool is_signed = false, has_min = false;

    template <int P>
    static simd::bytes32 part(const block_q3_k* b) {
        const simd::bytes32 high = simd::field<P, 1>(simd::load_bytes(b->hmask));
        return simd::field<P % 4 * 2, 3>(simd::load_bytes(b->qs + P / 4 * 32)) | simd::shift_left<2>(high);
    }
    static void scales_and_mins(const block_q3_k* b, float* scale, float*) {
        std::uint32_t word[3];
        std::memcpy(word, b->scales, sizeof(word));
        std::uint32_t joined[4];
        for (unsigned k = 0; k < 4; ++k) {
            const std::uint32_t low = (word[k % 2] >> (k / 2 * 4)) & 0x0F0F0F0Fu;
            joined[k] = low | ((word[2] >> (2 * k)) & 0x03030303u) << 4;
        }
        std::int8_t scales[16];
        std::memcpy(scales, joined, sizeof(scales));
        for (std::int8_t& s : scales) s = static_cast<std::int8_t>(s - 32);
        scale_all(scales, b->d.get(), scale);
    }
};

template <>
struct codes<block_q6_k> {
    static constexpr int group = 16, offset = 32;
    static constexpr bool is_signed = false, has_min = false;

    template <int P>
    static simd::bytes32 part(const block_q6_k* b) {
        const simd::bytes32 high = simd::field<P % 4 * 2, 3>(simd::load_bytes(b->qh + P / 4 * 32));
        const simd::bytes32 low = simd::load_bytes(b->ql + P / 4 * 64 + P % 2 * 32);
        return simd::field<P % 4 / 2 * 4, 15>(low) | simd::shift_left<4>(high);
    }
    static void scales_and_mins(const block_q6_k* b, float* scale, float*) { scale_all(b->scales, b->d.get(), scale); }
};

template <>
struct codes<block_iq4_xs> {
    static constexpr int group = 32, offset = 0;
    static constexpr bool is_signed = true, has_min = false;

    template <int P>
    static simd::bytes32 part(const block_iq4_xs* b) {
        return simd::lookup(iq4_values, simd::nibbles(b->qs + P * 16));
    }
    static void scales_and_mins(const block_iq4_xs* b, float* scale, float*) {
        const float d = simd::float_of(b->d.get());
        for (int k = 0; k < 8; ++k) scale[k] = d * static_cast<float>(b->scale(k));
    }
};

template <class Block>
inline constexpr bool is_float_block = Block::elements == 1;

/// The scales and minimums of `parts` parts (all eight of a span, but for blocks of 32 columns) beginning with *b. The
/// minimums include the offset: weight = scale code - min. Both arrays have 16 elements.
template <class Block>
void span_factors(const Block* b, int parts, float* scale, float* min) {
    using C = codes<Block>;
    constexpr int bias = C::is_signed && simd::biased_codes ? 128 : C::offset;
    if constexpr (Block::elements == 32) {
        for (int p = 0; p < parts; ++p) {
            scale[p] = C::scale(b[p]);
            if constexpr (C::has_min) min[p] = C::min(b[p]);
            if constexpr (bias != 0) min[p] = static_cast<float>(bias) * scale[p];
        }
    } else {
        C::scales_and_mins(b, scale, min);
        if constexpr (bias != 0) {
            for (int k = 0; k < span_columns / C::group; ++k) min[k] = static_cast<float>(bias) * scale[k];
        }
    }
}

/// Whether span_factors gives minimums that are not zero.
template <class Block>
inline constexpr bool has_minimums = codes<Block>::has_min || codes<Block>::offset != 0 ||
                                     (codes<Block>::is_signed && simd::biased_codes);

/// Whether span_codes gives signed bytes.
template <class Block>
inline constexpr bool has_signed_codes = codes<Block>::is_signed && !simd::biased_codes;

/// The codes of part P as they are multiplied, to go with span_factors.
template <class Block, int P>
simd::bytes32 span_codes(const Block* b) {
    const simd::bytes32 x = codes<Block>::template part<P>(b);
    if constexpr (codes<Block>::is_signed && simd::biased_codes) return simd::biased(x);
    return x;
}

/// Decodes the 32 columns of part P, given the factors of the span.
template <class Block, int P>
void decode_part(const Block* b, const float* scale, const float* min, float* out) {
    alignas(32) std::uint8_t code[32];
    simd::store_bytes(code, span_codes<Block, P>(b));
    constexpr int group = codes<Block>::group;
    for (int i = 0; i < part_columns; i += 8) {
        const int k = (P * part_columns + i) / group;
        simd::floats8 value;
        if constexpr (has_signed_codes<Block>) {
            value = simd::floats_of(reinterpret_cast<const std::int8_t*>(code + i));
        } else {
            value = simd::floats_of(code + i);
        }
        if constexpr (has_minimums<Block>) {
            value = simd::fma(value, simd::splat8(scale[k]), simd::splat8(-min[k]));
        } else {
            value = value * simd::splat8(scale[k]);
        }
        simd::store_floats8(out + i, value);
    }
}

/// As decode_row, with vectors.
template <class Block>
void decode_columns(const Block* b, float* out, index columns) {
    alignas(32) float scale[16], min[16];
    constexpr index blocks = span_columns / Block::elements;
    for (; columns >= span_columns; columns -= span_columns, b += blocks, out += span_columns) {
        span_factors(b, span_parts, scale, min);
        unrolled<span_parts>([&]<int P>() { decode_part<Block, P>(b, scale, min, out + P * part_columns); });
    }
    if constexpr (Block::elements == part_columns) {
        for (; columns > 0; columns -= part_columns, ++b, out += part_columns) {
            span_factors(b, 1, scale, min);
            decode_part<Block, 0>(b, scale, min, out);
        }
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
