// SPDX-License-Identifier: MIT
//
// Kimi Delta Attention over many tokens, in chunks of 16: kda_prepare.cuh makes the factors of all chunks at once,
// kda_scan.cuh walks over them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/head_dim.hpp>
#include <keel/backend/cuda/kda_prepare.cuh>
#include <keel/backend/cuda/kda_scan.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch {

namespace detail {

/// Grid: (chunks, heads, segments).
template <int D>
__global__ void __launch_bounds__(kda_prepare_threads<D>, 8)
    kda_prepare_kernel(kda_chunk_args args, int first_chunk, kda_factors<D>* factors) {
    __shared__ kda_prepare_memory<D> memory;
    cuda_kernels::wait_for_previous();
    const cuda_launch::segment segment = args.segments[blockIdx.z];
    const int chunk = first_chunk + static_cast<int>(blockIdx.x);
    if (chunk * kda_tokens >= segment.rows) return;
    const std::size_t slot = (static_cast<std::size_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    kda_prepare<D>(args, segment, chunk, static_cast<int>(blockIdx.y), factors[slot], memory);
}

inline constexpr int kda_stages = 6;

/// One more warp than those that walk fetches.
template <int D>
inline constexpr int kda_scan_threads = (kda_workers<D> + 1) * 32;

template <int D>
struct kda_scan_memory {
    kda_ring<D, kda_stages> ring;
    kda_exchange<D> exchange;
};

/// What is left of a segment from a chunk on.
__device__ inline cuda_launch::segment rest_of(cuda_launch::segment s, int chunk) {
    s.first_row += chunk * kda_tokens;
    s.rows -= chunk * kda_tokens;
    return s;
}

template <int D>
__device__ void kda_fetch(const kda_chunk_args& args, const cuda_launch::segment& segment, int chunks, int head,
                          int first_column, const kda_factors<D>* factors, kda_ring<D, kda_stages>& ring, int lane) {
    constexpr int pieces = kda_slabs * kda_columns / 4;  // of 16 bytes of v, a row
    const int t = lane / pieces, column = lane % pieces * 4;
    const float* from = args.v.data + (segment.first_row + t) * args.v.row + head * args.v.head + first_column + column;
    int left = segment.rows - t;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int slot = chunk % kda_stages;
        if (chunk >= kda_stages) ring.empty[slot].wait(chunk / kda_stages % 2 ^ 1);
        const stage_copy copy{ring.full[slot], lane};
        copy.begin(static_cast<int>(sizeof(kda_factors<D>)));
        copy.whole(&ring.stages[slot].factors, factors + chunk, static_cast<int>(sizeof(kda_factors<D>)));
#pragma unroll
        for (int i = 0; i < kda_tokens; i += 32 / pieces) {  // behind the last row v counts nothing, but NaN would
            copy_async(&ring.stages[slot].v[t + i][column], from + (i < left ? i : 0) * args.v.row, i < left ? 16 : 0);
        }
        copy.end();
        from += kda_tokens * args.v.row;
        left -= kda_tokens;
    }
}

/// Grid: (slabs of D, heads, segments); each block walks over `chunks` chunks, or as many as there are.
template <int D>
__global__ void __launch_bounds__(kda_scan_threads<D>)
    kda_scan_kernel(kda_chunk_args args, int first_chunk, int chunks, const kda_factors<D>* factors) {
    extern __shared__ uint4 dynamic_memory[];
    auto& memory = *reinterpret_cast<kda_scan_memory<D>*>(dynamic_memory);
    auto& ring = memory.ring;
    constexpr int workers = kda_workers<D>;
    const int thread = static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.x % 32u),
              warp = static_cast<int>(threadIdx.x / 32u);
    if (thread < kda_stages) {
        ring.full[thread].init(stage_copy::arrivals);
        ring.empty[thread].init(workers);
    }
    publish_to_copies();
    __syncthreads();
    cuda_kernels::wait_for_previous();
    const cuda_launch::segment segment = rest_of(args.segments[blockIdx.z], first_chunk);
    const int here = min(chunks, (segment.rows + kda_tokens - 1) / kda_tokens);
    if (here <= 0) return;
    const int head = static_cast<int>(blockIdx.y), column = static_cast<int>(blockIdx.x) * kda_slabs * kda_columns;
    if (warp == workers) {
        const std::size_t slot = static_cast<std::size_t>(blockIdx.z) * gridDim.y + blockIdx.y;
        kda_fetch(args, segment, here, head, column, factors + slot * static_cast<std::size_t>(chunks), ring, lane);
    } else {
        const auto walk = [&]<int Part>() {
            kda_scan<D, Part>(args, segment, here, head, column, ring, memory.exchange, warp % kda_slabs, lane);
        };
        if (warp < kda_slabs) {
            walk.template operator()<0>();
        } else {
            walk.template operator()<kda_parts<D> - 1>();
        }
    }
}

/// Shared memory of a block of kda_scan: with few blocks so much that no two meet on a multiprocessor. They are placed
/// while others are still busy with kda_prepare, and the walk takes as long as its slowest block.
template <int D>
cudaError_t kda_scan_bytes(dim3 grid, int& bytes) {
    int device = 0, multiprocessors = 0, shared = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    const bool few = grid.x * grid.y * grid.z <= static_cast<unsigned>(multiprocessors);
    bytes = std::max(static_cast<int>(sizeof(kda_scan_memory<D>)), few ? shared / 2 : 0);
    return e;
}

template <int D>
cudaError_t kda_chunk(const kda_chunk_args& args, cudaStream_t stream) {
    auto* const factors = static_cast<kda_factors<D>*>(args.workspace);
    const int all = (args.longest + kda_tokens - 1) / kda_tokens;
    const std::size_t one = sizeof(kda_factors<D>) * static_cast<std::size_t>(args.segment_count * args.layout.heads);
    const int chunks = static_cast<int>(std::min(args.workspace_bytes / one, static_cast<std::size_t>(all)));
    if (chunks == 0) return all == 0 ? cudaSuccess : cudaErrorInvalidValue;
    const auto heads = static_cast<unsigned>(args.layout.heads), segments = static_cast<unsigned>(args.segment_count);
    const dim3 walk(D / (kda_slabs * kda_columns), heads, segments);
    int bytes = 0;
    cudaError_t e = kda_scan_bytes<D>(walk, bytes);
    for (int first = 0; e == cudaSuccess && first < all; first += chunks) {
        const int count = std::min(chunks, all - first);
        e = cuda_kernels::start(kda_prepare_kernel<D>, dim3(static_cast<unsigned>(count), heads, segments),
                                kda_prepare_threads<D>, 0, stream, args, first, factors);
        if (e != cudaSuccess) return e;
        e = cuda_kernels::start(kda_scan_kernel<D>, walk, kda_scan_threads<D>, bytes, stream, args, first, count,
                                static_cast<const kda_factors<D>*>(factors));
    }
    return e;
}

}  // namespace detail

inline std::size_t kda_chunk_bytes(int segment_count, int heads, int head_dim, int longest) {
    const auto chunks = static_cast<std::size_t>((longest + detail::kda_tokens - 1) / detail::kda_tokens);
    const auto of_dim = [&]<int D>() {
        return static_cast<std::size_t>(segment_count * heads) * chunks * sizeof(detail::kda_factors<D>);
    };
    return detail::visit_head_dim<32, 64, 128>(head_dim, of_dim, std::size_t{0});
}

inline cudaError_t kda_chunk(const kda_chunk_args& args, cudaStream_t stream) {
    return detail::visit_head_dim<32, 64, 128>(
        args.layout.head_dim, [&]<int D>() { return detail::kda_chunk<D>(args, stream); }, cudaErrorInvalidValue);
}

}  // namespace keel::cuda_launch
