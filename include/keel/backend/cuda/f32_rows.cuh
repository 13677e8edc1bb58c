// SPDX-License-Identifier: MIT
//
// Products of few rows of activations with a small f32 matrix: the router's. A block takes two rows of W and holds them
// in registers before the previous kernel is done; what is left is a load of x and a sum over the block.
#pragma once

#include <keel/backend/cuda/device.cuh>

namespace keel::cuda_kernels {

struct f32_rows {
    static constexpr int of_weights = 2, pieces = 2;  // rows of W of a block, 4 columns each of a thread
    static constexpr int of_x = 8;                    // rows of activations of a block, where there are several
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

/// Sums over the lanes of N values, a power of two: the one with number lane / (32 / N). In the order of lanes_sum().
template <int N, int Distance = warp_size / 2>
__device__ inline float lanes_sum_each(float* v) {
    if constexpr (N == 1) {
        return lanes_sum<2 * Distance>(v[0]);
    } else {
        const bool upper = (threadIdx.x & Distance) != 0;  // a lane goes on with this half of the values
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float given = upper ? v[i] : v[i + N / 2], mine = upper ? v[i + N / 2] : v[i];
            v[i] = mine + __shfl_xor_sync(0xFFFFFFFFu, given, Distance);
        }
        return lanes_sum_each<N / 2, Distance / 2>(v);
    }
}

/// Grid: (rows of W / 2, rows of x / Rows).
template <int Rows>
__global__ void __launch_bounds__(f32_rows::most_threads)
    f32_rows_kernel(const __grid_constant__ launch::matvec_args a) {
    constexpr int rows = f32_rows::of_weights, pieces = f32_rows::pieces;
    constexpr int values = 4 * Rows;  // of a row of x: products with those of W, its squares, nothing
    static_assert(rows == 2);
    __shared__ float sums[f32_rows::most_threads / warp_size][values];
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
    if (!a.beside) wait_for_previous();
    const int first_x = blockIdx.y * Rows;
    float sum[values] = {};
#pragma unroll
    for (int n = 0; n < Rows; ++n) {
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            const float4 x = load(a.x + min(first_x + n, a.rows - 1) * a.x_row, i);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                sum[4 * n + r] += w[r][i].x * x.x + w[r][i].y * x.y + w[r][i].z * x.z + w[r][i].w * x.w;
            }
            sum[4 * n + rows] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        }
    }
    float* const of_warp = sums[threadIdx.x / warp_size];
    const int lane = threadIdx.x % warp_size;
    if constexpr (Rows == 1) {  // three chains of shuffles beside each other take less time than one of selects
#pragma unroll
        for (int r = 0; r <= rows; ++r) {
            const float total = lanes_sum(sum[r]);
            if (lane == 0) of_warp[r] = total;
        }
    } else {
        constexpr int lanes = warp_size / values;
        const float total = lanes_sum_each<values>(sum);
        if (lane % lanes == 0) of_warp[lane / lanes] = total;
    }
    if (a.beside) wait_for_previous();
    __syncthreads();
    const int n = threadIdx.x / rows, r = threadIdx.x % rows;
    if (n >= Rows || first_x + n >= a.rows) return;
    float product = 0, squares = 0;
    for (int i = 0; i < warps; ++i) product += sums[i][4 * n + r], squares += sums[i][4 * n + rows];
    if (normed) product /= sqrtf(squares / static_cast<float>(a.columns) + a.epsilon);
    float& out = to.out[(first_x + n) * to.out_row + first + r];
    out = to.accumulate ? out + product : product;
}

inline cudaError_t start_f32_rows(const launch::matvec_args& a, cudaStream_t stream) {
    const auto with = [&]<int Rows>() {
        return start(f32_rows_kernel<Rows>,
                     launch::grid_of(a.list[0].weight.rows / f32_rows::of_weights, ceil_div(a.rows, Rows)),
                     f32_rows::threads(a.columns), 0, stream, a);
    };
    return a.rows == 1 ? with.template operator()<1>() : with.template operator()<f32_rows::of_x>();
}

}  // namespace keel::cuda_kernels
