// SPDX-License-Identifier: MIT
//
// Warpgroup products of sm_90a. C (64 x N) += A (64 x 16) B (16 x N): warp w of four holds rows 16 w to 16 w + 15 of A
// and C as the fragments of mma.cuh; B lies in shared memory as N rows of 16 halves, in tiles of 8 rows of 128 bytes
// whose 16-byte pieces are swizzled: piece p of row r is at p ^ (r % 8).
#pragma once

#include <cstdint>

#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

/// Where tiles of B begin.
inline constexpr int tiles_alignment = 1024;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// B at `address`, tiles of 8 rows `stride` bytes apart.
__device__ inline std::uint64_t describe(std::uint32_t address, int stride) {
    return std::uint64_t{1} << 62 | static_cast<std::uint64_t>(stride >> 4) << 32 | std::uint64_t{1} << 16 |
           ((address & 0x3FFFFu) >> 4);
}

/// One instruction: C has 8, 4 or 1 tiles of 8 columns.
template <int Tiles>
__device__ inline void wgmma_tiles(float (*c)[4], const std::uint32_t (&a)[4], std::uint64_t b) {
    if constexpr (Tiles == 8) {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
            "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
            : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
              "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
              "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
              "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
              "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else if constexpr (Tiles == 4) {
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
            "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }"
            : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
              "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
              "+f"(c[3][2]), "+f"(c[3][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        static_assert(Tiles == 1);
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {"
            "%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0; }"
            : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}

/// C += A B; the tiles of 8 rows of B begin at `address` and lie `stride` bytes apart.
template <int From = 0, int Tiles>
__device__ inline void wgmma(float (&c)[Tiles][4], const std::uint32_t (&a)[4], std::uint32_t address, int stride) {
    constexpr int left = Tiles - From, now = left >= 8 ? 8 : left >= 4 ? 4 : 1;
    wgmma_tiles<now>(c + From, a, describe(address + From * stride, stride));
    if constexpr (left > now) wgmma<From + now>(c, a, address, stride);
}

/// Keeps the compiler from computing an operand later than here, behind the fence.
__device__ inline void settle(std::uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

/// Orders the registers written so far before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#endif

}  // namespace keel::cuda_launch::detail
