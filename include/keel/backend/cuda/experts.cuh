// SPDX-License-Identifier: MIT
//
// The router's choice, and gated feed-forward networks for few rows: only the chosen experts' weights are read.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/matvec.cuh>

namespace keel::cuda_kernels {

/// A float as an unsigned number of the same order; never 0 unless it is a NaN with all bits set.
__device__ inline unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// A warp chooses the k best experts of row `r`, the smaller index on a tie; lane l holds experts l + 32 i, `Each` of
/// them. The largest key wins a round, then is 0.
template <int Each>
__device__ inline void choose_best(const launch::route_args& a, int r) {
    const int lane = threadIdx.x % warp_size;
    const float* logits = a.logits + r * a.logits_row;
    unsigned key[Each];
    float share[Each];
#pragma unroll
    for (int i = 0; i < Each; ++i) {
        const int e = lane + warp_size * i;
        share[i] = e < a.experts ? sigmoid(__ldcg(logits + e)) : 0.0f;
        key[i] = e < a.experts ? max(1u, ordered(share[i] + a.bias[e])) : 0;
    }
    float total = 0;
    float mine = 0;
    for (int slot = 0; slot < a.k; ++slot) {
        unsigned largest = 0;
        int at = 0;
        float offer = 0;
#pragma unroll
        for (int i = 0; i < Each; ++i) {
            if (key[i] > largest) largest = key[i], at = i, offer = share[i];
        }
        const unsigned winner = __reduce_max_sync(0xFFFFFFFFu, largest);
        const unsigned e =
            __reduce_min_sync(0xFFFFFFFFu, largest == winner ? static_cast<unsigned>(lane + warp_size * at) : ~0u);
#pragma unroll
        for (int i = 0; i < Each; ++i) {
            if (e == static_cast<unsigned>(lane + warp_size * i)) key[i] = 0;
        }
        offer = __shfl_sync(0xFFFFFFFFu, offer, static_cast<int>(e % warp_size));
        total += offer;
        if (slot == lane) mine = offer;
        if (lane == 0) a.chosen[r * a.chosen_row + slot] = static_cast<int>(e);
    }
    if (lane < a.k) a.weights[r * a.weights_row + lane] = mine * (a.scale / fmaxf(total, 0x1p-14f));
}

template <int Each>
__global__ void __launch_bounds__(warp_size) route_kernel(const __grid_constant__ launch::route_args a) {
    wait_for_previous();
    choose_best<Each>(a, blockIdx.x);
}

inline constexpr int choose_warps = 2;

/// A warp makes an expert's logit: the norm's factor is the same for all, so it comes last. The block that finishes a
/// row's last logit chooses. Grid: (blocks, rows).
template <int Each>
__global__ void __launch_bounds__(choose_warps* warp_size)
    choose_kernel(const __grid_constant__ launch::choose_args a) {
    __shared__ bool last;
    __shared__ float of_warp[choose_warps];
    const int r = blockIdx.y, lane = threadIdx.x % warp_size;
    const int blocks = a.codes == nullptr ? gridDim.x : gridDim.x - 1;
    if (blockIdx.x == blocks) {  // one more block than logits need makes the codes
        const int units = units_of(a.router.columns);
        const staged to(a.codes + static_cast<long long>(r) * staged::code_bytes(units), units, false);
        wait_for_previous();
        stage_weighted(to, units, false, true, a.x + r * a.x_row, a.norm, a.router.columns, of_warp);
        __syncthreads();
        const float factor = inverse_rms(of_warp, a.router.columns, a.epsilon);
        for (int u = threadIdx.x; u < units; u += blockDim.x) {
            to.marks[u].x = __float_as_int(__int_as_float(to.marks[u].x) * factor);
        }
        return;
    }
    const int e =
        min(static_cast<int>(blockIdx.x) * choose_warps + static_cast<int>(threadIdx.x) / warp_size, a.router.rows - 1);
    const unsigned char* weight = a.router.data + static_cast<long long>(e) * a.router.row_bytes;
    const int columns = a.router.columns;
    constexpr int ahead = 9, step = 4 * warp_size;
    if (lane == 0) prefetch(weight, a.router.row_bytes);
    wait_for_previous();
    const float* x = a.x + r * a.x_row;
    float squares = 0, sum = 0;
    const auto with = [&](auto&& load) {
        for (int c = 4 * lane; c < columns; c += ahead * step) {
            uint4 w[ahead];
            float4 v[ahead], n[ahead];
#pragma unroll
            for (int i = 0; i < ahead; ++i) {
                const int at = c + i * step;
                const bool inside = at < columns;
                w[i] = inside ? load_weights16(weight + 4 * at) : uint4{};
                v[i] = inside ? load(x, at) : float4{};
                n[i] = inside ? load(a.norm, at) : float4{};
            }
#pragma unroll
            for (int i = 0; i < ahead; ++i) {
                squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
                sum += v[i].x * n[i].x * __uint_as_float(w[i].x) + v[i].y * n[i].y * __uint_as_float(w[i].y) +
                       v[i].z * n[i].z * __uint_as_float(w[i].z) + v[i].w * n[i].w * __uint_as_float(w[i].w);
            }
        }
    };
    if (aligned16(x, a.norm) && columns % 4 == 0) {
        with([&](const float* p, int i) { return *reinterpret_cast<const float4*>(p + i); });
    } else {
        with([&](const float* p, int i) { return load_four(p, i, columns); });
    }
    squares = lanes_sum(squares);
    sum = lanes_sum(sum);
    if (lane == 0) {
        a.logits[r * a.route.logits_row + e] = sum / sqrtf(squares / static_cast<float>(columns) + a.epsilon);
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.arrived + r, 1u) == blocks - 1;
        if (last) a.arrived[r] = 0;
        __threadfence();
    }
    __syncthreads();
    if (last && threadIdx.x < warp_size) choose_best<Each>(a.route, r);
}

inline constexpr int expert_threads = 256;

/// One of the networks that a row goes through: the k chosen, then the shared one.
struct expert_slot {
    const launch::matrix *gate, *up, *down;
    int which;
    float weight;

    __device__ expert_slot(const launch::experts_args& a, int row, int slot) {
        const bool shared = slot == a.k;
        gate = shared ? &a.shared_gate : &a.gate;
        up = shared ? &a.shared_up : &a.up;
        down = shared ? &a.shared_down : &a.down;
        which = !shared && a.chosen ? a.chosen[row * a.chosen_row + slot] : 0;
        weight = !shared && a.chosen ? a.weights[row * a.weights_row + slot] : 1.0f;
    }
};

/// What lies between the two kernels: per row and slot, the down product's input as `staged` wants it, as codes if its
/// weights are codes. Units of the widest network apart.
__device__ inline unsigned char* hidden_of(const launch::experts_args& a, int slots, int units, int row, int slot) {
    return reinterpret_cast<unsigned char*>(a.hidden) +
           (static_cast<long long>(row) * slots + slot) * staged::value_bytes(units);
}

__device__ inline const unsigned char* record(const launch::matrix& m, int which, int row) {
    return m.data + (static_cast<long long>(which) * m.rows + row) * m.row_bytes;
}

/// silu(W_gate x) * W_up x. A block makes a unit of 32 elements of one slot. Grid: (units, slots, rows).
template <bool Codes>
__global__ void __launch_bounds__(expert_threads, 4)
    expert_up_kernel(const __grid_constant__ launch::experts_args a, const int widest_units, const bool floats,
                     const bool codes) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float made[32];
    const int row = blockIdx.z, unit = blockIdx.x;
    const int units = units_of(a.gate.columns);
    __shared__ float squares[expert_threads / warp_size];
    wait_for_previous();
    const expert_slot slot(a, row, blockIdx.y);
    if (unit >= units_of(slot.gate->rows)) return;
    constexpr int lanes = 8;
    const int lane = threadIdx.x % lanes, local = threadIdx.x / lanes;
    const int r = min(32 * unit + local, slot.gate->rows - 1);
    if (threadIdx.x % warp_size == 0) {
        const int rows = min(warp_size / lanes, slot.gate->rows - r);
        prefetch(record(*slot.gate, slot.which, r), rows * slot.gate->row_bytes);
        prefetch(record(*slot.up, slot.which, r), rows * slot.up->row_bytes);
    }
    const staged x(memory, units, floats);
    const int columns = a.gate.columns;
    if (a.codes != nullptr) {
        const uint4* from =
            reinterpret_cast<const uint4*>(a.codes + static_cast<long long>(row) * staged::code_bytes(units));
        for (int i = threadIdx.x; i < staged::code_bytes(units) / 16; i += blockDim.x) {
            reinterpret_cast<uint4*>(x.first)[i] = from[i];
        }
    } else {
        stage_weighted(x, units, floats, codes, a.x + row * a.x_row, a.norm, columns, squares);
    }
    __syncthreads();
    const float factor = a.codes == nullptr && a.norm != nullptr ? inverse_rms(squares, columns, a.epsilon) : 1.0f;

    float gate[1] = {}, up[1] = {};
    visit_format(slot.gate->type, [&]<class Format>() {
        row_product<Format, Codes, lanes>(record(*slot.gate, slot.which, r), units, lane, x, 0, gate);
    });
    visit_format(slot.up->type, [&]<class Format>() {
        row_product<Format, Codes, lanes>(record(*slot.up, slot.which, r), units, lane, x, 0, up);
    });
    if (threadIdx.x % warp_size == 0) {  // this block's share of the next kernel's weights
        constexpr int warps = expert_threads / warp_size;
        const int shares = units_of(slot.gate->rows) * warps;
        const int each = ceil_div(slot.down->rows, shares), from = (unit * warps + threadIdx.x / warp_size) * each;
        const int n = min(each, slot.down->rows - from);
        if (n > 0) prefetch(record(*slot.down, slot.which, from), n * slot.down->row_bytes);
    }
    gate[0] = lanes_sum<lanes>(gate[0]) * factor;
    up[0] = lanes_sum<lanes>(up[0]) * factor;
    if (lane == 0) made[local] = 32 * unit + local < slot.gate->rows ? silu(gate[0]) * up[0] : 0.0f;
    __syncthreads();
    if (threadIdx.x >= warp_size) return;
    unsigned char* to = hidden_of(a, gridDim.y, widest_units, row, blockIdx.y);
    const bool as_codes = Codes && is_integer(slot.down->type);
    const staged out(to, units_of(slot.gate->rows), !as_codes);
    const int i = threadIdx.x;
    const float value = made[i];
    if (!as_codes) {
        out.values[staged::place(32 * unit + i)] = value;
        return;
    }
    const float largest = lanes_max(fabsf(value));
    const int q = __float2int_rn(value * (largest > 0 ? 127.0f / largest : 0.0f));
    const int sum = lanes_sum<16>(q);
    const int other = __shfl_xor_sync(0xFFFFFFFFu, sum, 16);
    (i < 16 ? out.first : out.second)[16 * unit + i % 16] = static_cast<signed char>(q);
    if (i == 0) out.marks[unit] = {__float_as_int(largest * (1 / 127.0f)), (sum & 0xFFFF) | other << 16};
}

/// A lane's part of one output row over several slots with the same matrices. Where a slot is one piece for each lane,
/// several slots are loaded at once.
template <class Format, bool Codes>
__device__ inline float down_product(const launch::matrix& down, int row, int slots, const long long* start,
                                     const float* weight, unsigned char* memory, int slot_bytes, int lane) {
    const int units = units_of(down.columns), pieces = units * (32 / Format::elements);
    const unsigned char* record = down.data + static_cast<long long>(row) * down.row_bytes;
    constexpr bool floats = !(Codes && Format::integer);
    float total = 0;
    int slot = 0;
    if (pieces == warp_size) {
        constexpr int ahead = sizeof(typename Format::piece) > 32 ? 2 : 4;
#pragma unroll 1
        for (; slot + ahead <= slots; slot += ahead) {
            typename Format::piece w[ahead];
#pragma unroll
            for (int i = 0; i < ahead; ++i) w[i] = Format::load(record + start[slot + i], units, lane);
#pragma unroll
            for (int i = 0; i < ahead; ++i) {
                float sum[1] = {};
                add_products<Format, Codes>(w[i], lane, staged(memory + (slot + i) * slot_bytes, units, floats), 0,
                                            sum);
                total += weight[slot + i] * sum[0];
            }
        }
    }
#pragma unroll 1
    for (; slot < slots; ++slot) {
        float sum[1] = {};
        row_product<Format, Codes, warp_size>(record + start[slot], units, lane,
                                              staged(memory + slot * slot_bytes, units, floats), 0, sum);
        total += weight[slot] * sum[0];
    }
    return total;
}

/// out = or += the weighted sum over the slots of W_down hidden. A warp per element of the output. Grid: (blocks,
/// rows).
template <bool Codes>
__global__ void __launch_bounds__(expert_threads, 4)
    expert_down_kernel(const __grid_constant__ launch::experts_args a, const int widest_units, const int slots) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ long long start[32];
    __shared__ float weight[32];
    wait_for_previous();
    const int row = blockIdx.y;
    const auto bytes = [&](const launch::matrix& down) {
        const int units = units_of(down.columns);
        return Codes && is_integer(down.type) ? staged::code_bytes(units) : staged::value_bytes(units);
    };
    const int slot_bytes = bytes(a.down), shared_at = a.k * slot_bytes;
    // All slots' activations: chunks of 16 bytes, slot after slot, several on the way at once.
    const int chunks = slot_bytes / 16, end = a.k * chunks + (slots > a.k ? bytes(a.shared_down) / 16 : 0);
    constexpr int turns = 4;
    for (int base = threadIdx.x; base < end; base += turns * expert_threads) {
        uint4 v[turns];
#pragma unroll
        for (int t = 0; t < turns; ++t) {
            const int i = min(base + t * expert_threads, end - 1), slot = min(i / chunks, a.k);
            v[t] = reinterpret_cast<const uint4*>(hidden_of(a, slots, widest_units, row, slot))[i - slot * chunks];
        }
#pragma unroll
        for (int t = 0; t < turns; ++t) {
            if (base + t * expert_threads < end) reinterpret_cast<uint4*>(memory)[base + t * expert_threads] = v[t];
        }
    }
    if (threadIdx.x < a.k) {
        const expert_slot slot(a, row, threadIdx.x);
        start[threadIdx.x] = static_cast<long long>(slot.which) * a.down.rows * a.down.row_bytes;
        weight[threadIdx.x] = slot.weight;
    }
    __syncthreads();
    const int lane = threadIdx.x % warp_size;
    const int r = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size;
    if (r >= a.down.rows) return;
    float total = 0;
    visit_format(a.down.type, [&]<class Format>() {
        total = down_product<Format, Codes>(a.down, r, a.k, start, weight, memory, slot_bytes, lane);
    });
    if (slots > a.k) {
        const long long first = 0;
        const float one = 1;
        visit_format(a.shared_down.type, [&]<class Format>() {
            total += down_product<Format, Codes>(a.shared_down, r, 1, &first, &one, memory + shared_at, 0, lane);
        });
    }
    total = lanes_sum(total);
    if (lane != 0) return;
    float& out = a.out[row * a.out_row + r];
    out = a.accumulate ? out + total : total;
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

/// Up to 1024 experts, up to 32 of them chosen.
cudaError_t route(const route_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.experts > 1024 || a.k > warp_size) return cudaErrorInvalidValue;
    return start(a.experts <= 256 ? route_kernel<8> : route_kernel<32>, grid_of(a.rows), warp_size, 0, stream, a);
}

cudaError_t choose(const choose_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.route.experts > 1024 || a.route.k > warp_size || a.router.type != layout::f32) return cudaErrorInvalidValue;
    return start(a.route.experts <= 256 ? choose_kernel<8> : choose_kernel<32>,
                 grid_of(ceil_div(a.router.rows, choose_warps) + (a.codes == nullptr ? 0 : 1), a.route.rows),
                 choose_warps * warp_size, 0, stream, a);
}

cudaError_t experts(const experts_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    const bool shared = a.shared_gate.data != nullptr;
    const int slots = a.k + (shared ? 1 : 0);
    if (a.k > 32) return cudaErrorInvalidValue;
    const int units = units_of(a.gate.columns);
    const int widest = max(a.gate.rows, shared ? a.shared_gate.rows : 0);
    bool floats = false, codes = false;
    const auto input = [&](const matrix& m) { (a.quantise && is_integer(m.type) ? codes : floats) = true; };
    input(a.gate), input(a.up);
    if (shared) input(a.shared_gate), input(a.shared_up);
    const int in_bytes = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    const auto up = a.quantise ? expert_up_kernel<true> : expert_up_kernel<false>;
    const auto e = start(up, grid_of(units_of(widest), slots, a.rows), expert_threads, in_bytes, stream, a,
                         units_of(widest), floats, codes);
    if (e != cudaSuccess) return e;
    const auto slot_bytes = [&](const matrix& m) {
        const int u = units_of(m.columns);
        return a.quantise && is_integer(m.type) ? staged::code_bytes(u) : staged::value_bytes(u);
    };
    const int bytes = a.k * slot_bytes(a.down) + (shared ? slot_bytes(a.shared_down) : 0);
    const auto down = a.quantise ? expert_down_kernel<true> : expert_down_kernel<false>;
    return start(down, grid_of(ceil_div(a.down.rows, expert_threads / warp_size), a.rows), expert_threads, bytes,
                 stream, a, units_of(widest), slots);
}

}  // namespace keel::cuda_launch
