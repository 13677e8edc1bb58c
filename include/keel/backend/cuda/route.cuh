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

inline constexpr int most_experts = 1024, most_chosen = 32;

/// The networks that a row goes through, in shared memory: those chosen, then the shared one.
struct expert_slots {
    unsigned key[most_experts];  // orders the experts
    int which[most_chosen + 1];
    float weight[most_chosen + 1];

    /// Chooses the k best experts of row `r`, the smaller index on a tie. All threads of a block; ends with a barrier.
    __device__ void choose(const launch::route_args& a, int r) {
        const float* logits = a.logits + r * a.logits_row;
        const int end = ceil_div(a.experts, warp_size) * warp_size;
        for (int e = threadIdx.x; e < end; e += blockDim.x) {
            key[e] = e < a.experts ? max(1u, ordered(sigmoid(__ldcg(logits + e)) + a.bias[e])) : 0;
        }
        __syncthreads();
        if (threadIdx.x < warp_size) {
            const int lane = threadIdx.x;
            float logit = 0;
#pragma unroll 1
            for (int slot = 0; slot < a.k; ++slot) {
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
                if (slot == lane) which[lane] = e, logit = __ldcg(logits + e);
            }
            if (lane < a.k) weight[lane] = logit;
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
};

/// The choice as one warp makes it, of at most 256 experts, eight neighbouring ones a lane.
struct warp_choice {
    static constexpr int each = 8, most = each * warp_size;

    int first;
    float bias[each];

    /// What can be read before the logits are there.
    __device__ explicit warp_choice(const launch::route_args& a) : first(each * (threadIdx.x % warp_size)) {
        read(bias, a.bias, a.experts);
    }

    /// Chooses the `count` best, the smaller index on a tie; all lanes. Leaves them and their logits in shared memory,
    /// where the calling warp may read them, and returns the last one.
    __device__ int make(const launch::route_args& a, int count, int* which, float* chosen_logits) const {
        const int lane = threadIdx.x % warp_size;
        float logits[each];
        read(logits, a.logits, a.experts);
        unsigned key[each], largest = 0;
#pragma unroll
        for (int i = 0; i < each; ++i) {
            key[i] = first + i < a.experts ? max(1u, ordered(sigmoid(logits[i]) + bias[i])) : 0;
            largest = max(largest, key[i]);
        }
#pragma unroll 1
        for (int slot = 0; slot < count; ++slot) {
            const unsigned best = __reduce_max_sync(0xFFFFFFFFu, largest);
            if (lane != __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, largest == best))) - 1) continue;
            int at = 0;
            float logit = 0;
            bool found = false;
            largest = 0;
#pragma unroll
            for (int i = 0; i < each; ++i) {
                const bool it = !found && key[i] == best;
                if (it) at = i, logit = logits[i], key[i] = 0, found = true;
                largest = max(largest, key[i]);
            }
            which[slot] = first + at, chosen_logits[slot] = logit;
        }
        __syncwarp();
        return which[count - 1];
    }

    static bool serves(const launch::route_args& a) {
        return a.logits != nullptr && a.experts <= most && a.experts % 4 == 0 && a.k < warp_size &&
               aligned16(a.logits, a.bias);
    }

private:
    __device__ void read(float (&to)[each], const float* from, int experts) const {
#pragma unroll
        for (int i = 0; i < each; i += 4) {
            const int at = min(first + i, experts - 4);
            const float4 four = __ldcg(reinterpret_cast<const float4*>(from + at));
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
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
