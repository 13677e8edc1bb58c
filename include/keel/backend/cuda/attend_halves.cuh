// SPDX-License-Identifier: MIT
//
// Absorbed attention of a row over a latent cache of halves, on tensor cores: a block takes 32 heads and a part of the
// cache, which it reads once for scores and sums. Products are of halves, sums f32.
#pragma once

#include <keel/backend/cuda/attention.cuh>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_kernels {

/// Of as many warps: 8, or 16 that share the columns of the scores too.
template <int Warps>
struct halves_attention {
    static constexpr int heads = 32, tile = halves_tile, threads = Warps * warp_size, score_parts = Warps / 8;
    static constexpr int columns_of_warp = attend_most_rank / Warps;

    /// What shared memory holds; rows are padded by 16 bytes against bank conflicts.
    int width, stages;

    __host__ __device__ int pitch() const { return width + 8; }
    __host__ __device__ int bytes() const {
        return 2 * pitch() * (heads + stages * tile) + 4 * score_parts * heads * (tile + 4) + 2 * heads * (tile + 8) +
               4 * heads;
    }

    /// Whether all heads of all rows can be read 16 bytes at a time.
    static bool readable(const float* first, long long row, long long head) {
        return reinterpret_cast<unsigned long long>(first) % 16 == 0 && row % 4 == 0 && head % 4 == 0;
    }

    /// Whether the kernel serves these shapes.
    static bool serves(const launch::latent_attend_args& a) {
        return a.halves && a.layout.half && a.rank % columns_of_warp == 0 && a.layout.latent_width % 16 == 0 &&
               readable(a.q_latent, a.latent_row, a.latent_head) &&
               readable(a.q_position, a.position_row, a.position_head);
    }
};

/// Grid: (splits, rows, groups of 32 heads).
template <int Warps>
__global__ void __launch_bounds__(halves_attention<Warps>::threads, 1)
    attend_halves_kernel(const __grid_constant__ launch::latent_attend_args a, const halves_attention<Warps> shape) {
    using namespace cuda_launch::detail;
    using attention = halves_attention<Warps>;
    constexpr int heads = attention::heads, tile = attention::tile, threads = attention::threads;
    constexpr int score_parts = attention::score_parts;
    constexpr int score_pitch = tile + 4, weight_pitch = tile + 8;
    extern __shared__ __align__(16) unsigned char memory[];
    const int width = shape.width, pitch = shape.pitch();
    __half* const q = reinterpret_cast<__half*>(memory);  // (heads, pitch)
    __half* const cache = q + heads * pitch;              // (stages, tile, pitch)
    float* const scores =
        reinterpret_cast<float*>(cache + shape.stages * tile * pitch);  // (score_parts, heads, score_pitch)
    __half* const weights =
        reinterpret_cast<__half*>(scores + score_parts * heads * score_pitch);        // (heads, weight_pitch)
    float* const shrinks = reinterpret_cast<float*>(weights + heads * weight_pitch);  // (heads)

    const int r = a.first_row + blockIdx.y, first_head = blockIdx.z * heads;
    const launch::segment& s = segment_of(a.segments, a.segment_count, r);
    const split_range range(s.position + r - s.first_row + 1, a.splits, blockIdx.x, tile);
    // A warp copies a row at a time. A tile starts at a multiple of its size and so lies in one block of the cache.
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    constexpr int warps = threads / warp_size;
    const auto fetch = [&](int from, int stage) {  // nothing behind the end
        if (from >= range.count) return commit_copies();
        const unsigned char* rows = latent_row(a.layout, s, a.layer, range.first + from);
        __half* to = cache + stage * tile * pitch;
#pragma unroll 4
        for (int t = warp; t < tile; t += warps) {
            const bool inside = from + t < range.count;
            for (int c = 8 * lane; c < width; c += 8 * warp_size) {
                copy_async(to + t * pitch + c, rows + 2 * (inside ? t * width + c : 0), inside ? 16 : 0);
            }
        }
        commit_copies();
    };
    // What was in the cache before this batch does not have to be waited for.
    int ahead = 0;
    for (; ahead < shape.stages && ahead * tile < range.count; ++ahead) {
        if (range.first + (ahead + 1) * tile > s.position) break;
        fetch(ahead * tile, ahead);
    }
    wait_for_previous();
    if (range.count == 0) return;
    for (; ahead < shape.stages; ++ahead) fetch(ahead * tile, ahead);
    // All that a warp converts is asked for at once, from inside the row where it would be behind the end.
    constexpr int heads_of_warp = heads / warps, pieces = 5, columns = 4 * warp_size;
    for (int from = 0; from < width; from += pieces * columns) {
        float4 v[heads_of_warp][pieces];
#pragma unroll
        for (int i = 0; i < heads_of_warp; ++i) {
            const int at = min(first_head + warp + i * warps, a.heads - 1);
            const float* latent = a.q_latent + r * a.latent_row + at * a.latent_head;
            const float* position = a.q_position + r * a.position_row + at * a.position_head;
#pragma unroll
            for (int j = 0; j < pieces; ++j) {
                const int c = min(from + j * columns + 4 * lane, width - 4);
                v[i][j] = *reinterpret_cast<const float4*>(c < a.rank ? latent + c : position + c - a.rank);
            }
        }
#pragma unroll
        for (int i = 0; i < heads_of_warp; ++i) {
#pragma unroll
            for (int j = 0; j < pieces; ++j) {
                const int c = from + j * columns + 4 * lane;
                const __half2 halves[2] = {__floats2half2_rn(v[i][j].x * a.scale, v[i][j].y * a.scale),
                                           __floats2half2_rn(v[i][j].z * a.scale, v[i][j].w * a.scale)};
                if (c < width)
                    *reinterpret_cast<uint2*>(q + (warp + i * warps) * pitch + c) =
                        *reinterpret_cast<const uint2*>(halves);
            }
        }
    }

    const int matrix = lane / 8, line = lane % 8;
    constexpr int parts = threads / heads;
    const int head = threadIdx.x / parts, part = threadIdx.x % parts;  // in the softmax
    float largest = -INFINITY, total = 0;
    constexpr int eights = attention::columns_of_warp / 8;
    float sum[2][eights][4] = {};  // 32 heads, the warp's columns
    const int column = warp * attention::columns_of_warp;
    for (int from = 0, stage = 0; from < range.count; from += tile) {
        if (shape.stages == 2) {
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const __half* const rows = cache + stage * tile * pitch;

        // Scores: a warp takes 16 heads, 16 positions and, with 16 warps, every other 32 columns.
        {
            const int m = warp % 2 * 16, n = warp / 2 % 4 * 16, of_part = warp / 8;
            const std::uint32_t left = shared_address(q + (m + matrix % 2 * 8 + line) * pitch + matrix / 2 * 8);
            const std::uint32_t right = shared_address(rows + (n + matrix / 2 * 8 + line) * pitch + matrix % 2 * 8);
            float score[2][2][4] = {};
#pragma unroll 3
            for (int k = 32 * of_part; k < width; k += 32 * score_parts) {
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    if (k + 16 * odd >= width) break;
                    std::uint32_t x[4], y[4];
                    load_matrices(x, left + 2 * (k + 16 * odd));
                    load_matrices(y, right + 2 * (k + 16 * odd));
                    multiply(score[odd][0], x, y[0], y[1]);
                    multiply(score[odd][1], x, y[2], y[3]);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float* to = scores + (of_part * heads + m + lane / 4) * score_pitch + n + 8 * j + lane % 4 * 2;
                to[0] = score[0][j][0] + score[1][j][0];
                to[1] = score[0][j][1] + score[1][j][1];
                to[8 * score_pitch] = score[0][j][2] + score[1][j][2];
                to[8 * score_pitch + 1] = score[0][j][3] + score[1][j][3];
            }
        }
        __syncthreads();
        {
            float value[tile / parts];
            float top = largest;
#pragma unroll
            for (int i = 0; i < tile / parts; ++i) {
                const int t = part + parts * i;
                const float* of = scores + head * score_pitch + t;
                float score = of[0];
                if constexpr (score_parts == 2) score += of[heads * score_pitch];
                value[i] = from + t < range.count ? score : -INFINITY;
                top = fmaxf(top, value[i]);
            }
            top = lanes_max<parts>(top);
            const float shrink = __expf(largest - top);
            float some = 0;
#pragma unroll
            for (int i = 0; i < tile / parts; ++i) {
                const float w = __expf(value[i] - top);
                some += w;
                weights[head * weight_pitch + part + parts * i] = __float2half_rn(w);
            }
            total = total * shrink + lanes_sum<parts>(some);
            largest = top;
            if (part == 0) shrinks[head] = shrink;
        }
        __syncthreads();
        if (column < a.rank) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const float upper = shrinks[16 * m + lane / 4], lower = shrinks[16 * m + lane / 4 + 8];
#pragma unroll
                for (int j = 0; j < eights; ++j) {
                    sum[m][j][0] *= upper, sum[m][j][1] *= upper, sum[m][j][2] *= lower, sum[m][j][3] *= lower;
                }
            }
            const std::uint32_t left =
                shared_address(weights + (matrix % 2 * 8 + line) * weight_pitch + matrix / 2 * 8);
            const std::uint32_t right =
                shared_address(rows + (matrix % 2 * 8 + line) * pitch + column + matrix / 2 * 8);
#pragma unroll
            for (int k = 0; k < tile; k += 16) {
                std::uint32_t x[2][4];
                load_matrices(x[0], left + 2 * k);
                load_matrices(x[1], left + 2 * (16 * weight_pitch + k));
#pragma unroll
                for (int j = 0; j < eights; j += 2) {
                    std::uint32_t y[4];
                    load_transposed(y, right + 2 * (k * pitch + 8 * j));
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        multiply(sum[m][j], x[m], y[0], y[1]);
                        multiply(sum[m][j + 1], x[m], y[2], y[3]);
                    }
                }
            }
        }
        __syncthreads();
        fetch(from + shape.stages * tile, stage);
        if (shape.stages == 2) stage ^= 1;
    }

    float* const partial = a.partial + attend_partial(a, blockIdx.y, blockIdx.x);
    if (part == 0 && first_head + head < a.heads) {
        float* to = partial + (first_head + head) * attend_pitch(a.rank) + a.rank;
        to[0] = largest;
        to[1] = total;
    }
    if (column >= a.rank) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int h = first_head + 16 * m + 8 * lower + lane / 4;
            if (h >= a.heads) continue;
            float* to = partial + h * attend_pitch(a.rank) + column + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < eights; ++j) {
                *reinterpret_cast<float2*>(to + 8 * j) = {sum[m][j][2 * lower], sum[m][j][2 * lower + 1]};
            }
        }
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t latent_attend(const latent_attend_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.rank > attend_most_rank || a.rank % 4 != 0 || a.splits > attend_most_splits) return cudaErrorInvalidValue;
    const bool few = a.heads * a.row_count <= 64;  // then the heads alone do not fill the device
    int tile = attend_tile;
    cudaError_t e = cudaSuccess;
    const auto halves = [&]<int Warps>() {
        int device = 0, most = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        halves_attention<Warps> shape{a.layout.latent_width, 2};
        if (shape.bytes() > most) shape.stages = 1;
        tile = shape.tile;
        return start(attend_halves_kernel<Warps>, grid_of(a.splits, a.row_count, ceil_div(a.heads, shape.heads)),
                     shape.threads, shape.bytes(), stream, a, shape);
    };
    if (few && halves_attention<16>::serves(a)) {
        e = halves.template operator()<16>();
    } else if (halves_attention<8>::serves(a)) {
        e = halves.template operator()<8>();
    } else {
        const int pitch = a.layout.latent_width + 1;
        const int bytes = 4 * ((attend_heads + attend_tile) * pitch + attend_heads * attend_tile + attend_heads);
        e = start(latent_attend_kernel, grid_of(a.splits, a.row_count, ceil_div(a.heads, attend_heads)), attend_threads,
                  bytes, stream, a);
    }
    if (e != cudaSuccess) return e;
    const auto join = [&]<int Threads, int Ahead>(int parts) {
        return start(latent_join_kernel<Threads, Ahead>, grid_of(a.heads, a.row_count, parts), Threads, 0, stream, a,
                     tile);
    };
    constexpr int ahead = 9;  // of 132 splits in groups of 16
    if (few && a.rank % 16 == 0) return join.template operator()<512, ahead>(4);
    return a.splits > 4 ? join.template operator()<512, 1>(1) : join.template operator()<128, 1>(1);
}

}  // namespace keel::cuda_launch
