// SPDX-License-Identifier: MIT
//
// Products of a few rows of activations, 2 to 64, with quantised weights: what gemm.cuh does for many, made for reading
// weights as fast as memory gives them. A warp takes 16 rows of W and up to 32 rows of activations; its lanes have the
// units of the next groups on their way to slots of their own in shared memory, so that nothing waits at a barrier.
// Where a matrix has few rows, several warps share 16 of them and split the columns.
//
// Activations are halves as in gemm.cuh, with the columns of a group in the order of the right operand's fragments:
//   values [groups of 128 columns][tiles of 8 rows][4 pairs of steps][8 rows][4 threads][8 halves]
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/halves.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

struct fragment_rows : prepared {
    using prepared::prepared;

    /// Piece p = 4 thread + pair of steps.
    __device__ uint4* piece(int plane, int group, int row, int p) const {
        return reinterpret_cast<uint4*>(tile(plane, group, row)) + p % 4 * 32 + row % 8 * 4 + p / 4;
    }
    __device__ static int element(int p, int i) { return p / 4 * 32 + p % 4 * 4 + i / 2 * 2 + i % 2 * 16; }

    /// One half: column i of a group.
    __device__ __half* half(int plane, int group, int row, int i) const {
        const int step = i % 16 / 2;
        return reinterpret_cast<__half*>(piece(plane, group, row, i / 32 * 4 + step / 2)) + step % 2 * 4 +
               i % 32 / 16 * 2 + i % 2;
    }
};

inline constexpr int few_warps = 8;

/// Up to so many rows products are computed here.
inline constexpr int few_most = 64;

/// Rows of x that a warp works on at once: of all rows, and of those of a list.
inline constexpr int few_tile_rows = 32, few_list_rows = 16;

/// Where the units of a warp lie on their way, some groups ahead: two blocks fit on a multiprocessor.
template <layout L, int Matrices>
struct few_slots {
    static constexpr int slot = weight_unit<L>::pieces * 512 + weight_unit<L>::words * 128;
    static constexpr int stage = 2 * Matrices * slot;
    static constexpr int stages = std::clamp(112 * 1024 / (few_warps * stage), 1, 4);
    static constexpr int warp_bytes = stages * stage;

    unsigned char* memory;
    int lane;

    __device__ weight_slot of(int at, int m, int r) const { return {memory + at * stage + (2 * m + r) * slot, lane}; }
};

/// What the kernels below multiply with.
struct few_input {
    fragment_rows x;
    tiling tiles;
    const int* pairs;  ///< null, or pairs[position] / k is the row of x
    int k;
    int parts;  ///< warps that share 16 rows of W

    /// Row i of a tile, or its last one. All rows of several matrices lie side by side, as heads do.
    __device__ int position(const row_tile& tile, int i) const {
        const int at = tile.first + min(i, tile.rows - 1);
        return tiles.matrices == 1 ? at : at * tiles.matrices + tile.matrix;
    }
    /// Of x.
    __device__ int row(const row_tile& tile, int i) const {
        const int at = position(tile, i);
        return pairs == nullptr ? at : pairs[at] / k;
    }
};

/// What a warp works on.
struct few_place {
    int warp, lane, row_group, part;

    __device__ explicit few_place(int parts)
        : warp(static_cast<int>(threadIdx.x) / 32), lane(static_cast<int>(threadIdx.x) % 32) {
        row_group = static_cast<int>(blockIdx.x) * (few_warps / parts) + warp / parts;
        part = warp % parts;
    }
};

/// Adds what the warps of the same rows have, in their order, in the first of them. All threads of the block.
template <int Matrices, int Tiles>
__device__ void join_parts(float (&acc)[Matrices][Tiles][4], int parts, const few_place& place, float4* memory) {
    if (parts == 1) return;
    constexpr int each = Matrices * Tiles;
    __syncthreads();  // the sums go where the slots lie
    if (place.part > 0) {
#pragma unroll
        for (int i = 0; i < each; ++i) {
            const float(&v)[4] = acc[i / Tiles][i % Tiles];
            memory[(place.warp * each + i) * 32 + place.lane] = {v[0], v[1], v[2], v[3]};
        }
    }
    __syncthreads();
    if (place.part > 0) return;
    for (int p = 1; p < parts; ++p) {
#pragma unroll
        for (int i = 0; i < each; ++i) {
            const float4 v = memory[((place.warp + p) * each + i) * 32 + place.lane];
            float(&sum)[4] = acc[i / Tiles][i % Tiles];
            sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
    }
}

/// acc[m] += 16 rows of matrix m, of which `from[m][r]` are rows g and g + 8, times 8 * Tiles rows of x; then the first
/// of the warps that share these rows of W has the sum of all. All threads of the block.
template <int Tiles, int Matrices, layout L>
__device__ void multiply_few(float (&acc)[Matrices][Tiles][4], const unsigned char* const (&from)[Matrices][2],
                             int columns, const few_input& in, const row_tile& tile, const few_place& place) {
    extern __shared__ uint4 dynamic_memory[];
    using slots = few_slots<L, Matrices>;
    const slots slot{reinterpret_cast<unsigned char*>(dynamic_memory) + place.warp * slots::warp_bytes, place.lane};
    const int quad = place.lane % 4, units = (columns + 31) / 32, groups = groups_of(columns);
    const auto ask = [&](int group, int stage) {
        if (group < groups) {
#pragma unroll
            for (int i = 0; i < 2 * Matrices; ++i) {
                weight_unit<L>::ask(slot.of(stage, i / 2, i % 2), from[i / 2][i % 2], units,
                                    min(4 * group + quad, units - 1));
            }
        }
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i < slots::stages - 1; ++i) ask(place.part + i * in.parts, i);
    if (in.tiles.list == nullptr) cuda_kernels::wait_for_previous();  // weights need not wait
    int row[Tiles];
#pragma unroll
    for (int t = 0; t < Tiles; ++t) row[t] = in.row(tile, 8 * t + place.lane / 4);
    int stage = 0;
    for (int group = place.part; group < groups; group += in.parts) {
        ask(group + (slots::stages - 1) * in.parts, (stage + slots::stages - 1) % slots::stages);
        wait_copies<slots::stages - 1>();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            std::uint32_t a[Matrices][4][4];
#pragma unroll
            for (int i = 0; i < 2 * Matrices; ++i) {
                weight_unit<L> unit;
                unit.take(slot.of(stage, i / 2, i % 2), min(4 * group + quad, units - 1));
                const half_steps w = unit.steps(half);
#pragma unroll
                for (int s = 0; s < 4; ++s) a[i / 2][s][i % 2] = w.low[s], a[i / 2][s][2 + i % 2] = w.high[s];
            }
            for (int plane = 0; plane < (planes_for(L) == 2 ? in.x.planes : 1); ++plane) {
#pragma unroll
                for (int t = 0; t < Tiles; ++t) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint4 b = __ldg(in.x.piece(plane, group, row[t], 4 * quad + 2 * half + i));
#pragma unroll
                        for (int m = 0; m < Matrices; ++m) {
                            multiply(acc[m][t], a[m][2 * i], b.x, b.y);
                            multiply(acc[m][t], a[m][2 * i + 1], b.z, b.w);
                        }
                    }
                }
            }
        }
        stage = (stage + 1) % slots::stages;
    }
    wait_copies<0>();
    join_parts(acc, in.parts, place, reinterpret_cast<float4*>(dynamic_memory));
}

/// Calls f(t, e, position, scale) for the rows of a tile whose results this lane has, in acc[.][t][e] and acc[.][t][e +
/// 2], if this warp has the sums; results are to be multiplied with `scale`.
template <int Tiles, class F>
__device__ void for_each_result(const few_input& in, const row_tile& tile, const few_place& place, F&& f) {
    if (place.part > 0) return;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = 8 * t + place.lane % 4 * 2 + e;
            if (i < tile.rows) f(t, e, in.position(tile, i), in.x.scale[in.row(tile, i)]);
        }
    }
}

/// Calls f.template operator()<Tiles>() with the least number of tiles of 8 rows, at most Most, that holds `rows`.
template <int Most, class F>
__device__ void visit_few(int rows, F&& f) {
    if constexpr (Most >= 4) {
        if (rows > 16) return f.template operator()<4>();
    }
    if (rows > 8) return f.template operator()<2>();
    f.template operator()<1>();
}

struct few_arguments {
    few_input in;
    const int* out_rows;  // null, or the row of `out` for each position
    int products;
    product_target list[matvec_args::most];  // first_block counts 16 rows of W
};

template <int Tiles, layout L>
__device__ void few_product_tile(const few_arguments& args, const product_target& target, const row_tile& tile,
                                 const few_place& place) {
    const matrix& w = target.weight;
    const int mine = (place.row_group - target.first_block) * 16 + place.lane / 4;
    const unsigned char* from[1][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        from[0][r] = w.data + (static_cast<std::size_t>(tile.matrix) * w.rows + min(mine + 8 * r, w.rows - 1)) *
                                  static_cast<std::size_t>(w.row_bytes);
    }
    float acc[1][Tiles][4] = {};
    multiply_few<Tiles, 1, L>(acc, from, w.columns, args.in, tile, place);
    for_each_result<Tiles>(args.in, tile, place, [&](int t, int e, int position, float scale) {
        float* const to = static_cast<float*>(target.out) +
                          (args.out_rows == nullptr ? position : args.out_rows[position]) * target.row + mine;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (mine + 8 * r >= w.rows) continue;
            const float y = acc[0][t][2 * r + e] * scale;
            to[8 * r] = target.accumulate ? to[8 * r] + y : y;
        }
    });
}

/// Grid: (blocks of few_warps / parts times 16 rows of W over all products, tiles of up to 8 Most rows).
template <layout L, int Most>
__global__ void __launch_bounds__(few_warps * 32, 2) few_product_kernel(const __grid_constant__ few_arguments args) {
    if (args.in.tiles.list != nullptr) cuda_kernels::wait_for_previous();
    row_tile tile;
    if (!args.in.tiles.get(static_cast<int>(blockIdx.y), tile)) return;
    const few_place place(args.in.parts);
    int which = 0;
    while (which + 1 < args.products && place.row_group >= args.list[which + 1].first_block) ++which;
    const product_target& target = args.list[which];
    visit_few<Most>(tile.rows, [&]<int Tiles>() { few_product_tile<Tiles, L>(args, target, tile, place); });
}

struct few_gated_arguments {
    few_input in;
    matrix gate, up;
    fragment_rows hidden;
};

template <int Tiles, layout L>
__device__ void few_gated_tile(const few_gated_arguments& args, const row_tile& tile, const few_place& place) {
    const int mine = place.row_group * 16 + place.lane / 4, rows = args.gate.rows;
    const unsigned char* from[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const auto row = static_cast<std::size_t>(tile.matrix) * rows + min(mine + 8 * r, rows - 1);
        from[0][r] = args.gate.data + row * static_cast<std::size_t>(args.gate.row_bytes);
        from[1][r] = args.up.data + row * static_cast<std::size_t>(args.up.row_bytes);
    }
    float acc[2][Tiles][4] = {};
    multiply_few<Tiles, 2, L>(acc, from, args.gate.columns, args.in, tile, place);
    for_each_result<Tiles>(args.in, tile, place, [&](int t, int e, int position, float scale) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int w = mine + 8 * r;
            for (int plane = 0; plane < args.hidden.planes; ++plane) {
                *args.hidden.half(plane, w / group_columns, position, w % group_columns) =
                    w < rows ? gated_half(acc[0][t][2 * r + e] * scale, acc[1][t][2 * r + e] * scale, plane)
                             : __half(0.0f);
            }
        }
        if (mine == 0) args.hidden.scale[position] = 1.0f / hidden_factor;
    });
}

/// Grid: (blocks of few_warps / parts times 16 rows of W, tiles of up to 8 Most rows). The rows of W are those of whole
/// groups, so that all of the hidden activations are written.
template <layout L, int Most>
__global__ void __launch_bounds__(few_warps * 32, 2)
    few_gated_kernel(const __grid_constant__ few_gated_arguments args) {
    if (args.in.tiles.list != nullptr) cuda_kernels::wait_for_previous();
    row_tile tile;
    if (!args.in.tiles.get(static_cast<int>(blockIdx.y), tile)) return;
    const few_place place(args.in.parts);
    visit_few<Most>(tile.rows, [&]<int Tiles>() { few_gated_tile<Tiles, L>(args, tile, place); });
}

/// How many warps share 16 rows of W, so that `row_groups` of these times `tiles` fill a GPU; at most `groups`. Every
/// block reads its activations, so that there should be no more blocks than that where these are many.
inline int parts_for(int row_groups, int tiles, int groups) {
    const int blocks = tiles == 1 ? 264 : 132;
    int parts = 1;
    while (parts < few_warps && 2 * parts <= groups && row_groups * tiles * parts < blocks * few_warps) parts *= 2;
    return parts;
}

/// Whether products of all rows with a list of matrices are computed here. Many rows of W keep the blocks of gemm.cuh
/// busy, which load activations once for 256 of them.
inline bool is_few(int rows, const product_target* list, int count) {
    int rows_of_w = 0;
    for (int i = 0; i < count; ++i) rows_of_w += list[i].weight.rows;
    return rows <= few_tile_rows / 2 || (rows <= few_most && rows_of_w < 8192);
}

/// Starts a kernel of `row_groups` times 16 rows of W and `tiles` tiles.
template <layout L, int Matrices, class Arguments>
cudaError_t start_few(void (*kernel)(Arguments), int row_groups, int tiles, const Arguments& args,
                      cudaStream_t stream) {
    constexpr int bytes = few_warps * few_slots<L, Matrices>::warp_bytes;
    if (row_groups == 0 || tiles == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>((row_groups * args.in.parts + few_warps - 1) / few_warps),
                    static_cast<unsigned>(tiles));
    return cuda_kernels::start(kernel, grid, few_warps * 32, bytes, stream, args);
}

/// All products of a list that share a layout in one launch; `tiles` is the most that args.in.tiles may have.
inline cudaError_t start_few_products(few_arguments args, const product_target* list, int count, int tiles,
                                      cudaStream_t stream) {
    const bool all = args.in.tiles.list == nullptr;
    for (int type = 0; type <= static_cast<int>(layout::wide); ++type) {
        args.products = 0;
        int row_groups = 0, groups = 0;
        for (int i = 0; i < count; ++i) {
            if (list[i].weight.type != static_cast<layout>(type)) continue;
            args.list[args.products] = list[i];
            args.list[args.products++].first_block = row_groups;
            row_groups += (list[i].weight.rows + 15) / 16;
            groups = groups_of(list[i].weight.columns);
        }
        if (args.products == 0) continue;
        args.in.parts = parts_for(row_groups, tiles, groups);
        const cudaError_t error = visit_layout(static_cast<layout>(type), [&]<layout L>() {
            return start_few<L, 1>(
                all ? few_product_kernel<L, few_tile_rows / 8> : few_product_kernel<L, few_list_rows / 8>, row_groups,
                tiles, args, stream);
        });
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

inline cudaError_t start_few_gated(few_gated_arguments args, int tiles, cudaStream_t stream) {
    const bool all = args.in.tiles.list == nullptr;
    const int row_groups = groups_of(args.gate.rows) * (group_columns / 16);
    args.in.parts = parts_for(row_groups, tiles, groups_of(args.gate.columns));
    return visit_layout(args.gate.type, [&]<layout L>() {
        return start_few<L, 2>(all ? few_gated_kernel<L, few_tile_rows / 8> : few_gated_kernel<L, few_list_rows / 8>,
                               row_groups, tiles, args, stream);
    });
}

}  // namespace keel::cuda_launch::detail
