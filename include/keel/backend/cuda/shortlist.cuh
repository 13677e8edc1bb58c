// SPDX-License-Identifier: MIT
//
// Shortlists of logits (core/shortlist.hpp). Parts of a row are counted side by side, each in bins below its own
// largest logit; since bins are the same for all of them, the counts add up when the largest of all is known.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/core/shortlist.hpp>

namespace keel::cuda_kernels {

inline constexpr int shortlist_threads = 512;

/// The distance of a logit's bin from the first one of the largest logit: to be compared with numbers of bins.
__device__ inline unsigned bin_below(float best, float logit) {
    return static_cast<unsigned>(__float2int_rd(shortlist::per_unit * best)) -
           static_cast<unsigned>(__float2int_rd(shortlist::per_unit * logit));
}

/// Grid: (parts, rows).
__global__ void count_logits_kernel(const __grid_constant__ launch::shortlist_args a) {
    constexpr int each = launch::shortlist_part / shortlist_threads;
    __shared__ unsigned counts[shortlist::bins];
    for (int i = threadIdx.x; i < shortlist::bins; i += blockDim.x) counts[i] = 0;
    wait_for_previous();
    const float* logits = a.logits + blockIdx.y * a.logits_row;
    const int first = blockIdx.x * launch::shortlist_part + threadIdx.x;
    float value[each];
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int id = first + i * shortlist_threads;
        value[i] = id < a.columns ? logits[id] : -INFINITY;
    }
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < each; ++i) best = fmaxf(best, value[i]);  // not a NaN
    best = block_max(best);
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const unsigned bin = bin_below(best, value[i]);
        if (value[i] > -INFINITY && bin < shortlist::bins) atomicAdd(&counts[bin], 1u);
    }
    __syncthreads();
    const int part = blockIdx.y * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < shortlist::bins; i += blockDim.x) a.counts[part * shortlist::bins + i] = counts[i];
    if (threadIdx.x == 0) a.best[part] = best;
    if (threadIdx.x == 0 && blockIdx.x == 0) reinterpret_cast<shortlist*>(a.lists)[blockIdx.y].listed = 0;
}

/// Inclusive sums over the threads of a block.
__device__ inline unsigned sum_up_to(unsigned x) {
    __shared__ unsigned of_warp[warp_size];
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    for (int d = 1; d < warp_size; d *= 2) {
        const unsigned before = __shfl_up_sync(0xFFFFFFFFu, x, d);
        if (lane >= d) x += before;
    }
    if (lane == warp_size - 1) of_warp[warp] = x;
    __syncthreads();
    for (int w = 0; w < warp; ++w) x += of_warp[w];
    return x;
}

/// Grid: (parts, rows). Every block finds how many bins are listed, and lists what its part has of them.
__global__ void shortlist_kernel(const __grid_constant__ launch::shortlist_args a) {
    wait_for_previous();
    const float* best_of = a.best + blockIdx.y * gridDim.x;
    float best = -INFINITY;
    for (int p = 0; p < gridDim.x; ++p) best = fmaxf(best, best_of[p]);

    const unsigned* counts = a.counts + blockIdx.y * gridDim.x * shortlist::bins;
    const unsigned bin = threadIdx.x;
    unsigned count = 0;
    for (int p = 0; p < gridDim.x; ++p, counts += shortlist::bins) {
        const unsigned skipped = bin_below(best, best_of[p]);
        if (bin < shortlist::bins && skipped <= bin) count += counts[bin - skipped];
    }
    const unsigned up_to = sum_up_to(count);
    const bool fits = bin < shortlist::bins && up_to <= shortlist::most;
    const unsigned listed_bins = __syncthreads_count(fits);

    shortlist& list = reinterpret_cast<shortlist*>(a.lists)[blockIdx.y];
    if (blockIdx.x == 0 && bin < shortlist::bins) list.others[bin] = fits ? 0 : count;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        list.best = best;
        list.top = __float2int_rd(shortlist::per_unit * best);
        list.vocabulary = a.columns;
    }
    if (bin_below(best, best_of[blockIdx.x]) >= listed_bins) return;
    const float* logits = a.logits + blockIdx.y * a.logits_row;
    const int first = blockIdx.x * launch::shortlist_part, end = min(first + launch::shortlist_part, a.columns);
#pragma unroll 4
    for (int id = first + threadIdx.x; id < end; id += blockDim.x) {
        const float logit = logits[id];
        if (logit > -INFINITY && bin_below(best, logit) < listed_bins) {
            list.entries[atomicAdd(&list.listed, 1)] = {id, logit};
        }
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t shortlist(const shortlist_args& a, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(shortlist_parts(a.columns)), static_cast<unsigned>(a.rows));
    const auto e =
        cuda_kernels::start(cuda_kernels::count_logits_kernel, grid, cuda_kernels::shortlist_threads, 0, stream, a);
    if (e != cudaSuccess) return e;
    return cuda_kernels::start(cuda_kernels::shortlist_kernel, grid, cuda_kernels::shortlist_threads, 0, stream, a);
}

}  // namespace keel::cuda_launch
