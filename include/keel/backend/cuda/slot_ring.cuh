// SPDX-License-Identifier: MIT
//
// How weights come to shared memory ahead of their use.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_kernels {

/// Slots begin at multiples of this: a copy to anywhere else takes a fifth longer.
inline constexpr int slot_alignment = 32;
__host__ __device__ constexpr int slot_bytes_for(int bytes) { return ceil_div(bytes, slot_alignment) * slot_alignment; }

/// Dynamic shared memory that begins with slots; a block asks for slot_alignment bytes more.
__device__ inline unsigned char* slot_memory() { return cuda_launch::detail::dynamic_memory_on<slot_alignment>(); }

/// A ring of slots in shared memory: one warp, all its lanes, fills them in turn, and others use each when it is full.
template <int Slots>
class slot_ring {
public:
    using stage_copy = cuda_launch::detail::stage_copy;

    /// One thread, before a barrier. `users`: warps that release a slot before it is filled again.
    __device__ void init(int users) {
        for (int i = 0; i < Slots; ++i) full_[i].init(stage_copy::arrivals), free_[i].init(users);
        cuda_launch::detail::publish_to_copies();
    }

    /// A warp's place in the ring, of which it takes `slots`.
    struct cursor {
        int slots, slot = 0, round = 0;
        /// At most `slots` further.
        __device__ void next(int steps = 1) {
            slot += steps;
            if (slot >= slots) slot -= slots, ++round;
        }
    };

    /// The warp that fills: waits until the slot is free, then copies(stage_copy) begins to copy `bytes`.
    template <class Copies>
    __device__ void fill(const cursor& at, int bytes, Copies&& copies) {
        if (at.round > 0) free_[at.slot].wait((at.round - 1) & 1);
        const stage_copy copy{full_[at.slot], static_cast<int>(threadIdx.x % warp_size)};
        copy.begin(bytes);
        copies(copy);
        copy.end();
    }
    __device__ void fill(const cursor& at, unsigned char* to, const unsigned char* from, int bytes) {
        fill(at, bytes, [&](const stage_copy& copy) {
            if (bytes > 0) copy.whole<true>(to, from, bytes);
        });
    }
    __device__ void wait(const cursor& at) { full_[at.slot].wait(at.round & 1); }
    __device__ void release(const cursor& at) {
        __syncwarp();
        if (threadIdx.x % warp_size == 0) free_[at.slot].arrive();
    }

private:
    using barrier = cuda_launch::detail::barrier;

    barrier full_[Slots], free_[Slots];
};

}  // namespace keel::cuda_kernels
