// SPDX-License-Identifier: MIT
//
// Weights as pairs of halves, for tensor core products. A thread takes a unit of 32 elements of a row; step s of 8
// needs its elements 2s, 2s+1 (`low`) and 16+2s, 17+2s (`high`): where the layouts of launch.hpp keep nibbles, these
// are the two halves of the same bytes. Codes become halves exactly: 0x64 above a byte q is the half 1024 + q.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include <keel/backend/cuda/formats.cuh>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

__device__ inline __half2 as_half2(std::uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ inline std::uint32_t as_bits(__half2 h) { return *reinterpret_cast<const std::uint32_t*>(&h); }
__device__ inline __half2 both(float x) { return __float2half2_rn(x); }

/// silu(gate) up is kept as halves of this part of it: up to a million does not overflow.
inline constexpr float hidden_factor = 0.0625f;

/// As a half of plane 0, or what that leaves.
__device__ inline __half gated_half(float gate, float up, int plane) {
    const float y = gate / (1.0f + __expf(-gate)) * up * hidden_factor;
    const float inside = fminf(fmaxf(y, -65504.0f), 65504.0f);
    const __half first = __float2half_rn(inside);
    return plane == 0 ? first : __float2half_rn(inside - __half2float(first));
}

/// Bytes 2 i and 2 i + 1 of a word, q, as 1024 + q.
__device__ inline std::uint32_t byte_pair(std::uint32_t word, int i) {
    return __byte_perm(word, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
}

/// Four steps: pairs of halves of both parts of a unit.
struct half_steps {
    std::uint32_t low[4], high[4];
};

/// scale * (q + offset - 1024) - minimum, where a byte pair gave 1024 + q.
struct half_scale {
    __half2 scale, minus_minimum, offset;
    __device__ std::uint32_t operator()(std::uint32_t pair) const {
        return as_bits(__hfma2(__hadd2(as_half2(pair), offset), scale, minus_minimum));
    }
};
struct half_scale_only {
    __half2 scale, offset;
    __device__ std::uint32_t operator()(std::uint32_t pair) const {
        return as_bits(__hmul2(__hadd2(as_half2(pair), offset), scale));
    }
};

/// Steps [4 part, 4 part + 4) of codes in bytes.
template <class Low, class High>
__device__ half_steps bytes_to_halves(const unsigned (&a)[4], const unsigned (&b)[4], int part, const Low& low,
                                      const High& high) {
    half_steps out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out.low[i] = low(byte_pair(a[2 * part + i / 2], i % 2));
        out.high[i] = high(byte_pair(b[2 * part + i / 2], i % 2));
    }
    return out;
}

/// Loads that stay where they are written: the compiler would move them to their use, a group later.
__device__ inline void fetch(std::uint32_t& to, const unsigned char* from, int bytes) {
    if (bytes == 2) {
        asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(to) : "l"(from));
    } else {
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to) : "l"(from));
    }
}
__device__ inline void fetch(uint2& to, const unsigned char* from) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
}
__device__ inline void fetch(uint4& to, const unsigned char* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from));
}

/// Room in shared memory for the units that the lanes of a warp have asked for: pieces of 16 bytes, then of 4 or 8.
struct weight_slot {
    unsigned char* at;
    int lane;

    __device__ uint4* piece(int i) const { return reinterpret_cast<uint4*>(at + i * 512) + lane; }
    template <int Pieces, class T>
    __device__ T* rest() const {
        return reinterpret_cast<T*>(at + Pieces * 512) + lane;
    }
};

/// A unit of a row: load() as early as may be, or ask() for a copy to a slot and take() it from there when it has
/// arrived; then steps() twice. What is less than 4 bytes a unit is at the end of a row, from factors_at() on, and not
/// in slots: take() finds it in a copy of that end.
template <layout L>
struct weight_unit;

/// Both factors of a unit of Q4_K or Q5_K: scale, -minimum.
struct scale_pair {
    std::uint32_t codes, factors;

    __device__ void load(const unsigned char* scales, int units, int unit) {
        fetch(codes, scales + 2 * unit, 2);
        fetch(factors, scales + 2 * units + unit / 8 * 4, 4);
    }
    __device__ void take(const unsigned char* scales, int units, int unit) {
        codes = *reinterpret_cast<const unsigned short*>(scales + 2 * unit);
        factors = *reinterpret_cast<const std::uint32_t*>(scales + 2 * units + unit / 8 * 4);
    }
    __device__ half_scale value(float offset) const {
        const __half2 product = __hmul2(__hadd2(as_half2(byte_pair(codes, 0)), both(-1024.0f)), as_half2(factors));
        return {__low2half2(product), __hneg2(__high2half2(product)), both(offset)};
    }
};

template <>
struct weight_unit<layout::q4_k> {
    uint4 codes;
    scale_pair scales;

    static constexpr int pieces = 1, rest = 0;
    __host__ __device__ static int factors_at(int units) { return 16 * units; }
    __device__ static void ask(const weight_slot& slot, const unsigned char* row, int, int unit) {
        copy_once<16>(slot.piece(0), row + 16 * unit);
    }
    __device__ void load(const unsigned char* row, int units, int unit) {
        fetch(codes, row + 16 * unit);
        scales.load(row + 16 * units, units, unit);
    }
    __device__ void take(const weight_slot& slot, const unsigned char* factors, int units, int unit) {
        codes = *slot.piece(0);
        scales.take(factors, units, unit);
    }
    __device__ half_steps steps(int part) const {
        const std::uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        const half_scale value = scales.value(-1024.0f);
        half_steps out;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t pair = byte_pair(words[2 * part + i / 2], i % 2);
            const __half2 high = __hfma2(as_half2(pair & 0xFFF0FFF0u), both(0.0625f), both(-64.0f));
            out.low[i] = value(pair & 0xFF0FFF0Fu);
            out.high[i] = as_bits(__hfma2(high, value.scale, value.minus_minimum));
        }
        return out;
    }
};

template <>
struct weight_unit<layout::q5_k> {
    uint4 codes;
    std::uint32_t high;
    scale_pair scales;

    static constexpr int pieces = 1, rest = 4;
    __host__ __device__ static int factors_at(int units) { return 20 * units; }
    __device__ static void ask(const weight_slot& slot, const unsigned char* row, int units, int unit) {
        copy_once<16>(slot.piece(0), row + 16 * unit);
        copy_once<rest>(slot.rest<pieces, std::uint32_t>(), row + 16 * units + 4 * unit);
    }
    __device__ void load(const unsigned char* row, int units, int unit) {
        fetch(codes, row + 16 * unit);
        fetch(high, row + 16 * units + 4 * unit, 4);
        scales.load(row + 20 * units, units, unit);
    }
    __device__ void take(const weight_slot& slot, const unsigned char* factors, int units, int unit) {
        codes = *slot.piece(0);
        high = *slot.rest<pieces, std::uint32_t>();
        scales.take(factors, units, unit);
    }
    __device__ half_steps steps(int part) const {
        unsigned a[4], b[4];
        cuda_kernels::unpack_nibbles(codes, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i] |= ((high >> i) & 0x01010101u) << 4;
            b[i] |= ((high >> (4 + i)) & 0x01010101u) << 4;
        }
        const half_scale value = scales.value(-1024.0f);
        return bytes_to_halves(a, b, part, value, value);
    }
};

template <>
struct weight_unit<layout::q6_k> {
    uint4 codes;
    uint2 high;
    std::uint32_t scales, factor;

    static constexpr int pieces = 1, rest = 8;
    __host__ __device__ static int factors_at(int units) { return 24 * units; }
    __device__ static void ask(const weight_slot& slot, const unsigned char* row, int units, int unit) {
        copy_once<16>(slot.piece(0), row + 16 * unit);
        copy_once<rest>(slot.rest<pieces, uint2>(), row + 16 * units + 8 * unit);
    }
    __device__ void load(const unsigned char* row, int units, int unit) {
        fetch(codes, row + 16 * unit);
        fetch(high, row + 16 * units + 8 * unit);
        fetch(scales, row + 24 * units + 2 * unit, 2);
        fetch(factor, row + 26 * units + unit / 8 * 2, 2);
    }
    __device__ void take(const weight_slot& slot, const unsigned char* factors, int units, int unit) {
        codes = *slot.piece(0);
        high = *slot.rest<pieces, uint2>();
        scales = *reinterpret_cast<const unsigned short*>(factors + 2 * unit);
        factor = *reinterpret_cast<const unsigned short*>(factors + 2 * units + unit / 8 * 2);
    }
    __device__ half_steps steps(int part) const {
        unsigned a[4], b[4];
        cuda_kernels::unpack_nibbles(codes, a, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned pairs = (i < 2 ? high.x : high.y) >> (i % 2 * 4);
            a[i] |= (pairs & 0x03030303u) << 4;
            b[i] |= (pairs & 0x0C0C0C0Cu) << 2;
        }
        const __half2 signed_codes = __hadd2(as_half2(byte_pair(scales ^ 0x8080u, 0)), both(-1152.0f));
        const __half2 of = __hmul2(signed_codes, __half2half2(__ushort_as_half(static_cast<unsigned short>(factor))));
        return bytes_to_halves(a, b, part, half_scale_only{__low2half2(of), both(-1056.0f)},
                               half_scale_only{__high2half2(of), both(-1056.0f)});
    }
};

/// Signed bytes as unsigned ones, 128 larger.
struct byte_codes {
    uint4 first, second;

    __device__ void load(const unsigned char* codes, int unit) {
        fetch(first, codes + 32 * unit);
        fetch(second, codes + 32 * unit + 16);
    }
    __device__ static void ask(const weight_slot& slot, const unsigned char* codes, int unit) {
        copy_once<16>(slot.piece(0), codes + 32 * unit);
        copy_once<16>(slot.piece(1), codes + 32 * unit + 16);
    }
    __device__ void take(const weight_slot& slot) { first = *slot.piece(0), second = *slot.piece(1); }
    __device__ void unpack(unsigned (&a)[4], unsigned (&b)[4]) const {
        a[0] = first.x, a[1] = first.y, a[2] = first.z, a[3] = first.w;
        b[0] = second.x, b[1] = second.y, b[2] = second.z, b[3] = second.w;
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] ^= 0x80808080u, b[i] ^= 0x80808080u;
    }
};

template <>
struct weight_unit<layout::q8_0> {
    byte_codes codes;
    std::uint32_t scale;

    static constexpr int pieces = 2, rest = 0;
    __host__ __device__ static int factors_at(int units) { return 32 * units; }
    __device__ static void ask(const weight_slot& slot, const unsigned char* row, int, int unit) {
        byte_codes::ask(slot, row, unit);
    }
    __device__ void load(const unsigned char* row, int units, int unit) {
        codes.load(row, unit);
        fetch(scale, row + 32 * units + 2 * unit, 2);
    }
    __device__ void take(const weight_slot& slot, const unsigned char* factors, int, int unit) {
        codes.take(slot);
        scale = *reinterpret_cast<const unsigned short*>(factors + 2 * unit);
    }
    __device__ half_steps steps(int part) const {
        unsigned a[4], b[4];
        codes.unpack(a, b);
        const half_scale_only value{__half2half2(__ushort_as_half(static_cast<unsigned short>(scale))), both(-1152.0f)};
        return bytes_to_halves(a, b, part, value, value);
    }
};

template <>
struct weight_unit<layout::wide> {
    byte_codes codes;
    uint4 scales;  // scale, minimum of elements 0 to 15, then of 16 to 31

    static constexpr int pieces = 3, rest = 0;
    __host__ __device__ static int factors_at(int units) { return 48 * units; }
    __device__ static void ask(const weight_slot& slot, const unsigned char* row, int units, int unit) {
        byte_codes::ask(slot, row, unit);
        copy_once<16>(slot.piece(2), row + 32 * units + 16 * unit);
    }
    __device__ void load(const unsigned char* row, int units, int unit) {
        codes.load(row, unit);
        fetch(scales, row + 32 * units + 16 * unit);
    }
    __device__ void take(const weight_slot& slot, const unsigned char*, int, int) {
        codes.take(slot);
        scales = *slot.piece(2);
    }
    __device__ half_steps steps(int part) const {
        unsigned a[4], b[4];
        codes.unpack(a, b);
        const auto value = [](std::uint32_t scale, std::uint32_t minimum) {
            return half_scale{both(__uint_as_float(scale)), both(-__uint_as_float(minimum)), both(-1152.0f)};
        };
        return bytes_to_halves(a, b, part, value(scales.x, scales.y), value(scales.z, scales.w));
    }
};

/// Elements stay where they are until they are needed: 64 or 128 bytes of a unit would take too many registers.
template <int ElementBytes>
struct element_unit {
    static constexpr int pieces = 2 * ElementBytes, rest = 0;
    __host__ __device__ static int factors_at(int units) { return 32 * ElementBytes * units; }
    const uint4* from;
    int step;  // between pieces

    __device__ void load(const unsigned char* row, int, int unit) {
        from = reinterpret_cast<const uint4*>(row + unit * 32 * ElementBytes);
        step = 1;
    }
    __device__ static void ask(const weight_slot& slot, const unsigned char* row, int, int unit) {
#pragma unroll
        for (int i = 0; i < pieces; ++i) copy_once<16>(slot.piece(i), row + unit * 32 * ElementBytes + 16 * i);
    }
    __device__ void take(const weight_slot& slot, const unsigned char*, int, int) {
        from = slot.piece(0);
        step = 32;
    }
    /// 16 bytes from element i on.
    __device__ uint4 piece(int i) const { return from[i * ElementBytes / 16 * step]; }
};

template <>
struct weight_unit<layout::f16> : element_unit<2> {
    __device__ half_steps steps(int part) const {
        const uint4 low = piece(8 * part), high = piece(16 + 8 * part);
        return {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
    }
};

template <>
struct weight_unit<layout::bf16> : element_unit<2> {
    __device__ static std::uint32_t convert(std::uint32_t pair) {
        return pack(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
    }
    __device__ half_steps steps(int part) const {
        const uint4 low = piece(8 * part), high = piece(16 + 8 * part);
        return {{convert(low.x), convert(low.y), convert(low.z), convert(low.w)},
                {convert(high.x), convert(high.y), convert(high.z), convert(high.w)}};
    }
};

template <>
struct weight_unit<layout::f32> : element_unit<4> {
    __device__ void four(int i, std::uint32_t& first, std::uint32_t& second) const {
        const uint4 v = piece(i);
        first = pack(__uint_as_float(v.x), __uint_as_float(v.y));
        second = pack(__uint_as_float(v.z), __uint_as_float(v.w));
    }
    __device__ half_steps steps(int part) const {
        half_steps out;
        four(8 * part, out.low[0], out.low[1]);
        four(8 * part + 4, out.low[2], out.low[3]);
        four(16 + 8 * part, out.high[0], out.high[1]);
        four(20 + 8 * part, out.high[2], out.high[3]);
        return out;
    }
};

/// Calls f.template operator()<L>() with a layout as a constant.
template <class F>
cudaError_t visit_layout(layout type, F&& f) {
    switch (type) {
        case layout::f32:
            return f.template operator()<layout::f32>();
        case layout::f16:
            return f.template operator()<layout::f16>();
        case layout::bf16:
            return f.template operator()<layout::bf16>();
        case layout::q8_0:
            return f.template operator()<layout::q8_0>();
        case layout::q4_k:
            return f.template operator()<layout::q4_k>();
        case layout::q5_k:
            return f.template operator()<layout::q5_k>();
        case layout::q6_k:
            return f.template operator()<layout::q6_k>();
        case layout::wide:
            return f.template operator()<layout::wide>();
    }
    return cudaErrorInvalidValue;
}

}  // namespace keel::cuda_launch::detail
