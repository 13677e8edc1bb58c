// SPDX-License-Identifier: MIT
//
// Products of rows of activations, by the kernels that fit their number and the type of the weights.
#pragma once

#include <cuda_runtime.h>

#include <keel/backend/cuda/f32_product.cuh>
#include <keel/backend/cuda/few_rows.cuh>
#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>

namespace keel::cuda_launch {

inline std::size_t products_bytes(int rows, int columns) { return detail::prepared::bytes(rows, columns, 2); }

inline cudaError_t products(const products_args& args, cudaStream_t stream) {
    using namespace detail;
    if (args.count > matvec_args::most) return cudaErrorInvalidValue;
    if (args.rows == 0) return cudaSuccess;
    const activations<const float> input{args.x, args.x_row, args.x_head};
    const int rows = args.rows * args.heads;
    product_target list[matvec_args::most];
    int count = 0, planes = 1;
    bool fits = true;  // a block's memory, with few rows
    for (int i = 0; i < args.count; ++i) {
        const product& p = args.list[i];
        if (p.weight.type != layout::f32) {
            planes = std::max(planes, planes_for(p.weight.type));
            fits = fits && fits_few<1>(p.weight);
            list[count++] = {p.weight, p.out, args.heads > 1 ? p.out_head : p.out_row, p.accumulate, 0, 0};
            continue;
        }
        if (args.heads > 1) return cudaErrorNotSupported;
        const cudaError_t error = f32_product(args, p, stream);
        if (error != cudaSuccess) return error;
    }
    if (count == 0) return cudaSuccess;
    if (args.heads == 1 && (args.rows > few_tile_rows || !fits)) {
        const prepared x(args.workspace, rows, args.columns, planes);
        const cudaError_t error = prepare_rows(input, 1, rows, args.columns, args.norm, x, stream);
        if (error != cudaSuccess) return error;
        return start_all_products({x, {nullptr, nullptr, rows, 0}, nullptr, 1.0f, 0, 0, {}}, list, count, 0, stream);
    }
    const prepared x(args.workspace, rows, args.columns, planes);
    const cudaError_t error = prepare_rows(input, args.heads, rows, args.columns, args.norm, x, stream);
    if (error != cudaSuccess) return error;
    const tiling all{nullptr, nullptr, args.rows, few_tile_rows, args.heads};
    return start_few_products({{x, all, nullptr, 1}, nullptr, 0, {}}, list, count, all.tiles(), stream);
}

}  // namespace keel::cuda_launch
