// SPDX-License-Identifier: MIT
//
// The short convolution, alone and with all else that stands between the products and the recurrence of a KDA layer.
// Segments are convolved in place, in tiles of rows side by side. So what each tile needs of the rows before it is
// copied aside first, where there is more than one tile.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/head_dim.hpp>

namespace keel::cuda_kernels {

/// A tile of a segment. Grid: (.., tiles, segments).
struct conv_tile {
    static constexpr int rows = launch::short_conv_tile;
    launch::segment segment;
    int first, last;
    bool alone;

    __device__ explicit conv_tile(const launch::segment* segments) : segment(segments[blockIdx.z]) {
        first = segment.first_row + static_cast<int>(blockIdx.y) * rows;
        last = min(first + rows, segment.first_row + segment.rows);
        alone = segment.rows <= rows;
    }
    __device__ bool begins() const { return first == segment.first_row; }
    __device__ bool ends() const { return last == segment.first_row + segment.rows; }

    /// The segment's history of part `which`: taps rows, `channels` apart.
    __device__ float* history(const launch::memory& m, int layer, int which, int channels) const {
        return reinterpret_cast<float*>(segment.recurrent) + layer * m.layer_floats +
               static_cast<long long>(m.heads) * m.head_dim * m.head_dim +
               static_cast<long long>(which) * m.taps * channels;
    }
    /// Where the rows before this tile lie aside, as the history does: tiles of long segments begin at least a tile
    /// apart, but for a first tile and the last one of the segment before it.
    __device__ float* aside(float* edges, int taps, int channels) const {
        return edges + static_cast<long long>(2 * (first / rows) + (begins() ? 1 : 0)) * taps * channels;
    }
};

/// What a thread does with Channels neighbouring channels: y_t = silu(sum_j weight_j x_{t - Taps + j}).
template <int Taps, int Channels>
struct conv_window {
    float weight[Channels][Taps + 1], past[Channels][Taps];

    /// `before` are the rows before the first one, `pitch` apart.
    __device__ conv_window(const float* taps, const float* before, int pitch) {
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
#pragma unroll
            for (int j = 0; j <= Taps; ++j) weight[c][j] = taps[c * (Taps + 1) + j];
#pragma unroll
            for (int j = 0; j < Taps; ++j) past[c][j] = before[j * pitch + c];
        }
    }
    __device__ void step(float (&x)[Channels]) {
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < Taps; ++j) sum += weight[c][j] * past[c][j];
            sum += weight[c][Taps] * x[c];
#pragma unroll
            for (int j = 0; j + 1 < Taps; ++j) past[c][j] = past[c][j + 1];
            past[c][Taps - 1] = x[c];
            x[c] = silu(sum);
        }
    }
    __device__ void leave(float* history, int pitch) const {
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
#pragma unroll
            for (int j = 0; j < Taps; ++j) history[j * pitch + c] = past[c][j];
        }
    }
};

/// Channels neighbouring floats, in accesses of up to 16 bytes.
template <int Channels>
__device__ inline void load_some(float (&v)[Channels], const float* p) {
    using word = std::conditional_t<Channels % 4 == 0, float4, std::conditional_t<Channels % 2 == 0, float2, float>>;
#pragma unroll
    for (int i = 0; i < Channels; i += sizeof(word) / 4) {
        *reinterpret_cast<word*>(v + i) = *reinterpret_cast<const word*>(p + i);
    }
}
template <int Channels>
__device__ inline void store_some(float* p, const float (&v)[Channels]) {
    using word = std::conditional_t<Channels % 4 == 0, float4, std::conditional_t<Channels % 2 == 0, float2, float>>;
#pragma unroll
    for (int i = 0; i < Channels; i += sizeof(word) / 4) {
        *reinterpret_cast<word*>(p + i) = *reinterpret_cast<const word*>(v + i);
    }
}

/// Copies the rows before each tile aside, of Parts arrays. Grid: (channels of all parts, tiles, segments).
template <class Arguments>
__global__ void conv_edges_kernel(const __grid_constant__ Arguments a) {
    wait_for_previous();
    const conv_tile tile(a.segments);
    const int channels = a.layout.heads * a.layout.head_dim, at = blockIdx.x * blockDim.x + threadIdx.x;
    const int part = at / channels, channel = at % channels, taps = a.layout.taps;
    if (part >= Arguments::parts || tile.first >= tile.last || tile.alone) return;
    float* const to = tile.aside(a.edges_of(part), taps, channels) + channel;
    const float* const history = tile.history(a.layout, a.layer, a.which(part), channels) + channel;
    const launch::activation_rows x = a.input(part);
    for (int j = 0; j < taps; ++j) {
        to[j * channels] = tile.begins() ? history[j * channels] : x.data[(tile.first - taps + j) * x.row + channel];
    }
}

/// One thread per channel of a tile.
template <int Taps>
__global__ void short_conv_kernel(const __grid_constant__ launch::short_conv_args a) {
    wait_for_previous();
    constexpr int at_once = 8;
    const conv_tile tile(a.segments);
    const int channels = a.layout.heads * a.layout.head_dim, channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels || tile.first >= tile.last) return;
    float* const history = tile.history(a.layout, a.layer, a.part, channels) + channel;
    conv_window<Taps, 1> window(a.taps + channel * (Taps + 1),
                                tile.alone ? history : tile.aside(a.edges, Taps, channels) + channel, channels);
    for (int first = tile.first; first < tile.last; first += at_once) {
        float* const x = a.x.data + first * a.x.row + channel;
        float now[at_once][1];
#pragma unroll
        for (int r = 0; r < at_once; ++r) now[r][0] = first + r < tile.last ? x[r * a.x.row] : 0.0f;
#pragma unroll
        for (int r = 0; r < at_once; ++r) {
            if (first + r >= tile.last) break;
            window.step(now[r]);
            x[r * a.x.row] = now[r][0];
        }
    }
    if (tile.ends()) window.leave(history, channels);
}

/// Of a tile and a head, warp 0 makes q, warp 1 k, warp 2 v, warp 3 the decay and beta. Grid: (heads, tiles, segments).
template <int D, int Taps>
__global__ void __launch_bounds__(128) kda_inputs_kernel(const __grid_constant__ launch::kda_inputs_args a) {
    wait_for_previous();
    constexpr int each = D / warp_size, at_once = 4;  // channels of a lane, rows
    const conv_tile tile(a.segments);
    if (tile.first >= tile.last) return;
    const int part = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, h = blockIdx.x;
    const int channels = a.layout.heads * D, channel = h * D + lane * each;
    if (part == a.parts) {
        float bias[each];
        load_some(bias, a.dt_bias + channel);
        const float slope = a.a[h];
        for (int row = tile.first; row < tile.last; ++row) {
            float* const to = a.log_decay.data + row * a.log_decay.row + channel;
            float g[each];
            load_some(g, to);
#pragma unroll
            for (int c = 0; c < each; ++c) g[c] = slope * softplus(g[c] + bias[c]);
            store_some(to, g);
        }
        for (int row = tile.first + lane; row < tile.last; row += warp_size) {
            float& beta = a.beta.data[row * a.beta.row + h];
            beta = sigmoid(beta);
        }
        return;
    }
    float* const history = tile.history(a.layout, a.layer, part, channels) + channel;
    conv_window<Taps, each> window(a.taps[part] + channel * (Taps + 1),
                                   tile.alone ? history : tile.aside(a.edges_of(part), Taps, channels) + channel,
                                   channels);
    const launch::activation_rows x = a.x[part];
    for (int first = tile.first; first < tile.last; first += at_once) {
        float now[at_once][each];
#pragma unroll
        for (int r = 0; r < at_once; ++r) load_some(now[r], x.data + min(first + r, tile.last - 1) * x.row + channel);
#pragma unroll
        for (int r = 0; r < at_once; ++r) {
            if (first + r >= tile.last) break;
            window.step(now[r]);
            if (part < 2) {  // of unit length
                float squares = 0;
#pragma unroll
                for (int c = 0; c < each; ++c) squares += now[r][c] * now[r][c];
                const float length = fmaxf(sqrtf(lanes_sum(squares)), a.epsilon);
#pragma unroll
                for (int c = 0; c < each; ++c) now[r][c] /= length;
            }
            store_some(x.data + (first + r) * x.row + channel, now[r]);
        }
    }
    if (tile.ends()) window.leave(history, channels);
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

/// Copies what lies before tiles aside if there are several; `grid` for the rest.
template <class Arguments>
cudaError_t start_edges(const Arguments& a, cudaStream_t stream) {
    const int tiles = cuda_kernels::ceil_div(a.longest, short_conv_tile);
    if (tiles <= 1) return cudaSuccess;
    const int all = Arguments::parts * a.layout.heads * a.layout.head_dim;
    return cuda_kernels::start(cuda_kernels::conv_edges_kernel<Arguments>,
                               grid_of(cuda_kernels::ceil_div(all, 128), tiles, a.segment_count), 128, 0, stream, a);
}

/// Calls f.template operator()<Taps>() with a number of taps as a constant, up to Most.
template <int Most, int Taps = 1, class F>
cudaError_t visit_taps(int taps, F&& f) {
    if constexpr (Taps > Most) {
        return cudaErrorInvalidValue;
    } else {
        return taps == Taps ? f.template operator()<Taps>() : visit_taps<Most, Taps + 1>(taps, f);
    }
}

cudaError_t short_conv(const short_conv_args& a, cudaStream_t stream) {
    const auto e = start_edges(a, stream);
    if (e != cudaSuccess) return e;
    const dim3 grid = grid_of(cuda_kernels::ceil_div(a.layout.heads * a.layout.head_dim, 128),
                              cuda_kernels::ceil_div(a.longest, short_conv_tile), a.segment_count);
    return visit_taps<8>(a.layout.taps, [&]<int Taps>() {
        return cuda_kernels::start(cuda_kernels::short_conv_kernel<Taps>, grid, 128, 0, stream, a);
    });
}

cudaError_t kda_inputs(const kda_inputs_args& a, cudaStream_t stream) {
    const auto e = start_edges(a, stream);
    if (e != cudaSuccess) return e;
    const dim3 grid = grid_of(a.layout.heads, cuda_kernels::ceil_div(a.longest, short_conv_tile), a.segment_count);
    return visit_taps<4>(a.layout.taps, [&]<int Taps>() {
        const auto with = [&]<int D>() {
            return cuda_kernels::start(cuda_kernels::kda_inputs_kernel<D, Taps>, grid, 128, 0, stream, a);
        };
        return detail::visit_head_dim<32, 64, 128, 256>(a.layout.head_dim, with, cudaErrorInvalidValue);
    });
}

}  // namespace keel::cuda_launch
