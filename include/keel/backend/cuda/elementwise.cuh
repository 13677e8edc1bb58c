// SPDX-License-Identifier: MIT
//
// Norms, convolution, gates, sums: one block per row, or per row and head.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/matvec.cuh>

namespace keel::cuda_kernels {

__global__ void rms_norm_kernel(const __grid_constant__ launch::rms_norm_args a) {
    wait_for_previous();
    const float* x = a.x + blockIdx.x * a.x_row;
    float* out = a.out + blockIdx.x * a.out_row;
    const float scale = inverse_rms_of(x, a.columns, a.epsilon);
    for (int i = threadIdx.x; i < a.columns; i += blockDim.x) out[i] = x[i] * scale * a.weight[i];
}

/// One thread per channel of a segment; the history moves through registers.
__global__ void short_conv_kernel(const __grid_constant__ launch::short_conv_args a) {
    wait_for_previous();
    constexpr int most_taps = 8;
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.channels) return;
    const launch::segment s = a.segments[blockIdx.y];
    const int taps = a.layout.taps;
    float* history = reinterpret_cast<float*>(s.recurrent) + a.layer * a.layout.layer_floats +
                     static_cast<long long>(a.layout.heads) * a.layout.head_dim * a.layout.head_dim +
                     static_cast<long long>(a.which) * taps * a.channels + c;
    float weight[most_taps + 1], past[most_taps];
#pragma unroll
    for (int j = 0; j <= most_taps; ++j) weight[j] = j <= taps ? a.taps[c * (taps + 1) + j] : 0.0f;
#pragma unroll
    for (int j = 0; j < most_taps; ++j) past[j] = j < taps ? history[j * a.channels] : 0.0f;
    for (int r = s.first_row; r < s.first_row + s.rows; ++r) {
        float& x = a.x[r * a.x_row + c];
        const float now = x;
        float sum = 0;
#pragma unroll
        for (int j = 0; j <= most_taps; ++j) {
            if (j < taps) sum += weight[j] * past[j];
            if (j == taps) sum += weight[j] * now;
        }
#pragma unroll
        for (int j = 0; j < most_taps; ++j) {
            if (j + 1 < taps) past[j] = past[j + 1];
            if (j + 1 == taps) past[j] = now;
        }
        x = silu(sum);
    }
#pragma unroll
    for (int j = 0; j < most_taps; ++j) {
        if (j < taps) history[j * a.channels] = past[j];
    }
}

/// A warp per row and head.
__global__ void l2_norm_kernel(const __grid_constant__ launch::l2_norm_args a) {
    wait_for_previous();
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size, lane = threadIdx.x % warp_size;
    if (at >= a.rows * a.heads) return;
    float* x = a.x + at / a.heads * a.x_row + at % a.heads * a.x_head;
    float squares = 0;
    for (int i = lane; i < a.head_dim; i += warp_size) squares += x[i] * x[i];
    const float length = fmaxf(sqrtf(lanes_sum(squares)), a.epsilon);
    for (int i = lane; i < a.head_dim; i += warp_size) x[i] /= length;
}

__global__ void kda_gates_kernel(const __grid_constant__ launch::kda_gates_args a) {
    wait_for_previous();
    const int row = blockIdx.x, h = blockIdx.y;
    float* g = a.log_decay + row * a.decay_row + h * a.decay_head;
    for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
        g[d] = a.a[h] * softplus(g[d] + a.dt_bias[h * a.head_dim + d]);
    }
    if (threadIdx.x == 0) {
        float& beta = a.beta[row * a.beta_row + h];
        beta = sigmoid(beta);
    }
}

/// A warp per row and head.
__global__ void gated_norm_kernel(const __grid_constant__ launch::gated_norm_args a) {
    wait_for_previous();
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size, lane = threadIdx.x % warp_size;
    if (at >= a.rows * a.heads) return;
    float* x = a.x + at / a.heads * a.x_row + at % a.heads * a.x_head;
    const float* gate = a.gate + at / a.heads * a.gate_row + at % a.heads * a.gate_head;
    float squares = 0;
    for (int i = lane; i < a.head_dim; i += warp_size) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(lanes_sum(squares) / static_cast<float>(a.head_dim) + a.epsilon);
    for (int i = lane; i < a.head_dim; i += warp_size) x[i] = x[i] * scale * a.weight[i] * sigmoid(gate[i]);
}

/// A warp per row and head.
__global__ void head_norm_kernel(const __grid_constant__ launch::head_norm_args a) {
    wait_for_previous();
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size, lane = threadIdx.x % warp_size;
    if (at >= a.rows * a.heads) return;
    float sum = 0;
    for (int s = 0; s < a.slabs; ++s) sum += a.squares[at * a.slabs + s];
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
    for (int i = lane; i < a.head_dim; i += warp_size) a.x[static_cast<long long>(at) * a.head_dim + i] *= scale;
}

__global__ void add_kernel(const __grid_constant__ launch::add_args a) {
    wait_for_previous();
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i < a.columns) a.x[blockIdx.x * a.x_row + i] += a.y[blockIdx.x * a.y_row + i];
}

__global__ void gather_kernel(const __grid_constant__ launch::gather_args a) {
    wait_for_previous();
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i < a.columns) a.out[blockIdx.x * a.out_row + i] = a.x[a.which[blockIdx.x] * a.x_row + i];
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

inline dim3 grid_of(int x, int y = 1, int z = 1) {
    return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

cudaError_t rms_norm(const rms_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::rms_norm_kernel, grid_of(a.rows), 256, 0, stream, a);
}

cudaError_t short_conv(const short_conv_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::short_conv_kernel,
                               grid_of(cuda_kernels::ceil_div(a.channels, 128), a.segment_count), 128, 0, stream, a);
}

cudaError_t l2_norm(const l2_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::l2_norm_kernel, grid_of(cuda_kernels::ceil_div(a.rows * a.heads, 4)), 128,
                               0, stream, a);
}

cudaError_t kda_gates(const kda_gates_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::kda_gates_kernel, grid_of(a.rows, a.heads), 128, 0, stream, a);
}

cudaError_t gated_norm(const gated_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::gated_norm_kernel, grid_of(cuda_kernels::ceil_div(a.rows * a.heads, 4)),
                               128, 0, stream, a);
}

cudaError_t head_norm(const head_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::head_norm_kernel, grid_of(cuda_kernels::ceil_div(a.rows * a.heads, 4)),
                               128, 0, stream, a);
}

cudaError_t add(const add_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::add_kernel, grid_of(a.rows, cuda_kernels::ceil_div(a.columns, 256)), 256,
                               0, stream, a);
}

cudaError_t gather(const gather_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::gather_kernel, grid_of(a.rows, cuda_kernels::ceil_div(a.columns, 256)),
                               256, 0, stream, a);
}

}  // namespace keel::cuda_launch
