// SPDX-License-Identifier: MIT
//
// What all kernels share: how they are started and wait for each other, sums over a warp and over a block, loads.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/launch.hpp>

namespace keel::cuda_launch {

inline dim3 grid_of(int x, int y = 1, int z = 1) {
    return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

}  // namespace keel::cuda_launch

namespace keel::cuda_kernels {

namespace launch = cuda_launch;

inline constexpr int warp_size = 32;

// Programmatic dependent launch: a kernel may start while the one before it still runs, as soon as all blocks of that
// one have called start_next(). Before wait_for_previous() it may read what is constant (weights), and ask for anything
// to be brought to L2.

/// Lets the next kernel start when all blocks of this one run: to load its weights while this one waits and works.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Until the previous kernel, and so all before it, are done. Then the next may start: one behind a kernel that did not
/// call start_next() earlier may read, before it waits, all that was there when this one began.
template <bool ThenStartNext = true>
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (ThenStartNext) start_next();
}

// A kernel may also go beside the previous one, where it needs nothing of it and that one lets the next start only when
// it has waited itself: then all before it are done. Such a kernel waits at its end, for those behind it wait for
// nobody else.

/// Starts a kernel behind the previous one on the stream, overlapping its beginning with that one's end. `cluster`
/// neighbouring blocks share their shared memory, where there are clusters; 0: none do.
template <class Kernel, class... Arguments>
cudaError_t start_clusters(Kernel kernel, dim3 grid, int cluster, int threads, int shared_bytes, cudaStream_t stream,
                           const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    if (shared_bytes > 32 * 1024) {  // with what a kernel has of its own, 48 KiB need no permission
        const auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        if (e != cudaSuccess) return e;
    }
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster > 0 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Kernel, class... Arguments>
cudaError_t start(Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                  const Arguments&... arguments) {
    return start_clusters(kernel, grid, 0, threads, shared_bytes, stream, arguments...);
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Sum over `Width` neighbouring lanes, in all of them; the order does not depend on anything else.
template <int Width = warp_size>
__device__ inline float lanes_sum(float x) {
    for (int d = Width / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, d);
    return x;
}

template <int Width = warp_size>
__device__ inline float lanes_max(float x) {
    for (int d = Width / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, d));
    return x;
}

template <int Width = warp_size>
__device__ inline int lanes_sum(int x) {
    for (int d = Width / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, d);
    return x;
}

/// What op(x) makes of the warps' x, each again made by op(x) of its lanes', in all threads; `none` is the x of no
/// warp. Ends with a barrier behind which it may be called again.
template <class Op>
__device__ inline float over_block(float x, float none, Op&& op) {
    __shared__ float of_warp[warp_size];
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    x = op(x);
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    x = op(lane < blockDim.x / warp_size ? of_warp[lane] : none);
    __syncthreads();
    return x;
}
__device__ inline float block_sum(float x) {
    return over_block(x, 0.0f, [](float y) { return lanes_sum(y); });
}
__device__ inline float block_max(float x) {
    return over_block(x, -INFINITY, [](float y) { return lanes_max(y); });
}

__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

__device__ inline float silu(float x) { return x * sigmoid(x); }

__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

/// Asks for memory to be brought to L2; nothing waits for it. `p` and `bytes` are multiples of 16.
__device__ inline void prefetch(const unsigned char* p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#else
    for (int i = 0; i < bytes; i += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i));
#endif
}

/// True if both (null or not) can be read 16 bytes at a time.
__host__ __device__ inline bool aligned16(const void* a, const void* b) {
    return ((reinterpret_cast<unsigned long long>(a) | reinterpret_cast<unsigned long long>(b)) & 15) == 0;
}

/// Where weights are read from.
enum class space { global, shared };

/// 16 bytes of weights, which are read once: they need not stay in L1.
template <space From = space::global>
__device__ inline uint4 load_weights16(const unsigned char* p) {
    if constexpr (From == space::shared) return *reinterpret_cast<const uint4*>(p);
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}

template <class T, space From = space::global>
__device__ inline T load(const unsigned char* p) {
    if constexpr (From == space::shared) return *reinterpret_cast<const T*>(p);
    return __ldg(reinterpret_cast<const T*>(p));
}

__device__ inline float half_bits(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }

/// Copies 16 bytes to shared memory. What a thread began since the last call of end_copies() is a group;
/// copies_done<n>() waits for all but the last n of its groups.
__device__ inline void begin_copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from));
}
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int but = 0>
__device__ inline void copies_done() {
    if constexpr (but == 0) {
        asm volatile("cp.async.wait_all;" ::: "memory");  // also what is in no group yet
    } else {
        asm volatile("cp.async.wait_group %0;" ::"n"(but) : "memory");
    }
}

/// A warp begins to copy `bytes`, a multiple of 16.
__device__ inline void begin_copy(unsigned char* to, const unsigned char* from, int bytes) {
#pragma unroll 4
    for (int i = 16 * (threadIdx.x % warp_size); i < bytes; i += 16 * warp_size) begin_copy16(to + i, from + i);
}

/// Bytes of shared memory that a block may ask for, of `wanted`, beside its static arrays of up to `static_bytes`.
inline int shared_bytes_up_to(int wanted, int static_bytes = 2048) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return most - static_bytes < wanted ? most - static_bytes : wanted;
}

inline int multiprocessors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

/// Four neighbouring floats from element `i` on; those at `n` and beyond are 0.
__device__ inline float4 load_four(const float* p, int i, int n) {
    if (i + 4 <= n && (reinterpret_cast<unsigned long long>(p + i) & 15) == 0) {
        return *reinterpret_cast<const float4*>(p + i);
    }
    float4 v;
    v.x = i < n ? p[i] : 0.0f;
    v.y = i + 1 < n ? p[i + 1] : 0.0f;
    v.z = i + 2 < n ? p[i + 2] : 0.0f;
    v.w = i + 3 < n ? p[i + 3] : 0.0f;
    return v;
}

/// 1 / rms of a row, in all threads.
__device__ inline float inverse_rms_of(const float* x, int columns, float epsilon) {
    float squares = 0;
    for (int i = 4 * threadIdx.x; i < columns; i += 4 * blockDim.x) {
        const float4 v = load_four(x, i, columns);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(columns) + epsilon);
}

}  // namespace keel::cuda_kernels
