// SPDX-License-Identifier: MIT
//
// Activations as weights of few bits meet them: codes of 8 bits, a unit of 32 elements at a time, and products of
// codes.
#pragma once

#include <keel/backend/cuda/device.cuh>

namespace keel::cuda_kernels {

/// Activations in shared memory, one row: as floats (36 places for 32 elements, so that lanes that read neighbouring
/// units meet no bank conflict), and as codes of 8 bits with a scale per unit of 32 elements.
struct staged {
    float* values;
    signed char* first;   // elements 0 to 15 of every unit
    signed char* second;  // elements 16 to 31
    int2* marks;          // per unit: the scale's bits; the codes' sums, elements 0 to 15 low, 16 to 31 high

    __host__ __device__ static constexpr int value_bytes(int units) { return units * 144; }
    __host__ __device__ static constexpr int code_bytes(int units) { return (units * 40 + 15) / 16 * 16; }

    __device__ staged(unsigned char* memory, int units, bool floats)
        : values(reinterpret_cast<float*>(memory)),
          first(reinterpret_cast<signed char*>(memory + (floats ? value_bytes(units) : 0))),
          second(first + 16 * units),
          marks(reinterpret_cast<int2*>(second + 16 * units)) {}

    __device__ static int place(int element) { return element + element / 32 * 4; }
};

/// A unit of activations as codes, in registers.
struct unit_codes {
    int4 first, second;  // elements 0 to 15, 16 to 31
    float scale;         // what a product of codes is multiplied with
    int sums;            // of the codes: elements 0 to 15 low, 16 to 31 high

    __device__ unit_codes(const staged& x, int u)
        : first(*reinterpret_cast<const int4*>(x.first + 16 * u)),
          second(*reinterpret_cast<const int4*>(x.second + 16 * u)) {
        const int2 mark = x.marks[u];
        scale = __int_as_float(mark.x), sums = mark.y;
    }
    __device__ int low_sum() const { return static_cast<short>(sums & 0xFFFF); }
    __device__ int high_sum() const { return sums >> 16; }

    /// The value of products of codes, of elements 0 to 15 and of the others.
    __device__ float value(int low, int high) const { return scale * static_cast<float>(low + high); }
    /// The sum of the unit.
    __device__ float total() const { return scale * static_cast<float>(__dp2a_lo(sums, 0x0101, 0)); }
};

/// The same with a scale for each half of the unit. Memory: the codes as in `staged`, then (scale, sum of codes) of
/// both halves of every unit.
struct half_codes {
    int4 first, second;
    float2 scale;
    int2 sums;

    static constexpr int bytes = 48;  // of a unit

    __device__ half_codes(const unsigned char* memory, int units, int u)
        : first(*reinterpret_cast<const int4*>(memory + 16 * u)),
          second(*reinterpret_cast<const int4*>(memory + 16 * (units + u))) {
        const int4 mark = *reinterpret_cast<const int4*>(memory + 16 * (2 * units + u));
        scale = {__int_as_float(mark.x), __int_as_float(mark.z)}, sums = {mark.y, mark.w};
    }
    /// Sixteen neighbouring lanes write a half, an element each; all lanes of the warp call it.
    __device__ static void put(unsigned char* memory, int units, int half, float x, bool inside) {
        const int i = threadIdx.x % 16, unit = half / 2, part = half % 2;
        const float largest = lanes_max<16>(fabsf(x));
        const int code = __float2int_rn(x * (largest > 0 ? 127.0f / largest : 0.0f)), sum = lanes_sum<16>(code);
        if (!inside) return;
        memory[16 * (part * units + unit) + i] = static_cast<unsigned char>(code);
        if (i == 0) {
            reinterpret_cast<int2*>(memory + 32 * units)[half] = {__float_as_int(largest * (1 / 127.0f)), sum};
        }
    }
    __device__ void weigh(float by) { scale = {scale.x * by, scale.y * by}; }

    __device__ int low_sum() const { return sums.x; }
    __device__ int high_sum() const { return sums.y; }
    __device__ float value(int low, int high) const {
        return scale.x * static_cast<float>(low) + scale.y * static_cast<float>(high);
    }
    __device__ float total() const { return value(sums.x, sums.y); }
};

/// Products of the 16 codes in a and in b, each with 16 activations of the unit.
template <class Codes>
__device__ inline int2 dot_codes(const unsigned (&a)[4], const unsigned (&b)[4], const Codes& x) {
    const int4 &lo = x.first, &hi = x.second;
    int2 sum{0, 0};
    sum.x = __dp4a(static_cast<int>(a[0]), lo.x, sum.x);
    sum.y = __dp4a(static_cast<int>(b[0]), hi.x, sum.y);
    sum.x = __dp4a(static_cast<int>(a[1]), lo.y, sum.x);
    sum.y = __dp4a(static_cast<int>(b[1]), hi.y, sum.y);
    sum.x = __dp4a(static_cast<int>(a[2]), lo.z, sum.x);
    sum.y = __dp4a(static_cast<int>(b[2]), hi.z, sum.y);
    sum.x = __dp4a(static_cast<int>(a[3]), lo.w, sum.x);
    sum.y = __dp4a(static_cast<int>(b[3]), hi.w, sum.y);
    return sum;
}

/// sum + four unsigned bytes times four signed ones.
__device__ inline int dot_unsigned(unsigned a, int b, int sum) {
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(sum));
    return sum;
}

}  // namespace keel::cuda_kernels
