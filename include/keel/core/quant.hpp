// SPDX-License-Identifier: MIT
//
// The quantised blocks of GGUF: their layout, and the scalar decode that defines their values. Kernels for any
// processor are tested against this file. Notation of the layouts: d, m = f16 scale and minimum; q = integer code.
//
//   32 elements    Q4_0    d (q - 8)               Q4_1  d q + m                 byte i holds q of element i (low
//                  Q5_0    d (q - 16)              Q5_1  d q + m                 nibble) and of i + 16 (high nibble);
//                  IQ4_NL  d iq4_values[q]         MXFP4 2^(e-128) mxfp4_values[q]   bit i of qh is the fifth bit
//                  Q8_0    d q
//   256 elements   Q2_K    (d scale) q - dmin min            scale, min of 4 bits per 16 elements
//                  Q3_K    (d scale) (q - 4)                 scale of 6 bits, signed, per 16
//                  Q4_K    (d scale) q - dmin min            scale, min of 6 bits per 32
//                  Q5_K    as Q4_K, q of 5 bits              scale, min of 6 bits per 32
//                  Q6_K    (d scale) (q - 32)                scale of 8 bits, signed, per 16
//                  IQ4_XS  (d scale) iq4_values[q]           scale of 6 bits, signed, per 32
//
// Everything is little-endian and byte-packed: a block has no alignment. Except in Q6_K every product is exact in
// binary32 (11 bits of d, at most 13 more), so that neither the order of factors nor fma contraction changes a value.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

static_assert(std::endian::native == std::endian::little, "blocks are read as they lie in the file");

/// A field of a block: a T of any alignment.
template <class T>
struct unaligned {
    std::uint8_t raw[sizeof(T)];

    KEEL_HD T get() const {
        T value;
        std::memcpy(&value, raw, sizeof(T));
        return value;
    }
    KEEL_HD void set(T value) { std::memcpy(raw, &value, sizeof(T)); }
};

/// Values of the codes of IQ4_NL and IQ4_XS.
inline constexpr std::int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

/// Twice the E2M1 values of MXFP4.
inline constexpr std::int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/// The bits of the binary32 2^(e - 128): half of the E8M0 scale e, to go with mxfp4_values. 0 and 1 are subnormal, 255
/// is an ordinary exponent.
KEEL_HD constexpr std::uint32_t e8m0_half_bits(std::uint8_t e) {
    return e < 2 ? 0x00200000u << e : static_cast<std::uint32_t>(e - 1) << 23;
}

namespace detail {

/// The codes of a 32-element block of nibbles: the low ones are elements 0 to 15, the high ones 16 to 31.
template <class F>
void for_each_nibble(const std::uint8_t (&qs)[16], F&& f) {
    for (int i = 0; i < 16; ++i) f(i, qs[i] & 15);
    for (int i = 0; i < 16; ++i) f(i + 16, qs[i] >> 4);
}

}  // namespace detail

struct block_f32 {
    static constexpr dtype type = dtype::f32;
    static constexpr int elements = 1, bytes = 4;
    unaligned<float> value;

    void decode(float* out) const { *out = value.get(); }
};

struct block_f16 {
    static constexpr dtype type = dtype::f16;
    static constexpr int elements = 1, bytes = 2;
    unaligned<f16> value;

    void decode(float* out) const { *out = to_float(value.get()); }
};

struct block_bf16 {
    static constexpr dtype type = dtype::bf16;
    static constexpr int elements = 1, bytes = 2;
    unaligned<bf16> value;

    void decode(float* out) const { *out = to_float(value.get()); }
};

struct block_q8_0 {
    static constexpr dtype type = dtype::q8_0;
    static constexpr int elements = 32, bytes = 34;
    unaligned<f16> d;
    std::int8_t qs[32];

    void decode(float* out) const {
        const float scale = to_float(d.get());
        for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(qs[i]);
    }
};

struct block_q4_0 {
    static constexpr dtype type = dtype::q4_0;
    static constexpr int elements = 32, bytes = 18;
    unaligned<f16> d;
    std::uint8_t qs[16];

    void decode(float* out) const {
        const float scale = to_float(d.get());
        detail::for_each_nibble(qs, [&](int i, int q) { out[i] = scale * static_cast<float>(q - 8); });
    }
};

struct block_q4_1 {
    static constexpr dtype type = dtype::q4_1;
    static constexpr int elements = 32, bytes = 20;
    unaligned<f16> d, m;
    std::uint8_t qs[16];

    void decode(float* out) const {
        const float scale = to_float(d.get()), minimum = to_float(m.get());
        detail::for_each_nibble(qs, [&](int i, int q) { out[i] = scale * static_cast<float>(q) + minimum; });
    }
};

struct block_q5_0 {
    static constexpr dtype type = dtype::q5_0;
    static constexpr int elements = 32, bytes = 22;
    unaligned<f16> d;
    unaligned<std::uint32_t> qh;
    std::uint8_t qs[16];

    void decode(float* out) const {
        const float scale = to_float(d.get());
        const std::uint32_t high = qh.get();
        detail::for_each_nibble(qs, [&](int i, int low) {
            const int q = low | static_cast<int>((high >> i) & 1u) << 4;
            out[i] = scale * static_cast<float>(q - 16);
        });
    }
};

struct block_q5_1 {
    static constexpr dtype type = dtype::q5_1;
    static constexpr int elements = 32, bytes = 24;
    unaligned<f16> d, m;
    unaligned<std::uint32_t> qh;
    std::uint8_t qs[16];

    void decode(float* out) const {
        const float scale = to_float(d.get()), minimum = to_float(m.get());
        const std::uint32_t high = qh.get();
        detail::for_each_nibble(qs, [&](int i, int low) {
            const int q = low | static_cast<int>((high >> i) & 1u) << 4;
            out[i] = scale * static_cast<float>(q) + minimum;
        });
    }
};

struct block_iq4_nl {
    static constexpr dtype type = dtype::iq4_nl;
    static constexpr int elements = 32, bytes = 18;
    unaligned<f16> d;
    std::uint8_t qs[16];

    void decode(float* out) const {
        const float scale = to_float(d.get());
        detail::for_each_nibble(qs, [&](int i, int q) { out[i] = scale * static_cast<float>(iq4_values[q]); });
    }
};

struct block_mxfp4 {
    static constexpr dtype type = dtype::mxfp4;
    static constexpr int elements = 32, bytes = 17;
    std::uint8_t e;
    std::uint8_t qs[16];

    void decode(float* out) const {
        const float scale = std::bit_cast<float>(e8m0_half_bits(e));
        detail::for_each_nibble(qs, [&](int i, int q) { out[i] = scale * static_cast<float>(mxfp4_values[q]); });
    }
};

struct block_q2_k {
    static constexpr dtype type = dtype::q2_k;
    static constexpr int elements = 256, bytes = 84;
    std::uint8_t scales[16];  // low nibble: scale, high nibble: minimum; of 16 elements each
    std::uint8_t qs[64];      // bits 2j, 2j + 1 of byte 32 h + l: element 128 h + 32 j + l
    unaligned<f16> d, dmin;

    KEEL_HD int scale(int k) const { return scales[k] & 15; }
    KEEL_HD int min(int k) const { return scales[k] >> 4; }

    void decode(float* out) const {
        const float all_scale = to_float(d.get()), all_min = to_float(dmin.get());
        for (int i = 0; i < 256; ++i) {
            const int q = (qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
            out[i] = all_scale * static_cast<float>(scale(i / 16)) * static_cast<float>(q) -
                     all_min * static_cast<float>(min(i / 16));
        }
    }
};

struct block_q3_k {
    static constexpr dtype type = dtype::q3_k;
    static constexpr int elements = 256, bytes = 110;
    std::uint8_t hmask[32];   // bit b of byte l: third bit of element 32 b + l
    std::uint8_t qs[64];      // low two bits, as in Q2_K
    std::uint8_t scales[12];  // 16 of 6 bits: low nibbles in bytes 0 to 7, high bit pairs in bytes 8 to 11
    unaligned<f16> d;

    /// Of elements 16 k to 16 k + 15; in [-32, 31].
    KEEL_HD int scale(int k) const {
        const int low = k < 8 ? scales[k] & 15 : scales[k - 8] >> 4;
        const int high = (scales[8 + k % 4] >> (k / 4 * 2)) & 3;
        return (low | high << 4) - 32;
    }

    void decode(float* out) const {
        const float all_scale = to_float(d.get());
        for (int i = 0; i < 256; ++i) {
            const int low = (qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
            const int high = (hmask[i % 32] >> (i / 32)) & 1;
            out[i] = all_scale * static_cast<float>(scale(i / 16)) * static_cast<float>((low | high << 2) - 4);
        }
    }
};

/// Eight scales and eight minimums of 6 bits in 12 bytes, as in Q4_K and Q5_K. Those of sub-blocks 0 to 3 are the low
/// six bits of bytes 0 to 3 and 4 to 7; the others have their low nibbles in bytes 8 to 11 (scale low, minimum high)
/// and their high two bits on top of bytes 0 to 3 and 4 to 7.
struct packed_scales {
    std::uint8_t raw[12];

    KEEL_HD int scale(int b) const { return b < 4 ? raw[b] & 63 : (raw[b + 4] & 15) | (raw[b - 4] >> 6) << 4; }
    KEEL_HD int min(int b) const { return b < 4 ? raw[b + 4] & 63 : raw[b + 4] >> 4 | (raw[b] >> 6) << 4; }
};

struct block_q4_k {
    static constexpr dtype type = dtype::q4_k;
    static constexpr int elements = 256, bytes = 144;
    unaligned<f16> d, dmin;
    packed_scales scales;  // of 32 elements each
    std::uint8_t qs[128];  // byte 32 p + l: low nibble element 64 p + l, high nibble 64 p + 32 + l

    void decode(float* out) const {
        const float all_scale = to_float(d.get()), all_min = to_float(dmin.get());
        for (int i = 0; i < 256; ++i) {
            const int b = i / 32;
            const int q = (qs[i / 64 * 32 + i % 32] >> (b % 2 * 4)) & 15;
            out[i] = all_scale * static_cast<float>(scales.scale(b)) * static_cast<float>(q) -
                     all_min * static_cast<float>(scales.min(b));
        }
    }
};

struct block_q5_k {
    static constexpr dtype type = dtype::q5_k;
    static constexpr int elements = 256, bytes = 176;
    unaligned<f16> d, dmin;
    packed_scales scales;  // of 32 elements each
    std::uint8_t qh[32];   // bit b of byte l: fifth bit of element 32 b + l
    std::uint8_t qs[128];  // low nibbles, as in Q4_K

    void decode(float* out) const {
        const float all_scale = to_float(d.get()), all_min = to_float(dmin.get());
        for (int i = 0; i < 256; ++i) {
            const int b = i / 32;
            const int low = (qs[i / 64 * 32 + i % 32] >> (b % 2 * 4)) & 15;
            const int q = low | ((qh[i % 32] >> b) & 1) << 4;
            out[i] = all_scale * static_cast<float>(scales.scale(b)) * static_cast<float>(q) -
                     all_min * static_cast<float>(scales.min(b));
        }
    }
};

struct block_q6_k {
    static constexpr dtype type = dtype::q6_k;
    static constexpr int elements = 256, bytes = 210;
    std::uint8_t ql[128];    // byte 64 h + l: low nibble element 128 h + l, high nibble 128 h + 64 + l; l < 64
    std::uint8_t qh[64];     // high two bits, placed as the codes of Q2_K
    std::int8_t scales[16];  // of 16 elements each
    unaligned<f16> d;

    void decode(float* out) const {
        const float all_scale = to_float(d.get());
        for (int i = 0; i < 256; ++i) {
            const int low = (ql[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4)) & 15;
            const int high = (qh[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
            out[i] = all_scale * static_cast<float>(scales[i / 16]) * static_cast<float>((low | high << 4) - 32);
        }
    }
};

struct block_iq4_xs {
    static constexpr dtype type = dtype::iq4_xs;
    static constexpr int elements = 256, bytes = 136;
    unaligned<f16> d;
    unaligned<std::uint16_t> scales_h;  // bits 2b, 2b + 1: high bits of scale b
    std::uint8_t scales_l[4];           // low nibbles of the scales, two per byte
    std::uint8_t qs[128];               // byte 16 b + l: low nibble element 32 b + l, high nibble 32 b + 16 + l

    /// Of elements 32 b to 32 b + 31; in [-32, 31].
    KEEL_HD int scale(int b) const {
        const int low = (scales_l[b / 2] >> (b % 2 * 4)) & 15;
        const int high = (scales_h.get() >> (2 * b)) & 3;
        return (low | high << 4) - 32;
    }

    void decode(float* out) const {
        const float all_scale = to_float(d.get());
        for (int i = 0; i < 256; ++i) {
            const int q = (qs[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4)) & 15;
            out[i] = all_scale * static_cast<float>(scale(i / 32)) * static_cast<float>(iq4_values[q]);
        }
    }
};

/// Calls f.template operator()<Block>() with the block struct of `type`, and returns what it returns: the one place
/// where a run-time type becomes a static one. Use: visit_blocks(type, [&]<class Block>() { ... });
/// Throws errc::unsupported for a value that is none of the enumerators.
template <class F>
decltype(auto) visit_blocks(dtype type, F&& f) {
    switch (type) {
        case dtype::f32:
            return f.template operator()<block_f32>();
        case dtype::f16:
            return f.template operator()<block_f16>();
        case dtype::bf16:
            return f.template operator()<block_bf16>();
        case dtype::q8_0:
            return f.template operator()<block_q8_0>();
        case dtype::q4_0:
            return f.template operator()<block_q4_0>();
        case dtype::q4_1:
            return f.template operator()<block_q4_1>();
        case dtype::q5_0:
            return f.template operator()<block_q5_0>();
        case dtype::q5_1:
            return f.template operator()<block_q5_1>();
        case dtype::q2_k:
            return f.template operator()<block_q2_k>();
        case dtype::q3_k:
            return f.template operator()<block_q3_k>();
        case dtype::q4_k:
            return f.template operator()<block_q4_k>();
        case dtype::q5_k:
            return f.template operator()<block_q5_k>();
        case dtype::q6_k:
            return f.template operator()<block_q6_k>();
        case dtype::iq4_nl:
            return f.template operator()<block_iq4_nl>();
        case dtype::iq4_xs:
            return f.template operator()<block_iq4_xs>();
        case dtype::mxfp4:
            return f.template operator()<block_mxfp4>();
    }
    throw error(errc::unsupported, "tensor type " + std::to_string(static_cast<std::uint32_t>(type)),
                "keel has no blocks of this type");
}

/// Decodes `columns` elements, a multiple of the block, to f32; bit-exact on every processor.
inline void decode_row(dtype type, const std::byte* from, float* to, index columns) {
    visit_blocks(type, [&]<class Block>() {
        static_assert(sizeof(Block) == Block::bytes && alignof(Block) == 1);
        static_assert(info(Block::type).block_bytes == Block::bytes);
        static_assert(info(Block::type).block_elements == Block::elements);
        const auto* blocks = reinterpret_cast<const Block*>(from);
        for (index i = 0; i < columns / Block::elements; ++i) blocks[i].decode(to + i * Block::elements);
    });
}

}  // namespace keel::inline KEEL_ABI
