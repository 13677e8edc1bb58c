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

/// The segment that a row of the batch belongs to. While a batch decodes it is the one with the row's number, which is
/// the last one that it can be; else it takes a search, as a row after the other would be a chain of loads.
__device__ inline const launch::segment& segment_of(const launch::segment* segments, int count, int row) {
    int first = 0, last = min(row - segments[0].first_row, count - 1);
    while (segments[last].first_row > row) {
        const int middle = (first + last + 1) / 2;
        if (segments[middle].first_row > row) {
            last = middle - 1;
        } else {
            first = middle;
        }
    }
    return segments[last];
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

/// Positions of a tile of attend_halves.cuh.
inline constexpr int halves_tile = 64;

/// Grid: (rows, 1 + splits). The first block of a row appends it; the others have nothing to do with that: while the
/// queries are made, and memory idles, they ask for what attention will read first, a tile of each of its splits.
__global__ void latent_append_kernel(const __grid_constant__ launch::latent_append_args a) {
    const int r = a.segments[0].first_row + blockIdx.x;
    const launch::segment& s = segment_of(a.segments, a.segment_count, r);
    const long long position = s.position + r - s.first_row;
    if (blockIdx.y > 0) {
        start_next();
        wait_for_previous();
        const split_range range(position + 1, gridDim.y - 1, blockIdx.y - 1, halves_tile);
        const int bytes = min(range.count, halves_tile) * a.layout.latent_width * 2;
        if (threadIdx.x == 0 && bytes > 0) prefetch(latent_row(a.layout, s, a.layer, range.first), bytes);
        return;
    }
    unsigned char* to = latent_row(a.layout, s, a.layer, position);
    if (threadIdx.x == 0 && a.rank % 4 == 0 && aligned16(a.weight, a.weight)) {
        prefetch(reinterpret_cast<const unsigned char*>(a.weight), a.rank * 4);
    }
    start_next();
    wait_for_previous();
    float* row = a.rows + r * a.row_stride;
    const float scale = inverse_rms_of(row, a.rank, a.epsilon);
#pragma unroll 4
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

/// Floats from a head to the next in `partial`: its sum, then maximum and total.
__host__ __device__ constexpr int attend_pitch(int rank) { return rank + 4; }

/// Where a row's and split's part of `partial` begins.
__device__ inline long long attend_partial(const launch::latent_attend_args& a, int row, int split) {
    return (static_cast<long long>(row) * a.splits + split) * a.heads * attend_pitch(a.rank);
}

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
    float* partial = a.partial + attend_partial(a, blockIdx.y, blockIdx.x);
    if (at == 0 && first_head + head < a.heads) {
        partial[(first_head + head) * attend_pitch(a.rank) + a.rank] = largest;
        partial[(first_head + head) * attend_pitch(a.rank) + a.rank + 1] = total;
    }
#pragma unroll
    for (int h = 0; h < attend_heads; ++h) {
        if (first_head + h >= a.heads) continue;
        float* out = partial + (first_head + h) * attend_pitch(a.rank);
        if (threadIdx.x < a.rank) out[threadIdx.x] = sum[h][0];
        if (threadIdx.x + 256 < a.rank) out[threadIdx.x + 256] = sum[h][1];
    }
}

inline constexpr int attend_most_splits = 256;

/// Joins the splits of a row and head, in a part of its columns; groups of threads take four columns each of every few
/// splits, and ask for the first `Ahead` before their weights are known. Grid: (heads, rows, parts). `tile` is that of
/// the kernel before.
template <int Threads, int Ahead>
__global__ void __launch_bounds__(Threads)
    latent_join_kernel(const __grid_constant__ launch::latent_attend_args a, const int tile) {
    __shared__ float weight[attend_most_splits], of_warp[Threads / warp_size];
    __shared__ __align__(16) float4 sums[Threads];
    start_next();
    const int h = blockIdx.x, r = a.first_row + blockIdx.y;
    const launch::segment& s = segment_of(a.segments, a.segment_count, r);
    const long long tiles = (s.position + r - s.first_row + tile) / tile, each = (tiles + a.splits - 1) / a.splits;
    const int splits = static_cast<int>((tiles + each - 1) / each);
    const float* partial = a.partial + attend_partial(a, blockIdx.y, 0) + h * attend_pitch(a.rank);
    const long long distance = static_cast<long long>(a.heads) * attend_pitch(a.rank);
    const int lanes = a.rank / (4 * gridDim.z), groups = Threads / lanes, group = threadIdx.x / lanes;
    const int column = 4 * (blockIdx.z * lanes + threadIdx.x % lanes);

    wait_for_previous();
    const auto part_of = [&](int i) {
        return i < splits ? *reinterpret_cast<const float4*>(partial + i * distance + column) : float4{};
    };
    float4 first[Ahead];
#pragma unroll
    for (int j = 0; j < Ahead; ++j) first[j] = part_of(group + j * groups);
    const bool mine = threadIdx.x < splits;
    const float top = mine ? partial[threadIdx.x * distance + a.rank] : -INFINITY;
    const float some = mine ? partial[threadIdx.x * distance + a.rank + 1] : 0.0f;
    float largest = lanes_max(top);
    if (threadIdx.x % warp_size == 0) of_warp[threadIdx.x / warp_size] = largest;
    __syncthreads();
    for (const float x : of_warp) largest = fmaxf(largest, x);
    const float factor = mine ? expf(top - largest) : 0.0f;
    if (threadIdx.x < attend_most_splits) weight[threadIdx.x] = factor;
    const float total = block_sum(factor * some);  // a barrier for weight, too

    float4 sum{};
    const auto add = [&](int i, const float4& x) {
        const float w = i < splits ? weight[i] : 0.0f;
        sum = {sum.x + w * x.x, sum.y + w * x.y, sum.z + w * x.z, sum.w + w * x.w};
    };
    if (group < groups) {
#pragma unroll
        for (int j = 0; j < Ahead; ++j) add(group + j * groups, first[j]);
        for (int i = group + Ahead * groups; i < splits; i += groups) add(i, part_of(i));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int g = 1; g < groups; ++g) {
        const float4 x = sums[g * lanes + threadIdx.x];
        sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
    float* out = a.out + r * a.out_row + h * a.out_head + column;
    out[0] = sum.x / total, out[1] = sum.y / total, out[2] = sum.z / total, out[3] = sum.w / total;
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t latent_append(const latent_append_args& a, cudaStream_t stream) {
    const bool ahead = a.layout.half && a.layout.latent_width % 8 == 0;
    return cuda_kernels::start(cuda_kernels::latent_append_kernel, grid_of(a.row_count, 1 + (ahead ? a.splits : 0)),
                               128, 0, stream, a);
}

}  // namespace keel::cuda_launch
