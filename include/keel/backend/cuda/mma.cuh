// SPDX-License-Identifier: MIT
//
// The tensor core, asynchronous copy and shared memory instructions that the prefill kernels are written in.
//
// Fragments of mma.m16n8k16, lane = 4 g + c:
//   A (16 x 16, rows m)   a[0]: row g, columns 2c, 2c+1   a[1]: row g + 8   a[2], a[3]: the same rows, columns + 8
//   B (16 x 8, columns n) b0: rows 2c, 2c+1 of column g   b1: rows + 8
//   C (16 x 8)            c[0], c[1]: row g, columns 2c, 2c+1   c[2], c[3]: row g + 8
// so that two neighbouring C tiles, rounded and packed, are an A fragment, and (c[0], c[1]) is half a B fragment of the
// transpose.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

namespace keel::cuda_launch::detail {

__device__ inline std::uint32_t pack(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&h);
}

__device__ inline float2 unpack(std::uint32_t bits) { return __half22float2(*reinterpret_cast<const __half2*>(&bits)); }

/// c += a b
__device__ inline void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Four 8 x 8 matrices of halves; lane 8 i + r gives the address of row r of matrix i.
__device__ inline void load_matrices(std::uint32_t (&m)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

__device__ inline void load_transposed(std::uint32_t (&m)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

/// Copies 16 bytes of which the first `valid` are read and the others zero.
__device__ inline void copy_async(void* to, const void* from, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace keel::cuda_launch::detail
