// SPDX-License-Identifier: MIT
//
// Activations on their way into products: floats to codes of 8 bits in shared memory, the norm before them included.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>

namespace keel::cuda_kernels {

/// Eight neighbouring elements.
struct eight {
    float4 first, second;
};

__device__ inline float4 times(const float4& a, const float4& b) {
    return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ inline float largest_of(const float4& v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}
__device__ inline float squares_of(const float4& v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

/// Four codes of 8 bits.
__device__ inline int codes_of(const float4& v, float factor) {
    const int q0 = __float2int_rn(v.x * factor), q1 = __float2int_rn(v.y * factor), q2 = __float2int_rn(v.z * factor),
              q3 = __float2int_rn(v.w * factor);
    return static_cast<int>(__byte_perm(__byte_perm(q0, q1, 0x0040), __byte_perm(q2, q3, 0x0040), 0x5410));
}

/// The first `threads` threads of a block, whole warps, put a row of activations into shared memory. load(i) returns
/// its elements from i on, zeros behind the end; four lanes make a unit.
template <class F>
__device__ inline void stage(const staged& x, int units, bool floats, bool codes, int threads, F&& load) {
    const int end = ceil_div(units * 4, warp_size) * warp_size;
    const auto load_inside = [&](int i) { return i < 4 * units ? load(8 * i) : eight{}; };
    eight ahead = load_inside(threadIdx.x);
#pragma unroll 1
    for (int i = threadIdx.x; i < end; i += threads) {
        const int u = i / 4, part = i % 4;
        const bool inside = u < units;
        const eight v = ahead;
        ahead = load_inside(i + threads);
        if (floats && inside) {
            float4* to = reinterpret_cast<float4*>(x.values + staged::place(8 * i));
            to[0] = v.first, to[1] = v.second;
        }
        if (!codes) continue;
        const float largest = lanes_max<4>(fmaxf(largest_of(v.first), largest_of(v.second)));
        const float factor = largest > 0 ? __fdividef(127.0f, largest) : 0.0f;
        const int2 q = {codes_of(v.first, factor), codes_of(v.second, factor)};
        const int sum = lanes_sum<2>(__dp4a(q.x, 0x01010101, __dp4a(q.y, 0x01010101, 0)));
        const int other = __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
        if (!inside) continue;
        *reinterpret_cast<int2*>((part < 2 ? x.first : x.second) + 16 * u + part % 2 * 8) = q;
        if (part == 0) x.marks[u] = {__float_as_int(largest * (1 / 127.0f)), (sum & 0xFFFF) | other << 16};
    }
}

/// Stages x * weight and leaves sums of squares of x, one per warp: products with it have to be multiplied with
/// inverse_rms(squares) in the end. `weight` null: x alone. `Whole`: rows of whole units, on 16 bytes. `ahead`, if not
/// null, are weights from 8 threadIdx.x on, loaded before. As stage(); a barrier must follow.
template <bool Whole = false>
__device__ inline void stage_weighted(const staged& to, int units, bool floats, bool codes, int threads, const float* x,
                                      const float* weight, int columns, float* squares, const eight* ahead = nullptr) {
    float sum = 0;
    const bool whole = Whole || (aligned16(x, weight) && columns % 32 == 0);
    const auto load = [&](const float* p, int i) -> eight {
        if (!whole) return {load_four(p, i, columns), load_four(p, i + 4, columns)};
        const float4* from = reinterpret_cast<const float4*>(p + i);
        return {from[0], from[1]};
    };
    stage(to, units, floats, codes, threads, [&](int i) {
        const eight v = load(x, i);
        if (weight == nullptr) return v;
        const eight w = ahead != nullptr && i == 8 * static_cast<int>(threadIdx.x) ? *ahead : load(weight, i);
        sum += squares_of(v.first) + squares_of(v.second);
        return eight{times(v.first, w.first), times(v.second, w.second)};
    });
    sum = lanes_sum(sum);
    if (threadIdx.x % warp_size == 0) squares[threadIdx.x / warp_size] = sum;
}

/// A norm's weights that the calling thread needs first, for a row of whole units on 16 bytes.
__device__ inline eight weights_ahead(const float* weight, int columns) {
    if (weight == nullptr || 8 * static_cast<int>(threadIdx.x) >= columns) return {};
    const float4* from = reinterpret_cast<const float4*>(weight) + 2 * threadIdx.x;
    return {from[0], from[1]};
}

/// A warp writes a unit of activations, an element a lane, as codes.
__device__ inline void put_unit(const staged& to, int unit, float value) {
    const int i = threadIdx.x % warp_size;
    const float largest = lanes_max(fabsf(value));
    const int q = __float2int_rn(value * (largest > 0 ? 127.0f / largest : 0.0f));
    const int sum = lanes_sum<16>(q), other = __shfl_xor_sync(0xFFFFFFFFu, sum, 16);
    (i < 16 ? to.first : to.second)[16 * unit + i % 16] = static_cast<signed char>(q);
    if (i == 0) to.marks[unit] = {__float_as_int(largest * (1 / 127.0f)), (sum & 0xFFFF) | other << 16};
}

/// Activations as codes of 16 bits, for weights of 8: a unit's elements are scale (256 high + low). Memory: of every
/// unit 32 high and 32 low bytes, then the scales.
struct fine_codes {
    __host__ __device__ static constexpr int bytes(int units) { return (units * 68 + 15) / 16 * 16; }

    /// Eight neighbouring lanes write a unit, four elements each; all lanes of the warp call it.
    __device__ static void put(unsigned char* memory, int units, int unit, const float4& x, bool inside) {
        constexpr float most = 127 * 256;
        const int part = threadIdx.x % 8;
        const float largest = lanes_max<8>(largest_of(x)), factor = largest > 0 ? most / largest : 0.0f;
        const float values[4] = {x.x, x.y, x.z, x.w};
        unsigned high = 0, low = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int code = __float2int_rn(values[i] * factor), upper = (code + 128) >> 8;
            high |= (static_cast<unsigned>(upper) & 255) << (8 * i);
            low |= (static_cast<unsigned>(code) & 255) << (8 * i);
        }
        if (!inside) return;
        unsigned* const to = reinterpret_cast<unsigned*>(memory + 64 * unit);
        to[part] = high, to[8 + part] = low;
        if (part == 0) reinterpret_cast<float*>(memory + 64 * units)[unit] = largest * (1 / most);
    }

    /// The product of unit u with weights.
    __device__ static float dot(const format<launch::layout::q8_0>::piece& w, const unsigned char* memory, int units,
                                int u) {
        const int4* const x = reinterpret_cast<const int4*>(memory + 64 * u);
        unsigned a[4], b[4];
        w.codes.unpack(a, b);
        const auto with = [&](const int4& first, const int4& second) {
            const int2 sums = dot_codes(a, b, plain_codes{first, second});
            return sums.x + sums.y;
        };
        const float scale = half_bits(w.scale) * reinterpret_cast<const float*>(memory + 64 * units)[u];
        return scale * static_cast<float>(256 * with(x[0], x[1]) + with(x[2], x[3]));
    }

private:
    struct plain_codes {
        int4 first, second;
    };
};

/// From the sums of squares of the warps, behind a barrier.
__device__ inline float inverse_rms(const float* squares, int threads, int columns, float epsilon) {
    float sum = 0;
    for (int w = 0; w < threads / warp_size; ++w) sum += squares[w];
    return 1.0f / sqrtf(sum / static_cast<float>(columns) + epsilon);
}

}  // namespace keel::cuda_kernels
