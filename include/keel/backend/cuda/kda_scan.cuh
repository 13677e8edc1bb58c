// SPDX-License-Identifier: MIT
//
// The walk of kda_chunk over the chunks of a sequence: what depends on v and the state. With the factors of
// kda_prepare.cuh and the state S at the start of a chunk
//   U = T V - (T kd) S,    O = (b T) V + (qd - b T kd) S,    S <- diag(e^{G_16}) S + kr^T U
// Each column of V and S is independent of the others.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <keel/backend/cuda/kda_prepare.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

/// Columns of V and S that a warp works on, and how many times as many a block does.
inline constexpr int kda_columns = 16, kda_slabs = 2;

/// Warps that share the rows of 16 columns of S: nothing but latency limits a warp, and each has half the work.
template <int D>
inline constexpr int kda_parts = D == 128 ? 2 : 1;

/// Warps of a block that call kda_scan().
template <int D>
inline constexpr int kda_workers = kda_slabs* kda_parts<D>;

/// Chunks on their way through a block: each stage is full, then empty again.
template <int D, int Stages>
struct kda_ring {
    struct stage {
        kda_factors<D> factors;
        float v[kda_tokens][kda_slabs * kda_columns + 4];  // shifted, so that the reads below have no conflicts
    } stages[Stages];
    barrier full[Stages], empty[Stages];
};

/// What the parts of S give each other.
template <int D>
struct kda_exchange {
    float4 update[2][kda_slabs][kda_parts<D>][2][32];  // of even and odd chunks: U, as far as a part of S gives it
    float4 out[2][kda_slabs][kda_parts<D>][32];        // the 8 tokens that the other part writes
};

/// Adds the products of a part of S, as halves, with factors of 16 tokens: to even[8 tokens] and odd[8 tokens], which
/// may be the same. Where the sum is waited for, two chains of products are sooner done than one.
template <int Steps>
__device__ inline void multiply_state(float (&even)[2][4], float (&odd)[2][4], const std::uint32_t (&s)[Steps][4],
                                      const uint4 (&factors)[2][Steps / 2]) {
#pragma unroll
    for (int j = 0; j < Steps / 2; ++j) {
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            const uint4& by = factors[token][j];
            multiply(even[token], s[2 * j], by.x, by.y);
            multiply(odd[token], s[2 * j + 1], by.z, by.w);
        }
    }
}

/// What a warp multiplies with in a chunk. Its loads are under way while the chunk before is worked on.
template <int D>
struct kda_operands {
    static constexpr int steps = D / kda_parts<D> / 16;  // of 16 rows of S
    uint4 erase[2][steps / 2], read[2][steps / 2], keys[steps], solve, mix;
    std::uint32_t v[4];
    float2 decay[2 * steps];

    template <class Stage>
    __device__ void load(const Stage& stage, int column, int part, int lane) {
        const int quad = lane % 4;
        const kda_factors<D>& f = stage.factors;
#pragma unroll
        for (int i = 0; i < steps; ++i) erase[i % 2][i / 2] = f.erase[i % 2][part * (steps / 2) + i / 2][lane];
        if (part == 0) solve = f.solve[lane];
        if (part == kda_parts<D> - 1) mix = f.mix[lane];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = 2 * quad + i / 2 * 8, c = column + i % 2 * 8;
            v[i] = pack(stage.v[t][c], stage.v[t + 1][c]);
        }
#pragma unroll
        for (int i = 0; i < steps; ++i) read[i % 2][i / 2] = f.read[i % 2][part * (steps / 2) + i / 2][lane];
#pragma unroll
        for (int j = 0; j < 2 * steps; ++j) {
            decay[j] = *reinterpret_cast<const float2*>(&f.decay[part * (D / kda_parts<D>)+8 * j + 2 * quad]);
        }
    }
    /// The rest, which is used until the end of a chunk.
    template <class Stage>
    __device__ void load_keys(const Stage& stage, int part, int lane) {
#pragma unroll
        for (int i = 0; i < steps; ++i) keys[i] = stage.factors.keys[part * steps + i][lane];
    }
};

/// One warp's share: 16 columns of the block's, from `slab` on, and D / kda_parts rows of S, those of number `Part`,
/// which it holds transposed: rows of its tiles are columns of V. `first_column` is the block's first.
template <int D, int Part, int Stages>
__device__ void kda_scan(const kda_chunk_args& args, const cuda_launch::segment& segment, int chunks, int head,
                         int first_column, kda_ring<D, Stages>& ring, kda_exchange<D>& exchange, int slab, int lane) {
    constexpr int parts = kda_parts<D>, steps = kda_operands<D>::steps;
    const int group = lane / 4, quad = lane % 4;
    const int mine = slab * kda_columns + group;  // of the block's columns
    float* const from = reinterpret_cast<float*>(segment.recurrent) + args.layer * args.layout.layer_floats +
                        head * D * D + Part * (D / parts) * D + first_column + mine;
    float state[2 * steps][4];
#pragma unroll
    for (int j = 0; j < 2 * steps; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state[j][e] = from[(8 * j + 2 * quad + e % 2) * D + e / 2 * 8];
    }
    const long long row = args.out.row;
    const int first = 8 * (parts - 1) * Part + 2 * quad;  // token of a chunk that this lane writes
    float* to = args.out.data + (segment.first_row + first) * row + head * args.out.head + first_column + mine;
    int left = segment.rows - first;
    const auto write = [&](float* at, int rows, const float(&out)[4]) {  // 8 tokens
        if (rows > 0) at[0] = out[0], at[8] = out[2];
        if (rows > 1) at[row] = out[1], at[row + 8] = out[3];
    };
    const auto write_chunk = [&](const float(&low)[4], const float(&high)[4]) {
        write(to, left, low);
        if constexpr (parts == 1) write(to + 8 * row, left - 8, high);
        to += kda_tokens * row, left -= kda_tokens;
    };
    float kept[4] = {};  // with two parts: of the previous chunk, the tokens that this one writes

    ring.full[0].wait(0);
    kda_operands<D> f;
    f.load(ring.stages[0], mine, Part, lane);
    f.load_keys(ring.stages[0], Part, lane);
    int slot = 0, phase = 0;
#pragma unroll 2  // instructions are what the walk takes its time for: which buffer is then a constant
    for (int chunk = 0; chunk < chunks; ++chunk) {
        std::uint32_t s[steps][4];
#pragma unroll
        for (int j = 0; j < steps; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[j][e] = pack(state[2 * j + e / 2][e % 2 * 2], state[2 * j + e / 2][e % 2 * 2 + 1]);
            }
        }
        float update[2][2][4] = {}, out[2][4] = {};  // [two halves of the sum][8 tokens], [8 tokens]
        if (Part == 0) {
            multiply(update[0][0], f.v, f.solve.x, f.solve.y);
            multiply(update[0][1], f.v, f.solve.z, f.solve.w);
        }
        multiply_state(update[1], update[0], s, f.erase);
        float4 sum[2];
#pragma unroll
        for (int token = 0; token < 2; ++token) {
            const auto& u = update;
            sum[token] = {u[0][token][0] + u[1][token][0], u[0][token][1] + u[1][token][1],
                          u[0][token][2] + u[1][token][2], u[0][token][3] + u[1][token][3]};
            if constexpr (parts == 2) exchange.update[chunk % 2][slab][Part][token][lane] = sum[token];
        }
        if (Part == parts - 1) {
            multiply(out[0], f.v, f.mix.x, f.mix.y);
            multiply(out[1], f.v, f.mix.z, f.mix.w);
        }
        multiply_state(out, out, s, f.read);
#pragma unroll
        for (int j = 0; j < 2 * steps; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) state[j][e] *= e % 2 == 0 ? f.decay[j].x : f.decay[j].y;
        }

        int ahead = slot, ahead_phase = phase;  // behind the last chunk this one's once more
        if (chunk + 1 < chunks && ++ahead == Stages) ahead = 0, ahead_phase ^= 1;
        ring.full[ahead].wait(ahead_phase);
        if constexpr (parts == 2) {
            named_barrier(slab + 1, 64);
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                const float4 other = exchange.update[chunk % 2][slab][Part ^ 1][token][lane];
                sum[token] = {sum[token].x + other.x, sum[token].y + other.y, sum[token].z + other.z,
                              sum[token].w + other.w};
            }
        }
        f.load(ring.stages[ahead], mine, Part, lane);
        const std::uint32_t u[4] = {pack(sum[0].x, sum[0].y), pack(sum[0].z, sum[0].w), pack(sum[1].x, sum[1].y),
                                    pack(sum[1].z, sum[1].w)};
#pragma unroll
        for (int j = 0; j < steps; ++j) {
            multiply(state[2 * j], u, f.keys[j].x, f.keys[j].y);
            multiply(state[2 * j + 1], u, f.keys[j].z, f.keys[j].w);
        }
        __syncwarp();
        if (lane == 0) ring.empty[slot].arrive();
        slot = ahead, phase = ahead_phase;
        f.load_keys(ring.stages[slot], Part, lane);
        if constexpr (parts == 1) {
            write_chunk(out[0], out[1]);
        } else {  // the other part's share of the previous chunk has arrived: it was written before the barrier
            if (chunk > 0) {
                const float4 other = exchange.out[(chunk + 1) % 2][slab][Part ^ 1][lane];
                const float whole[4] = {kept[0] + other.x, kept[1] + other.y, kept[2] + other.z, kept[3] + other.w};
                write_chunk(whole, whole);
            }
            const float(&keep)[4] = out[Part];
            const float(&give)[4] = out[1 - Part];
#pragma unroll
            for (int e = 0; e < 4; ++e) kept[e] = keep[e];
            exchange.out[chunk % 2][slab][Part][lane] = {give[0], give[1], give[2], give[3]};
        }
    }
    if constexpr (parts == 2) {
        named_barrier(slab + 1, 64);
        const float4 other = exchange.out[(chunks + 1) % 2][slab][Part ^ 1][lane];
        const float whole[4] = {kept[0] + other.x, kept[1] + other.y, kept[2] + other.z, kept[3] + other.w};
        write_chunk(whole, whole);
    }
#pragma unroll
    for (int j = 0; j < 2 * steps; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) from[(8 * j + 2 * quad + e % 2) * D + e / 2 * 8] = state[j][e];
    }
}

}  // namespace keel::cuda_launch::detail
