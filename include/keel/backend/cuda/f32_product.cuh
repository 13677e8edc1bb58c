// SPDX-License-Identifier: MIT
//
// Products of many rows of activations with f32 weights, in f32: the router's, whose choice must not hang on rounding.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>

namespace keel::cuda_kernels {

/// A block computes a square of the result, each of its threads 4 x 4 elements, over 16 columns at a time.
struct f32_tile {
    static constexpr int side = 64, depth = 16, threads = 256;
    float x[depth][side + 4], w[depth][side + 4];  // shifted, so that four stores meet no bank conflict
};

/// Grid: (squares along the rows of W, along those of x).
__global__ void __launch_bounds__(f32_tile::threads)
    f32_product_kernel(const float* x, long long x_row, int rows, int columns, launch::input_norm norm,
                       launch::product to) {
    __shared__ f32_tile tile;
    wait_for_previous();
    const int first_w = static_cast<int>(blockIdx.x) * f32_tile::side;
    const int first_x = static_cast<int>(blockIdx.y) * f32_tile::side;
    const int thread = static_cast<int>(threadIdx.x);
    const int load_row = thread / 4, load_column = thread % 4 * 4;  // four columns of a row of each operand
    const float* const of_x = x + min(first_x + load_row, rows - 1) * x_row;
    const float* const of_w = reinterpret_cast<const float*>(
        to.weight.data + min(first_w + load_row, to.weight.rows - 1) * static_cast<long long>(to.weight.row_bytes));
    float squares = 0;  // of this thread's part of a row
    const auto load_x = [&](int column) {
        float4 v = load_four(of_x, column, columns);
        if (norm.weight == nullptr) return v;
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        const float4 w = load_four(norm.weight, column, columns);
        return float4{v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w};
    };
    float4 next_x = load_x(load_column), next_w = load_four(of_w, load_column, columns);
    const int row_x = thread / 16 * 4, row_w = thread % 16 * 4;
    float sum[4][4] = {};
    for (int first = 0; first < columns; first += f32_tile::depth) {
        const float xs[4] = {next_x.x, next_x.y, next_x.z, next_x.w}, ws[4] = {next_w.x, next_w.y, next_w.z, next_w.w};
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            tile.x[load_column + i][load_row] = xs[i];
            tile.w[load_column + i][load_row] = ws[i];
        }
        __syncthreads();
        next_x = load_x(first + f32_tile::depth + load_column);
        next_w = load_four(of_w, first + f32_tile::depth + load_column, columns);
#pragma unroll
        for (int k = 0; k < f32_tile::depth; ++k) {
            const float4 a = *reinterpret_cast<const float4*>(&tile.x[k][row_x]);
            const float4 b = *reinterpret_cast<const float4*>(&tile.w[k][row_w]);
            const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] += as[i] * bs[j];
            }
        }
    }
    __shared__ float factor[f32_tile::side];
    squares = lanes_sum<4>(squares);
    if (thread % 4 == 0) {
        factor[load_row] =
            norm.weight == nullptr ? 1.0f : 1.0f / sqrtf(squares / static_cast<float>(columns) + norm.epsilon);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (first_x + row_x + i >= rows || first_w + row_w + j >= to.weight.rows) continue;
            float& y = to.out[(first_x + row_x + i) * to.out_row + first_w + row_w + j];
            const float value = sum[i][j] * factor[row_x + i];
            y = to.accumulate ? y + value : value;
        }
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch::detail {

inline cudaError_t f32_product(const products_args& args, const product& to, cudaStream_t stream) {
    using cuda_kernels::ceil_div, cuda_kernels::f32_tile;
    const dim3 grid(static_cast<unsigned>(ceil_div(to.weight.rows, f32_tile::side)),
                    static_cast<unsigned>(ceil_div(args.rows, f32_tile::side)));
    return cuda_kernels::start(cuda_kernels::f32_product_kernel, grid, f32_tile::threads, 0, stream, args.x, args.x_row,
                               args.rows, args.columns, args.norm, to);
}

}  // namespace keel::cuda_launch::detail
