// SPDX-License-Identifier: MIT
//
// Products of K-quantised weights with a few rows of activations as whole numbers. Activations are codes of 16 bits
// with a scale for every 256 columns. The tensor core multiplies their upper and their lower bytes, two columns of a
// fragment, with the weights' codes: whole numbers that are weighed, 32 columns at a time, with the whole numbers that
// K-quants have for scales. Both operands are rows of bytes in shared memory, weights as they lie in global memory.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/halves.cuh>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/mma.cuh>
#include <keel/backend/cuda/slot_ring.cuh>
#include <keel/backend/cuda/staging.cuh>

namespace keel::cuda_launch::detail {

/// Up to 4 rows of activations in shared memory, x = scale (256 upper + lower). Byte rows 2 r and 2 r + 1 are the upper
/// and lower bytes of row r; they lie so that eight of them meet no bank conflict.
class byte_rows {
public:
    static constexpr int most_rows = 4;  // whose bytes are the columns of a fragment
    static constexpr int block = 256;    // columns that have a scale

    __device__ byte_rows(unsigned char* memory, int columns) : memory_(memory), columns_(columns) {}

    __host__ __device__ static int bytes(int columns) {
        return 2 * most_rows * (columns + 16 + sums_pitch(columns)) + most_rows * columns / block * 4;
    }

    /// Row r becomes from(r), for all threads of some warps.
    template <class From>
    __device__ void fill(int rows, int warp, int warps, From&& from) const {
        const int lane = static_cast<int>(threadIdx.x) % 32, blocks = columns_ / block;
        for (int i = warp; i < rows * blocks; i += warps) {
            const int row = i / blocks, first = i % blocks * block + 4 * lane;
            const float* const at = from(row) + first;
            const float4 x[2] = {*reinterpret_cast<const float4*>(at),
                                 *reinterpret_cast<const float4*>(at + block / 2)};
            const float largest =
                cuda_kernels::lanes_max(fmaxf(cuda_kernels::largest_of(x[0]), cuda_kernels::largest_of(x[1])));
            const float factor = largest > 0x1p-100f ? largest_code / largest : 0.0f;
            if (lane == 0) scales()[i % blocks * most_rows + row] = largest / largest_code;
#pragma unroll
            for (int half = 0; half < 2; ++half) put(row, first + half * (block / 2), x[half], factor);
        }
    }

    /// B fragments of two units: 2 u and 2 u + 1 are those of unit + u.
    __device__ void load(std::uint32_t (&b)[4], int unit, int lane) const {
        load_matrices(b, shared_address(codes(lane % 8) + 32 * unit + lane / 8 * 16));
    }
    /// B fragment of the sums over 16 codes of eight units.
    __device__ uint2 sums(int unit, int lane) const {
        const std::uint32_t* const at = sums_of(lane / 4) + unit + lane % 4;
        return {at[0], at[4]};
    }
    /// Of the row whose results a lane has: bytes of it are columns 2 (lane % 4) and the next of a C fragment.
    __device__ float scale(int block, int lane) const { return scales()[block * most_rows + lane % 4]; }
    __device__ static float join(float upper, float lower) { return 256.0f * upper + lower; }

private:
    static constexpr float largest_code = 32600;  // less than 127.5 times 256

    /// Of a byte row: halves, two for a unit.
    __host__ __device__ static int sums_pitch(int columns) { return columns / 8 + 16; }

    __device__ void put(int row, int column, const float4& x, float factor) const {
        const int code[4] = {__float2int_rn(x.x * factor), __float2int_rn(x.y * factor), __float2int_rn(x.z * factor),
                             __float2int_rn(x.w * factor)};
        std::uint32_t bytes[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bytes[0] |= (static_cast<std::uint32_t>(code[i] + 128) >> 8 & 0xFFu) << 8 * i;
            bytes[1] |= (static_cast<std::uint32_t>(code[i]) & 0xFFu) << 8 * i;
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            *reinterpret_cast<std::uint32_t*>(codes(2 * row + part) + column) = bytes[part];
            const int sum = cuda_kernels::lanes_sum<4>(__dp4a(static_cast<int>(bytes[part]), 0x01010101, 0));
            if (column % 16 == 0) {
                reinterpret_cast<__half*>(sums_of(2 * row + part))[column / 16] = __int2half_rn(sum);
            }
        }
    }

    __device__ unsigned char* codes(int byte_row) const { return memory_ + byte_row * (columns_ + 16); }
    __device__ std::uint32_t* sums_of(int byte_row) const {
        return reinterpret_cast<std::uint32_t*>(codes(2 * most_rows) + byte_row * sums_pitch(columns_));
    }
    __device__ float* scales() const { return reinterpret_cast<float*>(sums_of(2 * most_rows)); }

    unsigned char* memory_;
    int columns_;
};

/// What a row has besides nibbles: value = d scale code - m minimum. `scales` are those of a block of eight units.
template <layout L>
struct row_format;

/// Scale and minimum of whole units, Q4_K and Q5_K.
struct unit_scales {
    static constexpr int parts = 1;  // of a unit, with a scale of their own

    /// Of the first or second unit of two.
    __device__ static int scale(std::uint32_t two, int unit, int) {
        return static_cast<int>(__byte_perm(two, 0, 0x4440 + 2 * unit));
    }
    /// As an A fragment takes them, for both halves of a unit.
    __device__ static std::uint32_t minima(const unsigned char* scales, int unit) {
        const std::uint32_t minimum = scales[2 * unit + 1];
        return as_bits(__hadd2(as_half2(minimum * 0x00010001u | 0x64006400u), both(-1024.0f)));
    }
    /// d, m.
    __device__ static float2 factors(const unsigned char* behind_scales, int block) {
        return __half22float2(*reinterpret_cast<const __half2*>(behind_scales + 4 * block));
    }
};

template <>
struct row_format<layout::q4_k> : unit_scales {
    /// Adds what codes have above their nibbles.
    __device__ static void add_bits(const unsigned char*, int, int, int, std::uint32_t&, std::uint32_t&) {}
};

template <>
struct row_format<layout::q5_k> : unit_scales {
    __device__ static void add_bits(const unsigned char* row, int units, int unit, int quad, std::uint32_t& low,
                                    std::uint32_t& high) {
        const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(row + 16 * units + 4 * unit) >> quad;
        low |= bits << 4 & 0x10101010u;
        high |= bits & 0x10101010u;
    }
};

/// Scales of 16 elements; what is taken from codes is 32 times the scale.
template <>
struct row_format<layout::q6_k> {
    static constexpr int parts = 2;

    __device__ static int scale(std::uint32_t two, int unit, int part) {
        return static_cast<signed char>(two >> (16 * unit + 8 * part));
    }
    __device__ static std::uint32_t minima(const unsigned char* scales, int unit) {
        const std::uint32_t pair = *reinterpret_cast<const unsigned short*>(scales + 2 * unit);
        return as_bits(__hadd2(as_half2(byte_pair(pair ^ 0x8080u, 0)), both(-1152.0f)));
    }
    __device__ static float2 factors(const unsigned char* behind_scales, int block) {
        const float d = __half2float(*reinterpret_cast<const __half*>(behind_scales + 2 * block));
        return {d, 32.0f * d};
    }
    __device__ static void add_bits(const unsigned char* row, int units, int unit, int quad, std::uint32_t& low,
                                    std::uint32_t& high) {
        const unsigned char* const at = row + 16 * units + 8 * unit + quad / 2 * 4;
        const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(at) >> quad % 2 * 4;
        low |= bits << 4 & 0x30303030u;
        high |= bits << 2 & 0x30303030u;
    }
};

/// The 32 rows of weights of an item in shared memory: in four pieces of 8 neighbouring rows, each at a multiple of
/// slot_alignment, which lie so that two rows of each, eight in all, meet no bank conflict where rows have an odd
/// number of 16 bytes, and otherwise one. These are rows 8 r to 8 r + 7 of fragment f, if the two begin with the
/// piece's row 4 f + 2 r.
struct item_rows {
    static constexpr int count = 32, piece = 8, pieces = count / piece;

    int row_bytes;

    __host__ __device__ int at_piece(int p) const { return p * (piece * row_bytes + cuda_kernels::slot_alignment); }
    __host__ __device__ int bytes() const { return at_piece(pieces - 1) + piece * row_bytes; }
    __device__ int at_pair(int eighth) const { return at_piece(eighth / 2) + eighth % 2 * row_bytes; }
    /// Which row of the item has the results that the lanes [4 eighth, 4 eighth + 4) have of rows 8 r to 8 r + 7 of f.
    __device__ static int result(int eighth, int f, int r) { return eighth / 2 * piece + 4 * f + 2 * r + eighth % 2; }
};

/// acc[f][r] += 256 columns of a row of weights times row lane % 4 of x, for a warp. `nibbles` and `mine`: the lane's
/// addresses for ldmatrix, and of the first of its rows.
template <layout L>
__device__ void multiply_block(float (&acc)[2][2], const unsigned char* nibbles, const unsigned char* mine,
                               int row_bytes, int units, int block, const byte_rows& x, int lane) {
    using format = row_format<L>;
    const int quad = lane % 4;
    const unsigned char* const scales = mine + weight_unit<L>::factors_at(units) + 16 * block;
    const auto row = [&](int f, int r) { return (4 * f + 2 * r) * row_bytes; };
    int sums[2][4] = {};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        std::uint32_t b[4];
        x.load(b, 8 * block + 2 * pair, lane);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
            std::uint32_t words[4], two[2];  // of both rows: nibbles of the first unit and the next, their scales
            load_matrices(words, shared_address(nibbles + row(f, 0) + 128 * block + 32 * pair));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                two[r] = *reinterpret_cast<const std::uint32_t*>(scales + row(f, r) + 4 * pair);
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                std::uint32_t a[4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    a[r] = words[2 * u + r] & 0x0F0F0F0Fu;
                    a[2 + r] = words[2 * u + r] >> 4 & 0x0F0F0F0Fu;
                    format::add_bits(mine + row(f, r), units, 8 * block + 2 * pair + u, quad, a[r], a[2 + r]);
                }
#pragma unroll
                for (int part = 0; part < format::parts; ++part) {
                    int products[4];
                    if constexpr (format::parts == 1) {
                        multiply_bytes(products, a, b[2 * u], b[2 * u + 1]);
                    } else {
                        multiply_bytes(products, a[2 * part], a[2 * part + 1], b[2 * u + part]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[f][e] += format::scale(two[e / 2], u, part) * products[e];
                }
            }
        }
    }
    const uint2 sums_of_x = x.sums(8 * block, lane);
    const float scale = x.scale(block, lane);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
        const unsigned char* const of[2] = {scales + row(f, 0), scales + row(f, 1)};
        const std::uint32_t minima[4] = {format::minima(of[0], quad), format::minima(of[1], quad),
                                         format::minima(of[0], quad + 4), format::minima(of[1], quad + 4)};
        float taken[4] = {};
        multiply(taken, minima, sums_of_x.x, sums_of_x.y);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 factors = format::factors(of[r] - 16 * block + 2 * units, block);
            const float product =
                byte_rows::join(static_cast<float>(sums[f][2 * r]), static_cast<float>(sums[f][2 * r + 1]));
            acc[f][r] += scale * (factors.x * product - factors.y * byte_rows::join(taken[2 * r], taken[2 * r + 1]));
        }
    }
}

}  // namespace keel::cuda_launch::detail
