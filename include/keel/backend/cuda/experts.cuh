// SPDX-License-Identifier: MIT
//
// Gated feed-forward networks for few rows: only the chosen experts' weights are read. Behind the router both kernels
// make the choice by themselves, in every block: that takes less time than a kernel in between.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/matvec.cuh>
#include <keel/backend/cuda/one_row_experts.cuh>
#include <keel/backend/cuda/route.cuh>

namespace keel::cuda_kernels {

/// What lies between the two kernels: per row and slot, the down product's input as `staged` wants it, as codes if its
/// weights are codes. Units of the widest network apart.
__device__ inline unsigned char* hidden_of(const launch::experts_args& a, int slots, int units, int row, int slot) {
    return reinterpret_cast<unsigned char*>(a.hidden) +
           (static_cast<long long>(row) * slots + slot) * staged::value_bytes(units);
}

inline constexpr int up_threads = 128, up_warps = up_threads / warp_size;
inline constexpr int down_threads = 288, down_warps = down_threads / warp_size;

/// silu(W_gate x) * W_up x. A block makes a unit of 32 elements of one slot. The shared network's blocks come first, as
/// its weights need no choice. Grid: (units, slots, rows).
template <bool Codes, space From>
__global__ void __launch_bounds__(up_threads, 5)
    expert_up_kernel(const __grid_constant__ launch::experts_args a, const int widest_units, const bool floats,
                     const bool codes, const int slot_bytes) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ expert_slots slots;
    __shared__ float made[2][32], squares[up_warps];
    using tile_of = row_tile<8>;
    const int row = blockIdx.z, unit = blockIdx.x, warp = threadIdx.x / warp_size;
    const bool shared = a.shared_gate.data != nullptr && blockIdx.y == 0;
    const int slot = shared ? a.k : blockIdx.y - (a.shared_gate.data != nullptr ? 1 : 0);
    const launch::matrix &gate = shared ? a.shared_gate : a.gate, &up = shared ? a.shared_up : a.up,
                         &down = shared ? a.shared_down : a.down;
    if (unit >= units_of(gate.rows)) return;

    // A warp's tiles, by turns of W_gate and W_up, go through two slots of shared memory.
    constexpr int tiles = 2 * 32 / (up_warps * tile_of::rows);
    const int columns = gate.columns, units = units_of(columns);
    const staged x(memory, units, floats);
    const int x_bytes = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    unsigned char* const weights = memory + x_bytes + 2 * warp * slot_bytes;
    const auto row_of = [&](int i) { return (i / 2 * up_warps + warp) * tile_of::rows; };
    const auto rows_of = [&](int which, int i) {
        const launch::matrix& m = i % 2 == 0 ? gate : up;
        const int first = 32 * unit + row_of(i);
        return tile_of(m, static_cast<long long>(which) * m.rows + first, m.rows - first);
    };
    const auto fetch = [&](int which, int i) {
        if constexpr (From == space::shared) {
            if (i < tiles) rows_of(which, i).fetch(weights + i % 2 * slot_bytes);
            end_copies();
        }
    };
    if (shared) fetch(0, 0), fetch(0, 1);
    wait_for_previous();
    if (a.codes != nullptr) {
        const unsigned char* from = a.codes + static_cast<long long>(row) * x_bytes;
        for (int i = 16 * threadIdx.x; i < x_bytes; i += 16 * up_threads) begin_copy16(memory + i, from + i);
        end_copies();
    }
    if (!shared) slots.fill(a, row);
    if (a.codes == nullptr)
        stage_weighted(x, units, floats, codes, up_threads, a.x + row * a.x_row, a.norm, columns, squares);
    const int which = shared ? 0 : slots.which[slot];
    if (!shared) fetch(which, 0), fetch(which, 1);
    if (shared || a.codes == nullptr || From == space::global) {
        copies_done();
    } else {
        copies_done<2>();  // the codes, not yet the weights
    }
    __syncthreads();
    const float factor =
        a.codes == nullptr && a.norm != nullptr ? inverse_rms(squares, up_threads, columns, a.epsilon) : 1.0f;

#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
        copies_done<1>();
        __syncwarp();
        const tile_of rows = rows_of(which, i);
        float sum[1][1] = {};
        if (rows.count > 0) {
            visit_format(rows.type, [&]<class Format>() {
                rows.template multiply<Format, Codes, From>(weights + i % 2 * slot_bytes, units, x, 0, sum);
            });
        }
        __syncwarp();
        fetch(which, i + 2);
        const float total = lanes_sum<8>(sum[0][0]) * factor;
        if (threadIdx.x % 8 == 0) made[i % 2][row_of(i) + tile_of::row()] = total;
    }
    __syncthreads();
    if (threadIdx.x >= warp_size) return;
    const bool as_codes = Codes && is_integer(down.type);
    const staged out(hidden_of(a, gridDim.y, widest_units, row, slot), units_of(gate.rows), !as_codes);
    const int i = threadIdx.x;
    const float value = 32 * unit + i < gate.rows ? silu(made[0][i]) * made[1][i] : 0.0f;
    if (!as_codes) {
        out.values[staged::place(32 * unit + i)] = value;
        return;
    }
    put_unit(out, unit, value);
}

/// out = or += the weighted sum over the slots of W_down hidden. A warp takes two elements of the output, over all
/// slots. Grid: (blocks, rows). Behind the router and the first kernel, the choice is there before the wait.
template <bool Codes, space From>
__global__ void __launch_bounds__(down_threads, 3)
    expert_down_kernel(const __grid_constant__ launch::experts_args a, const int widest_units, const int slot_bytes) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ expert_slots slots;
    using tile_of = row_tile<warp_size, 2>;
    const bool shared = a.shared_gate.data != nullptr, routed = a.route.logits != nullptr;
    const int row = blockIdx.y, count = a.k + (shared ? 1 : 0);
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, warps = blockDim.x / warp_size;
    const auto bytes = [&](const launch::matrix& down) {
        const int units = units_of(down.columns);
        return Codes && is_integer(down.type) ? staged::code_bytes(units) : staged::value_bytes(units);
    };
    const int in_bytes = bytes(a.down), shared_at = a.k * in_bytes;
    const int all_bytes = shared_at + (shared ? bytes(a.shared_down) : 0);
    unsigned char* const weights = memory + all_bytes + warp * slot_bytes;
    const int pitch = tile_of::rows * a.down.row_bytes;  // between slots' rows
    const auto rows_of = [&](const launch::matrix& down, int slot, int r) {
        const int which = slot == a.k ? 0 : slots.which[slot];
        return tile_of(down, static_cast<long long>(which) * down.rows + r, down.rows - r);
    };
    const auto fetch_chosen = [&](int r) {
        for (int slot = 0; slot < a.k; ++slot) rows_of(a.down, slot, r).fetch(weights + slot * pitch);
    };
    const auto fetch_shared = [&](int r) {
        if (shared) rows_of(a.shared_down, a.k, r).fetch(weights + a.k * pitch);
    };
    constexpr bool copies = From == space::shared;
    int r = (warp * gridDim.x + blockIdx.x) * tile_of::rows;

    start_next();
    if (copies && r < a.down.rows) fetch_shared(r);
    if (!routed) wait_for_previous();
    slots.fill(a, row);
    if (copies && r < a.down.rows) fetch_chosen(r);
    if (routed) wait_for_previous();
    for (int i = 16 * threadIdx.x; i < all_bytes; i += 16 * blockDim.x) {
        const int slot = min(i / in_bytes, a.k);
        begin_copy16(memory + i, hidden_of(a, count, widest_units, row, slot) + i - slot * in_bytes);
    }
    copies_done();
    __syncthreads();
    while (r < a.down.rows) {
        float* const out = a.out + row * a.out_row + r + lane;
        const bool mine = lane < tile_of::rows && r + lane < a.down.rows;
        const float before = mine && a.accumulate ? *out : 0.0f;
        if (copies) {
            copies_done();
            __syncwarp();
        }
        float total[tile_of::each] = {};
        const auto add_slots = [&](const launch::matrix& down, int first_slot, int last_slot) {
            const int units = units_of(down.columns);
            visit_format(down.type, [&]<class Format>() {
                constexpr bool floats = !(Codes && Format::integer);
#pragma unroll 1
                for (int slot = first_slot; slot < last_slot; ++slot) {
                    float sum[tile_of::each][1] = {};
                    rows_of(down, slot, r)
                        .template multiply<Format, Codes, From>(
                            weights + slot * pitch, units, staged(memory + slot * in_bytes, units, floats), 0, sum);
#pragma unroll
                    for (int j = 0; j < tile_of::each; ++j) total[j] += slots.weight[slot] * sum[j][0];
                }
            });
        };
        add_slots(a.down, 0, a.k);
        if (shared) add_slots(a.shared_down, a.k, a.k + 1);
        const int next = r + static_cast<int>(gridDim.x) * warps * tile_of::rows;
        if (copies) {
            __syncwarp();
            if (next < a.down.rows) fetch_shared(next), fetch_chosen(next);
        }
        float result = 0;
#pragma unroll
        for (int j = 0; j < tile_of::each; ++j) {
            const float all = lanes_sum(total[j]);
            if (lane == j) result = before + all;
        }
        if (mine) *out = result;
        r = next;
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t experts(const experts_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (serves_one_row(a)) return start_one_row(a, stream);
    const bool shared = a.shared_gate.data != nullptr;
    const int slots = a.k + (shared ? 1 : 0);
    if (a.k > most_chosen || a.route.experts > most_experts) return cudaErrorInvalidValue;
    const int units = units_of(a.gate.columns);
    const int widest = max(a.gate.rows, shared ? a.shared_gate.rows : 0);
    bool floats = false, codes = false;
    int row_bytes = 0;
    const auto input = [&](const matrix& m) {
        (a.quantise && is_integer(m.type) ? codes : floats) = true;
        row_bytes = max(row_bytes, m.row_bytes);
    };
    input(a.gate), input(a.up);
    if (shared) input(a.shared_gate), input(a.shared_up);
    const int in_bytes = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    const auto up = [&]<space From>(int slot_bytes) {
        return start(a.quantise ? expert_up_kernel<true, From> : expert_up_kernel<false, From>,
                     grid_of(units_of(widest), slots, a.rows), up_threads, in_bytes + 2 * up_warps * slot_bytes, stream,
                     a, units_of(widest), floats, codes, slot_bytes);
    };
    const int up_slot = row_tile<8>::rows * row_bytes;
    const bool up_fits = in_bytes + 2 * up_warps * up_slot <= shared_bytes_up_to(208 * 1024);
    const auto e = up_fits ? up.template operator()<space::shared>(up_slot) : up.template operator()<space::global>(0);
    if (e != cudaSuccess) return e;

    const auto hidden_bytes = [&](const matrix& m) {
        const int u = units_of(m.columns);
        return a.quantise && is_integer(m.type) ? staged::code_bytes(u) : staged::value_bytes(u);
    };
    const int bytes = a.k * hidden_bytes(a.down) + (shared ? hidden_bytes(a.shared_down) : 0);
    const int tiles = ceil_div(a.down.rows, row_tile<warp_size, 2>::rows), blocks = min(tiles, multiprocessors());
    const auto down = [&]<space From>(int x, int warps, int slot_bytes) {
        return start(a.quantise ? expert_down_kernel<true, From> : expert_down_kernel<false, From>, grid_of(x, a.rows),
                     warps * warp_size, bytes + warps * slot_bytes, stream, a, units_of(widest), slot_bytes);
    };
    const int slot_bytes =
        row_tile<warp_size, 2>::rows * (a.k * a.down.row_bytes + (shared ? a.shared_down.row_bytes : 0));
    const int fit = (shared_bytes_up_to(160 * 1024) - bytes) / slot_bytes;
    const int warps = min(min(down_warps, ceil_div(tiles, blocks)), fit);
    constexpr int worth = 4;  // fewer warps than that do not keep a multiprocessor busy
    return warps >= worth || (warps > 0 && warps * blocks >= tiles)
               ? down.template operator()<space::shared>(blocks, warps, slot_bytes)
               : down.template operator()<space::global>(ceil_div(tiles, down_warps), down_warps, 0);
}

}  // namespace keel::cuda_launch
