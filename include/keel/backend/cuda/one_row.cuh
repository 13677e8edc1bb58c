// SPDX-License-Identifier: MIT
//
// Products of K-quantised matrices with one row of activations, which is what decoding for one user consists of. A
// thread keeps the codes of two units of the activations in registers and meets the same two units of every row of the
// weights; these flow through a ring of slots in shared memory that one warp fills by bulk copies, from before the
// previous kernel is done on.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>
#include <keel/backend/cuda/slot_ring.cuh>
#include <keel/backend/cuda/staging.cuh>

namespace keel::cuda_kernels {

/// A barrier of the first `threads` threads of a block, whole warps.
__device__ inline void barrier_of(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

/// The two units of every row that a thread multiplies: `lane` and lane + lanes, where `lanes` threads share a row.
struct own_units {
    unit_codes x[2];
    int unit[2];  // the second may not be there: then it weighs nothing

    __device__ own_units(const staged& from, int units, int lane, int lanes)
        : x{{from, lane}, {from, min(lane + lanes, units - 1)}}, unit{lane, min(lane + lanes, units - 1)} {
        if (lane + lanes >= units) x[1].scale = 0;
    }

    /// With a row of weights in shared memory.
    template <class Format>
    __device__ float product(const unsigned char* row, int units) const {
        return Format::dot(Format::template load<space::shared>(row, units, unit[0]), x[0]) +
               Format::dot(Format::template load<space::shared>(row, units, unit[1]), x[1]);
    }
};

/// Floats from a row of partial sums to the next, so that four rows meet no bank conflict.
__host__ __device__ constexpr int partial_pitch(int lanes) { return ceil_div(lanes - 8, 16) * 16 + 8; }

/// Neighbouring rows of one of a kernel's products, as they go through the ring.
struct alignas(16) row_step {
    const unsigned char* data;
    float* out;
    int rows, row_bytes;
    launch::layout type;
    int accumulate;
};

/// How blocks go through the rows of all products together.
struct one_row_shape {
    static constexpr int users = 16, threads = users * warp_size, all_threads = threads + warp_size;
    static constexpr int most_slots = 8, summed = threads / 8;  // rows that are summed at once

    int units, lanes;                     // `lanes` threads share a row
    int rows, steps;                      // rows of a step, steps of a block
    int slots, slot_bytes;                // of the ring
    int ends[launch::matvec_args::most];  // steps up to the end of every product, all blocks together

    __host__ __device__ int group() const { return summed / rows; }  // steps that are summed at once
    __host__ __device__ int partial_bytes() const { return group() * rows * partial_pitch(lanes) * 4; }
    __host__ __device__ int fixed_bytes() const {
        return slot_alignment + staged::code_bytes(units) + partial_bytes() +
               steps * static_cast<int>(sizeof(row_step));
    }

    /// Step i of all blocks'; behind the last, one of no rows.
    __device__ row_step step(const launch::matvec_args& a, int i) const {
        int begin = 0;
        row_step s{};
#pragma unroll
        for (int p = 0; p < launch::matvec_args::most; ++p) {  // constant indices: parameters are no memory
            if (p < a.products && i >= begin && i < ends[p]) {
                const launch::matrix& m = a.list[p].weight;
                const int row = (i - begin) * rows;
                s = {m.data + static_cast<long long>(row) * m.row_bytes,
                     a.list[p].out + row,
                     min(rows, m.rows - row),
                     m.row_bytes,
                     m.type,
                     a.list[p].accumulate};
            }
            begin = ends[p];
        }
        return s;
    }
};

/// Block b takes steps b, b + grid, ...
__global__ void __launch_bounds__(one_row_shape::all_threads, 2)
    one_row_kernel(const __grid_constant__ launch::matvec_args a, const __grid_constant__ one_row_shape s) {
    unsigned char* const memory = slot_memory();  // slots, codes, partial sums, steps
    __shared__ slot_ring<one_row_shape::most_slots> ring;
    __shared__ float squares[one_row_shape::users];
    constexpr int threads = one_row_shape::threads;
    unsigned char* const after_slots = memory + s.slots * s.slot_bytes;
    const staged codes(after_slots, s.units, false);
    float* const partial = reinterpret_cast<float*>(after_slots + staged::code_bytes(s.units));
    row_step* const steps = reinterpret_cast<row_step*>(after_slots + staged::code_bytes(s.units) + s.partial_bytes());
    const bool user = threadIdx.x < threads;
    slot_ring<one_row_shape::most_slots>::cursor at{s.slots};

    start_next();
    if (threadIdx.x == 0) ring.init(one_row_shape::users);
    for (int i = threadIdx.x; i < s.steps; i += blockDim.x) steps[i] = s.step(a, blockIdx.x + i * gridDim.x);
    __syncthreads();
    if (!user) {
        for (int i = 0; i < s.steps; ++i, at.next()) {
            const row_step step = steps[i];
            ring.fill(at, memory + at.slot * s.slot_bytes, step.data, step.rows * step.row_bytes);
        }
        return;
    }
    const bool normed = a.before == launch::prologue::rms_norm;
    const float* const norm = normed ? a.norm : nullptr;
    const eight ahead = weights_ahead(norm, a.columns);
    const int row = threadIdx.x / s.lanes, lane = threadIdx.x % s.lanes;
    const int summed = threadIdx.x / 8, summed_step = summed / s.rows, summed_row = summed % s.rows;

    wait_for_previous();
    const bool coded = a.before == launch::prologue::codes;
    float factor = 1;
    if (!coded) {
        stage_weighted<true>(codes, s.units, false, true, threads, a.x, norm, a.columns, squares, &ahead);
        barrier_of(threads);
        if (normed) factor = inverse_rms(squares, threads, a.columns, a.epsilon);
    }
    own_units own(coded ? staged(const_cast<unsigned char*>(a.codes), s.units, false) : codes, s.units, lane, s.lanes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (coded && a.squares != nullptr) {
            const float* of_head = a.squares + own.unit[i] / a.slabs * a.slabs;
            float sum = 0;
#pragma unroll
            for (int slab = 0; slab < 8; ++slab) sum += slab < a.slabs ? of_head[slab] : 0.0f;
            factor = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
        }
        own.x[i].scale *= factor;
    }

    for (int from = 0; from < s.steps; from += s.group()) {
        const int here = min(s.group(), s.steps - from);
        float *out = nullptr, before = 0;  // of the row that eight neighbouring threads sum up in the end
        if (summed_step < here) {
            const row_step& step = steps[from + summed_step];
            if (summed_row < step.rows) out = step.out + summed_row;
            if (out != nullptr && step.accumulate) before = *out;
        }
        for (int i = 0; i < here; ++i, at.next()) {
            const row_step step = steps[from + i];
            const unsigned char* weights = memory + at.slot * s.slot_bytes + row * step.row_bytes;
            ring.wait(at);
            if (row < step.rows) {
                visit_k_quant(step.type, [&]<class Format>() {
                    partial[(i * s.rows + row) * partial_pitch(s.lanes) + lane] =
                        own.template product<Format>(weights, s.units);
                });
            }
            ring.release(at);
        }
        barrier_of(threads);
        float sum = 0;
        if (out != nullptr) {
            const float* of_row = partial + summed * partial_pitch(s.lanes);
#pragma unroll 4
            for (int i = threadIdx.x % 8; i < s.lanes; i += 8) sum += of_row[i];
        }
        sum = lanes_sum<8>(sum);
        if (out != nullptr && threadIdx.x % 8 == 0) *out = before + sum;
        if (from + here < s.steps) barrier_of(threads);
    }
}

inline bool serves_one_row(const launch::matvec_args& a) {
    const int lanes = ceil_div(units_of(a.columns), 2);
    bool served = true;
    for (int i = 0; i < a.products; ++i) served = served && is_k_quant(a.list[i].weight.type);
    return a.rows == 1 && a.heads == 1 && a.quantise && served && a.put_codes == nullptr && aligned16(a.x, a.norm) &&
           a.before != launch::prologue::head_norm && (a.before != launch::prologue::codes || a.slabs <= 8) &&
           lanes <= one_row_shape::threads;
}

inline cudaError_t start_one_row(const launch::matvec_args& a, cudaStream_t stream) {
    int widest = 0;
    for (int i = 0; i < a.products; ++i) widest = max(widest, a.list[i].weight.row_bytes);
    const int device_blocks = multiprocessors();
    const int units = units_of(a.columns), lanes = ceil_div(units, 2);
    const auto with = [&](int rows) {
        one_row_shape s{units, lanes, rows, 0, 0, slot_bytes_for(rows * widest), {}};
        int end = 0;
        for (int i = 0; i < a.products; ++i) s.ends[i] = end += ceil_div(a.list[i].weight.rows, rows);
        s.steps = ceil_div(end, device_blocks);
        // Leaves room for the kernels before and behind, unless this is long.
        const int bytes = shared_bytes_up_to((s.steps > 2 * one_row_shape::most_slots ? 200 : 150) * 1024);
        s.slots = min(min(s.steps, one_row_shape::most_slots), (bytes - s.fixed_bytes()) / s.slot_bytes);
        return s;
    };
    // The fewest steps, and for these the fewest rows.
    one_row_shape best{};
    for (int rows = min(one_row_shape::threads / lanes, one_row_shape::summed); rows > 0; --rows) {
        const one_row_shape s = with(rows);
        if (s.slots >= min(2, s.steps) && (best.slots == 0 || s.steps <= best.steps)) best = s;
    }
    if (best.slots == 0) return cudaErrorInvalidValue;
    const int blocks = min(device_blocks, best.ends[a.products - 1]);
    return start(one_row_kernel, launch::grid_of(blocks), one_row_shape::all_threads,
                 best.slots * best.slot_bytes + best.fixed_bytes(), stream, a, best);
}

}  // namespace keel::cuda_kernels
