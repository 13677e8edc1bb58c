// SPDX-License-Identifier: MIT
//
// Kimi Delta Attention, token by token. The columns of S (the value axis) are independent of each other: a block takes
// a slab of 32 of them, for one head of one segment, and keeps it in registers.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/head_dim.hpp>

namespace keel::cuda_kernels {

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
__global__ void __launch_bounds__(256, 5) kda_step_kernel(const __grid_constant__ launch::kda_args a) {
    using slab = kda_slab<D>;
    __shared__ __align__(16) float decay[D], k[D], q[D], v[slab::columns], sums[slab::sum_floats];
    const int first = blockIdx.x * slab::columns, h = blockIdx.y;
    const launch::segment segment = a.segments[blockIdx.z];
    float* state = reinterpret_cast<float*>(segment.recurrent) + a.layer * a.layout.layer_floats + h * D * D;
    wait_for_previous();
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

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t kda_step(const kda_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    const auto with = [&]<int D>() {
        return start(kda_step_kernel<D>, grid_of(D / 32, a.layout.heads, a.segment_count), 256, 0, stream, a);
    };
    return detail::visit_head_dim<32, 64, 128, 256>(a.layout.head_dim, with, cudaErrorInvalidValue);
}

}  // namespace keel::cuda_launch
