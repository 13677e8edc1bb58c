// SPDX-License-Identifier: MIT
//
// Products of a few rows of activations, 2 to 64, with quantised weights: what gemm.cuh does for many, made for reading
// weights as fast as memory gives them. A warp takes 16 rows of W, a block eight times as many and up to 64 rows of
// activations. Its lanes have the units of the next groups on their way to slots of their own in shared memory; what
// all warps multiply with, the rows' part of these groups, is fetched once for the block. Where a matrix has few rows,
// the blocks of a cluster share them and split the columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/halves.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>
#include <keel/backend/cuda/prepared.cuh>
#include <keel/backend/cuda/wgmma.cuh>

namespace keel::cuda_launch::detail {

inline constexpr int few_warps = 8, few_threads = few_warps * 32;

/// Rows of x that a block works on at once: of all rows, and of those of a list. Up to so many of all rows products are
/// computed here.
inline constexpr int few_tile_rows = 64, few_list_rows = 16;

/// A ring in shared memory: what a block needs of a group of columns, some groups ahead. Every lane has slots of its
/// own for weights; behind those of all warps lie the rows of x, as they are in memory. Behind the ring lie the ends of
/// the rows of W, which have the factors of all their units. Two blocks fit on a multiprocessor where units are small.
template <layout L, int Matrices, int Tiles>
struct few_ring {
    static constexpr int slot = weight_unit<L>::pieces * 512 + weight_unit<L>::rest * 32;
    static constexpr int of_warp = 2 * Matrices * slot, of_x = planes_for(L) * Tiles * eight_bytes;
    static constexpr int stage = few_warps * of_warp + of_x;
    static constexpr int stages = std::clamp(64 * 1024 / stage, 2, 4), bytes = stages * stage;
    static_assert(Matrices * Tiles * few_warps * 512 <= bytes, "sums of a block go where the ring was");

    unsigned char* memory;
    int warp, lane, end_bytes;  // of a row's end

    __device__ weight_slot weights(int at, int m, int r) const {
        return {memory + at * stage + warp * of_warp + (2 * m + r) * slot, lane};
    }
    __device__ unsigned char* x(int at) const { return memory + at * stage + few_warps * of_warp; }

    /// The end of row i of the 16 of this warp. Rows lie so that eight of them meet no bank conflict.
    __device__ unsigned char* end(int m, int i) const {
        return memory + bytes + ((warp * Matrices + m) * 16 + i) * pitch(end_bytes);
    }
    __host__ __device__ static int pitch(int end_bytes) { return (end_bytes / 16 | 1) * 16; }
    static int all_ends(int end_bytes) { return end_bytes == 0 ? 0 : few_warps * Matrices * 16 * pitch(end_bytes); }
};

/// Shared memory of a block whose tiles have up to 8 Most rows, with rows of W like those of the matrix.
template <layout L, int Matrices, int Most>
int few_bytes(const matrix& like) {
    using largest = few_ring<L, Matrices, Most>;
    return tiles_alignment +
           std::max({few_ring<L, Matrices, 1>::bytes, few_ring<L, Matrices, 2>::bytes,
                     few_ring<L, Matrices, std::min(Most, 4)>::bytes, largest::bytes}) +
           largest::all_ends(like.row_bytes - weight_unit<L>::factors_at((like.columns + 31) / 32));
}

/// Whether there is so much on this device, where `Matrices` like this one are multiplied at a time.
template <int Matrices>
bool fits_few(const matrix& like) {
    int bytes = 0;
    visit_layout(like.type, [&]<layout L>() {
        bytes = few_bytes<L, Matrices, few_tile_rows / 8>(like);
        return cudaSuccess;
    });
    return bytes <= cuda_kernels::shared_bytes_up_to(228 * 1024);
}

/// The 16 rows of a matrix that a warp works on; behind the last one that there is, it again.
struct few_weights {
    const unsigned char* first;
    int row_bytes, last;

    __device__ few_weights(const matrix& w, int of, int row)
        : first(w.data + (static_cast<long long>(of) * w.rows + min(row, w.rows - 1)) * w.row_bytes),
          row_bytes(w.row_bytes),
          last(max(w.rows - 1 - row, 0)) {}
    __device__ const unsigned char* row(int i) const { return first + min(i, last) * row_bytes; }
};

/// What the kernels of few_rows.cuh multiply with.
struct few_input {
    prepared x;
    tiling tiles;
    const int* pairs;  ///< null, or pairs[position] / k is the row of x
    int k;
    int parts = 1;        ///< of the blocks that share rows of W
    bool beside = false;  ///< the kernel is beside the one before, which reads the same x

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

/// Where a warp is. The blocks that share rows of W are a cluster.
struct few_place {
    int warp, lane, part, block;  // `block` counts those with other rows of W

    __device__ few_place()
        : warp(static_cast<int>(threadIdx.x) / 32),
          lane(static_cast<int>(threadIdx.x) % 32),
          part(cluster_rank()),
          block(cluster_number()) {}

    /// Which 16 rows of W a warp of the block works on.
    __device__ int row_group(int of_warp) const { return block * few_warps + of_warp; }
};

/// acc[m] += 16 rows of matrix m times 8 * Tiles rows of x, over the columns of this block's part. All threads of the
/// block.
template <int Tiles, int Matrices, layout L>
__device__ void multiply_few(float (&acc)[Matrices][Tiles][4], const few_weights (&w)[Matrices], int columns,
                             const few_input& in, const row_tile& tile, const few_place& place) {
    using ring_of = few_ring<L, Matrices, Tiles>;
    constexpr int ahead = ring_of::stages - 1, planes = planes_for(L);
    const int units = (columns + 31) / 32, groups = groups_of(columns), ends_at = weight_unit<L>::factors_at(units);
    const ring_of ring{dynamic_memory_on<tiles_alignment>(), place.warp, place.lane, w[0].row_bytes - ends_at};
    const int eighth = place.lane / 4, quad = place.lane % 4;
    const auto begin_of = [&](int part) { return groups * part / in.parts; };
    const int first = begin_of(place.part), last = begin_of(place.part + 1);
    const auto ask_weights = [&](int group, int stage) {
        if (group >= last) return;
        const int unit = min(4 * group + quad, units - 1);
#pragma unroll
        for (int i = 0; i < 2 * Matrices; ++i) {
            weight_unit<L>::ask(ring.weights(stage, i / 2, i % 2), w[i / 2].row(eighth + i % 2 * 8), units, unit);
        }
    };
    // 128 threads, one of two teams, copy a tile of 8 rows, each the same 16 bytes of every group.
    constexpr int teams = 2, copies = (Tiles + teams - 1) / teams;
    const int team = static_cast<int>(threadIdx.x) / 128, piece = static_cast<int>(threadIdx.x) % 128;
    int at[copies];
    const auto ask_x = [&](int group, int stage) {
        if (group >= last) return;
        unsigned char* const to = ring.x(stage) + team * eight_bytes + piece * 16;
#pragma unroll
        for (int plane = 0; plane < planes; ++plane) {
            const unsigned char* const from = in.x.tile(plane, group, 0);
#pragma unroll
            for (int i = 0; i < copies; ++i) {
                if (Tiles % teams != 0 && i * teams + team >= Tiles) continue;
                copy_async(to + (plane * Tiles + i * teams) * eight_bytes, from + at[i]);
            }
        }
    };
#pragma unroll
    for (int m = 0; m < Matrices; ++m) {  // two lanes copy the end of a row
#pragma unroll 1
        for (int i = place.lane % 2 * 16; i < ring.end_bytes; i += 32) {
            copy_once<16>(ring.end(m, place.lane / 2) + i, w[m].row(place.lane / 2) + ends_at + i);
        }
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) ask_weights(first + i, i);
    if (in.beside) {
        cuda_kernels::start_next();
    } else if (in.tiles.list == nullptr) {
        cuda_kernels::wait_for_previous();  // weights need not wait
    }
#pragma unroll
    for (int i = 0; i < copies; ++i) {
        const int r = piece / 8 % 8, row = in.row(tile, 8 * (i * teams + team) + r);
        at[i] = row / 8 * eight_bytes + piece / 64 * 1024 + row % 8 * 128 + (piece % 8 ^ r ^ row % 8) * 16;
    }
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) {
        ask_x(first + i, i);
        commit_copies();
    }
    std::uint32_t a[2][Matrices][4][4];
    int stage = 0;
#pragma unroll 1
    for (int group = first; group < last; ++group) {
        wait_copies<ahead - 1>();
        publish_to_copies();
        settle_products();
        __syncthreads();  // all have what is in this stage, and nobody needs the one before it
        const int next = stage == 0 ? ahead : stage - 1;
        ask_weights(group + ahead, next);
        ask_x(group + ahead, next);
        commit_copies();
        const int unit_at = min(4 * group + quad, units - 1);
        weight_unit<L> unit[2 * Matrices];
#pragma unroll
        for (int i = 0; i < 2 * Matrices; ++i) {
            unit[i].take(ring.weights(stage, i / 2, i % 2), ring.end(i / 2, eighth + i % 2 * 8), units, unit_at);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2 * Matrices; ++i) {
                const half_steps steps = unit[i].steps(half);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    a[half][i / 2][s][i % 2] = steps.low[s], a[half][i / 2][s][2 + i % 2] = steps.high[s];
                }
            }
#pragma unroll
            for (int m = 0; m < Matrices; ++m) settle_operands(a[half][m]);
            settle_products();
#pragma unroll
            for (int m = 0; m < Matrices; ++m) {
                begin_products<planes>(acc[m], a[half][m], shared_address(ring.x(stage)) + half * 1024, place.lane);
            }
        }
        stage = stage == ahead ? 0 : stage + 1;
    }
    settle_products();
    wait_copies<0>();
}

/// Calls f(warp, t, sums) with what the blocks that share rows of W have together, in their order, for 16 rows of W,
/// those of a warp of the block, and tile t of 8 rows of x: sums[m] is a C fragment. All threads of the block, behind
/// multiply_few().
template <int Matrices, int Tiles, class F>
__device__ void for_each_sum(const float (&acc)[Matrices][Tiles][4], int parts, const few_place& place, F&& f) {
    if (parts == 1) {
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
            float sums[Matrices][4];
#pragma unroll
            for (int i = 0; i < 4 * Matrices; ++i) sums[i / 4][i % 4] = acc[i / 4][t][i % 4];
            f(place.warp, t, sums);
        }
        return;
    }
    float4* const mine = reinterpret_cast<float4*>(dynamic_memory_on<tiles_alignment>()) + place.lane;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
        for (int m = 0; m < Matrices; ++m) {
            const float(&v)[4] = acc[m][t];
            mine[((place.warp * Tiles + t) * Matrices + m) * 32] = {v[0], v[1], v[2], v[3]};
        }
    }
    cluster_barrier();
    for (int i = place.part + parts * place.warp; i < few_warps * Tiles; i += parts * few_warps) {
        float4 each[Matrices][most_parts];
#pragma unroll
        for (int p = 0; p < most_parts; ++p) {
#pragma unroll
            for (int m = 0; m < Matrices; ++m) {
                each[m][p] = p < parts ? load_from_block(mine + (i * Matrices + m) * 32, p) : float4{};
            }
        }
        float sums[Matrices][4];
#pragma unroll
        for (int m = 0; m < Matrices; ++m) {
            float4 sum = each[m][0];
#pragma unroll
            for (int p = 1; p < most_parts; ++p) {
                sum = {sum.x + each[m][p].x, sum.y + each[m][p].y, sum.z + each[m][p].z, sum.w + each[m][p].w};
            }
            sums[m][0] = sum.x, sums[m][1] = sum.y, sums[m][2] = sum.z, sums[m][3] = sum.w;
        }
        f(i / Tiles, i % Tiles, sums);
    }
    cluster_barrier();  // a block's memory stays until all have read it
}

/// Calls f(e, position, scale) for the rows of tile t whose results this lane has, in sums[.][e] and sums[.][e + 2];
/// these are to be multiplied with `scale`.
template <class F>
__device__ void for_each_result(const few_input& in, const row_tile& tile, int t, int lane, F&& f) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = 8 * t + lane % 4 * 2 + e;
        if (i < tile.rows) f(e, in.position(tile, i), in.x.scale[in.row(tile, i)]);
    }
}

/// Calls f.template operator()<Tiles>() with the least number of tiles of 8 rows, at most Most, that holds `rows`.
template <int Most, class F>
__device__ void visit_few(int rows, F&& f) {
    if constexpr (Most >= 8) {
        if (rows > 32) return f.template operator()<8>();
    }
    if constexpr (Most >= 4) {
        if (rows > 16) return f.template operator()<4>();
    }
    if (rows > 8) return f.template operator()<2>();
    f.template operator()<1>();
}

}  // namespace keel::cuda_launch::detail
