// SPDX-License-Identifier: MIT
//
// Norms, convolution, gates, sums: one block per row, or per row and head.
#pragma once

#include <keel/backend/cuda/device.cuh>

namespace keel::cuda_kernels {

__global__ void rms_norm_kernel(const __grid_constant__ launch::rms_norm_args a) {
    const bool whole = a.columns % 4 == 0 && aligned16(a.weight, a.weight);
    if (whole && threadIdx.x == 0) prefetch(reinterpret_cast<const unsigned char*>(a.weight), a.columns * 4);
    wait_for_previous();
    const float* x = a.x + blockIdx.x * a.x_row;
    float* out = a.out + blockIdx.x * a.out_row;
    const float scale = inverse_rms_of(x, a.columns, a.epsilon);
#pragma unroll 4
    for (int i = threadIdx.x; i < a.columns; i += blockDim.x) out[i] = x[i] * scale * a.weight[i];
}

/// Grid: (rows that a segment keeps, segments).
__global__ void keep_kernel(const __grid_constant__ launch::keep_args a) {
    wait_for_previous();
    const launch::segment s = a.segments[blockIdx.y];
    if (s.kept == nullptr) return;
    const int i = max(0, s.rows - s.kept_capacity) + static_cast<int>(blockIdx.x);
    if (i >= s.rows) return;
    int width = 0;
    for (const auto& part : a.list) width += part.width;
    float* to =
        s.kept + (static_cast<long long>(a.layer) * s.kept_capacity + (s.position + i) % s.kept_capacity) * width;
    for (const auto& part : a.list) {
        const float* from = part.data + (s.first_row + i) * part.row;
        for (int c = threadIdx.x; c < part.width; c += blockDim.x) to[c] = from[c];
        to += part.width;
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

/// A warp per row and head.
__global__ void kda_gates_kernel(const __grid_constant__ launch::kda_gates_args a) {
    wait_for_previous();
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size, lane = threadIdx.x % warp_size;
    if (at >= a.rows * a.heads) return;
    const int row = at / a.heads, h = at % a.heads;
    float* g = a.log_decay + row * a.decay_row + h * a.decay_head;
    for (int d = lane; d < a.head_dim; d += warp_size) {
        g[d] = a.a[h] * softplus(g[d] + a.dt_bias[h * a.head_dim + d]);
    }
    if (lane == 0) {
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

__global__ void scatter_kernel(const __grid_constant__ launch::scatter_args a) {
    wait_for_previous();
    float* to = a.to[blockIdx.x];
    if (to == nullptr) return;
    const float* x = a.x + blockIdx.x * a.x_row;
#pragma unroll 4
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < a.columns; i += gridDim.y * blockDim.x) to[i] = x[i];
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t rms_norm(const rms_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::rms_norm_kernel, grid_of(a.rows), 256, 0, stream, a);
}

cudaError_t keep(const keep_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::keep_kernel, grid_of(a.most_rows, a.segment_count), 256, 0, stream, a);
}

cudaError_t l2_norm(const l2_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::l2_norm_kernel, grid_of(cuda_kernels::ceil_div(a.rows * a.heads, 4)), 128,
                               0, stream, a);
}

cudaError_t kda_gates(const kda_gates_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::kda_gates_kernel, grid_of(cuda_kernels::ceil_div(a.rows * a.heads, 4)),
                               128, 0, stream, a);
}

cudaError_t gated_norm(const gated_norm_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::gated_norm_kernel, grid_of(cuda_kernels::ceil_div(a.rows * a.heads, 4)),
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

cudaError_t scatter(const scatter_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::scatter_kernel, grid_of(a.rows, cuda_kernels::ceil_div(a.columns, 2048)),
                               256, 0, stream, a);
}

}  // namespace keel::cuda_launch
