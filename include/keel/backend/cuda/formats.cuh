// SPDX-License-Identifier: MIT
//
// How weights are read: for every layout of launch.hpp, a piece that one lane loads with 16-byte accesses, its values
// as floats, and its product with activations of 8 bits.
#pragma once

#include <keel/backend/cuda/codes.cuh>
#include <keel/backend/cuda/device.cuh>

namespace keel::cuda_kernels {

/// Code `i` of four words of four signed bytes.
__device__ inline int code(const unsigned (&words)[4], int i) {
    return static_cast<signed char>(words[i / 4] >> (i % 4 * 8));
}

/// A layout. A piece is what a lane takes of a row at a time: `elements` neighbouring elements; row is the record.
template <launch::layout>
struct format;

template <>
struct format<launch::layout::f32> {
    static constexpr int elements = 4;
    static constexpr bool integer = false;
    struct piece {
        uint4 bits;
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int, int p) {
        return {load_weights16<From>(row + 16 * p)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        out[0] = __uint_as_float(w.bits.x);
        out[1] = __uint_as_float(w.bits.y);
        out[2] = __uint_as_float(w.bits.z);
        out[3] = __uint_as_float(w.bits.w);
    }
};

template <>
struct format<launch::layout::f16> {
    static constexpr int elements = 8;
    static constexpr bool integer = false;
    struct piece {
        uint4 bits;
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int, int p) {
        return {load_weights16<From>(row + 16 * p)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        const unsigned words[4] = {w.bits.x, w.bits.y, w.bits.z, w.bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = half_bits(static_cast<unsigned short>(words[i]));
            out[2 * i + 1] = half_bits(static_cast<unsigned short>(words[i] >> 16));
        }
    }
};

template <>
struct format<launch::layout::bf16> {
    static constexpr int elements = 8;
    static constexpr bool integer = false;
    struct piece {
        uint4 bits;
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int, int p) {
        return {load_weights16<From>(row + 16 * p)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        const unsigned words[4] = {w.bits.x, w.bits.y, w.bits.z, w.bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
        }
    }
};

/// Two times 16 codes of a signed byte.
struct byte_codes {
    uint4 first, second;

    template <space From>
    __device__ static byte_codes load(const unsigned char* codes, int u) {
        return {load_weights16<From>(codes + 32 * u), load_weights16<From>(codes + 32 * u + 16)};
    }
    __device__ void unpack(unsigned (&a)[4], unsigned (&b)[4]) const {
        a[0] = first.x, a[1] = first.y, a[2] = first.z, a[3] = first.w;
        b[0] = second.x, b[1] = second.y, b[2] = second.z, b[3] = second.w;
    }
};

/// Weights of 8 bits deserve activations of more: they are not multiplied as integers.
template <>
struct format<launch::layout::q8_0> {
    static constexpr int elements = 32;
    static constexpr bool integer = false;
    struct piece {
        byte_codes codes;
        unsigned short scale;
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int units, int u) {
        return {byte_codes::load<From>(row, u), cuda_kernels::load<unsigned short, From>(row + 32 * units + 2 * u)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        unsigned a[4], b[4];
        w.codes.unpack(a, b);
        const float scale = half_bits(w.scale);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            out[i] = scale * static_cast<float>(code(a, i));
            out[i + 16] = scale * static_cast<float>(code(b, i));
        }
    }
};

template <>
struct format<launch::layout::wide> {
    static constexpr int elements = 32;
    static constexpr bool integer = true;
    struct piece {
        byte_codes codes;
        uint4 scales;  // scale, minimum of elements 0 to 15, then of 16 to 31
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int units, int u) {
        return {byte_codes::load<From>(row, u), load_weights16<From>(row + 32 * units + 16 * u)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        unsigned a[4], b[4];
        w.codes.unpack(a, b);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            out[i] = __uint_as_float(w.scales.x) * static_cast<float>(code(a, i)) - __uint_as_float(w.scales.y);
            out[i + 16] = __uint_as_float(w.scales.z) * static_cast<float>(code(b, i)) - __uint_as_float(w.scales.w);
        }
    }
    __device__ static float dot(const piece& w, const unit_codes& x) {
        unsigned a[4], b[4];
        w.codes.unpack(a, b);
        const int2 sum = dot_codes(a, b, x);
        return x.scale * (__uint_as_float(w.scales.x) * static_cast<float>(sum.x) -
                          __uint_as_float(w.scales.y) * static_cast<float>(x.low_sum()) +
                          __uint_as_float(w.scales.z) * static_cast<float>(sum.y) -
                          __uint_as_float(w.scales.w) * static_cast<float>(x.high_sum()));
    }
};

/// 16 bytes of nibbles as two times 16 codes.
__device__ inline void unpack_nibbles(const uint4& codes, unsigned (&a)[4], unsigned (&b)[4]) {
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = words[i] & 0x0F0F0F0Fu;
        b[i] = (words[i] >> 4) & 0x0F0F0F0Fu;
    }
}

/// Q4_K and Q5_K: codes with a scale and a minimum per unit, both multiplied with factors of 8 units.
struct scaled_pair {
    unsigned short scales;  // scale low, minimum high
    unsigned factors;       // d low, dmin high

    template <space From>
    __device__ static scaled_pair load(const unsigned char* scales, int units, int u) {
        return {cuda_kernels::load<unsigned short, From>(scales + 2 * u),
                cuda_kernels::load<unsigned, From>(scales + 2 * units + u / 8 * 4)};
    }
    __device__ float scale() const {
        return half_bits(static_cast<unsigned short>(factors)) * static_cast<float>(scales & 255);
    }
    __device__ float minimum() const {
        return half_bits(static_cast<unsigned short>(factors >> 16)) * static_cast<float>(scales >> 8);
    }
    __device__ void decode(const unsigned (&a)[4], const unsigned (&b)[4], float (&out)[32]) const {
        const float d = scale(), m = minimum();
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            out[i] = d * static_cast<float>(code(a, i)) - m;
            out[i + 16] = d * static_cast<float>(code(b, i)) - m;
        }
    }
    template <class Codes>
    __device__ float dot(int low, int high, const Codes& x) const {
        return scale() * x.value(low, high) - minimum() * x.total();
    }
};

template <>
struct format<launch::layout::q4_k> {
    static constexpr int elements = 32;
    static constexpr bool integer = true;
    struct piece {
        uint4 codes;
        scaled_pair scales;
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int units, int u) {
        return {load_weights16<From>(row + 16 * u), scaled_pair::load<From>(row + 16 * units, units, u)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        unsigned a[4], b[4];
        unpack_nibbles(w.codes, a, b);
        w.scales.decode(a, b, out);
    }
    template <class Codes>
    __device__ static float dot(const piece& w, const Codes& x) {
        const unsigned words[4] = {w.codes.x, w.codes.y, w.codes.z, w.codes.w};
        const int4 &lo = x.first, &hi = x.second;
        int low = 0, high = 0;  // high nibbles stay where they are: 16 times their value, in unsigned bytes
        low = dot_unsigned(words[0] & 0x0F0F0F0Fu, lo.x, low), high = dot_unsigned(words[0] & 0xF0F0F0F0u, hi.x, high);
        low = dot_unsigned(words[1] & 0x0F0F0F0Fu, lo.y, low), high = dot_unsigned(words[1] & 0xF0F0F0F0u, hi.y, high);
        low = dot_unsigned(words[2] & 0x0F0F0F0Fu, lo.z, low), high = dot_unsigned(words[2] & 0xF0F0F0F0u, hi.z, high);
        low = dot_unsigned(words[3] & 0x0F0F0F0Fu, lo.w, low), high = dot_unsigned(words[3] & 0xF0F0F0F0u, hi.w, high);
        return w.scales.dot(low, high >> 4, x);
    }
};

template <>
struct format<launch::layout::q5_k> {
    static constexpr int elements = 32;
    static constexpr bool integer = true;
    struct piece {
        uint4 codes;
        unsigned high;
        scaled_pair scales;

        __device__ void unpack(unsigned (&a)[4], unsigned (&b)[4]) const {
            unpack_nibbles(codes, a, b);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] |= ((high >> i) & 0x01010101u) << 4;
                b[i] |= ((high >> (4 + i)) & 0x01010101u) << 4;
            }
        }
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int units, int u) {
        return {load_weights16<From>(row + 16 * u), cuda_kernels::load<unsigned, From>(row + 16 * units + 4 * u),
                scaled_pair::load<From>(row + 20 * units, units, u)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        unsigned a[4], b[4];
        w.unpack(a, b);
        w.scales.decode(a, b, out);
    }
    template <class Codes>
    __device__ static float dot(const piece& w, const Codes& x) {
        unsigned a[4], b[4];
        w.unpack(a, b);
        const int2 sum = dot_codes(a, b, x);
        return w.scales.dot(sum.x, sum.y, x);
    }
};

template <>
struct format<launch::layout::q6_k> {
    static constexpr int elements = 32;
    static constexpr bool integer = true;
    struct piece {
        uint4 codes;
        uint2 high;
        unsigned short scales;
        unsigned short factor;

        __device__ void unpack(unsigned (&a)[4], unsigned (&b)[4]) const {
            unpack_nibbles(codes, a, b);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const unsigned pairs = (i < 2 ? high.x : high.y) >> (i % 2 * 4);
                a[i] |= (pairs & 0x03030303u) << 4;
                b[i] |= (pairs & 0x0C0C0C0Cu) << 2;
            }
        }
        __device__ int scale(int half) const { return static_cast<signed char>(scales >> (8 * half)); }
    };
    template <space From = space::global>
    __device__ static piece load(const unsigned char* row, int units, int u) {
        return {load_weights16<From>(row + 16 * u), cuda_kernels::load<uint2, From>(row + 16 * units + 8 * u),
                cuda_kernels::load<unsigned short, From>(row + 24 * units + 2 * u),
                cuda_kernels::load<unsigned short, From>(row + 26 * units + u / 8 * 2)};
    }
    __device__ static void decode(const piece& w, float (&out)[elements]) {
        unsigned a[4], b[4];
        w.unpack(a, b);
        const float d = half_bits(w.factor);
        const float d0 = d * static_cast<float>(w.scale(0)), d1 = d * static_cast<float>(w.scale(1));
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            out[i] = d0 * static_cast<float>(code(a, i) - 32);
            out[i + 16] = d1 * static_cast<float>(code(b, i) - 32);
        }
    }
    template <class Codes>
    __device__ static float dot(const piece& w, const Codes& x) {
        unsigned a[4], b[4];
        w.unpack(a, b);
        const int2 sum = dot_codes(a, b, x);
        return half_bits(w.factor) *
               x.value(w.scale(0) * (sum.x - 32 * x.low_sum()), w.scale(1) * (sum.y - 32 * x.high_sum()));
    }
};

/// Calls f.template operator()<format>() with the format of a K-quant's layout: code for all of them.
template <class F>
__device__ inline void visit_k_quant(launch::layout type, F&& f) {
    switch (type) {
        case launch::layout::q4_k:
            return f.template operator()<format<launch::layout::q4_k>>();
        case launch::layout::q5_k:
            return f.template operator()<format<launch::layout::q5_k>>();
        default:
            return f.template operator()<format<launch::layout::q6_k>>();
    }
}

/// The same with all layouts.
template <class F>
__device__ inline void visit_format(launch::layout type, F&& f) {
    switch (type) {
        case launch::layout::f32:
            return f.template operator()<format<launch::layout::f32>>();
        case launch::layout::f16:
            return f.template operator()<format<launch::layout::f16>>();
        case launch::layout::bf16:
            return f.template operator()<format<launch::layout::bf16>>();
        case launch::layout::q8_0:
            return f.template operator()<format<launch::layout::q8_0>>();
        case launch::layout::wide:
            return f.template operator()<format<launch::layout::wide>>();
        default:
            return visit_k_quant(type, f);
    }
}

__host__ __device__ constexpr bool is_integer(launch::layout t) { return t > launch::layout::q8_0; }
__host__ __device__ constexpr bool is_k_quant(launch::layout t) { return is_integer(t) && t < launch::layout::wide; }

__host__ __device__ constexpr int units_of(int columns) { return ceil_div(columns, 32); }

}  // namespace keel::cuda_kernels
