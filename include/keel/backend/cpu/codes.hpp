// SPDX-License-Identifier: MIT
//
// The quantised blocks of GGUF as kernels want them: byte codes and float factors, for spans of 256 columns.
//
//   weight = scale (code - offset) - min
//
// codes<Block> has, for 8 parts of 32 columns each:
//   group          columns that share a scale (and a min): 16 or 32
//   bits           of a code
//   is_signed      whether codes are signed bytes; then offset is 0
//   offset         of all codes of the type
//   has_min
//   part<P>(b)     the 32 codes of part P of the span that begins with block *b
//   scales_and_mins(b, s, m)   256 / group of each
// Types with blocks of 32 columns also have scale(b) and min(b) of one block, for columns that fill no span.
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

/// Asks for the memory of a span of blocks, which need not exist. Locality: 3 for the first cache, 2 for the second.
template <class Block, int Locality = 3>
void prefetch_span(const void* span) {
    constexpr int size = span_columns / Block::elements * Block::bytes;
    for (int i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(span) + i, 0, Locality);
}

/// Blocks of 32 columns with one f16 scale.
template <class Block>
struct codes_of_32 {
    static constexpr int group = 32;
    static constexpr bool is_signed = false, has_min = false;
    static constexpr int offset = 0;

    static float scale(const Block& b) { return simd::float_of(b.d.get()); }
    static float min(const Block& b) { return -simd::float_of(b.m.get()); }

    static void scales_and_mins(const Block* b, float* scale, float* min) {
        simd::store_floats8(scale, simd::floats_of_halves([&](int i) { return b[i].d.get(); }));
        if constexpr (requires { b->m; }) {
            const auto m = simd::floats_of_halves([&](int i) { return b[i].m.get(); });
            simd::store_floats8(min, m * simd::splat8(-1.0f));
        }
    }
};

template <class Block>
struct codes;

template <>
struct codes<block_q8_0> : codes_of_32<block_q8_0> {
    static constexpr int bits = 8;
    static constexpr bool is_signed = true;

    template <int P>
    static simd::bytes32 part(const block_q8_0* b) {
        return simd::load_bytes(b[P].qs);
    }
};

template <>
struct codes<block_q4_0> : codes_of_32<block_q4_0> {
    static constexpr int bits = 4;
    static constexpr int offset = 8;

    template <int P>
    static simd::bytes32 part(const block_q4_0* b) {
        return simd::nibbles(b[P].qs);
    }
};

template <>
struct codes<block_q4_1> : codes_of_32<block_q4_1> {
    static constexpr int bits = 4;
    static constexpr bool has_min = true;

    template <int P>
    static simd::bytes32 part(const block_q4_1* b) {
        return simd::nibbles(b[P].qs);
    }
};

template <>
struct codes<block_q5_0> : codes_of_32<block_q5_0> {
    static constexpr int bits = 5;
    static constexpr int offset = 16;

    template <int P>
    static simd::bytes32 part(const block_q5_0* b) {
        return simd::add_where<16>(simd::nibbles(b[P].qs), b[P].qh.get());
    }
};

template <>
struct codes<block_q5_1> : codes_of_32<block_q5_1> {
    static constexpr int bits = 5;
    static constexpr bool has_min = true;

    template <int P>
    static simd::bytes32 part(const block_q5_1* b) {
        return simd::add_where<16>(simd::nibbles(b[P].qs), b[P].qh.get());
    }
};

template <>
struct codes<block_iq4_nl> : codes_of_32<block_iq4_nl> {
    static constexpr int bits = 8;
    static constexpr bool is_signed = true;

    template <int P>
    static simd::bytes32 part(const block_iq4_nl* b) {
        return simd::lookup(iq4_values, simd::nibbles(b[P].qs));
    }
};

template <>
struct codes<block_mxfp4> : codes_of_32<block_mxfp4> {
    static constexpr int bits = 8;
    static constexpr bool is_signed = true;

    template <int P>
    static simd::bytes32 part(const block_mxfp4* b) {
        return simd::lookup(mxfp4_values, simd::nibbles(b[P].qs));
    }
    static float scale(const block_mxfp4& b) { return std::bit_cast<float>(e8m0_half_bits(b.e)); }
    static void scales_and_mins(const block_mxfp4* b, float* scales, float*) {
        for (int i = 0; i < span_parts; ++i) scales[i] = scale(b[i]);
    }
};

/// The eight scales and the eight minimums of packed_scales as bytes of a word.
struct unpacked_scales {
    std::uint64_t scales, mins;
};
inline unpacked_scales unpack(const packed_scales& packed) {
    std::uint32_t word[3];
    std::memcpy(word, packed.raw, sizeof(word));
    const std::uint64_t scales = (word[2] & 0x0F0F0F0Fu) | ((word[0] >> 2) & 0x30303030u);
    const std::uint64_t mins = ((word[2] >> 4) & 0x0F0F0F0Fu) | ((word[1] >> 2) & 0x30303030u);
    return {scales << 32 | (word[0] & 0x3F3F3F3Fu), mins << 32 | (word[1] & 0x3F3F3F3Fu)};
}

/// Q4_K and Q5_K: eight scales and minimums of 32 columns.
template <class Block>
struct codes_with_packed_scales {
    static constexpr int group = 32, offset = 0;
    static constexpr bool is_signed = false, has_min = true;

    static void scales_and_mins(const Block* b, float* scale, float* min) {
        const unpacked_scales u = unpack(b->scales);
        simd::store_floats8(scale, simd::floats_of(u.scales) * simd::splat8(simd::float_of(b->d.get())));
        simd::store_floats8(min, simd::floats_of(u.mins) * simd::splat8(simd::float_of(b->dmin.get())));
    }
};

template <>
struct codes<block_q4_k> : codes_with_packed_scales<block_q4_k> {
    static constexpr int bits = 4;
    template <int P>
    static simd::bytes32 part(const block_q4_k* b) {
        return simd::field<P % 2 * 4, 15>(simd::load_bytes(b->qs + P / 2 * 32));
    }
};

template <>
struct codes<block_q5_k> : codes_with_packed_scales<block_q5_k> {
    static constexpr int bits = 5;
    template <int P>
    static simd::bytes32 part(const block_q5_k* b) {
        return simd::join<P % 2 * 4, 15, P - 4, 16>(simd::load_bytes(b->qs + P / 2 * 32), simd::load_bytes(b->qh));
    }
};

template <>
struct codes<block_q2_k> {
    static constexpr int group = 16, offset = 0, bits = 2;
    static constexpr bool is_signed = false, has_min = true;

    template <int P>
    static simd::bytes32 part(const block_q2_k* b) {
        return simd::field<P % 4 * 2, 3>(simd::load_bytes(b->qs + P / 4 * 32));
    }
    static void scales_and_mins(const block_q2_k* b, float* scale, float* min) {
        alignas(32) std::uint8_t both[32];  // the scales, then the minimums
        simd::store_bytes(both, simd::nibbles(b->scales));
        const simd::floats8 d = simd::splat8(simd::float_of(b->d.get()));
        const simd::floats8 dmin = simd::splat8(simd::float_of(b->dmin.get()));
        for (int k = 0; k < 16; k += 8) {
            simd::store_floats8(scale + k, simd::floats_of(both + k) * d);
            simd::store_floats8(min + k, simd::floats_of(both + 16 + k) * dmin);
        }
    }
};

template <>
struct codes<block_q3_k> {
    static constexpr int group = 16, offset = 4, bits = 3;
    static constexpr bool is_signed = false, has_min = false;

    template <int P>
    static simd::bytes32 part(const block_q3_k* b) {
        return simd::join<P % 4 * 2, 3, P - 2, 4>(simd::load_bytes(b->qs + P / 4 * 32), simd::load_bytes(b->hmask));
    }
    static void scales_and_mins(const block_q3_k* b, float* scale, float*) {
        std::uint64_t low;
        std::uint32_t high;
        std::memcpy(&low, b->scales, sizeof(low));
        std::memcpy(&high, b->scales + 8, sizeof(high));
        const std::uint64_t spread[2] = {high | static_cast<std::uint64_t>(high >> 2) << 32,
                                         high >> 4 | static_cast<std::uint64_t>(high >> 6) << 32};
        const float d = simd::float_of(b->d.get());
        for (int k = 0; k < 2; ++k) {
            const std::uint64_t joined = ((low >> (4 * k)) & 0x0F0F0F0F0F0F0F0F) | (spread[k] & 0x0303030303030303)
                                                                                       << 4;
            simd::store_floats8(scale + 8 * k,
                                simd::fma(simd::floats_of(joined), simd::splat8(d), simd::splat8(-32 * d)));
        }
    }
};

template <>
struct codes<block_q6_k> {
    static constexpr int group = 16, offset = 32, bits = 6;
    static constexpr bool is_signed = false, has_min = false;

    template <int P>
    static simd::bytes32 part(const block_q6_k* b) {
        const simd::bytes32 low = simd::load_bytes(b->ql + P / 4 * 64 + P % 2 * 32);
        return simd::join<P % 4 / 2 * 4, 15, P % 4 * 2 - 4, 48>(low, simd::load_bytes(b->qh + P / 4 * 32));
    }
    static void scales_and_mins(const block_q6_k* b, float* scale, float*) {
        const simd::floats8 d = simd::splat8(simd::float_of(b->d.get()));
        for (int k = 0; k < 16; k += 8) simd::store_floats8(scale + k, simd::floats_of(b->scales + k) * d);
    }
};

template <>
struct codes<block_iq4_xs> {
    static constexpr int group = 32, offset = 0, bits = 8;
    static constexpr bool is_signed = true, has_min = false;

    template <int P>
    static simd::bytes32 part(const block_iq4_xs* b) {
        return simd::lookup(iq4_values, simd::nibbles(b->qs + P * 16));
    }
    static void scales_and_mins(const block_iq4_xs* b, float* scale, float*) {
        std::uint32_t low;
        std::memcpy(&low, b->scales_l, sizeof(low));
        const float d = simd::float_of(b->d.get());
        simd::store_floats8(scale,
                            simd::fma(simd::floats_of(low, b->scales_h.get()), simd::splat8(d), simd::splat8(-32 * d)));
    }
};

template <class Block>
inline constexpr bool is_float_block = Block::elements == 1;

/// Whether activations of 8 bits would round as coarsely as the weights do; then few rows have their rests multiplied,
/// too.
template <class Block>
inline constexpr bool takes_rests = Block::bytes >= Block::elements;

/// What is subtracted from all codes of a type.
template <class Block>
inline constexpr int bias_of = codes<Block>::is_signed&& simd::biased_codes ? 128 : codes<Block>::offset;

/// The scales and minimums of the span that begins with *b; the minimums include the bias: weight = scale code - min.
/// Both arrays have 16 elements.
template <class Block>
void span_factors(const Block* b, float* scale, float* min) {
    codes<Block>::scales_and_mins(b, scale, min);
    if constexpr (bias_of<Block> != 0) {
        const simd::floats8 bias = simd::splat8(static_cast<float>(bias_of<Block>));
        for (int k = 0; k < span_columns / codes<Block>::group; k += 8) {
            simd::store_floats8(min + k, simd::load_floats8(scale + k) * bias);
        }
    }
}

/// The same for one block of 32 columns.
template <class Block>
void part_factors(const Block& b, float& scale, float& min) {
    scale = codes<Block>::scale(b);
    if constexpr (codes<Block>::has_min) min = codes<Block>::min(b);
    if constexpr (bias_of<Block> != 0) min = static_cast<float>(bias_of<Block>) * scale;
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
        span_factors(b, scale, min);
        unrolled<span_parts>([&]<int P>() { decode_part<Block, P>(b, scale, min, out + P * part_columns); });
    }
    if constexpr (Block::elements == part_columns) {
        for (; columns > 0; columns -= part_columns, ++b, out += part_columns) {
            part_factors(*b, scale[0], min[0]);
            decode_part<Block, 0>(b, scale, min, out);
        }
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
