// SPDX-License-Identifier: MIT
//
// Kimi Delta Attention, token by token. The columns of S (the value axis) are independent of each other. Where little
// else waits for memory, a block keeps a slab of 32 of them in registers; kda_step, which does nothing but read and
// write states, brings a whole head's to shared memory.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/head_dim.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_kernels {

/// x a + y
__device__ inline float4 fma4(float a, const float4& x, const float4& y) {
    return {fmaf(a, x.x, y.x), fmaf(a, x.y, y.y), fmaf(a, x.z, y.z), fmaf(a, x.w, y.w)};
}

/// 256 threads and a slab (D, 32) of S: thread t holds columns 4 (t % 8) to + 3 of the rows t / 8 + 32 i.
template <int D>
struct kda_slab {
    static constexpr int threads = 256, columns = 32, rows = D / 32;

    float4 s[rows];

    /// Of the whole matrix (D, D) at `state`, columns from `first` on.
    __device__ void read(const float* state, int first) {
#pragma unroll
        for (int i = 0; i < rows; ++i) s[i] = __ldcs(place<const float4>(state, first, i));
    }
    __device__ void write(float* state, int first) const {
#pragma unroll
        for (int i = 0; i < rows; ++i) __stcs(place<float4>(state, first, i), s[i]);
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
    __device__ static float rows_sum(float x) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, 8);
        return x + __shfl_xor_sync(0xFFFFFFFFu, x, 16);
    }
};

/// A block of kda_step: it takes all of a head's state (D, D), or so many columns of it, through shared memory, where a
/// bulk copy brings it without a register or an instruction of anybody: three blocks on a multiprocessor have 192 KB on
/// their way. A thread has four columns of the rows of its group. The state lies behind this structure, on a line.
template <int D>
struct __align__(128) kda_whole {
    static constexpr int threads = 256, columns = D > 128 ? 64 : D, across = columns / 4;
    static constexpr int groups = threads / across, rows = D / groups;  // of a group
    static constexpr int bytes = D * columns * 4;

    __align__(16) float decay[D], k[D], q[D], v[columns];
    float4 read[groups][across], ask[groups][across];  // S^T k and S^T q of a group's rows
    float along[groups];
    cuda_launch::detail::barrier full;
};

/// Grid: (D / columns, heads, segments). The formula is that of kda_slab.
template <int D>
__global__ void __launch_bounds__(kda_whole<D>::threads, 3)
    kda_step_kernel(const __grid_constant__ launch::kda_args a) {
    using whole = kda_whole<D>;
    using cuda_launch::detail::stage_copy;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ whole m;
    const int lane = threadIdx.x % warp_size, first = blockIdx.x * whole::columns, h = blockIdx.y;
    const int group = threadIdx.x / whole::across, column = threadIdx.x % whole::across;
    const launch::segment segment = a.segments[blockIdx.z];
    float* const state =
        reinterpret_cast<float*>(segment.recurrent) + a.layer * a.layout.layer_floats + h * D * D + first;
    if (threadIdx.x == 0) m.full.init(stage_copy::arrivals);
    cuda_launch::detail::publish_to_copies();
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x < warp_size) {
        const stage_copy copy{m.full, lane};
        constexpr int pieces = whole::columns == D ? 1 : D, bytes = whole::bytes / pieces;
        copy.begin(whole::bytes);
        for (int i = 0; i < pieces; ++i) copy.whole<true>(memory + i * bytes, state + i * D, bytes);
        copy.end();
    }
    float4* const here = reinterpret_cast<float4*>(memory) + group * whole::rows * whole::across + column;
    float4* const there = reinterpret_cast<float4*>(state + group * whole::rows * D) + column;
    const float scale = 1.0f / sqrtf(static_cast<float>(D));
    const auto decayed = [&](int row) {
        const float4 x = here[row * whole::across];
        const float d = m.decay[group * whole::rows + row];
        return float4{d * x.x, d * x.y, d * x.z, d * x.w};
    };
    const int end = segment.first_row + segment.rows;
    for (int t = segment.first_row; t < end; ++t) {
        const float beta = a.beta[t * a.beta_row + h];
        for (int i = threadIdx.x; i < D; i += whole::threads) {
            m.decay[i] = expf(a.log_decay[t * a.decay_row + h * a.decay_head + i]);
            m.k[i] = a.k[t * a.k_row + h * a.k_head + i];
            m.q[i] = a.q[t * a.q_row + h * a.q_head + i];
        }
        if (threadIdx.x < whole::columns) m.v[threadIdx.x] = a.v[t * a.v_row + h * a.v_head + first + threadIdx.x];
        __syncthreads();
        m.full.wait(0);
        float4 read{}, ask{};
        float along = 0;
#pragma unroll
        for (int i = 0; i < whole::rows; ++i) {
            const float key = m.k[group * whole::rows + i], query = m.q[group * whole::rows + i];
            const float4 x = decayed(i);
            read = fma4(key, x, read);
            ask = fma4(query, x, ask);
            along += key * query;
        }
        m.read[group][column] = read, m.ask[group][column] = ask;
        if (column == 0) m.along[group] = along;
        __syncthreads();
        read = {};
#pragma unroll
        for (int g = 0; g < whole::groups; ++g) read = fma4(1.0f, m.read[g][column], read);
        const float4 value = reinterpret_cast<const float4*>(m.v)[column];
        const float4 delta{beta * (value.x - read.x), beta * (value.y - read.y), beta * (value.z - read.z),
                           beta * (value.w - read.w)};
#pragma unroll
        for (int i = 0; i < whole::rows; ++i) {
            const float4 x = fma4(m.k[group * whole::rows + i], delta, decayed(i));
            if (t + 1 == end) {
                __stcs(there + i * (D / 4), x);
            } else {
                here[i * whole::across] = x;
            }
        }
        if (group == 0) {
            ask = {}, along = 0;
            for (int g = 0; g < whole::groups; ++g) ask = fma4(1.0f, m.ask[g][column], ask), along += m.along[g];
            const float4 o = fma4(along, delta, ask);
            float* const out = a.out + t * a.out_row + h * a.out_head + first + 4 * column;
            out[0] = o.x * scale, out[1] = o.y * scale, out[2] = o.z * scale, out[3] = o.w * scale;
        }
        __syncthreads();
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t kda_step(const kda_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    const auto with = [&]<int D>() {
        using whole = kda_whole<D>;
        return start(kda_step_kernel<D>, grid_of(D / whole::columns, a.layout.heads, a.segment_count), whole::threads,
                     whole::bytes, stream, a);
    };
    return detail::visit_head_dim<32, 64, 128, 256>(a.layout.head_dim, with, cudaErrorInvalidValue);
}

}  // namespace keel::cuda_launch
