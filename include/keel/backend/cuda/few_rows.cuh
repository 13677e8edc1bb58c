// SPDX-License-Identifier: MIT
//
// The kernels of few_multiply.cuh: products with a list of matrices, and the first half of gated networks.
#pragma once

#include <algorithm>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/few_multiply.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>

namespace keel::cuda_launch::detail {

struct few_arguments {
    few_input in;
    const int* out_rows;  // null, or the row of `out` for each position
    int products;
    product_target list[matvec_args::most];  // first_block counts 16 rows of W
};

/// The product that 16 rows of W belong to.
__device__ inline const product_target& target_of(const few_arguments& args, int row_group) {
    int which = 0;
    while (which + 1 < args.products && row_group >= args.list[which + 1].first_block) ++which;
    return args.list[which];
}

template <int Tiles, layout L>
__device__ void few_product_tile(const few_arguments& args, const row_tile& tile, const few_place& place) {
    const product_target& of_warp = target_of(args, place.row_group(place.warp));
    const auto first_row = [&](const product_target& target, int warp) {  // of W
        return (place.row_group(warp) - target.first_block) * 16;
    };
    const few_weights w[1] = {{of_warp.weight, tile.matrix, first_row(of_warp, place.warp)}};
    float acc[1][Tiles][4] = {};
    multiply_few<Tiles, 1, L>(acc, w, of_warp.weight.columns, args.in, tile, place);
    for_each_sum(acc, args.in.parts, place, [&](int warp, int t, const float(&sums)[1][4]) {
        const product_target& target = target_of(args, place.row_group(warp));
        const int mine = first_row(target, warp) + place.lane / 4;
        for_each_result(args.in, tile, t, place.lane, [&](int e, int position, float scale) {
            float* const to = static_cast<float*>(target.out) +
                              (args.out_rows == nullptr ? position : args.out_rows[position]) * target.row + mine;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (mine + 8 * r >= target.weight.rows) continue;
                const float y = sums[0][2 * r + e] * scale;
                if (target.accumulate) {
                    atomicAdd(to + 8 * r, y);  // nobody else adds to it: this only spares waiting for what is there
                } else {
                    to[8 * r] = y;
                }
            }
        });
    });
}

/// Grid: (blocks of few_warps times 16 rows of W over all products, each `parts` times; tiles of up to 8 Most rows).
template <layout L, int Most>
__global__ void __launch_bounds__(few_threads, 2) few_product_kernel(const __grid_constant__ few_arguments args) {
    if (args.in.tiles.list != nullptr) cuda_kernels::wait_for_previous();
    row_tile tile;
    if (!args.in.tiles.get(static_cast<int>(blockIdx.y), tile)) return;
    const few_place place;
    visit_few<Most>(tile.rows, [&]<int Tiles>() { few_product_tile<Tiles, L>(args, tile, place); });
    if (args.in.beside) cuda_kernels::wait_for_previous<false>();
}

struct few_gated_arguments {
    few_input in;
    matrix gate, up;
    prepared hidden;
};

template <int Tiles, layout L>
__device__ void few_gated_tile(const few_gated_arguments& args, const row_tile& tile, const few_place& place) {
    const int rows = args.gate.rows, first = place.row_group(place.warp) * 16;
    const few_weights w[2] = {{args.gate, tile.matrix, first}, {args.up, tile.matrix, first}};
    float acc[2][Tiles][4] = {};
    multiply_few<Tiles, 2, L>(acc, w, args.gate.columns, args.in, tile, place);
    for_each_sum(acc, args.in.parts, place, [&](int warp, int t, const float(&sums)[2][4]) {
        const int mine = place.row_group(warp) * 16 + place.lane / 4;
        for_each_result(args.in, tile, t, place.lane, [&](int e, int position, float scale) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int i = mine + 8 * r;
                for (int plane = 0; plane < args.hidden.planes; ++plane) {
                    *prepared::half_of(args.hidden.tile(plane, i / group_columns, position), position,
                                       i % group_columns) =
                        i < rows ? gated_half(sums[0][2 * r + e] * scale, sums[1][2 * r + e] * scale, plane)
                                 : __half(0.0f);
                }
            }
            if (mine == 0) args.hidden.scale[position] = 1.0f / hidden_factor;
        });
    });
}

/// Grid: (blocks of few_warps times 16 rows of W, each `parts` times; tiles of up to 8 Most rows). The rows of W are
/// those of whole groups, so that all of the hidden activations are written.
template <layout L, int Most>
__global__ void __launch_bounds__(few_threads, Most > 4 ? 1 : 2)
    few_gated_kernel(const __grid_constant__ few_gated_arguments args) {
    if (args.in.tiles.list != nullptr) cuda_kernels::wait_for_previous();
    row_tile tile;
    if (!args.in.tiles.get(static_cast<int>(blockIdx.y), tile)) return;
    const few_place place;
    visit_few<Most>(tile.rows, [&]<int Tiles>() { few_gated_tile<Tiles, L>(args, tile, place); });
}

/// Starts a kernel for `row_groups` times 16 rows of matrices like the one given and `tiles` tiles of up to 8 Most
/// rows. So many blocks share rows of W that they fill a GPU, where blocks can; where there is one group of columns,
/// rows of x are taken in smaller tiles for that.
template <layout L, int Matrices, int Most, class Arguments>
cudaError_t start_few(void (*kernel)(Arguments), int row_groups, const matrix& like, int tiles, Arguments args,
                      cudaStream_t stream) {
    if (row_groups == 0 || tiles == 0) return cudaSuccess;
    cudaFuncAttributes compiled;
    if (const cudaError_t e = cudaFuncGetAttributes(&compiled, kernel); e != cudaSuccess) return e;
    const int blocks = (row_groups + few_warps - 1) / few_warps, wanted = cuda_kernels::multiprocessors();
    const int groups = groups_of(like.columns), most = compiled.ptxVersion >= 90 ? std::min(most_parts, groups) : 1;
    few_input& in = args.in;
    while (2 * in.parts <= most && blocks * tiles * in.parts < wanted) in.parts *= 2;
    for (; groups == 1 && in.tiles.at_once > 8 && blocks * tiles < wanted; tiles = in.tiles.tiles()) {
        in.tiles.at_once /= 2;
    }
    const dim3 grid(static_cast<unsigned>(blocks * in.parts), static_cast<unsigned>(tiles));
    return cuda_kernels::start_clusters(kernel, grid, in.parts > 1 ? in.parts : 0, few_threads,
                                        few_bytes<L, Matrices, Most>(like), stream, args);
}

/// All products of a list that share a layout in one launch, beside those with another; `tiles` is the most that
/// args.in.tiles may have.
inline cudaError_t start_few_products(few_arguments args, const product_target* list, int count, int tiles,
                                      cudaStream_t stream) {
    for (int type = 0; type <= static_cast<int>(layout::wide); ++type) {
        args.products = 0;
        int row_groups = 0;
        for (int i = 0; i < count; ++i) {
            if (list[i].weight.type != static_cast<layout>(type)) continue;
            args.list[args.products] = list[i];
            args.list[args.products++].first_block = row_groups;
            row_groups += (list[i].weight.rows + 15) / 16;
        }
        if (args.products == 0) continue;
        const cudaError_t error = visit_layout(static_cast<layout>(type), [&]<layout L>() {
            const auto with = [&]<int Most>() {
                return start_few<L, 1, Most>(few_product_kernel<L, Most>, row_groups, args.list[0].weight, tiles, args,
                                             stream);
            };
            return args.in.tiles.list == nullptr ? with.template operator()<few_tile_rows / 8>()
                                                 : with.template operator()<few_list_rows / 8>();
        });
        if (error != cudaSuccess) return error;
        args.in.beside = args.in.tiles.list == nullptr;
    }
    return cudaSuccess;
}

inline cudaError_t start_few_gated(const few_gated_arguments& args, int tiles, cudaStream_t stream) {
    const int row_groups = groups_of(args.gate.rows) * (group_columns / 16);
    return visit_layout(args.gate.type, [&]<layout L>() {
        const auto with = [&]<int Most>() {
            return start_few<L, 2, Most>(few_gated_kernel<L, Most>, row_groups, args.gate, tiles, args, stream);
        };
        return args.in.tiles.list == nullptr ? with.template operator()<few_tile_rows / 8>()
                                             : with.template operator()<few_list_rows / 8>();
    });
}

}  // namespace keel::cuda_launch::detail
