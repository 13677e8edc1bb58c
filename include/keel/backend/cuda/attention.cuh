// SPDX-License-Identifier: MIT
//
// The latent cache: appending to it, and absorbed attention over it, split along the cache so that few rows fill the
// device.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/matvec.cuh>

namespace keel::cuda_kernels {

inline constexpr int block_rows = 256;  // memory_layout::block_rows

__device__ inline unsigned char* latent_row(const launch::memory& m, const launch::segment& s, int layer,
                                            long long position) {
    const long long row_bytes = m.latent_width * (m.half ? 2 : 4);
    return s.blocks[position / block_rows] + (layer * block_rows + position % block_rows) * row_bytes;
}

__device__ inline float latent_value(const launch::memory& m, const unsigned char* row, int i) {
    return m.half ? __half2float(reinterpret_cast<const __half*>(row)[i]) : reinterpret_cast<const float*>(row)[i];
}

/// The segment that a row of the batch belongs to.
__device__ inline const launch::segment& segment_of(const launch::segment* segments, int count, int row) {
    int i = 0;
    while (i + 1 < count && segments[i + 1].first_row <= row) ++i;
    return segments[i];
}

__global__ void latent_append_kernel(const __grid_constant__ launch::latent_append_args a) {
    wait_for_previous();
    const int r = a.segments[0].first_row + blockIdx.x;
    const launch::segment& s = segment_of(a.segments, a.segment_count, r);
    float* row = a.rows + r * a.row_stride;
    const float scale = inverse_rms(row, a.rank, a.epsilon);
    unsigned char* to = latent_row(a.layout, s, a.layer, s.position + r - s.first_row);
    for (int i = threadIdx.x; i < a.layout.latent_width; i += blockDim.x) {
        const float x = i < a.rank ? row[i] * scale * a.weight[i] : row[i];
        row[i] = x;
        if (a.layout.half) {
            reinterpret_cast<__half*>(to)[i] = __float2half_rn(x);
        } else {
            reinterpret_cast<float*>(to)[i] = x;
        }
    }
}

/// The positions [first, first + count) of split `i`: multiples of `tile`, the same number for all but the last.
struct split_range {
    long long first;
    int count;

    __device__ split_range(long long length, int splits, int i, int tile) {
        const long long tiles = (length + tile - 1) / tile;
        const long long each = (tiles + splits - 1) / splits * tile;
        first = i * each;
        count = static_cast<int>(max(0ll, min(each, length - first)));
    }
};

inline constexpr int attend_tile = 16, attend_heads = 16, attend_threads = 256, attend_most_rank = 512;

/// Grid: (splits, rows, groups of 16 heads).
__global__ void __launch_bounds__(attend_threads)
    latent_attend_kernel(const __grid_constant__ launch::latent_attend_args a) {
    extern __shared__ __align__(16) unsigned char memory[];
    wait_for_previous();
    const int width = a.layout.latent_width, pitch = width + 1;
    float* q = reinterpret_cast<float*>(memory);            // (16 heads, pitch)
    float* cache = q + attend_heads * pitch;                // (16 positions, pitch)
    float* weights = cache + attend_tile * pitch;           // (16 heads, 16 positions)
    float* rescale = weights + attend_heads * attend_tile;  // (16 heads)

    const int r = a.first_row + blockIdx.y;
    const launch::segment& s = segment_of(a.segments, a.segment_count, r);
    const split_range range(s.position + r - s.first_row + 1, a.splits, blockIdx.x, attend_tile);
    if (range.count == 0) return;
    const int first_head = blockIdx.z * attend_heads;
    for (int i = threadIdx.x; i < attend_heads * width; i += attend_threads) {
        const int h = i / width, c = i % width;
        float value = 0;
        if (first_head + h < a.heads) {
            value = c < a.rank ? a.q_latent[r * a.latent_row + (first_head + h) * a.latent_head + c]
                               : a.q_position[r * a.position_row + (first_head + h) * a.position_head + c - a.rank];
        }
        q[h * pitch + c] = value * a.scale;
    }
    // Thread t: the score of head t / 16 and position t % 16; then columns t and t + 256 of all heads' sums.
    const int head = threadIdx.x / attend_tile, at = threadIdx.x % attend_tile;
    float largest = -INFINITY, total = 0;
    float sum[attend_heads][2] = {};
    for (int from = 0; from < range.count; from += attend_tile) {
        const int count = min(attend_tile, range.count - from);
        __syncthreads();
        for (int t = threadIdx.x / warp_size; t < attend_tile; t += attend_threads / warp_size) {
            const unsigned char* row = t < count ? latent_row(a.layout, s, a.layer, range.first + from + t) : nullptr;
            for (int c = threadIdx.x % warp_size; c < width; c += warp_size) {
                cache[t * pitch + c] = t < count ? latent_value(a.layout, row, c) : 0.0f;
            }
        }
        __syncthreads();
        float score = 0;
        for (int c = 0; c < width; ++c) score += q[head * pitch + c] * cache[at * pitch + c];
        if (at >= count) score = -INFINITY;
        const float top = fmaxf(largest, lanes_max<attend_tile>(score));
        const float weight = expf(score - top);
        const float shrink = expf(largest - top);
        total = total * shrink + lanes_sum<attend_tile>(weight);
        largest = top;
        weights[head * attend_tile + at] = weight;
        if (at == 0) rescale[head] = shrink;
        __syncthreads();
#pragma unroll
        for (int h = 0; h < attend_heads; ++h) sum[h][0] *= rescale[h], sum[h][1] *= rescale[h];
        for (int t = 0; t < count; ++t) {
            const float x0 = threadIdx.x < a.rank ? cache[t * pitch + threadIdx.x] : 0.0f;
            const float x1 = threadIdx.x + 256 < a.rank ? cache[t * pitch + threadIdx.x + 256] : 0.0f;
#pragma unroll
            for (int h = 0; h < attend_heads; ++h) {
                sum[h][0] += weights[h * attend_tile + t] * x0;
                sum[h][1] += weights[h * attend_tile + t] * x1;
            }
        }
    }
    float* partial = a.partial + (static_cast<long long>(blockIdx.y) * a.splits + blockIdx.x) * a.heads * (a.rank + 2);
    if (at == 0 && first_head + head < a.heads) {
        partial[(first_head + head) * (a.rank + 2) + a.rank] = largest;
        partial[(first_head + head) * (a.rank + 2) + a.rank + 1] = total;
    }
#pragma unroll
    for (int h = 0; h < attend_heads; ++h) {
        if (first_head + h >= a.heads) continue;
        float* out = partial + (first_head + h) * (a.rank + 2);
        if (threadIdx.x < a.rank) out[threadIdx.x] = sum[h][0];
        if (threadIdx.x + 256 < a.rank) out[threadIdx.x + 256] = sum[h][1];
    }
}

/// Joins the splits of a row and head. Grid: (heads, rows).
__global__ void latent_join_kernel(const __grid_constant__ launch::latent_attend_args a) {
    wait_for_previous();
    const int h = blockIdx.x, r = a.first_row + blockIdx.y;
    const launch::segment& s = segment_of(a.segments, a.segment_count, r);
    const long long length = s.position + r - s.first_row + 1;
    const long long distance = static_cast<long long>(a.heads) * (a.rank + 2);
    const float* partial = a.partial + blockIdx.y * a.splits * distance + h * (a.rank + 2);
    int splits = a.splits;
    while (splits > 1 && split_range(length, a.splits, splits - 1, attend_tile).count == 0) --splits;
    float largest = -INFINITY;
    for (int i = 0; i < splits; ++i) largest = fmaxf(largest, partial[i * distance + a.rank]);
    float total = 0;
    for (int i = 0; i < splits; ++i) {
        total += expf(partial[i * distance + a.rank] - largest) * partial[i * distance + a.rank + 1];
    }
    for (int c = threadIdx.x; c < a.rank; c += blockDim.x) {
        float sum = 0;
        for (int i = 0; i < splits; ++i) {
            sum += expf(partial[i * distance + a.rank] - largest) * partial[i * distance + c];
        }
        a.out[r * a.out_row + h * a.out_head + c] = sum / total;
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t latent_append(const latent_append_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::latent_append_kernel, grid_of(a.row_count), 128, 0, stream, a);
}

cudaError_t latent_attend(const latent_attend_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.rank > attend_most_rank) return cudaErrorInvalidValue;
    const int pitch = a.layout.latent_width + 1;
    const int bytes = 4 * ((attend_heads + attend_tile) * pitch + attend_heads * attend_tile + attend_heads);
    const auto e = start(latent_attend_kernel, grid_of(a.splits, a.row_count, ceil_div(a.heads, attend_heads)),
                         attend_threads, bytes, stream, a);
    return e != cudaSuccess ? e : start(latent_join_kernel, grid_of(a.heads, a.row_count), 128, 0, stream, a);
}

}  // namespace keel::cuda_launch
