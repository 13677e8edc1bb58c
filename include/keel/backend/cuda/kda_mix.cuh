// SPDX-License-Identifier: MIT
//
// All of a KDA layer between its products, for few tokens: convolution, gates, the recurrence of kda_step.cuh and what
// the output product needs, in one kernel.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/head_dim.hpp>
#include <keel/backend/cuda/kda_step.cuh>
#include <keel/backend/cuda/matvec.cuh>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_kernels {

/// Blocks that work on a head together and write into each other's shared memory: a cluster, where there are clusters
/// (compute capability 9.0), of `Slabs` blocks; else one block does it all. All threads call everything but share().
template <int Slabs>
class head_blocks {
public:
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    static constexpr bool clusters = Slabs > 1;
#else
    static constexpr bool clusters = false;
#endif

    /// `barrier`: in shared memory. `bytes`: what every block is sent in a round. All must have begun, see all_here(),
    /// before anything is shared.
    __device__ head_blocks(unsigned long long* barrier, int bytes) : bytes_(bytes) {
        if constexpr (!clusters) return;
#if __CUDA_ARCH__ >= 900
        barrier_ = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier_) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
#endif
        cuda_launch::detail::cluster_arrive();
    }
    __device__ void all_here() const {
        if constexpr (!clusters) return __syncthreads();
        cuda_launch::detail::cluster_wait();
    }

    /// Writes `value` to `place`, in shared memory, of all blocks.
    __device__ void share(float* place, float value) const {
        if constexpr (!clusters) {
            *place = value;
            return;
        }
#if __CUDA_ARCH__ >= 900
        const auto here = static_cast<unsigned>(__cvta_generic_to_shared(place));
        for (unsigned block = 0; block < gridDim.x; ++block) {
            unsigned there, barrier;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(barrier_), "r"(block));
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
                         "r"(__float_as_uint(value)), "r"(barrier)
                         : "memory");
        }
#endif
    }

    /// Until all that is shared in this round is there; a barrier.
    __device__ void wait() {
        if constexpr (!clusters) return __syncthreads();
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_), "r"(bytes_)
                         : "memory");
        }
        __syncthreads();
        asm volatile(
            "{\n.reg .pred done;\n"
            "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n}" ::"r"(barrier_),
            "r"(round_ & 1)
            : "memory");
        ++round_;
#endif
    }

    /// Until all blocks have read what was shared, before the next round.
    __device__ static void all_read() {
        if constexpr (!clusters) return __syncthreads();
        cuda_launch::detail::cluster_barrier();
    }

private:
    unsigned barrier_ = 0;
    int bytes_, round_ = 0;
};

/// A channel's convolution, token by token, and its history.
class conv_channel {
public:
    static constexpr int most_taps = 4;

    /// Of the weights the last one is the token's own.
    __device__ void weigh(const float* weights, int taps) {
        unused_ = most_taps - taps;
#pragma unroll
        for (int j = 0; j <= most_taps; ++j) weight_[j] = j >= unused_ ? weights[j - unused_] : 0.0f;
    }
    /// `history` has its taps `distance` apart.
    __device__ void read(const float* history, long long distance) {
#pragma unroll
        for (int j = 0; j < most_taps; ++j) past_[j] = j >= unused_ ? history[(j - unused_) * distance] : 0.0f;
    }
    __device__ void write(float* history, long long distance) const {
#pragma unroll
        for (int j = 0; j < most_taps; ++j) {
            if (j >= unused_) history[(j - unused_) * distance] = past_[j];
        }
    }
    __device__ float next(float now) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < most_taps; ++j) sum += weight_[j] * past_[j];
        sum += weight_[most_taps] * now;
#pragma unroll
        for (int j = 0; j + 1 < most_taps; ++j) past_[j] = past_[j + 1];
        past_[most_taps - 1] = now;
        return silu(sum);
    }

private:
    float past_[most_taps], weight_[most_taps + 1];
    int unused_;
};

/// What becomes of a slab's 32 sums o of a token, four of each of eight threads: the sum of squares, and gate times
/// sum, as floats or codes. `slab` is one of `slabs` of head h.
__device__ inline void put(const launch::kda_mix_args& a, int t, int h, int slab, int slabs, const float* gate,
                           float scale, float4 o) {
    constexpr unsigned lanes = 0xFFu;
    const int c = 4 * threadIdx.x, unit = h * slabs + slab, all = a.layout.heads * slabs;
    o = {o.x * scale, o.y * scale, o.z * scale, o.w * scale};
    float squares = o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w;
    for (int d = 4; d > 0; d /= 2) squares += __shfl_xor_sync(lanes, squares, d);
    if (c == 0) a.squares[t * all + unit] = squares;
    o = {o.x * gate[c], o.y * gate[c + 1], o.z * gate[c + 2], o.w * gate[c + 3]};
    if (a.codes == nullptr) {
        *reinterpret_cast<float4*>(a.out + t * a.out_row + unit * 32 + c) = o;
        return;
    }
    const staged to(a.codes + static_cast<long long>(t) * staged::code_bytes(all), all, false);
    float largest = fmaxf(fmaxf(fabsf(o.x), fabsf(o.y)), fmaxf(fabsf(o.z), fabsf(o.w)));
    for (int d = 4; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, d));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const int q0 = __float2int_rn(o.x * inverse), q1 = __float2int_rn(o.y * inverse),
              q2 = __float2int_rn(o.z * inverse), q3 = __float2int_rn(o.w * inverse);
    int sum = q0 + q1 + q2 + q3;
    for (int d = 2; d > 0; d /= 2) sum += __shfl_xor_sync(lanes, sum, d);
    const int other = __shfl_xor_sync(lanes, sum, 4);
    *reinterpret_cast<int*>((c < 16 ? to.first : to.second) + 16 * unit + c % 16) =
        (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | q3 << 24;
    if (c == 0) to.marks[unit] = {__float_as_int(largest * (1 / 127.0f)), (sum & 0xFFFF) | other << 16};
}

/// The whole layer between its products, see launch.hpp. A block makes the inputs of its own channels, shares q, k and
/// decay with the head's other blocks, and advances its slabs. Grid: (blocks of a head, heads, segments).
/// With clusters, in as few registers as let a block run beside one of the product before.
template <int D>
__global__ void __launch_bounds__(256, head_blocks<D / kda_slab<D>::columns>::clusters ? 3 : 1)
    kda_mix_kernel(const __grid_constant__ launch::kda_mix_args a) {
    using slab = kda_slab<D>;
    using head = head_blocks<D / slab::columns>;
    constexpr int own = head::clusters ? slab::columns : D, slabs = own / slab::columns;
    constexpr int turns = ceil_div(3 * own, slab::threads);
    __shared__ __align__(16) float decay[D], k[D], q[D], v[own], gate[own], sums[slab::sum_floats];
    __shared__ float bias[own], norm[own], squares[2][D / warp_size];  // of q and k, a sum per 32 channels
    constexpr int units = ceil_div(D, 32);
    __shared__ __align__(16) unsigned char low[2 * staged::value_bytes(units)], fine[2 * fine_codes::bytes(units)];
    extern __shared__ __align__(16) unsigned char rows[];
    const int first = blockIdx.x * own, h = blockIdx.y, taps = a.layout.taps, channels = a.layout.heads * D;

    // Constants: the low-rank products' rows of the block's channels, decay and gate; taps. All is asked for before
    // anything is waited for: this is all that a block that starts late has to catch up on.
    start_next();
    const launch::segment segment = a.segments[blockIdx.z];
    const int own_channel = min(static_cast<int>(threadIdx.x), own - 1);
    const float own_bias = __ldg(a.dt_bias + h * D + first + own_channel),
                own_norm = __ldg(a.norm + first + own_channel);
    const float rate = __ldg(a.a + h);
    __shared__ unsigned long long barrier;
    head blocks(&barrier, static_cast<int>(sizeof q + sizeof k + sizeof decay + sizeof squares));
    const auto fetch = [&](const launch::matrix& m, unsigned char* to) {
        const unsigned char* from = m.data + static_cast<long long>(h * D + first) * m.row_bytes;
        for (int i = 16 * threadIdx.x; i < own * m.row_bytes; i += 16 * slab::threads) begin_copy16(to + i, from + i);
    };
    unsigned char* const gate_rows = rows + own * a.decay_up.row_bytes;
    fetch(a.decay_up, rows);
    fetch(a.gate_up, gate_rows);
    conv_channel conv[turns];
    const auto place_of = [&](int turn, int& which, int& d) {  // of the channel that this thread convolves
        const int i = threadIdx.x + turn * slab::threads;
        which = i / own;
        d = first + i % own;
        return i < 3 * own;
    };
    const auto each_channel = [&](auto&& f) {
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            int which, d;
            if (place_of(turn, which, d)) f(turn, which, d);
        }
    };
    each_channel([&](int turn, int which, int d) {
        const float* weights = which == 0 ? a.taps_q : which == 1 ? a.taps_k : a.taps_v;
        conv[turn].weigh(weights + (h * D + d) * (taps + 1), taps);
    });
    // The state is of the token before: no kernel that may still run writes it.
    float* const layer = reinterpret_cast<float*>(segment.recurrent) + a.layer * a.layout.layer_floats;
    float* const state = layer + h * D * D;
    float* const history = layer + static_cast<long long>(a.layout.heads) * D * D + h * D;
    const auto past_of = [&](int which, int d) {
        return history + static_cast<long long>(which) * taps * channels + d;
    };
    slab s[slabs];
#pragma unroll
    for (int j = 0; j < slabs; ++j) s[j].read(state, first + j * slab::columns);
    each_channel([&](int turn, int which, int d) { conv[turn].read(past_of(which, d), channels); });
    static_assert(own <= slab::threads);
    if (threadIdx.x < own) bias[threadIdx.x] = own_bias, norm[threadIdx.x] = own_norm;
    wait_for_previous();

    // A token's inputs, all asked for at once, before anything is stored that might be the same memory.
    float4 low_values{};  // of the low-rank inputs, four of each of the first threads
    float now[turns], beta_logit;
    const bool of_low = threadIdx.x < 2 * D / 4, low_of_gate = threadIdx.x >= D / 4;
    const int low_at = 4 * threadIdx.x - (low_of_gate ? D : 0);
    const auto load = [&](int t) {
        if (of_low) {
            const float* from = low_of_gate ? a.gate_low + t * a.gate_row : a.decay_low + t * a.decay_row;
            low_values = *reinterpret_cast<const float4*>(from + low_at);
        }
#pragma unroll
        for (int turn = 0; turn < turns; ++turn) {
            int which, d;
            if (!place_of(turn, which, d)) continue;
            const float* from = which == 0 ? a.q + t * a.q_row : which == 1 ? a.k + t * a.k_row : a.v + t * a.v_row;
            now[turn] = from[h * D + d];
        }
        beta_logit = a.beta[t * a.beta_row + h];
    };
    load(segment.first_row);
    const float scale = 1.0f / sqrtf(static_cast<float>(D));
    const auto low_of = [&](bool of_gate) {
        return staged(low + (of_gate ? staged::value_bytes(units) : 0), units, true);
    };
    const auto fine_of = [&](bool of_gate) { return fine + (of_gate ? fine_codes::bytes(units) : 0); };
    copies_done();
    blocks.all_here();
    const int end = segment.first_row + segment.rows;
    for (int t = segment.first_row; t < end; ++t) {
        fine_codes::put(fine_of(low_of_gate), units, min(low_at / 32, units - 1), low_values, of_low);
        if (of_low) *reinterpret_cast<float4*>(low_of(low_of_gate).values + staged::place(low_at)) = low_values;
        const float beta = sigmoid(beta_logit);
        each_channel([&](int turn, int which, int d) {  // whole warps
            const float x = conv[turn].next(now[turn]);
            if (which == 2) {
                v[d - first] = x;
                return;
            }
            blocks.share((which == 0 ? q : k) + d, x);
            const float sum = lanes_sum(x * x);
            if (threadIdx.x % warp_size == 0) blocks.share(&squares[which][d / warp_size], sum);
        });
        __syncthreads();
        constexpr int lanes = 4;
        for (int i = threadIdx.x / lanes; i < 2 * own; i += slab::threads / lanes) {
            const bool of_gate = i >= own;
            const launch::matrix& up = of_gate ? a.gate_up : a.decay_up;
            const int of_own = of_gate ? i - own : i;
            const float total = narrow_product<lanes>(up.type, (of_gate ? gate_rows : rows) + of_own * up.row_bytes,
                                                      units, low_of(of_gate), fine_of(of_gate));
            if (threadIdx.x % lanes != 0) continue;
            if (of_gate) {
                gate[of_own] = sigmoid(total) * norm[of_own];
            } else {
                blocks.share(decay + first + of_own, expf(rate * softplus(total + bias[of_own])));
            }
        }
        blocks.wait();
        const auto over_length = [&](int which) {
            float sum = 0;
            for (const float x : squares[which]) sum += x;
            return 1.0f / fmaxf(sqrtf(sum), a.epsilon);
        };
        const float over_q = over_length(0), over_k = over_length(1);
#pragma unroll
        for (int j = 0; j < slabs; ++j) {
            const int column = j * slab::columns;  // of the block's
            const float4 o = s[j].step(decay, k, q, v + column, beta, sums, over_k, over_q);
            if (threadIdx.x < 8)
                put(a, t, h, (first + column) / slab::columns, D / slab::columns, gate + column, scale, o);
            if (slabs > 1) __syncthreads();
        }
        if (t + 1 == end) break;
        load(t + 1);
        head::all_read();
    }
#pragma unroll
    for (int j = 0; j < slabs; ++j) s[j].write(state, first + j * slab::columns);
    each_channel([&](int turn, int which, int d) { conv[turn].write(past_of(which, d), channels); });
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t kda_mix(const kda_mix_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    if (a.layout.taps > conv_channel::most_taps) return cudaErrorInvalidValue;
    const auto with = [&]<int D>() {
        cudaFuncAttributes compiled;
        if (const auto e = cudaFuncGetAttributes(&compiled, kda_mix_kernel<D>); e != cudaSuccess) return e;
        const bool clusters = D > 32 && compiled.ptxVersion >= 90;
        const int blocks = clusters ? D / 32 : 1, own = D / blocks;
        const int bytes = own * (a.decay_up.row_bytes + a.gate_up.row_bytes);
        return start_clusters(kda_mix_kernel<D>, grid_of(blocks, a.layout.heads, a.segment_count),
                              clusters ? blocks : 0, 256, bytes, stream, a);
    };
    return detail::visit_head_dim<32, 64, 128, 256>(a.layout.head_dim, with, cudaErrorInvalidValue);
}

}  // namespace keel::cuda_launch
