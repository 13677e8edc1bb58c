// SPDX-License-Identifier: MIT
//
// The chosen experts' networks for one row of activations, all weights K-quants: as one_row.cuh, with the choice made
// by the warp that asks for the weights of the first kernel, and handed to the second.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/one_row.cuh>
#include <keel/backend/cuda/route.cuh>

namespace keel::cuda_kernels {

/// What lies between the two kernels, per slot: half_codes, those of the widest network apart.
__device__ inline unsigned char* hidden_of(const launch::experts_args& a, int units, int slot) {
    return reinterpret_cast<unsigned char*>(a.hidden) + slot * units * half_codes::bytes;
}

/// One of two matrices, field by field: a reference to parameters would make them memory.
__device__ inline launch::matrix pick(bool first, const launch::matrix& a, const launch::matrix& b) {
    return {first ? a.data : b.data, first ? a.type : b.type,       first ? a.count : b.count,
            first ? a.rows : b.rows, first ? a.columns : b.columns, first ? a.row_bytes : b.row_bytes};
}

/// The choice as up's last block, which has the least to do, gives it to the blocks of down, whenever they start: for
/// every slot the expert + 1 and its weight, or 0 until then.
class given_choice {
public:
    __device__ explicit given_choice(unsigned long long* memory) : memory_(memory) {}

    /// A warp, before the next kernel may start.
    __device__ void clear(int k) {
        const int lane = threadIdx.x % warp_size;
        if (lane < k) memory_[lane] = 0;
        __threadfence();
    }
    /// A warp, of what is in shared memory.
    __device__ void give(int k, const int* which, const float* weight) {
        const int lane = threadIdx.x % warp_size;
        if (lane >= k) return;
        const unsigned long long both = static_cast<unsigned long long>(__float_as_uint(weight[lane])) << 32 |
                                        static_cast<unsigned>(which[lane] + 1);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(memory_ + lane), "l"(both) : "memory");
    }
    /// A warp, until it is there; to shared memory.
    __device__ void take(int k, int* which, float* weight) {
        const int lane = threadIdx.x % warp_size;
        unsigned long long both = lane < k ? 0 : 1;
        while (both == 0)
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(memory_ + lane) : "memory");
        if (lane < k)
            which[lane] = static_cast<int>(both & 0xFFFFFFFFu) - 1, weight[lane] = __uint_as_float(both >> 32);
        __syncwarp();
    }

private:
    unsigned long long* memory_;
};

/// Half a unit of the hidden activations of a slot: 16 rows of W_gate and 16 of W_up, `rows` of them a step. The shared
/// network's halves come first, since their weights need no choice; block b takes halves b, b + grid, ...
struct one_row_up_shape {
    static constexpr int half = 16, users = 18, threads = users * warp_size, all_threads = threads + warp_size;
    static constexpr int most_slots = 10, most_group = 6;

    int units, lanes, rows;  // as in one_row_shape; rows is a power of two, at most 16
    int halves, shared;      // halves of a slot's unit, of the shared network's
    int all, group;          // of all slots together; those that are summed at once
    int slots, slot_bytes;   // of the ring
    int widest_units;

    __host__ __device__ int fixed_bytes() const {
        return slot_alignment + staged::code_bytes(units) + group * 2 * half * partial_pitch(lanes) * 4;
    }

    /// The i-th half of the calling block.
    struct item {
        int slot, half;
        bool shared;
    };
    __device__ item of_block(int i, int k) const {
        const int n = blockIdx.x + i * gridDim.x, chosen = n - shared;
        return chosen < 0 ? item{k, n, true} : item{chosen / halves, chosen % halves, false};
    }
};

/// silu(W_gate x) * W_up x as half_codes. Grid: (blocks).
__global__ void __launch_bounds__(one_row_up_shape::all_threads, 1)
    one_row_up_kernel(const __grid_constant__ launch::experts_args a, const __grid_constant__ one_row_up_shape s) {
    using shape = one_row_up_shape;
    unsigned char* const memory = slot_memory();  // slots, codes, partial sums
    __shared__ slot_ring<shape::most_slots> ring;
    __shared__ float squares[shape::users], made[shape::most_group * 2 * shape::half];
    __shared__ int which[warp_size];
    __shared__ float weight[warp_size];  // of the last block
    __shared__ __align__(16) unsigned keys[warp_choice::most];
    constexpr int threads = shape::threads, half = shape::half, choosers = warp_choice::most;
    unsigned char* const after_slots = memory + s.slots * s.slot_bytes;
    const staged codes(after_slots, s.units, false);
    float* const partial = reinterpret_cast<float*>(after_slots + staged::code_bytes(s.units));
    const int count = ceil_div(s.all - static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    const int steps = half / s.rows;  // of W_gate; as many of W_up follow
    const auto matrix_of = [&](const shape::item& at, int step) {
        return step < steps ? pick(at.shared, a.shared_gate, a.gate) : pick(at.shared, a.shared_up, a.up);
    };
    slot_ring<shape::most_slots>::cursor at{s.slots};

    if (threadIdx.x == 0) ring.init(shape::users);
    __syncthreads();
    if (threadIdx.x >= threads) {
        const auto fill = [&](const shape::item& next) {
            const int expert = next.shared ? 0 : which[next.slot];
            for (int step = 0; step < 2 * steps; ++step, at.next()) {
                const launch::matrix m = matrix_of(next, step);
                const long long row =
                    static_cast<long long>(expert) * m.rows + half * next.half + step % steps * s.rows;
                ring.fill(at, memory + at.slot * s.slot_bytes, m.data + row * m.row_bytes, s.rows * m.row_bytes);
            }
        };
        int i = 0;
        for (; i < count; ++i) {
            const shape::item next = s.of_block(i, a.k);
            if (!next.shared) break;
            fill(next);
        }
        const bool gives = blockIdx.x == gridDim.x - 1;
        wait_for_previous<false>();
        if (gives) given_choice(a.choice).clear(a.k);
        __syncwarp();
        start_next();
        if (i < count || gives) {
            cuda_launch::detail::named_barrier(2, choosers + warp_size);
            unsigned own[warp_choice::each];
#pragma unroll
            for (int e = 0; e < warp_choice::each; ++e)
                own[e] = keys[warp_choice::each * (threadIdx.x % warp_size) + e];
            warp_choice::make(own, a.k, which);
        }
        if (gives) {
            const int lane = threadIdx.x % warp_size;
            if (lane < a.k) weight[lane] = __ldcg(a.route.logits + which[lane]);
            weigh(a.route, weight);
            given_choice(a.choice).give(a.k, which, weight);
        }
        for (; i < count; ++i) fill(s.of_block(i, a.k));
        return;
    }
    const eight ahead = weights_ahead(a.norm, a.gate.columns);
    const int row = threadIdx.x / s.lanes, lane = threadIdx.x % s.lanes;
    const int expert = threadIdx.x - (threads - choosers);  // the last threads, which have the least to stage
    const float bias = expert >= 0 && expert < a.route.experts ? a.route.bias[expert] : 0.0f;
    wait_for_previous<false>();
    if (expert >= 0) {
        const float logit = expert < a.route.experts ? __ldcg(a.route.logits + expert) : 0.0f;
        keys[expert] = warp_choice::key(a.route, expert, logit, bias);
        cuda_launch::detail::named_arrive(2, choosers + warp_size);
    }
    stage_weighted<true>(codes, s.units, false, true, threads, a.x, a.norm, a.gate.columns, squares, &ahead);
    barrier_of(threads);
    const float factor = inverse_rms(squares, threads, a.gate.columns, a.epsilon);
    own_units own(codes, s.units, lane, s.lanes);
    own.x[0].scale *= factor, own.x[1].scale *= factor;
    for (int from = 0; from < count; from += s.group) {
        const int here = min(s.group, count - from);
        for (int i = 0; i < here; ++i) {
            const shape::item next = s.of_block(from + i, a.k);
#pragma unroll 1
            for (int step = 0; step < 2 * steps; ++step, at.next()) {
                const launch::matrix m = matrix_of(next, step);
                ring.wait(at);
                if (row < s.rows) {
                    const unsigned char* weights = memory + at.slot * s.slot_bytes + row * m.row_bytes;
                    visit_k_quant(m.type, [&]<class Format>() {
                        partial[(2 * half * i + step * s.rows + row) * partial_pitch(s.lanes) + lane] =
                            own.template product<Format>(weights, s.units);
                    });
                }
                ring.release(at);
            }
        }
        barrier_of(threads);
        for (int r = threadIdx.x / 8; r < 2 * half * here; r += threads / 8) {  // whole warps
            float sum = 0;
            const float* of_row = partial + r * partial_pitch(s.lanes);
#pragma unroll 4
            for (int i = threadIdx.x % 8; i < s.lanes; i += 8) sum += of_row[i];
            sum = lanes_sum<8>(sum);
            if (threadIdx.x % 8 == 0) made[r] = sum;
        }
        barrier_of(threads);
        for (int i = threadIdx.x / half; i / 2 * 2 < here; i += threads / half) {  // whole warps
            const bool inside = i < here;
            const shape::item next = s.of_block(from + min(i, here - 1), a.k);
            const float* of_half = made + 2 * half * (inside ? i : 0) + threadIdx.x % half;
            half_codes::put(hidden_of(a, s.widest_units, next.slot),
                            units_of(next.shared ? a.shared_gate.rows : a.gate.rows), next.half,
                            silu(of_half[0]) * of_half[half], inside);
        }
    }
}

struct one_row_down_shape {
    static constexpr int most_slots = 12;

    int rows;                      // of a block
    int slots, widest_units;       // of the networks' hidden activations
    int slot_bytes, shared_bytes;  // of weights of a slot, of the shared network's

    __host__ __device__ int partial_floats() const { return rows * slots * warp_size; }
    __host__ __device__ int weight_bytes(int k) const { return k * slot_bytes + (slots > k ? shared_bytes : 0); }
};

/// x += the weighted sum over the slots of W_down hidden. A warp takes a slot and `rows` rows of it, a lane a unit; one
/// more warp takes the choice, before the previous kernel is done, and asks for the weights. Grid: (blocks).
__global__ void __launch_bounds__((one_row_down_shape::most_slots + 1) * warp_size, 3)
    one_row_down_kernel(const __grid_constant__ launch::experts_args a, const __grid_constant__ one_row_down_shape s) {
    unsigned char* const memory = slot_memory();  // weights of every slot, partial sums
    __shared__ slot_ring<one_row_down_shape::most_slots> ring;
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
        given_choice(a.choice).take(a.k, which, weight);
        for (int slot = 0; slot < a.k; ++slot) fill(slot, a.down, which[slot]);
        return;
    }
    const launch::matrix down = pick(shared, a.shared_down, a.down);
    const int units = units_of(down.columns), unit = min(lane, units - 1);
    wait_for_previous();
    float before = 0;
    if (lane == 0 && warp < rows) before = a.out[first + warp];
    half_codes x(hidden_of(a, s.widest_units, warp), units, unit);
    ring.wait({s.slots, warp});
    x.weigh(lane < units ? (shared ? 1.0f : weight[warp]) : 0.0f);
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
           aligned16(a.x, a.norm) && warp_choice::serves(a.route) &&
           a.k + (shared ? 1 : 0) <= one_row_down_shape::most_slots && codes(a.gate) && codes(a.up) && codes(a.down) &&
           units(a.down) <= warp_size && ceil_div(units(a.gate), 2) <= one_row_up_shape::threads &&
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
    one_row_up_shape up{units, lanes, one_row_up_shape::half};
    while (up.rows * lanes > one_row_up_shape::threads) up.rows /= 2;
    up.halves = a.gate.rows / one_row_up_shape::half;
    up.shared = shared ? a.shared_gate.rows / one_row_up_shape::half : 0;
    up.all = a.k * up.halves + up.shared;
    const int blocks = min(multiprocessors(), up.all);
    up.group = min(ceil_div(up.all, blocks), one_row_up_shape::most_group);
    up.slot_bytes = slot_bytes_for(up.rows * widest);
    up.widest_units = widest_units;
    const int room = shared_bytes_up_to(100 * 1024) - up.fixed_bytes();  // leaves room for blocks of the next kernel
    up.slots = max(1, min(room / up.slot_bytes, one_row_up_shape::most_slots));
    const auto e = start(one_row_up_kernel, launch::grid_of(blocks), one_row_up_shape::all_threads,
                         up.fixed_bytes() + up.slots * up.slot_bytes, stream, a, up);
    if (e != cudaSuccess) return e;

    const auto down_of = [&](int rows) -> one_row_down_shape {
        return {rows, slots, widest_units, slot_bytes_for(rows * a.down.row_bytes),
                shared ? slot_bytes_for(rows * a.shared_down.row_bytes) : 0};
    };
    const auto bytes_of = [&](const one_row_down_shape& s) {
        return slot_alignment + s.weight_bytes(a.k) + 4 * s.partial_floats();
    };
    one_row_down_shape down = down_of(ceil_div(a.down.rows, 3 * multiprocessors()));
    while (down.rows > 1 && bytes_of(down) > shared_bytes_up_to(72 * 1024)) down = down_of(down.rows - 1);
    return start(one_row_down_kernel, launch::grid_of(ceil_div(a.down.rows, down.rows)), (slots + 1) * warp_size,
                 bytes_of(down), stream, a, down);
}

}  // namespace keel::cuda_kernels
