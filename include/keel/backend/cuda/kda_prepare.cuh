// SPDX-License-Identifier: MIT
//
// What kda_chunk needs to know of a chunk of 16 tokens beside v and the state. With G the running sum of the log decay
// in it, and keel::reference::kda_chunk's a and b ([KL] eq. 6-9), let
//   T = (1 + diag(beta) a)^-1 diag(beta),  kd_t = e^{G_t} k_t,  qd_t = e^{G_t} q_t / sqrt(D),  kr_t = e^{G_16 - G_t}
//   k_t
//
// Gates may be anything: decays e^{G_t - G_i} are formed as products of the e^{g} in (0, 1] between i and t, never as
// quotients or from differences of long sums. For a and b the pairs i < t are split by the highest bit in which t and i
// differ: with m the multiple of that power of two between them, e^{G_t - G_i} = (e^{g_m} .. e^{g_t}) (e^{g_i+1} ..
// e^{g_m-1}), one factor for t and one for i, which makes each of the four levels a matrix product. All factors have
// rows of length at most 1, because the delta rule with unit keys and 0 < beta < 1 never makes the state longer.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

inline constexpr int kda_tokens = 16;  // of a chunk

/// The factors of one chunk of one head as B fragments, so that a lane of kda_scan loads 16 bytes at a time.
template <int D>
struct alignas(16) kda_factors {
    uint4 erase[2][D / 32][32];  // -(T kd): [tokens 0 to 7, 8 to 15][32 key channels][lane]
    uint4 read[2][D / 32][32];   // qd - b T kd
    uint4 keys[D / 16][32];      // kr
    uint4 solve[32];             // T
    uint4 mix[32];               // b T
    float decay[D];              // e^{G_16}
};

/// v[t] summed over the warp for Count values of t; lane l returns the sum of v[l Count / 32].
template <int Count>
__device__ inline float sum_over_warp(const float (&v)[Count], int lane) {
    if constexpr (Count == 1) {
        return v[0] + __shfl_xor_sync(~0u, v[0], 1);
    } else {
        float half[Count / 2];
        const bool upper = lane & Count;
#pragma unroll
        for (int i = 0; i < Count / 2; ++i) {
            const float keep = upper ? v[i + Count / 2] : v[i];
            const float give = upper ? v[i] : v[i + Count / 2];
            half[i] = keep + __shfl_xor_sync(~0u, give, Count);
        }
        return sum_over_warp(half, lane);
    }
}

template <int D>
inline constexpr int kda_prepare_threads = D / 2 < 32 ? 32 : D / 2;

/// Each thread owns two channels for the 16 tokens, then warps share the matrix products.
template <int D>
struct kda_prepare_memory {
    static constexpr int stride = D / 2 + 4;  // of half2: rows shifted by 16 bytes, so that ldmatrix has no conflicts
    union {
        __half2 level[2][24][stride];  // k of later tokens, q of later tokens, k of earlier tokens
        struct {
            __half2 keys[kda_tokens][stride];               // kr
            __half2 solve[kda_tokens][kda_tokens / 2 + 4];  // T
            __half2 mix[kda_tokens][kda_tokens / 2 + 4];    // b T
        } late;                                             // when a and b are known
    };
    __half2 keys[kda_tokens][stride];       // kd
    __half2 queries[kda_tokens][stride];    // qd
    float a_b[kda_tokens][kda_tokens + 1];  // a_ti in row t and b_ti in row i, for i < t
    float diagonal[2][kda_tokens];          // b_tt, a part from each warp
    float beta[kda_tokens];
};

template <int D>
__device__ void kda_prepare(const kda_chunk_args& args, const cuda_launch::segment& segment, int chunk, int head,
                            kda_factors<D>& out, kda_prepare_memory<D>& memory) {
    constexpr int warps = kda_prepare_threads<D> / 32;
    const int thread = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.x / 32u),
              lane = static_cast<int>(threadIdx.x % 32u);
    const int group = lane / 4, quad = lane % 4;
    const int start = chunk * kda_tokens;
    const int length = min(kda_tokens, segment.rows - start);
    const std::int64_t first = segment.first_row + start;
    const bool mine = thread < D / 2;
    const auto load = [&](const activations<const float>& from, int t) {
        const float* p = from.data + (first + t) * from.row + head * from.head + 2 * thread;
        return mine && t < length ? __ldg(reinterpret_cast<const float2*>(p)) : float2{0, 0};
    };
    float2 decay[kda_tokens], k[kda_tokens], q[kda_tokens];
#pragma unroll
    for (int t = 0; t < kda_tokens; ++t) {
        decay[t] = load(args.log_decay, t);
        k[t] = load(args.k, t);
        q[t] = load(args.q, t);
    }
    const float scale = rsqrtf(static_cast<float>(D));
    float diagonal[kda_tokens];
#pragma unroll
    for (int t = 0; t < kda_tokens; ++t) {
        decay[t] = {__expf(decay[t].x), __expf(decay[t].y)};
        q[t] = {q[t].x * scale, q[t].y * scale};
        diagonal[t] = q[t].x * k[t].x + q[t].y * k[t].y;
    }
    const auto store = [&](__half2* row, float2 x, float2 factor) {
        if (mine) row[thread] = __floats2half2_rn(x.x * factor.x, x.y * factor.y);
    };
    const auto times = [](float2 x, float2 y) { return float2{x.x * y.x, x.y * y.y}; };
    const auto split = [&]<int Half>(__half2(&tile)[24][kda_prepare_memory<D>::stride]) {
#pragma unroll
        for (int block = 0; block < kda_tokens; block += 2 * Half) {
            float2 product = {1, 1};
#pragma unroll
            for (int i = Half - 1; i >= 0; --i) {
                store(tile[16 + block / 2 + i], k[block + i], product);
                product = times(product, decay[block + i]);
            }
            product = {1, 1};
#pragma unroll
            for (int i = 0; i < Half; ++i) {
                product = times(product, decay[block + Half + i]);
                store(tile[block / 2 + i], k[block + Half + i], product);
                store(tile[8 + block / 2 + i], q[block + Half + i], product);
            }
        }
    };
    const auto multiply_levels = [&](int from) {
        for (int level = warp; level < 2; level += warps) {
            float product[4] = {};
            const auto& tile = memory.level[level];
            const std::uint32_t later = shared_address(&tile[lane % 16][lane / 16 * 4]);
            const std::uint32_t earlier = shared_address(&tile[16 + lane % 8][lane / 8 * 4]);
#pragma unroll
            for (int step = 0; step < D / 32; ++step) {
                std::uint32_t a0[4], a1[4], b[4];
                load_matrices(a0, later + step * 64);
                load_matrices(a1, later + step * 64 + 32);
                load_matrices(b, earlier + step * 64);
                multiply(product, a0, b[0], b[1]);
                multiply(product, a1, b[2], b[3]);
            }
            const int half = 8 >> (from + level);
            const int t = group / half * 2 * half + half + group % half;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int earlier_token = 2 * quad + e;
                if (group / half != earlier_token / half) continue;
                const int i = earlier_token / half * 2 * half + earlier_token % half;
                memory.a_b[t][i] = product[e];
                memory.a_b[i][t] = product[2 + e];
            }
        }
        __syncthreads();
    };

    // Two levels at a time: more blocks fit on a multiprocessor than with room for all four.
    split.template operator()<8>(memory.level[0]);
    split.template operator()<4>(memory.level[1]);
    float2 product = {1, 1};
#pragma unroll
    for (int t = 0; t < kda_tokens; ++t) {
        product = times(product, decay[t]);
        store(memory.keys[t], k[t], product);
        store(memory.queries[t], q[t], product);
    }
    if (mine) *reinterpret_cast<float2*>(&out.decay[2 * thread]) = product;
    const float part = sum_over_warp(diagonal, lane);
    if (lane % 2 == 0) memory.diagonal[warp][lane / 2] = part;
    if (thread < kda_tokens) {
        memory.beta[thread] = thread < length ? args.beta.data[(first + thread) * args.beta.row + head] : 0.0f;
    }
    __syncthreads();
    multiply_levels(0);
    split.template operator()<2>(memory.level[0]);
    split.template operator()<1>(memory.level[1]);
    __syncthreads();
    multiply_levels(2);

    product = {1, 1};
#pragma unroll
    for (int t = kda_tokens - 1; t >= 0; --t) {
        store(memory.late.keys[t], k[t], product);
        product = times(product, decay[t]);
    }
    if (warp == 0) {  // column `lane` of T by forward substitution, then of b T
        float x[kda_tokens];
#pragma unroll
        for (int t = 0; t < kda_tokens; ++t) {
            float sum = lane % 16 == t ? 1.0f : 0.0f;
#pragma unroll
            for (int i = 0; i < t; ++i) sum -= memory.a_b[t][i] * x[i];
            x[t] = memory.beta[t] * sum;
        }
        if (lane < 16) {
#pragma unroll
            for (int t = 0; t < kda_tokens; ++t) {
                float sum = (memory.diagonal[0][t] + (warps > 1 ? memory.diagonal[1][t] : 0.0f)) * x[t];
#pragma unroll
                for (int i = 0; i < t; ++i) sum += memory.a_b[i][t] * x[i];
                reinterpret_cast<__half*>(memory.late.solve[t])[lane] = __float2half_rn(x[t]);
                reinterpret_cast<__half*>(memory.late.mix[t])[lane] = __float2half_rn(sum);
            }
        }
    }
    __syncthreads();

    for (int tile = warp; tile < D / 16; tile += warps) {
        std::uint32_t b[4];
        load_transposed(b, shared_address(&memory.late.keys[lane % 16][tile * 8 + lane / 16 * 4]));
        out.keys[tile][lane] = {b[0], b[1], b[2], b[3]};
    }
    std::uint32_t solve[4], mix[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        solve[i] = *reinterpret_cast<const std::uint32_t*>(&memory.late.solve[group + i % 2 * 8][quad + i / 2 * 4]);
        mix[i] = *reinterpret_cast<const std::uint32_t*>(&memory.late.mix[group + i % 2 * 8][quad + i / 2 * 4]);
    }
    if (warp == 0) {
        out.solve[lane] = {solve[0], solve[2], solve[1], solve[3]};
        out.mix[lane] = {mix[0], mix[2], mix[1], mix[3]};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        solve[i] ^= 0x80008000u;
        mix[i] ^= 0x80008000u;
    }
    for (int tile = warp; tile < D / 32; tile += warps) {
        std::uint32_t erase[2][4], read[2][4];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            std::uint32_t b[4];
            load_transposed(b, shared_address(&memory.keys[lane % 16][tile * 16 + pair * 8 + lane / 16 * 4]));
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = tile * 16 + pair * 8 + e * 4 + quad;
                const float2 low = __half22float2(memory.queries[group][column]);
                const float2 high = __half22float2(memory.queries[group + 8][column]);
                float erased[4] = {}, kept[4] = {low.x, low.y, high.x, high.y};
                multiply(erased, solve, b[2 * e], b[2 * e + 1]);
                multiply(kept, mix, b[2 * e], b[2 * e + 1]);
#pragma unroll
                for (int token = 0; token < 2; ++token) {
                    erase[token][2 * pair + e] = pack(erased[2 * token], erased[2 * token + 1]);
                    read[token][2 * pair + e] = pack(kept[2 * token], kept[2 * token + 1]);
                }
            }
        }
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            out.erase[token][tile][lane] = {erase[token][0], erase[token][1], erase[token][2], erase[token][3]};
            out.read[token][tile][lane] = {read[token][0], read[token][1], read[token][2], read[token][3]};
        }
    }
}

}  // namespace keel::cuda_launch::detail
