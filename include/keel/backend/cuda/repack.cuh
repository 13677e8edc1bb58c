// SPDX-License-Identifier: MIT
//
// Blocks of a file to the records of launch.hpp, on the device.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>
#include <keel/core/quant.hpp>

namespace keel::cuda_kernels {

/// A piece of a file's row in the words of `wide`: 32 codes, and for each 16 of them scale and minimum, so that
/// value = scale q - minimum.
struct unit_values {
    int codes[32];
    float scale[2], minimum[2];

    __device__ void uniform(float d, float m) {
        scale[0] = scale[1] = d;
        minimum[0] = minimum[1] = m;
    }
};

__device__ inline float as_float(unaligned<f16> h) { return half_bits(h.get().bits); }

/// Unit `u` of a row of blocks, whatever the type.
template <class Block>
struct unit_reader;

template <class Block>
__device__ inline int nibble(const Block& b, int i) {
    return i < 16 ? b.qs[i] & 15 : b.qs[i - 16] >> 4;
}

template <>
struct unit_reader<block_q4_0> {
    __device__ static void read(const block_q4_0* row, int u, unit_values& out) {
        for (int i = 0; i < 32; ++i) out.codes[i] = nibble(row[u], i) - 8;
        out.uniform(as_float(row[u].d), 0);
    }
};

template <>
struct unit_reader<block_q4_1> {
    __device__ static void read(const block_q4_1* row, int u, unit_values& out) {
        for (int i = 0; i < 32; ++i) out.codes[i] = nibble(row[u], i);
        out.uniform(as_float(row[u].d), -as_float(row[u].m));
    }
};

template <>
struct unit_reader<block_q5_0> {
    __device__ static void read(const block_q5_0* row, int u, unit_values& out) {
        const unsigned high = row[u].qh.get();
        for (int i = 0; i < 32; ++i) out.codes[i] = (nibble(row[u], i) | static_cast<int>((high >> i) & 1u) << 4) - 16;
        out.uniform(as_float(row[u].d), 0);
    }
};

template <>
struct unit_reader<block_q5_1> {
    __device__ static void read(const block_q5_1* row, int u, unit_values& out) {
        const unsigned high = row[u].qh.get();
        for (int i = 0; i < 32; ++i) out.codes[i] = nibble(row[u], i) | static_cast<int>((high >> i) & 1u) << 4;
        out.uniform(as_float(row[u].d), -as_float(row[u].m));
    }
};

/// Entry `i` of a table of 16 signed bytes, which host code keeps as an array.
__device__ inline int iq4_value(int i) {
    constexpr signed char values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return values[i];
}

__device__ inline int mxfp4_value(int i) {
    constexpr signed char values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return values[i];
}

template <>
struct unit_reader<block_iq4_nl> {
    __device__ static void read(const block_iq4_nl* row, int u, unit_values& out) {
        for (int i = 0; i < 32; ++i) out.codes[i] = iq4_value(nibble(row[u], i));
        out.uniform(as_float(row[u].d), 0);
    }
};

template <>
struct unit_reader<block_mxfp4> {
    __device__ static void read(const block_mxfp4* row, int u, unit_values& out) {
        for (int i = 0; i < 32; ++i) out.codes[i] = mxfp4_value(nibble(row[u], i));
        const unsigned e = row[u].e;
        out.uniform(__uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0);
    }
};

template <>
struct unit_reader<block_q2_k> {
    __device__ static void read(const block_q2_k* row, int u, unit_values& out) {
        const block_q2_k& b = row[u / 8];
        const int k = u % 8;
        for (int i = 0; i < 32; ++i) out.codes[i] = (b.qs[k / 4 * 32 + i] >> (k % 4 * 2)) & 3;
        for (int h = 0; h < 2; ++h) {
            out.scale[h] = as_float(b.d) * static_cast<float>(b.scale(2 * k + h));
            out.minimum[h] = as_float(b.dmin) * static_cast<float>(b.min(2 * k + h));
        }
    }
};

template <>
struct unit_reader<block_q3_k> {
    __device__ static void read(const block_q3_k* row, int u, unit_values& out) {
        const block_q3_k& b = row[u / 8];
        const int k = u % 8;
        for (int i = 0; i < 32; ++i) {
            const int low = (b.qs[k / 4 * 32 + i] >> (k % 4 * 2)) & 3;
            out.codes[i] = (low | ((b.hmask[i] >> k) & 1) << 2) - 4;
        }
        for (int h = 0; h < 2; ++h) {
            out.scale[h] = as_float(b.d) * static_cast<float>(b.scale(2 * k + h));
            out.minimum[h] = 0;
        }
    }
};

template <>
struct unit_reader<block_iq4_xs> {
    __device__ static void read(const block_iq4_xs* row, int u, unit_values& out) {
        const block_iq4_xs& b = row[u / 8];
        const int k = u % 8;
        for (int i = 0; i < 32; ++i) out.codes[i] = iq4_value((b.qs[16 * k + i % 16] >> (i / 16 * 4)) & 15);
        out.uniform(as_float(b.d) * static_cast<float>(b.scale(k)), 0);
    }
};

/// Writes unit `u` of a record of `units`.
template <class Block>
struct unit_writer {
    __device__ static void write(const Block* row, int u, int units, unsigned char* to) {
        unit_values v;
        unit_reader<Block>::read(row, u, v);
        for (int i = 0; i < 32; ++i) to[32 * u + i] = static_cast<unsigned char>(v.codes[i]);
        float* scales = reinterpret_cast<float*>(to + 32 * units + 16 * u);
        for (int h = 0; h < 2; ++h) scales[2 * h] = v.scale[h], scales[2 * h + 1] = v.minimum[h];
    }
};

template <>
struct unit_writer<block_q8_0> {
    __device__ static void write(const block_q8_0* row, int u, int units, unsigned char* to) {
        for (int i = 0; i < 32; ++i) to[32 * u + i] = static_cast<unsigned char>(row[u].qs[i]);
        reinterpret_cast<unsigned short*>(to + 32 * units)[u] = row[u].d.get().bits;
    }
};

/// Codes of Q4_K and Q5_K: 32 low nibbles of unit k in the order of launch.hpp.
__device__ inline void write_nibbles(const std::uint8_t (&qs)[128], int k, unsigned char* to) {
    const std::uint8_t* from = qs + k / 2 * 32;
    const int shift = k % 2 * 4;
    for (int i = 0; i < 16; ++i) {
        to[i] = static_cast<unsigned char>(((from[i] >> shift) & 15) | ((from[i + 16] >> shift) & 15) << 4);
    }
}

template <class Block>
__device__ inline void write_scaled_pair(const Block& b, int u, int units, unsigned char* scales) {
    scales[2 * u] = static_cast<unsigned char>(b.scales.scale(u % 8));
    scales[2 * u + 1] = static_cast<unsigned char>(b.scales.min(u % 8));
    unsigned short* factors = reinterpret_cast<unsigned short*>(scales + 2 * units + u / 8 * 4);
    if (u % 8 == 0) factors[0] = b.d.get().bits, factors[1] = b.dmin.get().bits;
}

template <>
struct unit_writer<block_q4_k> {
    __device__ static void write(const block_q4_k* row, int u, int units, unsigned char* to) {
        write_nibbles(row[u / 8].qs, u % 8, to + 16 * u);
        write_scaled_pair(row[u / 8], u, units, to + 16 * units);
    }
};

template <>
struct unit_writer<block_q5_k> {
    __device__ static void write(const block_q5_k* row, int u, int units, unsigned char* to) {
        const block_q5_k& b = row[u / 8];
        const int k = u % 8;
        write_nibbles(b.qs, k, to + 16 * u);
        unsigned high = 0;
        for (int i = 0; i < 16; ++i) {
            const int at = i % 4 * 8 + i / 4;  // of element i; element i + 16 is four bits above
            high |= ((b.qh[i] >> k) & 1u) << at | ((b.qh[i + 16] >> k) & 1u) << (at + 4);
        }
        reinterpret_cast<unsigned*>(to + 16 * units)[u] = high;
        write_scaled_pair(b, u, units, to + 20 * units);
    }
};

template <>
struct unit_writer<block_q6_k> {
    __device__ static void write(const block_q6_k* row, int u, int units, unsigned char* to) {
        const block_q6_k& b = row[u / 8];
        const int k = u % 8, half = k / 4, quarter = k % 4;
        const std::uint8_t* low = b.ql + half * 64 + quarter % 2 * 32;
        const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
        unsigned high[2] = {0, 0};
        for (int i = 0; i < 16; ++i) {
            to[16 * u + i] =
                static_cast<unsigned char>(((low[i] >> low_shift) & 15) | ((low[i + 16] >> low_shift) & 15) << 4);
            const int word = i / 4, at = i % 4 * 8 + word % 2 * 4;
            high[word / 2] |= ((b.qh[half * 32 + i] >> high_shift) & 3u) << at |
                              ((b.qh[half * 32 + i + 16] >> high_shift) & 3u) << (at + 2);
        }
        unsigned* pairs = reinterpret_cast<unsigned*>(to + 16 * units + 8 * u);
        pairs[0] = high[0], pairs[1] = high[1];
        to[24 * units + 2 * u] = static_cast<unsigned char>(b.scales[2 * k]);
        to[24 * units + 2 * u + 1] = static_cast<unsigned char>(b.scales[2 * k + 1]);
        if (k == 0) reinterpret_cast<unsigned short*>(to + 26 * units)[u / 8] = b.d.get().bits;
    }
};

/// One thread per unit.
template <class Block>
__global__ void repack_kernel(const __grid_constant__ launch::repack_args a) {
    const int units = units_of(a.columns);
    const long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= a.rows * units) return;
    const long long row = at / units;
    const int u = static_cast<int>(at % units);
    const auto* from = reinterpret_cast<const Block*>(a.from) + row * (a.columns / Block::elements);
    unit_writer<Block>::write(from, u, units, a.to + row * a.row_bytes);
}

/// Elements of plain types: rows are only padded with zeros.
template <class T>
__global__ void pad_kernel(const __grid_constant__ launch::repack_args a) {
    const int width = units_of(a.columns) * 32;
    const long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= a.rows * width) return;
    const long long row = at / width;
    const int column = static_cast<int>(at % width);
    T value = 0;
    if (column < a.columns) memcpy(&value, a.from + (row * a.columns + column) * sizeof(T), sizeof(T));
    reinterpret_cast<T*>(a.to + row * a.row_bytes)[column] = value;
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t probe() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, cuda_kernels::pad_kernel<unsigned>);
}

cudaError_t repack(const repack_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    constexpr int threads = 256;
    const auto blocks = [&](long long n) { return static_cast<unsigned>((n + threads - 1) / threads); };
    if (a.as == layout::f32) {
        pad_kernel<unsigned><<<blocks(a.rows * units_of(a.columns) * 32), threads, 0, stream>>>(a);
    } else if (a.as == layout::f16 || a.as == layout::bf16) {
        pad_kernel<unsigned short><<<blocks(a.rows * units_of(a.columns) * 32), threads, 0, stream>>>(a);
    } else {
        const unsigned grid = blocks(a.rows * units_of(a.columns));
        visit_blocks(static_cast<dtype>(a.type), [&]<class Block>() {
            if constexpr (Block::elements > 1) repack_kernel<Block><<<grid, threads, 0, stream>>>(a);
        });
    }
    return cudaGetLastError();
}

}  // namespace keel::cuda_launch
