// SPDX-License-Identifier: MIT
//
// Products of many rows of activations with quantised weights on tensor cores.
//
// A block of two warpgroups computes 256 rows of W with up to 128 rows of activations. Weights go from memory to
// registers one group ahead, become halves there, and are the left operand: they never visit shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/halves.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>
#include <keel/backend/cuda/prepared.cuh>
#include <keel/backend/cuda/wgmma.cuh>

namespace keel::cuda_launch::detail {

inline constexpr int block_rows = 256;  // of W that a block works on
inline constexpr int stage_bytes = tile_rows / 8 * eight_bytes;

/// Rows of prepared activations that meet the same matrix.
struct row_tile {
    int matrix, first, rows;
};

/// Which tiles a launch works on: those of a list on the device, or all rows of each of the first `matrices` matrices,
/// some at a time.
struct tiling {
    const row_tile* list;
    const int* count;
    int rows, at_once, matrices = 1;

    int tiles() const { return matrices * ((rows + at_once - 1) / at_once); }
    __device__ bool get(int i, row_tile& tile) const {
        if (list == nullptr) {
            const int first = i / matrices * at_once;
            tile = {i % matrices, first, min(at_once, rows - first)};
            return tile.rows > 0;
        }
        if (i >= *count) return false;
        tile = list[i];
        return true;
    }
};

/// All rows of one matrix, in the tiles with which `blocks` blocks for each take the least time: waves of as many
/// blocks as there are multiprocessors, and what a block does beside multiplying takes as long as some rows more.
inline tiling all_rows(int rows, int blocks, int planes) {
    int device = 0, multiprocessors = 1, best = 32;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    const auto cost = [&](int at_once) {
        constexpr int beside = 24;
        const int all = (rows + at_once - 1) / at_once * blocks;
        return (all + multiprocessors - 1) / multiprocessors * (at_once + beside);
    };
    for (int at_once = 64; at_once <= tile_rows / planes; at_once += 32) {
        if (cost(at_once) <= cost(best)) best = at_once;
    }
    return {nullptr, nullptr, rows, best};
}

/// The ring through which activations come to a block, and where its results go.
struct tile_ring {
    static constexpr int most = 6;
    barrier full[most], empty[most];
    float scale[tile_rows];
    int out_row[tile_rows];
};

inline constexpr int ring_bytes = 2048;  // before the stages

struct block_state {
    unsigned char* stages;
    tile_ring* ring;
    int depth;
};

// Products of the 16 rows of W that a warp holds, four steps of 16 columns, with prepared rows in shared memory. On
// sm_90a the four warps of a warpgroup begin them together, and they are under way until settle_products(): before that
// nobody touches sums, operands or rows.

/// Behind this, what is computed of the operands of the next products.
__device__ inline void settle_operands(std::uint32_t (&a)[4][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
    for (int i = 0; i < 16; ++i) settle(a[i / 4][i % 4]);
#endif
}

/// Until all products that this warp has begun are done.
__device__ inline void settle_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wgmma_wait<0>();
#endif
}

/// acc += a times 8 * Tiles rows, of which half a group's columns begin at address `x`, planes one behind the other.
template <int Planes, int Tiles>
__device__ void begin_products(float (&acc)[Tiles][4], const std::uint32_t (&a)[4][4], std::uint32_t x, int lane) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * Planes; ++i) {
        wgmma(acc, a[i % 4], x + i / 4 * Tiles * eight_bytes + i % 4 * 32, eight_bytes);
    }
    wgmma_commit();
#else
#pragma unroll
    for (int i = 0; i < 2 * Planes * Tiles; ++i) {
        const int step = i % 2 * 2, t = i / 2 % Tiles, row = lane % 8, piece = 2 * step + lane / 8;
        std::uint32_t b[4];
        load_matrices(b, x + i / 2 * eight_bytes + row * 128 + (piece ^ row) * 16);
        multiply(acc[t], a[step], b[0], b[1]);
        multiply(acc[t], a[step + 1], b[2], b[3]);
    }
#endif
}

/// acc[m] += rows of two matrices, `from[m][r]` for rows g and g + 8 of the 16 of this warp, times N rows of x from
/// `first` on. All threads of the block take part. A stage of activations holds N rows of each plane.
template <int N, layout L, int Planes>
__device__ void multiply_tile(float (&acc)[2][N / 8][4], const unsigned char* const (&from)[2][2], int columns,
                              const prepared& x, int first, const block_state& block) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, quad = lane % 4;
    const int units = (columns + 31) / 32, groups = groups_of(columns);
    const int lag = min(2, block.depth - 1);
    const auto fetch = [&](int group, int slot) {
        const stage_copy copy{block.ring->full[slot], lane};
        constexpr int bytes = N / 8 * eight_bytes;
        copy.begin(Planes * bytes);
        for (int plane = 0; plane < Planes; ++plane) {
            copy.whole(block.stages + slot * stage_bytes + plane * bytes, x.tile(plane, group, first), bytes);
        }
        copy.end();
    };
    if (warp == 0) {
        for (int group = 0; group < min(block.depth, groups); ++group) fetch(group, group);
    }
    weight_unit<L> unit[2][2];
    const auto load = [&](int m, int group) {  // one group ahead; units behind the end are the last one
#pragma unroll
        for (int r = 0; r < 2; ++r) unit[m][r].load(from[m][r], units, min(4 * group + quad, units - 1));
    };
    load(0, 0);
    load(1, 0);
    std::uint32_t a[2][4][4];
    int slot = 0, phase = 0;
    for (int group = 0; group < groups; ++group) {
        block.ring->full[slot].wait(phase);
        const std::uint32_t stage = shared_address(block.stages + slot * stage_bytes);
#pragma unroll
        for (int batch = 0; batch < 4; ++batch) {  // of four steps: matrix batch / 2, columns batch % 2
            const int m = batch / 2;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const half_steps w = unit[m][r].steps(batch % 2);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    a[batch % 2][s][r] = w.low[s];
                    a[batch % 2][s][2 + r] = w.high[s];
                }
            }
            if (batch % 2 == 1) load(m, group + 1);
            settle_operands(a[batch % 2]);
            settle_products();
            if (batch == 0 && group > 0) {  // this warp has finished the previous group
                if (lane == 0) block.ring->empty[slot == 0 ? block.depth - 1 : slot - 1].arrive();
                // Fetch into the stage of the group before it, which the other warpgroup has most likely finished too.
                const int next = group + block.depth - lag;
                if (warp == 0 && group >= lag && next < groups) {
                    const int free = slot < lag ? slot + block.depth - lag : slot - lag;
                    block.ring->empty[free].wait(slot < lag ? phase ^ 1 : phase);
                    fetch(next, free);
                }
            }
            begin_products<Planes>(acc[m], a[batch % 2], stage + batch % 2 * 1024, lane);
        }
        if (++slot == block.depth) slot = 0, phase ^= 1;
    }
    settle_products();
}

/// Asks for `rows` records from `row` on of matrix `m` in the second level cache.
__device__ inline void fetch_ahead(const matrix& w, int m, int row, int rows) {
#if __CUDA_ARCH__ >= 900
    rows = min(rows, w.rows - row);
    if (rows <= 0) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                     w.data + (static_cast<std::size_t>(m) * w.rows + row) * static_cast<std::size_t>(w.row_bytes)),
                 "r"(rows * w.row_bytes)
                 : "memory");
#endif
}

/// How many tiles before its turn a matrix is fetched into the cache: it is read from memory while others multiply.
inline constexpr int tiles_ahead = 8;

/// Before multiply_tile: the stages lie in dynamic shared memory, behind the barriers, on 1024 bytes.
__device__ inline block_state start_block(int depth) {
    unsigned char* const memory = dynamic_memory_on<tiles_alignment>();
    const block_state block{memory + ring_bytes, reinterpret_cast<tile_ring*>(memory), depth};
    if (static_cast<int>(threadIdx.x) < depth) {
        block.ring->full[threadIdx.x].init(stage_copy::arrivals);
        block.ring->empty[threadIdx.x].init(8);
    }
    publish_to_copies();
    __syncthreads();
    return block;
}

/// A matrix among the products of a launch.
struct product_target {
    matrix weight;
    void* out;
    long long row;
    int accumulate;
    int half;         // whether `out` is halves instead of floats
    int first_block;  // in blocks of 256 rows of W, of the launch
};

struct product_arguments {
    prepared x;
    tiling tiles;
    const int* out_rows;  // null, or the row of `out` for each row of x
    float factor;
    int depth;
    int products;
    product_target list[matvec_args::most];
};

template <int N, layout L, int Planes>
__device__ void product_tile(const product_arguments& args, const product_target& target, const row_tile& tile,
                             int first_row, const block_state& block) {
    const int thread = static_cast<int>(threadIdx.x), group = thread % 32 / 4, quad = thread % 4;
    const int mine = first_row + thread / 128 * 128 + thread % 128 / 32 * 16 + group;
    const unsigned char* from[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = min(mine + i / 2 * 64 + i % 2 * 8, target.weight.rows - 1);
        from[i / 2][i % 2] = target.weight.data + (static_cast<std::size_t>(tile.matrix) * target.weight.rows + row) *
                                                      static_cast<std::size_t>(target.weight.row_bytes);
    }
    const int position = tile.first + thread;
    if (thread < tile.rows) {
        block.ring->scale[thread] = args.x.scale[position] * args.factor;
        block.ring->out_row[thread] = args.out_rows == nullptr ? position : args.out_rows[position];
    }
    float acc[2][N / 8][4] = {};
    multiply_tile<N, L, Planes>(acc, from, target.weight.columns, args.x, tile.first, block);
    __syncthreads();
    const auto store = [&]<class T, bool Accumulate>(T* out) {
        out += mine;
        bool inside[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) inside[i] = mine + i / 2 * 64 + i % 2 * 8 < target.weight.rows;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = 8 * j + 2 * quad + e;
                if (token >= tile.rows) continue;
                const float scale = block.ring->scale[token];
                T* const to = out + block.ring->out_row[token] * target.row;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    T* const y = to + i / 2 * 64 + i % 2 * 8;
                    const float x = acc[i / 2][j][i % 2 * 2 + e] * scale;
                    if (!inside[i]) continue;
                    if constexpr (Accumulate) {
                        atomicAdd(y, x);  // nobody else adds to it: this only spares waiting for what is there
                    } else {
                        *y = static_cast<T>(x);
                    }
                }
            }
        }
    };
    if (target.half) {
        store.template operator()<__half, false>(static_cast<__half*>(target.out));
    } else if (target.accumulate) {
        store.template operator()<float, true>(static_cast<float*>(target.out));
    } else {
        store.template operator()<float, false>(static_cast<float*>(target.out));
    }
}

/// Calls f.template operator()<N>() with the least N that holds `rows` rows of a tile.
template <int Planes, class F>
__device__ void visit_tile(int rows, F&& f) {
    if constexpr (Planes == 1) {
        if (rows > 96) return f.template operator()<128>();
        if (rows > 64) return f.template operator()<96>();
    }
    if (rows > 32) return f.template operator()<64>();
    f.template operator()<32>();
}

/// Grid: (blocks of 256 rows of W over all products, tiles).
template <layout L, int Planes>
__global__ void __launch_bounds__(256, 1) product_kernel(const __grid_constant__ product_arguments args) {
    row_tile tile;
    if (!args.tiles.get(static_cast<int>(blockIdx.y), tile)) return;
    int which = 0;
    while (which + 1 < args.products && static_cast<int>(blockIdx.x) >= args.list[which + 1].first_block) ++which;
    const product_target& target = args.list[which];
    const int first_row = (static_cast<int>(blockIdx.x) - target.first_block) * block_rows;
    row_tile later;
    if (threadIdx.x == 0 && args.tiles.list != nullptr &&
        args.tiles.get(static_cast<int>(blockIdx.y) + tiles_ahead, later) && later.matrix != tile.matrix) {
        fetch_ahead(target.weight, later.matrix, first_row, block_rows);
    }
    const block_state block = start_block(args.depth);
    visit_tile<Planes>(tile.rows, [&]<int N>() { product_tile<N, L, Planes>(args, target, tile, first_row, block); });
}

/// Starts a kernel with as many stages as fit into a block's shared memory.
template <class Arguments>
cudaError_t start_products(void (*kernel)(Arguments), dim3 grid, Arguments args, cudaStream_t stream) {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    args.depth = std::clamp((most - 2 * ring_bytes) / stage_bytes, 2, tile_ring::most);
    const int bytes = 2 * ring_bytes + args.depth * stage_bytes;
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess || grid.x == 0 || grid.y == 0) return error;
    kernel<<<grid, 256, static_cast<std::size_t>(bytes), stream>>>(args);
    return cudaGetLastError();
}

/// All products of a list that share a layout, in one launch per layout. `tiles` is the most that args.tiles may have,
/// or 0 for all rows.
inline cudaError_t start_all_products(product_arguments args, const product_target* list, int count, int tiles,
                                      cudaStream_t stream) {
    for (int type = 0; type <= static_cast<int>(layout::wide); ++type) {
        args.products = 0;
        int blocks = 0;
        for (int i = 0; i < count; ++i) {
            if (list[i].weight.type != static_cast<layout>(type)) continue;
            args.list[args.products] = list[i];
            args.list[args.products++].first_block = blocks;
            blocks += (list[i].weight.rows + block_rows - 1) / block_rows;
        }
        if (args.products == 0) continue;
        int launched = tiles;
        if (args.tiles.list == nullptr) {
            args.tiles = all_rows(args.tiles.rows, blocks, args.x.planes);
            launched = args.tiles.tiles();
        }
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(launched));
        const cudaError_t error = visit_layout(static_cast<layout>(type), [&]<layout L>() {
            return args.x.planes == 2 ? start_products(product_kernel<L, planes_for(L)>, grid, args, stream)
                                      : start_products(product_kernel<L, 1>, grid, args, stream);
        });
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace keel::cuda_launch::detail
