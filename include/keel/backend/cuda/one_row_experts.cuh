// SPDX-License-Identifier: MIT
//
// The chosen experts' networks for one row of activations, all weights K-quants: as one_row.cuh, with the choice made
// by the warp that asks for the weights.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/one_row.cuh>
#include <keel/backend/cuda/route.cuh>

namespace keel::cuda_kernels {

/// What lies between the two kernels: per row and slot, the down product's input as `staged` wants it, as codes if its
/// weights are codes. Units of the widest network apart.
__device__ inline unsigned char* hidden_of(const launch::experts_args& a, int slots, int units, int row, int slot) {
    return reinterpret_cast<unsigned char*>(a.hidden) +
           (static_cast<long long>(row) * slots + slot) * staged::value_bytes(units);
}

/// One of two matrices, field by field: a reference to parameters would make them memory.
__device__ inline launch::matrix pick(bool first, const launch::matrix& a, const launch::matrix& b) {
    return {first ? a.data : b.data, first ? a.type : b.type,       first ? a.count : b.count,
            first ? a.rows : b.rows, first ? a.columns : b.columns, first ? a.row_bytes : b.row_bytes};
}

struct one_row_up_shape {
    static constexpr int users = 9, threads = users * warp_size, all_threads = threads + warp_size, most_slots = 8;

    int units, lanes, rows;  // as in one_row_shape; rows is a power of two, at most 32
    int slots, slot_bytes, widest_units;

    __host__ __device__ int fixed_bytes() const { return staged::code_bytes(units) + 64 * partial_pitch(lanes) * 4; }
};

/// silu(W_gate x) * W_up x as codes. A block makes a unit of 32 elements of one slot, the shared network's blocks
/// first. Grid: (units, slots).
__global__ void __launch_bounds__(one_row_up_shape::all_threads, 3)
    one_row_up_kernel(const __grid_constant__ launch::experts_args a, const __grid_constant__ one_row_up_shape s) {
    extern __shared__ __align__(16) unsigned char memory[];  // slots, codes, partial sums
    __shared__ slot_ring<one_row_up_shape::most_slots> ring;
    __shared__ float squares[one_row_up_shape::users], made[64], logits[warp_size];
    __shared__ int which[warp_size];
    constexpr int threads = one_row_up_shape::threads;
    unsigned char* const after_slots = memory + s.slots * s.slot_bytes;
    const staged codes(after_slots, s.units, false);
    float* const partial = reinterpret_cast<float*>(after_slots + staged::code_bytes(s.units));

    const bool any_shared = a.shared_gate.data != nullptr, shared = any_shared && blockIdx.y == 0;
    const int unit = blockIdx.x, slot = shared ? a.k : static_cast<int>(blockIdx.y) - (any_shared ? 1 : 0);
    const launch::matrix gate = pick(shared, a.shared_gate, a.gate), up = pick(shared, a.shared_up, a.up);
    if (unit >= units_of(gate.rows)) return;
    const int half = 32 / s.rows;  // steps of W_gate; as many of W_up follow
    const auto rows_of = [&](int step) { return min(s.rows, gate.rows - 32 * unit - step % half * s.rows); };
    slot_ring<one_row_up_shape::most_slots>::cursor at{s.slots};

    if (threadIdx.x == 0) ring.init(one_row_up_shape::users);
    __syncthreads();
    if (threadIdx.x >= threads) {
        const auto fill = [&](int step, int expert) {
            const launch::matrix m = pick(step < half, gate, up);
            const long long row = static_cast<long long>(expert) * m.rows + 32 * unit + step % half * s.rows;
            ring.fill(at, memory + at.slot * s.slot_bytes, m.data + row * m.row_bytes,
                      max(0, rows_of(step)) * m.row_bytes);
            at.next();
        };
        int step = 0, expert = 0;
        if (shared) {
            for (; step < s.slots; ++step) fill(step, expert);
            wait_for_previous();
        } else {
            const warp_choice choice(a.route);
            wait_for_previous();
            expert = choice.make(a.route, slot + 1, which, logits);
        }
        for (; step < 2 * half; ++step) fill(step, expert);
        return;
    }
    const eight ahead = weights_ahead(a.norm, gate.columns);
    const int row = threadIdx.x / s.lanes, lane = threadIdx.x % s.lanes;
    wait_for_previous();
    stage_weighted<true>(codes, s.units, false, true, threads, a.x, a.norm, gate.columns, squares, &ahead);
    barrier_of(threads);
    const float factor = inverse_rms(squares, threads, gate.columns, a.epsilon);
    own_units own(codes, s.units, lane, s.lanes);
    own.x[0].scale *= factor, own.x[1].scale *= factor;
#pragma unroll 1
    for (int step = 0; step < 2 * half; ++step, at.next()) {
        const launch::matrix m = pick(step < half, gate, up);
        ring.wait(at);
        if (row < s.rows) {
            float sum = 0;
            if (row < rows_of(step)) {
                const unsigned char* weights = memory + at.slot * s.slot_bytes + row * m.row_bytes;
                visit_k_quant(m.type, [&]<class Format>() { sum = own.template product<Format>(weights, s.units); });
            }
            partial[(step * s.rows + row) * partial_pitch(s.lanes) + lane] = sum;
        }
        ring.release(at);
    }
    barrier_of(threads);
    if (threadIdx.x < 256) {  // four threads to a row
        float sum = 0;
        const float* of_row = partial + threadIdx.x / 4 * partial_pitch(s.lanes);
#pragma unroll 4
        for (int i = threadIdx.x % 4; i < s.lanes; i += 4) sum += of_row[i];
        sum = lanes_sum<4>(sum);
        if (threadIdx.x % 4 == 0) made[threadIdx.x / 4] = sum;
    }
    barrier_of(threads);
    if (threadIdx.x >= warp_size) return;
    const int i = threadIdx.x, slots = a.k + (any_shared ? 1 : 0);
    put_unit(staged(hidden_of(a, slots, s.widest_units, 0, slot), units_of(gate.rows), false), unit,
             silu(made[i]) * made[32 + i]);
}

struct one_row_down_shape {
    int rows;                      // of a block
    int slots, widest_units;       // of the networks' hidden activations
    int slot_bytes, shared_bytes;  // of weights of a slot, of the shared network's

    __host__ __device__ int partial_floats() const { return rows * slots * warp_size; }
    __host__ __device__ int weight_bytes(int k) const { return k * slot_bytes + (slots > k ? shared_bytes : 0); }
};

inline constexpr int one_row_most_slots = 12;

/// x += the weighted sum over the slots of W_down hidden. A warp takes a slot and `rows` rows of it, a lane a unit; one
/// more warp chooses, before the previous kernel is done, and asks for the weights. Grid: (blocks).
__global__ void __launch_bounds__((one_row_most_slots + 1) * warp_size, 3)
    one_row_down_kernel(const __grid_constant__ launch::experts_args a, const __grid_constant__ one_row_down_shape s) {
    extern __shared__ __align__(16) unsigned char memory[];  // weights of every slot, partial sums
    __shared__ slot_ring<one_row_most_slots> ring;
    __shared__ float weight[warp_size];
    __shared__ int which[warp_size];
    float* const partial = reinterpret_cast<float*>(memory + s.weight_bytes(a.k));
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, threads = s.slots * warp_size;
    const int first = blockIdx.x * s.rows, rows = min(s.rows, a.down.rows - first);
    const bool shared = warp == a.k;

    start_next();
    if (threadIdx.x == 0) ring.init(1);
    __syncthreads();
    if (warp == s.slots) {
        const auto fill = [&](int slot, const launch::matrix& m, int expert) {
            const long long row = static_cast<long long>(expert) * m.rows + first;
            ring.fill({s.slots, slot}, memory + slot * s.slot_bytes, m.data + row * m.row_bytes, rows * m.row_bytes);
        };
        if (s.slots > a.k) fill(a.k, a.shared_down, 0);
        warp_choice(a.route).make(a.route, a.k, which, weight);
        weigh(a.route, weight);
        for (int slot = 0; slot < a.k; ++slot) fill(slot, a.down, which[slot]);
        return;
    }
    const launch::matrix down = pick(shared, a.shared_down, a.down);
    const int units = units_of(down.columns), unit = min(lane, units - 1);
    wait_for_previous();
    float before = 0;
    if (lane == 0 && warp < rows) before = a.out[first + warp];
    unit_codes x(staged(hidden_of(a, s.slots, s.widest_units, 0, warp), units, false), unit);
    ring.wait({s.slots, warp});
    x.scale *= lane < units ? (shared ? 1.0f : weight[warp]) : 0.0f;
    visit_k_quant(down.type, [&]<class Format>() {
        const unsigned char* weights = memory + warp * s.slot_bytes;
#pragma unroll 2
        for (int r = 0; r < rows; ++r) {
            partial[r * threads + threadIdx.x] =
                Format::dot(Format::template load<space::shared>(weights + r * down.row_bytes, units, unit), x);
        }
    });
    barrier_of(threads);
    for (int r = warp; r < rows; r += s.slots) {
        float sum = 0;
#pragma unroll 4
        for (int i = lane; i < threads; i += warp_size) sum += partial[r * threads + i];
        sum = lanes_sum(sum);
        if (lane == 0) a.out[first + r] = (r == warp ? before : a.out[first + r]) + sum;
    }
}

inline bool serves_one_row(const launch::experts_args& a) {
    const bool shared = a.shared_gate.data != nullptr;
    const auto units = [](const launch::matrix& m) { return units_of(m.columns); };
    const auto codes = [](const launch::matrix& m) { return is_k_quant(m.type); };
    return a.rows == 1 && a.quantise && a.accumulate && a.norm != nullptr && a.codes == nullptr &&
           aligned16(a.x, a.norm) && warp_choice::serves(a.route) && a.k + (shared ? 1 : 0) <= one_row_most_slots &&
           codes(a.gate) && codes(a.up) && codes(a.down) && units(a.down) <= warp_size &&
           ceil_div(units(a.gate), 2) <= one_row_up_shape::threads &&
           (!shared ||
            (codes(a.shared_gate) && codes(a.shared_up) && codes(a.shared_down) && units(a.shared_down) <= warp_size));
}

inline cudaError_t start_one_row(const launch::experts_args& a, cudaStream_t stream) {
    const bool shared = a.shared_gate.data != nullptr;
    const int slots = a.k + (shared ? 1 : 0);
    int widest = max(a.gate.row_bytes, a.up.row_bytes), widest_rows = a.gate.rows;
    if (shared) {
        widest = max(widest, max(a.shared_gate.row_bytes, a.shared_up.row_bytes));
        widest_rows = max(widest_rows, a.shared_gate.rows);
    }
    const int widest_units = units_of(widest_rows), units = units_of(a.gate.columns), lanes = ceil_div(units, 2);
    one_row_up_shape up{units, lanes, 32, 0, 0, widest_units};
    while (up.rows * lanes > one_row_up_shape::threads) up.rows /= 2;
    up.slot_bytes = up.rows * widest;
    const int room = shared_bytes_up_to(58 * 1024) - up.fixed_bytes();  // three blocks beside one of the next kernel's
    up.slots = max(1, min(min(room / up.slot_bytes, one_row_up_shape::most_slots), 2 * 32 / up.rows));
    const auto e = start(one_row_up_kernel, launch::grid_of(widest_units, slots), one_row_up_shape::all_threads,
                         up.fixed_bytes() + up.slots * up.slot_bytes, stream, a, up);
    if (e != cudaSuccess) return e;

    const auto down_of = [&](int rows) -> one_row_down_shape {
        return {rows, slots, widest_units, rows * a.down.row_bytes, shared ? rows * a.shared_down.row_bytes : 0};
    };
    const auto bytes_of = [&](const one_row_down_shape& s) { return s.weight_bytes(a.k) + 4 * s.partial_floats(); };
    one_row_down_shape down = down_of(ceil_div(a.down.rows, 3 * multiprocessors()));
    while (down.rows > 1 && bytes_of(down) > shared_bytes_up_to(72 * 1024)) down = down_of(down.rows - 1);
    return start(one_row_down_kernel, launch::grid_of(ceil_div(a.down.rows, down.rows)), (slots + 1) * warp_size,
                 bytes_of(down), stream, a, down);
}

}  // namespace keel::cuda_kernels
