// SPDX-License-Identifier: MIT
//
// Kimi Delta Attention, token by token. The columns of S (the value axis) are independent of each other: a block takes
// a slab of 32 of them, for one head of one segment, and keeps it in registers.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>

namespace keel::cuda_kernels {

/// 256 threads and a slab (D, 32) of S: thread t holds columns 4 (t % 8) to + 3 of the rows t / 8 + 32 i.
template <int D>
struct kda_slab {
    static constexpr int threads = 256, columns = 32, rows = D / 32;

    float4 s[rows];

    /// Of the whole matrix (D, D) at `state`, columns from `first` on.
    __device__ void read(const float* state, int first) {
#pragma unroll
        for (int i = 0; i < rows; ++i) s[i] = *place<const float4>(state, first, i);
    }
    __device__ void write(float* state, int first) const {
#pragma unroll
        for (int i = 0; i < rows; ++i) *place<float4>(state, first, i) = s[i];
    }

    /// One token: S <- diag(decay) S; S <- S + k (beta (v - S^T k))^T. Returns S^T q of the columns 4 (t % 8) to + 3.
    /// decay, k, q (D) and v (32 columns) are in shared memory; so is `sums`, (2 + 8, 8 * 8) floats. As
    /// S^T q after the update is (S^T q before) + delta (k q), one reduction serves both. k and q are taken times a
    /// factor each.
    __device__ float4 step(const float* decay, const float* k, const float* q, const float* v, float beta, float* sums,
                           float k_factor = 1.0f, float q_factor = 1.0f) {
        const int row = threadIdx.x / 8, column = threadIdx.x % 8, warp = threadIdx.x / warp_size;
        float4 read{}, ask{};
        float along = 0;
#pragma unroll
        for (int i = 0; i < rows; ++i) {
            const float d = decay[row + 32 * i], key = k_factor * k[row + 32 * i], query = q_factor * q[row + 32 * i];
            s[i] = {s[i].x * d, s[i].y * d, s[i].z * d, s[i].w * d};
            read = fma4(key, s[i], read);
            ask = fma4(query, s[i], ask);
            along += key * query;
        }
        // Lanes of a warp hold four rows (lane / 8) of the eight columns.
        read = {rows_sum(read.x), rows_sum(read.y), rows_sum(read.z), rows_sum(read.w)};
        ask = {rows_sum(ask.x), rows_sum(ask.y), rows_sum(ask.z), rows_sum(ask.w)};
        along = rows_sum(along);
        float4* of_warp = reinterpret_cast<float4*>(sums);
        if (threadIdx.x % warp_size < 8) {
            of_warp[warp * 16 + column] = read;
            of_warp[warp * 16 + 8 + column] = ask;
            if (column == 0) sums[512 + warp] = along;
        }
        __syncthreads();
        read = ask = {};
        along = 0;
#pragma unroll
        for (int w = 0; w < threads / warp_size; ++w) {
            read = fma4(1.0f, of_warp[w * 16 + column], read);
            ask = fma4(1.0f, of_warp[w * 16 + 8 + column], ask);
            along += sums[512 + w];
        }
        const float4 value = reinterpret_cast<const float4*>(v)[column];
        const float4 delta{beta * (value.x - read.x), beta * (value.y - read.y), beta * (value.z - read.z),
                           beta * (value.w - read.w)};
#pragma unroll
        for (int i = 0; i < rows; ++i) s[i] = fma4(k_factor * k[row + 32 * i], delta, s[i]);
        return fma4(along, delta, ask);
    }

    static constexpr int sum_floats = 512 + 8;

private:
    template <class T, class F>
    __device__ static T* place(F* state, int first, int i) {
        return reinterpret_cast<T*>(state + (threadIdx.x / 8 + 32 * i) * D + first) + threadIdx.x % 8;
    }
    __device__ static float4 fma4(float a, const float4& x, const float4& y) {
        return {fmaf(a, x.x, y.x), fmaf(a, x.y, y.y), fmaf(a, x.z, y.z), fmaf(a, x.w, y.w)};
    }
    __device__ static float rows_sum(float x) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, 8);
        return x + __shfl_xor_sync(0xFFFFFFFFu, x, 16);
    }
};

/// Grid: (slabs, heads, segments).
template <int D>
__global__ void __launch_bounds__(256) kda_step_kernel(const __grid_constant__ launch::kda_args a) {
    using slab = kda_slab<D>;
    __shared__ __align__(16) float decay[D], k[D], q[D], v[slab::columns], sums[slab::sum_floats];
    wait_for_previous();
    const int first = blockIdx.x * slab::columns, h = blockIdx.y;
    const launch::segment segment = a.segments[blockIdx.z];
    float* state = reinterpret_cast<float*>(segment.recurrent) + a.layer * a.layout.layer_floats + h * D * D;
    slab s;
    s.read(state, first);
    const float scale = 1.0f / sqrtf(static_cast<float>(D));
    for (int t = segment.first_row; t < segment.first_row + segment.rows; ++t) {
        for (int i = threadIdx.x; i < D; i += slab::threads) {
            decay[i] = expf(a.log_decay[t * a.decay_row + h * a.decay_head + i]);
            k[i] = a.k[t * a.k_row + h * a.k_head + i];
            q[i] = a.q[t * a.q_row + h * a.q_head + i];
        }
        if (threadIdx.x < slab::columns) v[threadIdx.x] = a.v[t * a.v_row + h * a.v_head + first + threadIdx.x];
        __syncthreads();
        const float4 o = s.step(decay, k, q, v, a.beta[t * a.beta_row + h], sums);
        if (threadIdx.x < 8) {
            float* out = a.out + t * a.out_row + h * a.out_head + first + 4 * threadIdx.x;
            out[0] = o.x * scale, out[1] = o.y * scale, out[2] = o.z * scale, out[3] = o.w * scale;
        }
        __syncthreads();
    }
    s.write(state, first);
}

/// The whole layer between its products, see launch.hpp. Grid: (slabs, heads, segments). All slabs of a head need its
/// q and k; the convolution's history of these is written by the slab that was the last to read it.
template <int D>
__global__ void __launch_bounds__(256) kda_mix_kernel(const __grid_constant__ launch::kda_mix_args a) {
    using slab = kda_slab<D>;
    constexpr int most_taps = 4, columns = slab::columns;
    __shared__ __align__(16) float decay[D], k[D], q[D], v[columns], gate[columns], sums[slab::sum_floats], lengths[2];
    __shared__ __align__(16) unsigned char low[2 * staged::value_bytes(ceil_div(D, 32))];
    __shared__ bool last;
    const int first = blockIdx.x * columns, h = blockIdx.y, taps = a.layout.taps, channels = a.layout.heads * D;
    const launch::segment segment = a.segments[blockIdx.z];
    float* layer = reinterpret_cast<float*>(segment.recurrent) + a.layer * a.layout.layer_floats;
    float* state = layer + h * D * D;
    slab s;
    s.read(state, first);

    // Threads 0 to D - 1 convolve q, D to 2 D - 1 k, then 32 threads v; small heads leave threads idle, large ones go
    // around twice.
    constexpr int inputs = 2 * D + columns, turns = ceil_div(inputs, slab::threads);
    float past[turns][most_taps], weight[turns][most_taps + 1];
    const auto place_of = [&](int turn, int& which, int& d) {
        const int i = threadIdx.x + turn * slab::threads;
        which = i < D ? 0 : i < 2 * D ? 1 : 2;
        d = which == 2 ? first + i - 2 * D : i % D;
        return i < inputs;
    };
    float* history = layer + static_cast<long long>(a.layout.heads) * D * D + h * D;
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
        int which, d;
        const bool inside = place_of(turn, which, d);
        const float* w = (which == 0 ? a.taps_q : which == 1 ? a.taps_k : a.taps_v) + (h * D + d) * (taps + 1);
#pragma unroll
        for (int j = 0; j < most_taps; ++j) {
            past[turn][j] = inside && j < taps ? history[(which * taps + j) * channels + d] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j <= most_taps; ++j) weight[turn][j] = inside && j <= taps ? w[j] : 0.0f;
    }
    // The low-rank products' rows of this head: D of the decay, 32 of the gate.
    extern __shared__ __align__(16) unsigned char rows[];
    const auto fetch = [&](const launch::matrix& m, int row, int n, unsigned char* to) {
        const unsigned char* from = m.data + static_cast<long long>(row) * m.row_bytes;
        for (int i = 16 * threadIdx.x; i < n * m.row_bytes; i += 16 * slab::threads) begin_copy16(to + i, from + i);
    };
    unsigned char* const gate_rows = rows + D * a.decay_up.row_bytes;
    fetch(a.decay_up, h * D, D, rows);
    fetch(a.gate_up, h * D + first, columns, gate_rows);

    const float scale = 1.0f / sqrtf(static_cast<float>(D));
    constexpr int units = ceil_div(D, 32);
    const staged decay_low(low, units, true), gate_low(low + staged::value_bytes(units), units, true);
    wait_for_previous();
    copies_done();
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned* arrived = a.arrived + blockIdx.z * gridDim.y + h;
        __threadfence();
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        if (last) *arrived = 0;
        __threadfence();
    }
    for (int t = segment.first_row; t < segment.first_row + segment.rows; ++t) {
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            int which, d;
            if (!place_of(turn, which, d)) continue;
            const float now = which == 0   ? a.q[t * a.q_row + h * D + d]
                              : which == 1 ? a.k[t * a.k_row + h * D + d]
                                           : a.v[t * a.v_row + h * D + d];
            float sum = 0;
#pragma unroll
            for (int j = 0; j <= most_taps; ++j) {
                if (j < taps) sum += weight[turn][j] * past[turn][j];
                if (j == taps) sum += weight[turn][j] * now;
            }
#pragma unroll
            for (int j = 0; j < most_taps; ++j) {
                if (j + 1 < taps) past[turn][j] = past[turn][j + 1];
                if (j + 1 == taps) past[turn][j] = now;
            }
            (which == 0 ? q[d] : which == 1 ? k[d] : v[d - first]) = silu(sum);
        }
        for (int i = threadIdx.x; i < 2 * D; i += slab::threads) {
            const bool of_gate = i >= D;
            const int d = of_gate ? i - D : i;
            (of_gate ? gate_low : decay_low).values[staged::place(d)] =
                of_gate ? a.gate_low[t * a.gate_row + d] : a.decay_low[t * a.decay_row + d];
        }
        __syncthreads();
        // Two warps take the lengths while the others begin with the low-rank products.
        const int warp = threadIdx.x / warp_size;
        if (warp < 2) {
            const float* x = warp == 0 ? q : k;
            float squares = 0;
            for (int i = threadIdx.x % warp_size; i < D; i += warp_size) squares += x[i] * x[i];
            squares = lanes_sum(squares);
            if (threadIdx.x % warp_size == 0) lengths[warp] = 1.0f / fmaxf(sqrtf(squares), a.epsilon);
        }
        constexpr int lanes = 4;
        for (int i = threadIdx.x / lanes; i < D + columns; i += slab::threads / lanes) {
            const bool of_gate = i >= D;
            const launch::matrix& up = of_gate ? a.gate_up : a.decay_up;
            const int d = of_gate ? first + i - D : i;
            const unsigned char* row = of_gate ? gate_rows + (i - D) * up.row_bytes : rows + i * up.row_bytes;
            float sum[1] = {};
            visit_format(up.type, [&]<class Format>() {
                row_product<Format, false, lanes, memory::shared>(row, units, threadIdx.x % lanes,
                                                                  of_gate ? gate_low : decay_low, 0, sum);
            });
            sum[0] = lanes_sum<lanes>(sum[0]);
            if (threadIdx.x % lanes == 0) {
                if (of_gate) {
                    gate[i - D] = sigmoid(sum[0]) * a.norm[d];
                } else {
                    decay[d] = expf(a.a[h] * softplus(sum[0] + a.dt_bias[h * D + d]));
                }
            }
        }
        __syncthreads();
        float4 o = s.step(decay, k, q, v, sigmoid(a.beta[t * a.beta_row + h]), sums, lengths[1], lengths[0]);
        if (threadIdx.x < 8) {
            const int c = 4 * threadIdx.x;
            o = {o.x * scale, o.y * scale, o.z * scale, o.w * scale};
            float squares = o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w;
            for (int d = 4; d > 0; d /= 2) squares += __shfl_xor_sync(0xFFu, squares, d);
            if (c == 0) a.squares[(t * gridDim.y + h) * gridDim.x + blockIdx.x] = squares;
            o = {o.x * gate[c], o.y * gate[c + 1], o.z * gate[c + 2], o.w * gate[c + 3]};
            if (a.codes == nullptr) {
                *reinterpret_cast<float4*>(a.out + t * a.out_row + h * D + first + c) = o;
            } else {
                const int all = static_cast<int>(gridDim.y * gridDim.x), unit = h * gridDim.x + blockIdx.x;
                const staged to(a.codes + static_cast<long long>(t) * staged::code_bytes(all), all, false);
                float largest = fmaxf(fmaxf(fabsf(o.x), fabsf(o.y)), fmaxf(fabsf(o.z), fabsf(o.w)));
                for (int d = 4; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFu, largest, d));
                const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
                const int q0 = __float2int_rn(o.x * inverse), q1 = __float2int_rn(o.y * inverse),
                          q2 = __float2int_rn(o.z * inverse), q3 = __float2int_rn(o.w * inverse);
                int sum = q0 + q1 + q2 + q3;
                for (int d = 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xFFu, sum, d);
                const int other = __shfl_xor_sync(0xFFu, sum, 4);
                *reinterpret_cast<int*>((c < 16 ? to.first : to.second) + 16 * unit + c % 16) =
                    (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | q3 << 24;
                if (c == 0) to.marks[unit] = {__float_as_int(largest * (1 / 127.0f)), (sum & 0xFFFF) | other << 16};
            }
        }
        __syncthreads();
    }
    s.write(state, first);
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
        int which, d;
        if (!place_of(turn, which, d) || (which < 2 && !last)) continue;
#pragma unroll
        for (int j = 0; j < most_taps; ++j) {
            if (j < taps) history[(which * taps + j) * channels + d] = past[turn][j];
        }
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t kda_step(const kda_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    const auto with = [&]<int D>() {
        return start(kda_step_kernel<D>, grid_of(D / 32, a.layout.heads, a.segment_count), 256, 0, stream, a);
    };
    switch (a.layout.head_dim) {
        case 32:
            return with.template operator()<32>();
        case 64:
            return with.template operator()<64>();
        case 128:
            return with.template operator()<128>();
        case 256:
            return with.template operator()<256>();
        default:
            return cudaErrorInvalidValue;
    }
}

cudaError_t kda_mix(const kda_mix_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.layout.taps > 4) return cudaErrorInvalidValue;
    const auto with = [&]<int D>() {
        const int rows = D * a.decay_up.row_bytes + 32 * a.gate_up.row_bytes;
        return start(kda_mix_kernel<D>, grid_of(D / 32, a.layout.heads, a.segment_count), 256, rows, stream, a);
    };
    switch (a.layout.head_dim) {
        case 32:
            return with.template operator()<32>();
        case 64:
            return with.template operator()<64>();
        case 128:
            return with.template operator()<128>();
        case 256:
            return with.template operator()<256>();
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace keel::cuda_launch
