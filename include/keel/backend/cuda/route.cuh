// SPDX-License-Identifier: MIT
//
// The router's choice of experts.
#pragma once

#include <keel/backend/cuda/device.cuh>

namespace keel::cuda_kernels {

/// A float as an unsigned number of the same order; never 0 unless it is a NaN with all bits set.
__device__ inline unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// A warp makes weights of the logits of the k chosen experts, in place.
__device__ inline void weigh(const launch::route_args& a, float* weight) {
    const int lane = threadIdx.x % warp_size;
    const float share = lane < a.k ? sigmoid(weight[lane]) : 0.0f;
    float total = 0;
    for (int slot = 0; slot < a.k; ++slot) total += __shfl_sync(0xFFFFFFFFu, share, slot);
    if (lane < a.k) weight[lane] = share * (a.scale / fmaxf(total, 0x1p-14f));
    __syncwarp();
}

/// The choice as one warp makes it, of at most 256 experts, eight neighbouring ones a lane.
struct warp_choice {
    static constexpr int each = 8, most = each * warp_size;

    /// Orders the experts; 0 for those that are not there.
    __device__ static unsigned key(const launch::route_args& a, int expert, float logit, float bias) {
        return expert < a.experts ? max(1u, ordered(sigmoid(logit) + bias)) : 0;
    }

    /// Chooses the `count` best, the smaller index on a tie; all lanes, with the keys of expert 8 lane and those behind
    /// it. Leaves them in shared memory, where the calling warp may read them.
    __device__ static void make(const unsigned (&keys)[each], int count, int* which) {
        const int lane = threadIdx.x % warp_size;
        // A lane orders its own, the best first; then the lane with the best of all gives up its first, and so on.
        unsigned long long own[each];  // key, and what is larger for a smaller index
#pragma unroll
        for (int i = 0; i < each; ++i) {
            own[i] = static_cast<unsigned long long>(keys[i]) << 32 | (most - 1 - each * lane - i);
        }
#pragma unroll
        for (int round = 0; round < each; ++round) {
#pragma unroll
            for (int i = round % 2; i + 1 < each; i += 2) {
                const auto larger = max(own[i], own[i + 1]);
                own[i + 1] = min(own[i], own[i + 1]);
                own[i] = larger;
            }
        }
#pragma unroll 1
        for (int slot = 0; slot < count; ++slot) {
            const unsigned first = static_cast<unsigned>(own[0] >> 32);
            const unsigned best = __reduce_max_sync(0xFFFFFFFFu, first);
            const bool mine = lane == __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, first == best))) - 1;
            if (mine) which[slot] = most - 1 - static_cast<int>(own[0] & 0xFFFFFFFFu);
#pragma unroll
            for (int i = 0; i + 1 < each; ++i) own[i] = mine ? own[i + 1] : own[i];
            if (mine) own[each - 1] = 0;
        }
        __syncwarp();
    }

    static bool serves(const launch::route_args& a) {
        return a.logits != nullptr && a.experts <= most && a.k < warp_size;
    }
};

inline constexpr int most_experts = 1024, most_chosen = 32;

/// The networks that a row goes through, in shared memory: those chosen, then the shared one.
struct expert_slots {
    unsigned key[most_experts];  // orders the experts
    int which[most_chosen + 1];
    float weight[most_chosen + 1];

    /// Chooses the k best experts of row `r`, the smaller index on a tie. All threads of a block; ends with a barrier.
    __device__ void choose(const launch::route_args& a, int r) {
        const float* logits = a.logits + r * a.logits_row;
        const int end = max(warp_choice::most, ceil_div(a.experts, warp_size) * warp_size);
        for (int e = threadIdx.x; e < end; e += blockDim.x) {
            key[e] = e < a.experts ? warp_choice::key(a, e, __ldcg(logits + e), a.bias[e]) : 0;
        }
        __syncthreads();
        if (threadIdx.x < warp_size) {
            const int lane = threadIdx.x;
            if (end == warp_choice::most) {  // the shorter way, for as many as models have
                unsigned own[warp_choice::each];
#pragma unroll
                for (int i = 0; i < warp_choice::each; ++i) own[i] = key[warp_choice::each * lane + i];
                warp_choice::make(own, a.k, which);
            } else {
                choose_of_many(end, a.k);
            }
            if (lane < a.k) weight[lane] = __ldcg(logits + which[lane]);
            weigh(a, weight);
        }
        __syncthreads();
    }

    /// The choice that is made of logits, or was made before. Ends with a barrier.
    __device__ void fill(const launch::experts_args& a, int row) {
        if (threadIdx.x == 0) which[a.k] = 0, weight[a.k] = 1;
        if (a.route.logits != nullptr) return choose(a.route, row);
        if (threadIdx.x < a.k) {
            which[threadIdx.x] = a.chosen ? a.chosen[row * a.chosen_row + threadIdx.x] : 0;
            weight[threadIdx.x] = a.chosen ? a.weights[row * a.weights_row + threadIdx.x] : 1.0f;
        }
        __syncthreads();
    }

private:
    /// A warp chooses from the first `end` keys.
    __device__ void choose_of_many(int end, int k) {
        const int lane = threadIdx.x;
#pragma unroll 1
        for (int slot = 0; slot < k; ++slot) {
            unsigned largest = 0;
            int at = 0;
#pragma unroll 8
            for (int e = lane; e < end; e += warp_size) {
                if (key[e] > largest) largest = key[e], at = e;
            }
            const unsigned best = __reduce_max_sync(0xFFFFFFFFu, largest);
            const int e =
                static_cast<int>(__reduce_min_sync(0xFFFFFFFFu, largest == best ? static_cast<unsigned>(at) : ~0u));
            if (e % warp_size == lane) key[e] = 0;  // read by this lane alone
            if (slot == lane) which[lane] = e;
        }
        __syncwarp();
    }
};

inline constexpr int route_threads = 128;

__global__ void __launch_bounds__(route_threads) route_kernel(const __grid_constant__ launch::route_args a) {
    __shared__ expert_slots slots;
    wait_for_previous();
    const int r = blockIdx.x;
    slots.choose(a, r);
    if (threadIdx.x < a.k) {
        a.chosen[r * a.chosen_row + threadIdx.x] = slots.which[threadIdx.x];
        a.weights[r * a.weights_row + threadIdx.x] = slots.weight[threadIdx.x];
    }
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

/// Up to 1024 experts, up to 32 of them chosen.
cudaError_t route(const route_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.experts > most_experts || a.k > most_chosen) return cudaErrorInvalidValue;
    return start(route_kernel, grid_of(a.rows), route_threads, 0, stream, a);
}

}  // namespace keel::cuda_launch
