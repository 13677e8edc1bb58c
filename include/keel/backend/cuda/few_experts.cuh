// SPDX-License-Identifier: MIT
//
// Experts' networks where each expert has only a few rows of activations and K-quantised weights: products that have to
// keep up with memory. One block on every multiprocessor goes through its share of items, 32 rows of weights each with
// up to 4 rows of activations: 16 rows of W_gate and the same of W_up, or 32 of W_down. A warp keeps a ring of items
// filled; sets of warps take them in turn, and a set's warps split the columns, 256 at a time (byte_products.cuh).
#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include <keel/backend/cuda/byte_products.cuh>
#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>
#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/mma.cuh>
#include <keel/backend/cuda/slot_ring.cuh>

namespace keel::cuda_launch::detail {

/// How the blocks go through items.
struct few_experts_shape {
    static constexpr int most_warps = 18, most_sets = 6;
    static constexpr int most_threads = (most_warps + 1) * 32;
    static constexpr int slots_of_set = 2;  // of the ring of items, and so many items' sums are kept

    int warps, sets;  // warps of a set, at most most_warps of all sets
    int slot_bytes;
    int items;  // of a tile

    __host__ __device__ int slots() const { return slots_of_set * sets; }

    /// Of shared memory: slots; two tiles' activations; for every slot the sums of all warps of a set but one.
    __host__ __device__ int sums_of_one() const { return (warps - 1) * 32; }
    int bytes(int columns) const {
        return cuda_kernels::slot_alignment +
               slots() * (slot_bytes + sums_of_one() * static_cast<int>(sizeof(float4))) +
               2 * byte_rows::bytes(columns);
    }
};

template <int Matrices>
struct few_experts_arguments {
    const row_tile* tiles;
    const int* tile_count;
    const int* pair;  // of a position
    const float* x;   // rows pair / k
    long long x_row;
    int k;
    matrix weight[Matrices];
    const unsigned char* shared[Matrices];  // of one more expert, whose number is the count of the others; or null
    float* out;                             // rows pair: silu(W_gate x) W_up x, or W_down x
    long long out_row;
    few_experts_shape shape;
};

/// A block's share of the items of all tiles. Where an expert has a second tile, its items alternate with those of the
/// first, so that L2 still has the weights when they are asked for again.
class few_experts_share {
public:
    template <int Matrices>
    __device__ explicit few_experts_share(const few_experts_arguments<Matrices>& a)
        : tiles_(a.tiles), count_(*a.tile_count), items_(a.shape.items) {
        const long long all = count_ * items_;
        first_ = static_cast<int>(all * blockIdx.x / gridDim.x);
        last_ = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
    }

    /// Calls f(tiles, count, begin, first, last) for one or two tiles, as one, that the block has a share in: of their
    /// items from `begin` on, [first, last), all counted from the share's first one on.
    template <class F>
    __device__ void for_each(F&& f) const {
        constexpr int rows = byte_rows::most_rows;
        int t = first_ / items_;
        if (t < count_ && tiles_[t].first % (2 * rows) != 0) --t;  // an expert's tiles begin at multiples of 8
        while (t * items_ < last_) {
            row_tile tiles = tiles_[t];
            int count = 1;
            if (tiles.rows == rows && t + 1 < count_ && tiles_[t + 1].first == tiles.first + rows) {
                tiles.rows += tiles_[t + 1].rows, ++count;
            }
            const int begin = t * items_, end = begin + count * items_;
            f(tiles, count, begin - first_, max(begin, first_) - first_, min(end, last_) - first_);
            t += count;
        }
    }

private:
    const row_tile* tiles_;
    int count_, items_, first_, last_;
};

template <layout L, int Matrices>
struct few_experts_block {
    using shape = few_experts_shape;
    using slot_ring = cuda_kernels::slot_ring<shape::most_sets * shape::slots_of_set>;
    static constexpr int rows_of_matrix = item_rows::count / Matrices;

    const few_experts_arguments<Matrices>& a;
    slot_ring& ring;
    unsigned char* memory;  // slots, activations, sums
    int lane;

    __device__ item_rows rows() const { return {a.weight[0].row_bytes}; }
    __device__ unsigned char* slot(const slot_ring::cursor& at) const { return memory + at.slot * a.shape.slot_bytes; }
    __device__ unsigned char* behind_slots() const { return memory + a.shape.slots() * a.shape.slot_bytes; }
    __device__ static int rows_in(const row_tile& tiles, int which) {
        return min(tiles.rows - which * byte_rows::most_rows, byte_rows::most_rows);
    }
    __device__ byte_rows rows_of(int tile) const {
        const int columns = a.weight[0].columns;
        return {behind_slots() + tile * byte_rows::bytes(columns), columns};
    }

    /// The warp that fills slots.
    __device__ void fill() const {
        slot_ring::cursor at{a.shape.slots()};
        few_experts_share(a).for_each([&](const row_tile& tiles, int count, int begin, int first, int last) {
            const int expert = tiles.matrix, row_bytes = a.weight[0].row_bytes;
            const bool shared = expert == a.weight[0].count;
            const long long of_expert = shared ? 0 : static_cast<long long>(expert) * a.weight[0].rows * row_bytes;
#pragma unroll 1
            for (int item = first; item < last; ++item, at.next()) {
                const int first_row = ((item - begin) >> (count - 1)) * rows_of_matrix;
                ring.fill(at, item_rows::count * row_bytes, [&](const stage_copy& copy) {
                    copy.pieces<true>(item_rows::pieces, item_rows::piece * row_bytes, [&](int p) {
                        const int m = p * Matrices / item_rows::pieces;
                        const int row = first_row + p * item_rows::piece % rows_of_matrix;
                        return stage_copy::piece{
                            slot(at) + rows().at_piece(p),
                            (shared ? a.shared[m] : a.weight[m].data) + of_expert + row * row_bytes};
                    });
                });
            }
        });
    }

    /// Warp `part` of a set.
    __device__ void multiply(int set, int part) const {
        const shape& s = a.shape;
        const int users = s.sets * s.warps;
        slot_ring::cursor at{s.slots()};
        at.next(set);
        int item = set, turn = 0;
        few_experts_share(a).for_each([&](const row_tile& tiles, int count, int begin, int, int last) {
            named_barrier(1, users * 32);  // nobody needs the tiles before
            for (int i = 0; i < count; ++i) {
                rows_of(i).fill(rows_in(tiles, i), set * s.warps + part, users, [&](int r) {
                    return a.x + a.pair[tiles.first + i * byte_rows::most_rows + r] / a.k * a.x_row;
                });
            }
            named_barrier(1, users * 32);
            for (; item < last; item += s.sets, at.next(s.sets)) {
                const int which = count == 2 ? (item - begin) % 2 : 0, row_of_x = lane % 4;
                // Where the results of one of the warps go, of which it is each one's turn: known when they are there.
                int pair = -1;
                if (part == turn && row_of_x < rows_in(tiles, which)) {
                    pair = a.pair[tiles.first + which * byte_rows::most_rows + row_of_x];
                }
                float acc[2][2] = {};
                multiply_item(acc, at, part, rows_of(which));
                add_up(acc, at, part, turn, pair, ((item - begin) >> (count - 1)) * rows_of_matrix);
                if (++turn == s.warps) turn = 0;
            }
        });
    }

    __device__ void multiply_item(float (&acc)[2][2], const slot_ring::cursor& at, int part, const byte_rows& x) const {
        const int blocks = a.weight[0].columns / byte_rows::block, row_bytes = a.weight[0].row_bytes;
        const unsigned char* const mine = slot(at) + rows().at_pair(lane / 4);
        const unsigned char* const nibbles =
            slot(at) + rows().at_pair(lane % 8) + lane / 8 % 2 * 2 * row_bytes + lane / 16 * 16;
        ring.wait(at);
        for (int block = part; block < blocks; block += a.shape.warps) {
            multiply_block<L>(acc, nibbles, mine, row_bytes, 8 * blocks, block, x, lane);
        }
    }

    /// Warp `turn` of the set adds up what all of them have for an item. The others do not wait: the slot, and with it
    /// the item's sums and barrier, is not used again before that warp has released it.
    __device__ void add_up(const float (&acc)[2][2], const slot_ring::cursor& at, int part, int turn, int pair,
                           int first_row) const {
        const shape& s = a.shape;
        float4* const sums = reinterpret_cast<float4*>(behind_slots() + 2 * byte_rows::bytes(a.weight[0].columns)) +
                             at.slot * s.sums_of_one() + lane;
        const int barrier = 2 + at.slot, threads = s.warps * 32;
        if (part != turn) {
            sums[(part < turn ? part : part - 1) * 32] = {acc[0][0], acc[0][1], acc[1][0], acc[1][1]};
            named_arrive(barrier, threads);
            return ring.release(at);
        }
        named_barrier(barrier, threads);
        // In the order of the warps, whichever it is.
        float4 total = {0, 0, 0, 0};
        const auto add = [&](const float4& v) { total = {total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w}; };
#pragma unroll 4
        for (int i = 0; i < turn; ++i) add(sums[i * 32]);
        add({acc[0][0], acc[0][1], acc[1][0], acc[1][1]});
#pragma unroll 4
        for (int i = turn; i < s.warps - 1; ++i) add(sums[i * 32]);
        ring.release(at);
        const float all[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = item_rows::result(lane / 4, i / 2, i % 2);
            float y = all[i];
            // Half of the lanes have rows of W_gate, the others the same of W_up.
            if (Matrices == 2) y = cuda_kernels::silu(y) * __shfl_xor_sync(~0u, y, 16);
            if (pair >= 0 && row < rows_of_matrix) a.out[pair * a.out_row + first_row + row] = y;
        }
    }
};

/// Grid: (multiprocessors). Behind the sets there is a warp that fills slots.
template <layout L, int Matrices>
__global__ void __launch_bounds__(few_experts_shape::most_threads, 1)
    few_experts_kernel(const __grid_constant__ few_experts_arguments<Matrices> a) {
    using block = few_experts_block<L, Matrices>;
    __shared__ typename block::slot_ring ring;
    const int warp = static_cast<int>(threadIdx.x) / 32, users = a.shape.sets * a.shape.warps;
    const block here{a, ring, cuda_kernels::slot_memory(), static_cast<int>(threadIdx.x) % 32};
    if (threadIdx.x == 0) ring.init(a.shape.warps);
    __syncthreads();
    if (warp < users) {
        cuda_kernels::wait_for_previous();
        here.multiply(warp / a.shape.warps, warp % a.shape.warps);
    } else {
        // The list is older than the kernel before W_down's, so that weights need not wait.
        if (Matrices == 2) cuda_kernels::wait_for_previous();
        here.fill();
    }
}

/// Chooses the shape for the weights; false if there is no kernel for them here.
template <int Matrices>
bool shape_few_experts(few_experts_arguments<Matrices>& a) {
    const matrix& m = a.weight[0];
    if (!cuda_kernels::is_k_quant(m.type) || m.columns % 256 != 0 || m.rows % item_rows::count != 0) return false;
    const int blocks = m.columns / 256, rounds = cuda_kernels::ceil_div(blocks, few_experts_shape::most_warps);
    few_experts_shape& s = a.shape;
    s.warps = cuda_kernels::ceil_div(blocks, rounds);
    s.slot_bytes = item_rows{m.row_bytes}.bytes();
    s.items = m.rows * Matrices / item_rows::count;
    const int room = cuda_kernels::shared_bytes_up_to(228 * 1024, 512);
    s.sets = std::min(few_experts_shape::most_warps / s.warps, few_experts_shape::most_sets);
    while (s.sets > 0 && s.bytes(m.columns) > room) --s.sets;
    return s.sets > 0;
}

template <int Matrices>
cudaError_t start_few_experts(const few_experts_arguments<Matrices>& a, cudaStream_t stream) {
    const auto with = [&]<layout L>() {
        const few_experts_shape& s = a.shape;
        return cuda_kernels::start(few_experts_kernel<L, Matrices>, grid_of(cuda_kernels::multiprocessors()),
                                   (s.sets * s.warps + 1) * 32, s.bytes(a.weight[0].columns), stream, a);
    };
    if (a.weight[0].type == layout::q4_k) return with.template operator()<layout::q4_k>();
    if (a.weight[0].type == layout::q5_k) return with.template operator()<layout::q5_k>();
    return with.template operator()<layout::q6_k>();
}

}  // namespace keel::cuda_launch::detail
