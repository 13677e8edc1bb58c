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

/// c = a b for 32 unsigned and signed bytes: words of four bytes lie where pairs of halves do.
__device__ inline void multiply_bytes(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}
/// The same for 16.
__device__ inline void multiply_bytes(int (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(0));
}

__device__ inline std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Dynamic shared memory from the first multiple of Alignment on; a block asks for as many bytes more.
template <int Alignment>
__device__ inline unsigned char* dynamic_memory_on() {
    extern __shared__ uint4 dynamic_memory[];
    const std::uint32_t from = shared_address(dynamic_memory);
    return reinterpret_cast<unsigned char*>(dynamic_memory) + ((from + Alignment - 1) / Alignment * Alignment - from);
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
/// For what nobody reads again soon: its lines are the first to leave L2, which has better to hold: code, parameters
/// and activations of kernels to come.
__device__ inline unsigned long long leaving_first() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
/// Copies 4, 8 or 16 bytes that nobody reads again soon.
template <int Bytes>
__device__ inline void copy_once(void* to, const void* from) {
    const unsigned long long policy = leaving_first();
    if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                     "l"(from), "l"(policy)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                     "l"(from), "n"(Bytes), "l"(policy)
                     : "memory");
    }
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Waits for `threads` threads, whole warps, at the barrier `id` of 16; __syncthreads() is the one with number 0.
__device__ inline void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Is one of the `threads` threads that a named_barrier() waits for, and does not wait.
__device__ inline void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// The most blocks of a cluster that every device with clusters, compute capability 9.0, can have.
inline constexpr int most_parts = 8;

/// A block's number in its cluster, and its cluster's along the grid. Without clusters every block is one.
__device__ inline int cluster_rank() {
    int rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
__device__ inline int cluster_number() {
    int number = static_cast<int>(blockIdx.x);
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
#endif
    return number;
}

/// The halves of a barrier for all threads of the blocks of a cluster; what they wrote to shared memory before they
/// arrived can be read behind the wait.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

/// What another block of the cluster has where `p` points to in this one's shared memory.
__device__ inline float4 load_from_block(const float4* p, int block) {
    float4 v{};
#if __CUDA_ARCH__ >= 900
    std::uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there));
#endif
    return v;
}

/// A barrier in shared memory that counts arrivals and, on sm_90, the bytes of bulk copies.
struct barrier {
    std::uint64_t state;

    __device__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }
    __device__ void arrive() {
        asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared_address(this)) : "memory");
    }
    /// Waits for the end of a phase: the phases alternate between parity 0 and 1.
    __device__ void wait(int parity) {
        std::uint32_t done = 0;
        while (done == 0) {
#if __CUDA_ARCH__ >= 900
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                         : "=r"(done)
                         : "r"(shared_address(this)), "r"(parity)
                         : "memory");
        }
    }
};

/// Makes this thread's ordinary writes to shared memory, barriers too, visible to copies and wgmma that others start
/// behind the next barrier.
__device__ inline void publish_to_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Called by all lanes of a warp to fill a stage of shared memory: begin() with the bytes of the whole() copies that
/// follow, copies, end(). Then `full`, made for stage_copy::arrivals, completes its phase.
struct stage_copy {
    barrier& full;
    int lane;

#if __CUDA_ARCH__ >= 900
    static constexpr int arrivals = 33;
#else
    static constexpr int arrivals = 32;
#endif

    __device__ void begin(int bytes) const {
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            asm volatile(
                "{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(shared_address(&full)),
                "r"(bytes)
                : "memory");
        }
#endif
    }
    /// A multiple of 16 bytes, the same in all lanes. `Once`: nobody reads them again soon.
    template <bool Once = false>
    __device__ void whole(void* to, const void* from, int bytes) const {
        pieces<Once>(1, bytes, [&](int) { return piece{to, from}; });
    }
    struct piece {
        void* to;
        const void* from;
    };
    /// Up to 32 pieces of as many bytes, of(i) the one with number i: every lane begins one, which takes less time than
    /// one lane for all.
    template <bool Once = false, class F>
    __device__ void pieces(int count, int bytes, F&& of) const {
#if __CUDA_ARCH__ >= 900
        if (lane >= count) return;
        const piece mine = of(lane);
        if constexpr (Once) {
            const unsigned long long policy = leaving_first();
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                "[%3], %4;" ::"r"(shared_address(mine.to)),
                "l"(mine.from), "r"(bytes), "r"(shared_address(&full)), "l"(policy)
                : "memory");
        } else {
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    shared_address(mine.to)),
                "l"(mine.from), "r"(bytes), "r"(shared_address(&full))
                : "memory");
        }
#else
        for (int p = 0; p < count; ++p) {
            const piece now = of(p);
            for (int i = lane * 16; i < bytes; i += 512) {
                copy_async(static_cast<char*>(now.to) + i, static_cast<const char*>(now.from) + i);
            }
        }
#endif
    }
    /// Behind all copy_async() and whole() of this lane.
    __device__ void end() const {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&full)) : "memory");
    }
};

}  // namespace keel::cuda_launch::detail
