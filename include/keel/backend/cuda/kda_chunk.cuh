// SPDX-License-Identifier: MIT
//
// Kimi Delta Attention over many tokens. With S the state at the start of a chunk of 16 tokens, G the running sum of
// the log decay in it, and keel::reference::kda_chunk's a and b ([KL] eq. 6-9), let
//   T = (1 + diag(beta) a)^-1 diag(beta),  kd_t = e^{G_t} k_t,  qd_t = e^{G_t} q_t / sqrt(D),  kr_t = e^{G_16 - G_t}
//   k_t
// Then the chunk is
//   U = T V - (T kd) S,    O = (b T) V + (qd - b T kd) S,    S <- diag(e^{G_16}) S + kr^T U
// where everything but S and V is independent of other chunks. So kda_prepare computes these factors for all chunks
// at once, and kda_scan walks over the chunks. Each column of V and S is independent of the others: a pair of
// warps of kda_scan keeps 16 columns of S in registers and shares nothing but the factors with other warps.
//
// Gates may be anything: decays e^{G_t - G_i} are formed as products of the e^{g} in (0, 1] between i and t, never as
// quotients or from differences of long sums. For a and b the pairs i < t are split by the highest bit in which t and i
// differ: with m the multiple of that power of two between them, e^{G_t - G_i} = (e^{g_m} .. e^{g_t}) (e^{g_i+1} ..
// e^{g_m-1}), one factor for t and one for i, which makes each of the four levels a matrix product. All factors have
// rows of length at most 1, because the delta rule with unit keys and 0 < beta < 1 never makes the state longer.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/head_dim.hpp>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch {

namespace detail {

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
    __half2 level[4][24][stride];             // k of later tokens, q of later tokens, k of earlier tokens
    __half2 keys[kda_tokens][stride];         // kd
    __half2 queries[kda_tokens][stride];      // qd
    float a[kda_tokens][kda_tokens];          // a_ti for i < t
    float b[kda_tokens][kda_tokens + 4];      // b_ti for i < t
    float diagonal[2][kda_tokens];            // b_tt, a part from each warp
    float beta[kda_tokens];
    __half2 solve[kda_tokens][kda_tokens / 2 + 4];  // T
    __half2 mix[kda_tokens][kda_tokens / 2 + 4];    // b T
};

template <int D>
__device__ void kda_prepare(const kda_chunk_args& args, const cuda_launch::segment& segment, int chunk, int head,
                            kda_factors<D>& out, kda_prepare_memory<D>& memory) {
    constexpr int warps = kda_prepare_threads<D> / 32;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int group = lane / 4, quad = lane % 4;
    const int start = chunk * kda_tokens;
    const int length = min(kda_tokens, segment.rows - start);
    const std::int64_t first = segment.first_row + start;
    float diagonal[kda_tokens];

    if (thread < D / 2) {
        const auto load = [&](const activations<const float>& from, int t) {
            const float* p = from.data + (first + t) * from.row + head * from.head + 2 * thread;
            return t < length ? __ldg(reinterpret_cast<const float2*>(p)) : float2{0, 0};
        };
        float2 decay[kda_tokens], k[kda_tokens], q[kda_tokens];
#pragma unroll
        for (int t = 0; t < kda_tokens; ++t) {
            decay[t] = load(args.log_decay, t);
            k[t] = load(args.k, t);
            q[t] = load(args.q, t);
        }
        const float scale = rsqrtf(static_cast<float>(D));
#pragma unroll
        for (int t = 0; t < kda_tokens; ++t) {
            decay[t] = {__expf(decay[t].x), __expf(decay[t].y)};
            q[t] = {q[t].x * scale, q[t].y * scale};
            diagonal[t] = q[t].x * k[t].x + q[t].y * k[t].y;
        }
        const auto store = [&](__half2* row, float2 x, float2 factor) {
            row[thread] = __floats2half2_rn(x.x * factor.x, x.y * factor.y);
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
        split.template operator()<8>(memory.level[0]);
        split.template operator()<4>(memory.level[1]);
        split.template operator()<2>(memory.level[2]);
        split.template operator()<1>(memory.level[3]);
        float2 product = {1, 1};
#pragma unroll
        for (int t = 0; t < kda_tokens; ++t) {
            product = times(product, decay[t]);
            store(memory.keys[t], k[t], product);
            store(memory.queries[t], q[t], product);
        }
        *reinterpret_cast<float2*>(&out.decay[2 * thread]) = product;
        product = {1, 1};
#pragma unroll
        for (int t = kda_tokens - 1; t >= 0; --t) {
            k[t] = times(k[t], product);
            product = times(product, decay[t]);
        }
        const int channel = 2 * thread;
        uint2* const keys = reinterpret_cast<uint2*>(&out.keys[channel / 16][channel % 8 * 4]) + channel / 8 % 2;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            keys[2 * c] = {pack(k[2 * c].x, k[2 * c + 1].x), pack(k[2 * c + 8].x, k[2 * c + 9].x)};
            keys[2 * c + 8] = {pack(k[2 * c].y, k[2 * c + 1].y), pack(k[2 * c + 8].y, k[2 * c + 9].y)};
        }
    } else {
#pragma unroll
        for (int t = 0; t < kda_tokens; ++t) diagonal[t] = 0;
    }
    const float part = sum_over_warp(diagonal, lane);
    if (lane % 2 == 0) memory.diagonal[warp][lane / 2] = part;
    if (thread < kda_tokens) {
        memory.beta[thread] = thread < length ? args.beta.data[(first + thread) * args.beta.row + head] : 0.0f;
    }
    __syncthreads();

    for (int level = warp; level < 4; level += warps) {
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
        const int half = 8 >> level;
        const int t = group / half * 2 * half + half + group % half;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int earlier_token = 2 * quad + e;
            if (group / half != earlier_token / half) continue;
            const int i = earlier_token / half * 2 * half + earlier_token % half;
            memory.a[t][i] = product[e];
            memory.b[t][i] = product[2 + e];
        }
    }
    __syncthreads();

    if (warp == 0) {  // column `lane` of T by forward substitution, then of b T
        float x[kda_tokens];
#pragma unroll
        for (int t = 0; t < kda_tokens; ++t) {
            float sum = lane % 16 == t ? 1.0f : 0.0f;
#pragma unroll
            for (int i = 0; i < t; ++i) sum -= memory.a[t][i] * x[i];
            x[t] = memory.beta[t] * sum;
        }
        if (lane < 16) {
#pragma unroll
            for (int t = 0; t < kda_tokens; ++t) {
                float sum = (memory.diagonal[0][t] + (warps > 1 ? memory.diagonal[1][t] : 0.0f)) * x[t];
#pragma unroll
                for (int i = 0; i < t; ++i) sum += memory.b[t][i] * x[i];
                reinterpret_cast<__half*>(memory.solve[t])[lane] = __float2half_rn(x[t]);
                reinterpret_cast<__half*>(memory.mix[t])[lane] = __float2half_rn(sum);
            }
        }
    }
    __syncthreads();

    std::uint32_t solve[4], mix[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        solve[i] = *reinterpret_cast<const std::uint32_t*>(&memory.solve[group + i % 2 * 8][quad + i / 2 * 4]);
        mix[i] = *reinterpret_cast<const std::uint32_t*>(&memory.mix[group + i % 2 * 8][quad + i / 2 * 4]);
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

/// Grid: (chunks, heads, segments).
template <int D>
__global__ void __launch_bounds__(kda_prepare_threads<D>)
    kda_prepare_kernel(kda_chunk_args args, int first_chunk, kda_factors<D>* factors) {
    __shared__ kda_prepare_memory<D> memory;
    const cuda_launch::segment segment = args.segments[blockIdx.z];
    const int chunk = first_chunk + static_cast<int>(blockIdx.x);
    if (chunk * kda_tokens >= segment.rows) return;
    const std::size_t slot = (static_cast<std::size_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    kda_prepare<D>(args, segment, chunk, static_cast<int>(blockIdx.y), factors[slot], memory);
}

inline constexpr int kda_stages = 6;

/// Columns of V and S that a warp works on, and how many times as many a block does.
inline constexpr int kda_columns = 16, kda_slabs = 2;

/// Warps that share the rows of 16 columns of S: nothing but latency limits a warp, and each has half the work.
template <int D>
inline constexpr int kda_parts = D == 128 ? 2 : 1;

/// One more warp fetches.
template <int D>
inline constexpr int kda_scan_threads = (kda_slabs * kda_parts<D> + 1) * 32;

template <int D>
struct kda_scan_memory {
    struct stage {
        kda_factors<D> factors;
        float v[kda_tokens][kda_slabs * kda_columns + 4];  // shifted, so that the reads below have no conflicts
    } ring[kda_stages];
    float4 update[2][kda_slabs][kda_parts<D>][2][32];  // of even and odd chunks: U, as far as a part of S gives it
    float4 out[2][kda_slabs][kda_parts<D>][32];        // the 8 tokens that the other part writes
    barrier full[kda_stages], empty[kda_stages];
};

/// What a block of kda_scan works on.
struct kda_scan_range {
    cuda_launch::segment segment;
    int first_chunk, chunks, head;
    int column;  // first of the block
};

template <int D>
__device__ void kda_fetch(const kda_chunk_args& args, const kda_scan_range& range, const kda_factors<D>* factors,
                          kda_scan_memory<D>& memory, int lane) {
    constexpr int pieces = kda_slabs * kda_columns / 4;  // of 16 bytes of v, a row
    const int t = lane / pieces, column = lane % pieces * 4;
    const float* from = args.v.data + (range.segment.first_row + range.first_chunk * kda_tokens + t) * args.v.row +
                        range.head * args.v.head + range.column + column;
    int left = range.segment.rows - range.first_chunk * kda_tokens - t;
    for (int chunk = 0; chunk < range.chunks; ++chunk) {
        const int slot = chunk % kda_stages;
        if (chunk >= kda_stages) memory.empty[slot].wait(chunk / kda_stages % 2 ^ 1);
        const stage_copy copy{memory.full[slot], lane};
        copy.begin(static_cast<int>(sizeof(kda_factors<D>)));
        copy.whole(&memory.ring[slot].factors, factors + chunk, static_cast<int>(sizeof(kda_factors<D>)));
#pragma unroll
        for (int i = 0; i < kda_tokens; i += 32 / pieces) {  // behind the last row v counts nothing, but NaN would
            copy_async(&memory.ring[slot].v[t + i][column], from + (i < left ? i : 0) * args.v.row, i < left ? 16 : 0);
        }
        copy.end();
        from += kda_tokens * args.v.row;
        left -= kda_tokens;
    }
}

/// Holds 16 columns of S, D / kda_parts rows of them, transposed: rows of its tiles are columns of V.
template <int D>
__device__ void kda_scan(const kda_chunk_args& args, const kda_scan_range& range, kda_scan_memory<D>& memory, int slab,
                         int part, int lane) {
    constexpr int parts = kda_parts<D>, steps = D / parts / 16;  // of 16 rows of S
    const int group = lane / 4, quad = lane % 4;
    const int mine = slab * kda_columns + group;  // of the block's columns
    float* const from = reinterpret_cast<float*>(range.segment.recurrent) + args.layer * args.layout.layer_floats +
                        range.head * D * D + part * (D / parts) * D + range.column + mine;
    float state[2 * steps][4];
#pragma unroll
    for (int j = 0; j < 2 * steps; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state[j][e] = from[(8 * j + 2 * quad + e % 2) * D + e / 2 * 8];
    }
    float* const to = args.out.data +
                      (range.segment.first_row + range.first_chunk * kda_tokens + 2 * quad) * args.out.row +
                      range.head * args.out.head + range.column + mine;
    const int rows = range.segment.rows - range.first_chunk * kda_tokens - 2 * quad;
    const auto write = [&](int chunk, int token, const float(&out)[4]) {  // 8 tokens
        const int t = chunk * kda_tokens + token * 8;
        float* const at = to + t * args.out.row;
        if (t < rows) at[0] = out[0], at[8] = out[2];
        if (t + 1 < rows) at[args.out.row] = out[1], at[args.out.row + 8] = out[3];
    };
    float kept[4] = {};  // with two parts: of the previous chunk, the tokens that this one writes

    int slot = 0, phase = 0;
    for (int chunk = 0; chunk < range.chunks; ++chunk) {
        const typename kda_scan_memory<D>::stage& stage = memory.ring[slot];
        const kda_factors<D>& f = stage.factors;
        memory.full[slot].wait(phase);
        uint4 erase[2][steps / 2], read[2][steps / 2], keys[steps];
#pragma unroll
        for (int i = 0; i < steps; ++i) erase[i % 2][i / 2] = f.erase[i % 2][part * (steps / 2) + i / 2][lane];
#pragma unroll
        for (int i = 0; i < steps; ++i) read[i % 2][i / 2] = f.read[i % 2][part * (steps / 2) + i / 2][lane];
#pragma unroll
        for (int i = 0; i < steps; ++i) keys[i] = f.keys[part * steps + i][lane];
        std::uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = 2 * quad + i / 2 * 8, c = mine + i % 2 * 8;
            v[i] = pack(stage.v[t][c], stage.v[t + 1][c]);
        }
        const uint4 solve = f.solve[lane], mix = f.mix[lane];
        float2 decay[2 * steps];
#pragma unroll
        for (int j = 0; j < 2 * steps; ++j) {
            decay[j] = *reinterpret_cast<const float2*>(&f.decay[part * (D / parts) + 8 * j + 2 * quad]);
        }

        std::uint32_t s[steps][4];
#pragma unroll
        for (int j = 0; j < steps; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[j][e] = pack(state[2 * j + e / 2][e % 2 * 2], state[2 * j + e / 2][e % 2 * 2 + 1]);
            }
        }
        float update[2][2][4] = {}, out[2][2][4] = {};  // [two halves of the sum][8 tokens]
        if (part == 0) {
            multiply(update[0][0], v, solve.x, solve.y);
            multiply(update[0][1], v, solve.z, solve.w);
        }
#pragma unroll
        for (int j = 0; j < steps / 2; ++j) {
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                multiply(update[1][token], s[2 * j], erase[token][j].x, erase[token][j].y);
                multiply(update[0][token], s[2 * j + 1], erase[token][j].z, erase[token][j].w);
            }
        }
        float4 sum[2];
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            const auto& u = update;
            sum[token] = {u[0][token][0] + u[1][token][0], u[0][token][1] + u[1][token][1],
                          u[0][token][2] + u[1][token][2], u[0][token][3] + u[1][token][3]};
            if constexpr (parts == 2) memory.update[chunk % 2][slab][part][token][lane] = sum[token];
        }
        if (part == parts - 1) {
            multiply(out[0][0], v, mix.x, mix.y);
            multiply(out[0][1], v, mix.z, mix.w);
        }
#pragma unroll
        for (int j = 0; j < steps / 2; ++j) {
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                multiply(out[1][token], s[2 * j], read[token][j].x, read[token][j].y);
                multiply(out[0][token], s[2 * j + 1], read[token][j].z, read[token][j].w);
            }
        }
#pragma unroll
        for (int j = 0; j < 2 * steps; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) state[j][e] *= e % 2 == 0 ? decay[j].x : decay[j].y;
        }
        if constexpr (parts == 2) {
            asm volatile("bar.sync %0, 64;" ::"r"(slab + 1) : "memory");
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                const float4 other = memory.update[chunk % 2][slab][part ^ 1][token][lane];
                sum[token] = {sum[token].x + other.x, sum[token].y + other.y, sum[token].z + other.z,
                              sum[token].w + other.w};
            }
        }
        const std::uint32_t u[4] = {pack(sum[0].x, sum[0].y), pack(sum[0].z, sum[0].w), pack(sum[1].x, sum[1].y),
                                    pack(sum[1].z, sum[1].w)};
#pragma unroll
        for (int j = 0; j < steps; ++j) {
            multiply(state[2 * j], u, keys[j].x, keys[j].y);
            multiply(state[2 * j + 1], u, keys[j].z, keys[j].w);
        }
        __syncwarp();
        if (lane == 0) memory.empty[slot].arrive();
        if (++slot == kda_stages) slot = 0, phase ^= 1;
        float all[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) all[i / 4][i % 4] = out[0][i / 4][i % 4] + out[1][i / 4][i % 4];
        if constexpr (parts == 1) {
            write(chunk, 0, all[0]);
            write(chunk, 1, all[1]);
        } else {  // the other part's share of the previous chunk has arrived: it was written before the barrier
            if (chunk > 0) {
                const float4 other = memory.out[(chunk + 1) % 2][slab][part ^ 1][lane];
                const float whole[4] = {kept[0] + other.x, kept[1] + other.y, kept[2] + other.z, kept[3] + other.w};
                write(chunk - 1, part, whole);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) kept[e] = part == 0 ? all[0][e] : all[1][e];
            const auto& give = all[1];
            const auto& take = all[0];
            memory.out[chunk % 2][slab][part][lane] =
                part == 0 ? float4{give[0], give[1], give[2], give[3]} : float4{take[0], take[1], take[2], take[3]};
        }
    }
    if constexpr (parts == 2) {
        asm volatile("bar.sync %0, 64;" ::"r"(slab + 1) : "memory");
        const float4 other = memory.out[(range.chunks + 1) % 2][slab][part ^ 1][lane];
        const float whole[4] = {kept[0] + other.x, kept[1] + other.y, kept[2] + other.z, kept[3] + other.w};
        write(range.chunks - 1, part, whole);
    }
#pragma unroll
    for (int j = 0; j < 2 * steps; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) from[(8 * j + 2 * quad + e % 2) * D + e / 2 * 8] = state[j][e];
    }
}

/// Grid: (slabs of D, heads, segments); each block walks over `chunks` chunks.
template <int D>
__global__ void __launch_bounds__(kda_scan_threads<D>)
    kda_scan_kernel(kda_chunk_args args, int first_chunk, int chunks, const kda_factors<D>* factors) {
    extern __shared__ uint4 dynamic_memory[];
    auto& memory = *reinterpret_cast<kda_scan_memory<D>*>(dynamic_memory);
    constexpr int workers = kda_slabs * kda_parts<D>;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    kda_scan_range range{args.segments[blockIdx.z], first_chunk, chunks, static_cast<int>(blockIdx.y),
                         static_cast<int>(blockIdx.x) * kda_slabs * kda_columns};
    range.chunks = min(chunks, (range.segment.rows + kda_tokens - 1) / kda_tokens - first_chunk);
    if (range.chunks <= 0) return;
    if (thread < kda_stages) {
        memory.full[thread].init(stage_copy::arrivals);
        memory.empty[thread].init(workers);
    }
    publish_to_copies();
    __syncthreads();
    if (warp == workers) {
        kda_fetch<D>(args, range,
                     factors + (static_cast<std::size_t>(blockIdx.z) * gridDim.y + blockIdx.y) *
                                   static_cast<std::size_t>(chunks),
                     memory, lane);
    } else {
        kda_scan<D>(args, range, memory, warp % kda_slabs, warp / kda_slabs, lane);
    }
}

template <int D>
cudaError_t kda_chunk(const kda_chunk_args& args, cudaStream_t stream) {
    auto* const factors = static_cast<kda_factors<D>*>(args.workspace);
    const int all = (args.longest + kda_tokens - 1) / kda_tokens;
    const std::size_t one = sizeof(kda_factors<D>) * static_cast<std::size_t>(args.segment_count * args.layout.heads);
    const int chunks = static_cast<int>(std::min(args.workspace_bytes / one, static_cast<std::size_t>(all)));
    if (chunks == 0) return all == 0 ? cudaSuccess : cudaErrorInvalidValue;
    constexpr int scan_bytes = static_cast<int>(sizeof(kda_scan_memory<D>));
    const cudaError_t raised =
        cudaFuncSetAttribute(kda_scan_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, scan_bytes);
    if (raised != cudaSuccess) return raised;
    const auto heads = static_cast<unsigned>(args.layout.heads), segments = static_cast<unsigned>(args.segment_count);
    for (int first = 0; first < all; first += chunks) {
        const int count = std::min(chunks, all - first);
        kda_prepare_kernel<D>
            <<<dim3(static_cast<unsigned>(count), heads, segments), kda_prepare_threads<D>, 0, stream>>>(args, first,
                                                                                                         factors);
        kda_scan_kernel<D>
            <<<dim3(D / (kda_slabs * kda_columns), heads, segments), kda_scan_threads<D>, scan_bytes, stream>>>(
                args, first, count, factors);
    }
    return cudaGetLastError();
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
