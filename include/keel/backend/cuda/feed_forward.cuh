// SPDX-License-Identifier: MIT
//
// Gated feed-forward networks of many rows, one or a choice of many. With a choice, rows are sorted by expert first:
// every (row, slot) gets a position, those of an expert are consecutive and begin on a multiple of 8, and each expert
// has a tile for every 128 of its positions, or for every 16 or 4 where there are few rows. Where a position lies in a
// tile changes no bit of its results, so the order within an expert does not matter.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/few_experts.cuh>
#include <keel/backend/cuda/few_rows.cuh>
#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>

namespace keel::cuda_launch::detail {

inline constexpr int most_experts = 1024;

/// The order of (row, slot) pairs by expert.
struct expert_order {
    int* pair;      // of a position, row * k + slot; -1 where there is none
    int* position;  // of a pair
    row_tile* tiles;
    int* tile_count;

    static int positions(int pairs, int experts) { return pairs + 7 * experts; }
    static int most_tiles(int pairs, int experts, int rows_of_tile) {
        return pairs / rows_of_tile + std::min(experts, pairs);
    }
};

/// Which expert each of `slots` pairs of every row goes to: chosen ones, and behind the last of these the shared one,
/// whose number is `experts`.
struct expert_choice {
    const int* chosen;
    long long chosen_row;
    int rows, slots, experts;
    bool shared;

    int pairs() const { return rows * slots; }
    __device__ int expert(int pair) const {
        const int row = pair / slots, slot = pair % slots;
        return shared && slot == slots - 1 ? experts : chosen[row * chosen_row + slot];
    }
};

/// One block of 1024 threads.
__global__ void __launch_bounds__(1024) sort_kernel(expert_choice choice, int rows_of_tile, expert_order order) {
    __shared__ int count[most_experts], next[most_experts], sums[2][32];
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int pairs = choice.rows * choice.slots;
    cuda_kernels::wait_for_previous();
    count[thread] = 0;
    __syncthreads();
    for (int i = thread; i < pairs; i += 1024) atomicAdd(&count[choice.expert(i)], 1);
    __syncthreads();
    const int mine = count[thread];
    const int places = (mine + 7) / 8 * 8, tiles = (mine + rows_of_tile - 1) / rows_of_tile;
    int before_places = places, before_tiles = tiles;  // running sums
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int a = __shfl_up_sync(~0u, before_places, d), b = __shfl_up_sync(~0u, before_tiles, d);
        if (lane >= d) before_places += a, before_tiles += b;
    }
    if (lane == 31) sums[0][warp] = before_places, sums[1][warp] = before_tiles;
    __syncthreads();
    for (int w = 0; w < warp; ++w) before_places += sums[0][w], before_tiles += sums[1][w];
    before_places -= places, before_tiles -= tiles;
    for (int i = 0; i < tiles; ++i) {
        const int first = i * rows_of_tile;
        order.tiles[before_tiles + i] = {thread, before_places + first, min(rows_of_tile, mine - first)};
    }
    if (thread == 1023) *order.tile_count = before_tiles + tiles;
    for (int i = mine; i < places; ++i) order.pair[before_places + i] = -1;
    next[thread] = before_places;
    __syncthreads();
    for (int i = thread; i < pairs; i += 1024) {
        const int position = atomicAdd(&next[choice.expert(i)], 1);
        order.position[i] = position;
        order.pair[position] = i;
    }
}

/// Copies prepared rows to the positions of their pairs; a warp per pair.
__global__ void __launch_bounds__(256)
    spread_kernel(prepared from, prepared to, const int* position, int pairs, int k) {
    const int pair = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (pair >= pairs) return;
    const int at = position[pair], row = pair / k;
    if (lane == 0) to.scale[at] = from.scale[row];
    for (int i = lane; i < 16 * from.groups * from.planes; i += 32) {
        const int plane = i / 16 / from.groups, group = i / 16 % from.groups;
        *to.piece(plane, group, at, i % 16) = *from.piece(plane, group, row, i % 16);
    }
}

struct gated_arguments {
    prepared x;
    tiling tiles;
    int depth;
    matrix gate, up;
    prepared hidden;
};

template <int N, layout L, int Planes>
__device__ void gated_tile(const gated_arguments& args, const row_tile& tile, int first_row, const block_state& block) {
    const int thread = static_cast<int>(threadIdx.x), group = thread % 32 / 4, quad = thread % 4;
    const int mine = thread / 128 * 64 + thread % 128 / 32 * 16 + group;
    const unsigned char* from[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = tile.matrix * args.gate.rows + min(first_row + mine + 8 * r, args.gate.rows - 1);
        from[0][r] = args.gate.data + row * static_cast<std::size_t>(args.gate.row_bytes);
        from[1][r] = args.up.data + row * static_cast<std::size_t>(args.up.row_bytes);
    }
    float acc[2][N / 8][4] = {};
    multiply_tile<N, L, Planes>(acc, from, args.gate.columns, args.x, tile.first, block);

    // The 128 rows are a group of the next product: collect it in shared memory, then write it out whole.
    for (int plane = 0; plane < args.hidden.planes; ++plane) {
        __syncthreads();
        unsigned char* const stage = block.stages;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = 8 * j + 2 * quad + e;
                const float scale = token < tile.rows ? args.x.scale[tile.first + token] : 0.0f;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float gate = acc[0][j][2 * r + e] * scale, up = acc[1][j][2 * r + e] * scale;
                    const int i = mine + 8 * r;
                    const bool inside = first_row + i < args.gate.rows && token < tile.rows;
                    *prepared::half_of(stage + j * eight_bytes, token, i) =
                        inside ? gated_half(gate, up, plane) : __half(0.0f);
                }
            }
        }
        __syncthreads();
        uint4* const to = reinterpret_cast<uint4*>(args.hidden.tile(plane, first_row / group_columns, tile.first));
        const int pieces = (tile.rows + 7) / 8 * (eight_bytes / 16);
        for (int i = thread; i < pieces; i += 256) to[i] = reinterpret_cast<const uint4*>(stage)[i];
    }
    if (first_row == 0 && thread < tile.rows) args.hidden.scale[tile.first + thread] = 1.0f / hidden_factor;
}

/// Grid: (groups of 128 rows of W, tiles).
template <layout L, int Planes>
__global__ void __launch_bounds__(256, 1) gated_kernel(const __grid_constant__ gated_arguments args) {
    row_tile tile, later;
    if (!args.tiles.get(static_cast<int>(blockIdx.y), tile)) return;
    const int first_row = static_cast<int>(blockIdx.x) * group_columns;
    if (threadIdx.x < 2 && args.tiles.list != nullptr &&
        args.tiles.get(static_cast<int>(blockIdx.y) + tiles_ahead, later) && later.matrix != tile.matrix) {
        fetch_ahead(threadIdx.x == 0 ? args.gate : args.up, later.matrix, first_row, group_columns);
    }
    const block_state block = start_block(args.depth);
    visit_tile<Planes>(tile.rows, [&]<int N>() { gated_tile<N, L, Planes>(args, tile, first_row, block); });
}

/// out[row] = or += sum of weights[row][slot] y[row slots + slot], slot by slot; the weight of slots from k on is 1.
/// Grid: (columns / 1024, rows).
__global__ void __launch_bounds__(256)
    join_kernel(const float* y, const float* weights, long long weights_row, int k, int slots, int columns, float* out,
                long long out_row, int accumulate) {
    cuda_kernels::wait_for_previous();
    const int column = (static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x)) * 4;
    const long long row = blockIdx.y;
    if (column >= columns) return;
    float4 sum = {0, 0, 0, 0};
    for (int slot = 0; slot < slots; ++slot) {
        const float w = slot < k ? weights[row * weights_row + slot] : 1.0f;
        const float4 v = __ldcs(reinterpret_cast<const float4*>(y + (row * slots + slot) * columns + column));
        sum.x += w * v.x, sum.y += w * v.y, sum.z += w * v.z, sum.w += w * v.w;
    }
    auto& to = *reinterpret_cast<float4*>(out + row * out_row + column);
    if (accumulate) {
        const float4 old = to;
        sum.x += old.x, sum.y += old.y, sum.z += old.z, sum.w += old.w;
    }
    to = sum;
}

/// Up to so many pairs experts have so few rows each that their weights, not products, take the time.
constexpr int most_few(int experts) { return few_list_rows / 2 * experts; }

/// Where things lie in the workspace.
struct feed_forward_plan {
    std::size_t used = 0;
    std::size_t rows, hidden, sorted = 0, outputs = 0, pair = 0, position = 0, tiles = 0, tile_count = 0;

    feed_forward_plan(int count, int k, int experts, int hidden_columns, int width, int planes) {
        // With few rows, also pairs with the shared expert, and floats between the products.
        const int few_rows = experts == 0 ? 0 : std::min(count, most_few(experts) / k), groups = experts + 1;
        const int pairs = count * k + few_rows;
        const int positions = experts == 0 ? count : expert_order::positions(pairs, groups);
        rows = take(prepared::bytes(count, hidden_columns, planes));
        const auto floats = static_cast<std::size_t>(few_rows * (k + 1)) * static_cast<std::size_t>(width);
        hidden = take(std::max(prepared::bytes(positions, width, planes), floats * sizeof(float)));
        if (experts == 0) return;
        sorted = take(prepared::bytes(positions, hidden_columns, planes));
        outputs = take(static_cast<std::size_t>(pairs) * static_cast<std::size_t>(hidden_columns) * sizeof(float));
        pair = take(static_cast<std::size_t>(positions) * sizeof(int));
        position = take(static_cast<std::size_t>(pairs) * sizeof(int));
        tiles = take(static_cast<std::size_t>(expert_order::most_tiles(pairs, groups, byte_rows::most_rows)) *
                     sizeof(row_tile));
        tile_count = take(sizeof(int));
    }

private:
    std::size_t take(std::size_t bytes) {
        const std::size_t at = used;
        used += (bytes + 1023) / 1024 * 1024;
        return at;
    }
};

/// The two kernels of few_experts.cuh, if they are for such networks; with the shared one, if it is like the others.
struct few_experts {
    bool shared;
    few_experts_arguments<2> up;
    few_experts_arguments<1> down;
    bool serves;

    few_experts(const feed_forward_args& a, const expert_order& order, float* inner, float* outputs)
        : shared(a.shared_like_others() && a.gate.count < most_experts),
          up{order.tiles,
             order.tile_count,
             order.pair,
             a.x,
             a.x_row,
             shared ? a.k + 1 : a.k,
             {a.gate, a.up},
             {a.shared_gate.data, a.shared_up.data},
             inner,
             a.gate.rows,
             {}},
          down{order.tiles, order.tile_count,     order.pair, inner,          a.gate.rows, 1,
               {a.down},    {a.shared_down.data}, outputs,    a.gate.columns, {}},
          serves(a.chosen != nullptr && a.rows * a.k <= byte_rows::most_rows * a.gate.count && shape_few_experts(up) &&
                 shape_few_experts(down)) {
        shared = shared && serves;
    }

    cudaError_t start(cudaStream_t stream) const {
        const cudaError_t error = start_few_experts(up, stream);
        return error == cudaSuccess ? start_few_experts(down, stream) : error;
    }
};

}  // namespace keel::cuda_launch::detail

namespace keel::cuda_launch {

inline std::size_t feed_forward_bytes(int rows, int k, int experts, int hidden, int width, int planes) {
    return detail::feed_forward_plan(rows, k, experts, hidden, width, planes).used;
}

inline cudaError_t feed_forward(const feed_forward_args& args, cudaStream_t stream) {
    using namespace detail;
    const bool choice = args.chosen != nullptr;
    const int hidden = args.gate.columns, width = args.gate.rows, experts = choice ? args.gate.count : 0;
    if (args.rows == 0) return cudaSuccess;
    if (args.gate.type != args.up.type || experts > most_experts || (choice && hidden % 4 != 0)) {
        return cudaErrorNotSupported;
    }
    const int planes = planes_for(args.gate.type), inner_planes = planes_for(args.down.type);
    const feed_forward_plan plan(args.rows, args.k, experts, hidden, width, std::max(planes, inner_planes));
    unsigned char* const memory = static_cast<unsigned char*>(args.workspace);
    const expert_order order{reinterpret_cast<int*>(memory + plan.pair), reinterpret_cast<int*>(memory + plan.position),
                             reinterpret_cast<row_tile*>(memory + plan.tiles),
                             reinterpret_cast<int*>(memory + plan.tile_count)};
    float* const outputs = reinterpret_cast<float*>(memory + plan.outputs);
    product_target down{args.down, args.out, args.out_row, args.accumulate, 0, 0};
    tiling tiles{nullptr, nullptr, args.rows, few_tile_rows};
    const few_experts streamed(args, order, reinterpret_cast<float*>(memory + plan.hidden), outputs);
    const bool few = (choice ? args.rows * args.k <= most_few(experts) : args.rows <= few_tile_rows) &&
                     fits_few<2>(args.gate) && fits_few<1>(args.down);
    const expert_choice of{args.chosen, args.chosen_row, args.rows, streamed.shared ? args.k + 1 : args.k,
                           experts,     streamed.shared};
    const int pairs = of.pairs(), positions = choice ? expert_order::positions(pairs, experts) : args.rows;
    int most_tiles = tiles.tiles();
    if (choice) {
        const int rows_of_tile = streamed.serves ? byte_rows::most_rows
                                 : few           ? few_list_rows
                                                 : tile_rows / std::max(planes, inner_planes);
        const cudaError_t error = cuda_kernels::start(sort_kernel, dim3(1), 1024, 0, stream, of, rows_of_tile, order);
        if (error != cudaSuccess) return error;
        down = {args.down, outputs, hidden, 0, 0, 0};
        tiles = {order.tiles, order.tile_count, 0, 0};
        most_tiles = expert_order::most_tiles(pairs, experts, rows_of_tile);
    }
    cudaError_t error = cudaSuccess;
    if (streamed.serves) {
        error = streamed.start(stream);
    } else if (few) {
        const prepared x(memory + plan.rows, args.rows, hidden, planes);
        const prepared inner(memory + plan.hidden, positions, width, inner_planes);
        error = prepare_rows({args.x, args.x_row, 0}, 1, args.rows, hidden, {}, x, stream);
        if (error != cudaSuccess) return error;
        error = start_few_gated({{x, tiles, choice ? order.pair : nullptr, args.k}, args.gate, args.up, inner},
                                most_tiles, stream);
        if (error != cudaSuccess) return error;
        error = start_few_products({{inner, tiles, nullptr, 1}, choice ? order.pair : nullptr, 0, {}}, &down, 1,
                                   most_tiles, stream);
    } else {
        prepared x(memory + plan.rows, args.rows, hidden, planes);
        const prepared inner(memory + plan.hidden, positions, width, inner_planes);
        error = prepare_rows({args.x, args.x_row, 0}, 1, args.rows, hidden, {}, x, stream);
        if (error != cudaSuccess) return error;
        const int blocks = groups_of(width);
        if (choice) {
            const prepared sorted(memory + plan.sorted, positions, hidden, planes);
            spread_kernel<<<static_cast<unsigned>((pairs + 7) / 8), 256, 0, stream>>>(x, sorted, order.position, pairs,
                                                                                      args.k);
            x = sorted;
        } else {
            tiles = all_rows(args.rows, blocks, std::max(planes, inner_planes));
            most_tiles = tiles.tiles();
        }
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(most_tiles));
        error = visit_layout(args.gate.type, [&]<layout L>() {
            return start_products(gated_kernel<L, planes_for(L)>, grid,
                                  gated_arguments{x, tiles, 0, args.gate, args.up, inner}, stream);
        });
        if (error != cudaSuccess) return error;
        const product_arguments arguments{inner, tiles, choice ? order.pair : nullptr, 1.0f, 0, 0, {}};
        error = start_all_products(arguments, &down, 1, most_tiles, stream);
    }
    if (error != cudaSuccess || !choice) return error;
    error = cuda_kernels::start(join_kernel,
                                dim3(static_cast<unsigned>((hidden + 1023) / 1024), static_cast<unsigned>(args.rows)),
                                256, 0, stream, outputs, args.weights, args.weights_row, args.k, of.slots, hidden,
                                args.out, args.out_row, args.accumulate);
    if (error != cudaSuccess || streamed.shared || args.shared_gate.data == nullptr) return error;
    feed_forward_args rest = args;
    rest.chosen = nullptr;
    rest.accumulate = 1;
    rest.gate = args.shared_gate, rest.up = args.shared_up, rest.down = args.shared_down;
    return feed_forward(rest, stream);
}

}  // namespace keel::cuda_launch
