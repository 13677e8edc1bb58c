// SPDX-License-Identifier: MIT
//
// Rows of activations as products on tensor cores read them: converted once, to halves with a power of two per row, and
// laid out as
//   values [planes][groups of 128 columns][tiles of 8 rows][2 halves of the columns][8 rows][64 halves]
// so that a block fetches 64 or 128 rows of a group with one copy of consecutive bytes. Within a group, the order of
// columns is the one in which threads hold weights: thread c of four holds elements [32 c, 32 c + 32) of its row, a
// unit of launch.hpp, and step s of 16 columns takes elements 2s, 2s+1, 16+2s, 17+2s of each of these four units. The
// 16-byte pieces of a row are swizzled as wgmma.cuh says.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

inline constexpr int group_columns = 128;
inline constexpr int tile_rows = 128;                      // of activations that a block works on
inline constexpr int eight_bytes = 8 * group_columns * 2;  // of 8 rows of a group

__host__ __device__ constexpr int groups_of(int columns) { return (columns + group_columns - 1) / group_columns; }

/// Weights of 16 bits deserve activations of more than the 11 bits of a half: their products take two planes of halves,
/// of which the second holds what the first one leaves.
__host__ __device__ constexpr int planes_for(layout type) {
    return type == layout::f16 || type == layout::bf16 ? 2 : 1;
}

/// Rows in the order and the type of products. There is room for tile_rows more, which a last tile may read.
struct prepared {
    unsigned char* values;
    float* scale;  // a row times this is what was converted
    int groups;
    int eights;  // tiles of 8 rows of a group, room included
    int planes;

    __host__ __device__ prepared(void* memory, int rows, int columns, int plane_count)
        : scale(static_cast<float*>(memory)),
          groups(groups_of(columns)),
          eights((rows + tile_rows + 7) / 8),
          planes(plane_count) {
        values = reinterpret_cast<unsigned char*>(scale) + (static_cast<std::size_t>(eights) * 32 + 1023) / 1024 * 1024;
    }
    __host__ __device__ static std::size_t bytes(int rows, int columns, int planes) {
        const auto eights = static_cast<std::size_t>((rows + tile_rows + 7) / 8);
        return (eights * 32 + 1023) / 1024 * 1024 +
               eights * static_cast<std::size_t>(planes * groups_of(columns)) * eight_bytes;
    }
    __device__ unsigned char* tile(int plane, int group, int row) const {
        return values + (static_cast<std::size_t>(plane * groups + group) * eights + row / 8) * eight_bytes;
    }
    /// Piece p (of 16) of a row's group: 8 halves, of which the pair i begins with element(p, i).
    __device__ uint4* piece(int plane, int group, int row, int p) const {
        return piece_of(tile(plane, group, row), row, p);
    }
    __device__ static uint4* piece_of(unsigned char* tile, int row, int p) {
        return reinterpret_cast<uint4*>(tile + p / 8 * 1024 + row % 8 * 128) + (p % 8 ^ row % 8);
    }
    __device__ static int element(int p, int i) { return 32 * i + 16 * (p % 2) + p / 2 * 2; }
    /// One half of a tile: column i of the group.
    __device__ static __half* half_of(unsigned char* tile, int row, int i) {
        return reinterpret_cast<__half*>(piece_of(tile, row, i % 16 / 2 * 2 + i % 32 / 16)) + i / 32 * 2 + i % 2;
    }
};

/// `Lanes` threads, `lane` among them, convert a row: `at(column)` gives two neighbouring elements, of which those
/// behind the end are 0. all(x) is the largest of the threads' x.
template <int Lanes, class At, class All>
__device__ void prepare_row(const prepared& out, int row, int columns, int lane, At&& at, All&& all) {
    float largest = 0;
    for (int i = 2 * lane; i < columns; i += 2 * Lanes) {
        const float2 x = at(i);
        largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
    }
    largest = all(largest);
    // The largest element lands between 1024 and 2048: far from overflow, and small ones keep their bits.
    const int exponent = largest > 0x1p-100f && largest < 0x1p100f ? ilogbf(largest) - 10 : 0;
    const float factor = ldexpf(1.0f, -exponent);
    if (lane == 0) out.scale[row] = ldexpf(1.0f, exponent);
    for (int i = lane; i < 16 * out.groups; i += Lanes) {
        const int group = i / 16, p = i % 16;
        float2 x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[j] = at(group * group_columns + prepared::element(p, j));
            x[j] = {x[j].x * factor, x[j].y * factor};
        }
        for (int plane = 0; plane < out.planes; ++plane) {
            std::uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                pairs[j] = pack(x[j].x, x[j].y);
                const float2 taken = unpack(pairs[j]);
                x[j] = {x[j].x - taken.x, x[j].y - taken.y};
            }
            *out.piece(plane, group, row, p) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

inline constexpr int prepare_threads = 256;

/// `Lanes` threads per row, all of a block or, without a norm, a warp. `heads` of x side by side are as many rows.
template <int Lanes>
__global__ void __launch_bounds__(prepare_threads)
    prepare_kernel(activations<const float> x, int heads, int rows, int columns, input_norm norm, prepared out) {
    cuda_kernels::wait_for_previous();
    const int thread = static_cast<int>(threadIdx.x);
    const int row = static_cast<int>(blockIdx.x) * (prepare_threads / Lanes) + thread / Lanes;
    if (row >= rows) return;
    const float* const from = x.data + row / heads * x.row + row % heads * x.head;
    const auto load = [&](const float* p, int i) {
        return i + 1 < columns ? *reinterpret_cast<const float2*>(p + i) : float2{i < columns ? p[i] : 0.0f, 0.0f};
    };
    float scale = 1;
    if (Lanes == prepare_threads && norm.weight != nullptr) {
        scale = cuda_kernels::inverse_rms_of(from, columns, norm.epsilon);
    }
    const auto at = [&](int i) {
        float2 v = load(from, i);
        if (norm.weight == nullptr) return v;
        const float2 w = load(norm.weight, i);
        return float2{v.x * scale * w.x, v.y * scale * w.y};
    };
    prepare_row<Lanes>(out, row, columns, thread % Lanes, at, [](float of_thread) {
        return Lanes == prepare_threads ? cuda_kernels::block_max(of_thread) : cuda_kernels::lanes_max(of_thread);
    });
}

inline cudaError_t prepare_rows(const activations<const float>& x, int heads, int rows, int columns,
                                const input_norm& norm, const prepared& out, cudaStream_t stream) {
    const auto with = [&]<int Lanes>() {
        const int blocks = cuda_kernels::ceil_div(rows, prepare_threads / Lanes);
        return cuda_kernels::start(prepare_kernel<Lanes>, grid_of(blocks), prepare_threads, 0, stream, x, heads, rows,
                                   columns, norm, out);
    };
    const bool by_warps = columns <= 2 * prepare_threads && norm.weight == nullptr;
    return by_warps ? with.template operator()<cuda_kernels::warp_size>() : with.template operator()<prepare_threads>();
}

}  // namespace keel::cuda_launch::detail
