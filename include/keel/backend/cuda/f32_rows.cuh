// SPDX-License-Identifier: MIT
//
// Products of few rows of activations with a small f32 matrix: the router's. A block takes two rows of W and holds them
// in registers before the previous kernel is done; what is left is a load of x and a sum over the block.
#pragma once

#include <keel/backend/cuda/device.cuh>

namespace keel::cuda_kernels {

struct f32_rows {
    static constexpr int of_weights = 2, pieces = 2;  // rows of W of a block, 4 columns each of a thread
    static constexpr int of_x = 8;                    // rows of activations of a block, one after the other
    static constexpr int most_threads = 1024;

    static int threads(int columns) { return ceil_div(columns, 4 * pieces * warp_size) * warp_size; }

    /// Whether the kernel serves these products; rows of activations do not matter, so bits do not hang on them.
    static bool serves(const launch::matvec_args& a) {
        const launch::matrix& m = a.list[0].weight;
        return a.products == 1 && a.heads == 1 && m.type == launch::layout::f32 && m.rows % of_weights == 0 &&
               m.rows <= 1024 && a.put_codes == nullptr && a.columns % 4 == 0 && threads(a.columns) <= most_threads &&
               aligned16(a.x, a.norm) && a.x_row % 4 == 0 &&
               (a.before == launch::prologue::none || a.before == launch::prologue::rms_norm);
    }
};

/// Grid: (rows of W / 2, rows of x / 8).
__global__ void __launch_bounds__(f32_rows::most_threads)
    f32_rows_kernel(const __grid_constant__ launch::matvec_args a) {
    constexpr int rows = f32_rows::of_weights, pieces = f32_rows::pieces;
    __shared__ float sums[f32_rows::most_threads / warp_size][rows + 1];  // of the warps; squares of x last
    const int first = blockIdx.x * rows, fours = a.columns / 4, warps = blockDim.x / warp_size;
    const launch::product& to = a.list[0];
    const bool normed = a.before == launch::prologue::rms_norm;
    start_next();
    const auto load = [&](const float* from, int i, bool once = false) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at >= fours) return float4{};
        const float4* of = reinterpret_cast<const float4*>(from) + at;
        return once ? __ldcs(of) : *of;
    };
    float4 w[rows][pieces];
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
        const float4 norm = normed ? load(a.norm, i) : float4{1, 1, 1, 1};
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const auto* row = to.weight.data + static_cast<long long>(first + r) * to.weight.row_bytes;
            const float4 v = load(reinterpret_cast<const float*>(row), i, true);
            w[r][i] = {v.x * norm.x, v.y * norm.y, v.z * norm.z, v.w * norm.w};
        }
    }
    wait_for_previous();
    for (int n = blockIdx.y * f32_rows::of_x; n < min(a.rows, static_cast<int>(blockIdx.y + 1) * f32_rows::of_x); ++n) {
        float sum[rows + 1] = {};
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            const float4 x = load(a.x + n * a.x_row, i);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                sum[r] += w[r][i].x * x.x + w[r][i].y * x.y + w[r][i].z * x.z + w[r][i].w * x.w;
            }
            sum[rows] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        }
#pragma unroll
        for (int r = 0; r <= rows; ++r) {
            const float total = lanes_sum(sum[r]);
            if (threadIdx.x % warp_size == 0) sums[threadIdx.x / warp_size][r] = total;
        }
        __syncthreads();
        if (threadIdx.x < rows) {
            float total = 0, squares = 0;
            for (int i = 0; i < warps; ++i) total += sums[i][threadIdx.x], squares += sums[i][rows];
            if (normed) total /= sqrtf(squares / static_cast<float>(a.columns) + a.epsilon);
            float& out = to.out[n * to.out_row + first + threadIdx.x];
            out = to.accumulate ? out + total : total;
        }
        __syncthreads();
    }
}

inline cudaError_t start_f32_rows(const launch::matvec_args& a, cudaStream_t stream) {
    const dim3 grid = launch::grid_of(a.list[0].weight.rows / f32_rows::of_weights, ceil_div(a.rows, f32_rows::of_x));
    return start(f32_rows_kernel, grid, f32_rows::threads(a.columns), 0, stream, a);
}

}  // namespace keel::cuda_kernels
