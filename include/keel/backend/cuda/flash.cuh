// SPDX-License-Identifier: MIT
//
// Expanded latent attention of many rows. Latents of a range of positions become keys and values of every head with
// the products of gemm.cuh, as halves in the workspace; then a block takes 128 rows of one head and walks over tiles
// of 64 keys with a running maximum and sum ("FlashAttention-2", 2023), everything but the tiles in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>

namespace keel::cuda_launch::detail {

/// Positions [first_key, first_key + keys) of a segment, expanded to rows `base` and following of the workspace.
struct key_range {
    segment of;
    int first_key, keys, base;
};

/// What is expanded at once.
struct key_round {
    static constexpr int most = 32;
    key_range range[most];
    int count, positions;
};

struct latent_arguments {
    key_round round;
    memory layout;
    int layer, rank;
    prepared latents;
    __half* position_keys;  // (positions, P)
};

/// A warp per position.
__global__ void __launch_bounds__(256) latent_kernel(const __grid_constant__ latent_arguments args) {
    const int at = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (at >= args.round.positions) return;
    int which = 0;
    while (which + 1 < args.round.count && at >= args.round.range[which + 1].base) ++which;
    const key_range& range = args.round.range[which];
    const int position = range.first_key + at - range.base, width = args.layout.latent_width;
    constexpr int block_rows = 256;
    const unsigned char* const row = range.of.blocks[position / block_rows] +
                                     (static_cast<std::size_t>(args.layer) * block_rows + position % block_rows) *
                                         static_cast<std::size_t>(width * (args.layout.half ? 2 : 4));
    const auto element = [&](int i) {
        return args.layout.half ? __half2float(reinterpret_cast<const __half*>(row)[i])
                                : reinterpret_cast<const float*>(row)[i];
    };
    const auto two = [&](int i) {
        return float2{i < args.rank ? element(i) : 0.0f, i + 1 < args.rank ? element(i + 1) : 0.0f};
    };
    prepare_row<32>(args.latents, at, args.rank, lane, two, [](float x) { return cuda_kernels::lanes_max(x); });
    for (int i = lane; i < width - args.rank; i += 32) {
        args.position_keys[static_cast<std::size_t>(at) * (width - args.rank) + i] =
            __float2half_rn(element(args.rank + i));
    }
}

/// count matrices of (rows, columns) to halves, transposed: to[m][column][row]. A thread takes a piece of a row.
template <layout L>
__global__ void __launch_bounds__(256) transpose_kernel(matrix from, __half* to) {
    using format = cuda_kernels::format<L>;
    const int units = (from.columns + 31) / 32, pieces = (from.columns + format::elements - 1) / format::elements;
    const long long i = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= static_cast<long long>(from.count) * from.rows * pieces) return;
    const int row = static_cast<int>(i % from.rows), piece = static_cast<int>(i / from.rows % pieces);
    const long long m = i / from.rows / pieces;
    float values[format::elements];
    format::decode(format::load(from.data + (m * from.rows + row) * from.row_bytes, units, piece), values);
#pragma unroll
    for (int e = 0; e < format::elements; ++e) {
        const int column = piece * format::elements + e;
        if (column < from.columns) to[(m * from.columns + column) * from.rows + row] = __float2half_rn(values[e]);
    }
}

struct attend_arguments {
    activations<const float> q;
    activations<float> out;
    key_round round;
    const __half *keys, *values, *position_keys;  // (positions, H, N), (positions, H, V), (positions, P)
    float* sums;                                  // (n, H): log2 of the sum of 2^score over earlier rounds
    float scale;                                  // times log2 e
    int heads, key, position_key, value;          // H, N, P, V
};

inline constexpr int attend_rows = 128, attend_keys = 64, attend_threads = 256;

/// A tile of keys and values; K and V are N + P and V of a head, rounded up. Rows are shifted by 16 bytes.
template <int K, int V>
struct attend_stage {
    __half keys[attend_keys][K + 8];
    __half values[attend_keys][V + 8];
};

/// Grid: (tiles of 128 rows, heads, ranges of the round).
template <int K, int V>
__global__ void __launch_bounds__(attend_threads, 1) attend_kernel(const __grid_constant__ attend_arguments args) {
    extern __shared__ uint4 dynamic_memory[];
    auto* const stages = reinterpret_cast<attend_stage<K, V>*>(dynamic_memory);
    const key_range& range = args.round.range[blockIdx.z];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int group = lane / 4, quad = lane % 4, head = static_cast<int>(blockIdx.y);
    // Later rows see more keys: start them first.
    const int tile_row =
        ((range.of.rows + attend_rows - 1) / attend_rows - 1 - static_cast<int>(blockIdx.x)) * attend_rows;
    if (tile_row < 0) return;
    const int start = static_cast<int>(range.of.position) + tile_row;  // position of the first row
    const int visible = min(
        range.keys, min(start + attend_rows, static_cast<int>(range.of.position) + range.of.rows) - range.first_key);
    if (visible <= 0) return;
    const int tiles = (visible + attend_keys - 1) / attend_keys;

    const auto fetch = [&](int tile) {
        if (tile < tiles) {
            attend_stage<K, V>& stage = stages[tile % 2];
            for (int i = thread; i < attend_keys * (K / 8); i += attend_threads) {
                const int key = i / (K / 8), c = i % (K / 8) * 8, at = tile * attend_keys + key;
                const std::size_t row = static_cast<std::size_t>(range.base + min(at, range.keys - 1));
                const bool own = c < args.key, inside = c < args.key + args.position_key;
                const __half* const from =
                    own ? args.keys + (row * args.heads + head) * args.key + c
                        : args.position_keys + row * args.position_key + (inside ? c - args.key : 0);
                copy_async(&stage.keys[key][c], inside ? from : args.keys, inside ? 16 : 0);
            }
            for (int i = thread; i < attend_keys * (V / 8); i += attend_threads) {
                const int key = i / (V / 8), c = i % (V / 8) * 8, at = tile * attend_keys + key;
                const std::size_t row = static_cast<std::size_t>(range.base + min(at, range.keys - 1));
                const bool inside = c < args.value;
                copy_async(&stage.values[key][c],
                           args.values + (inside ? (row * args.heads + head) * args.value + c : 0), inside ? 16 : 0);
            }
        }
        commit_copies();
    };
    fetch(0);

    const int width = args.key + args.position_key;
    const int mine = tile_row + warp * 16 + group;  // and 8 rows further
    std::uint32_t q[K / 16][4];
#pragma unroll
    for (int i = 0; i < K / 4; ++i) {
        const int row = mine + i % 2 * 8, column = i / 4 * 16 + i / 2 % 2 * 8 + 2 * quad;
        float2 x = {0, 0};
        if (row < range.of.rows && column < width) {
            x = *reinterpret_cast<const float2*>(args.q.data + (range.of.first_row + row) * args.q.row +
                                                 head * args.q.head + column);
        }
        q[i / 4][i % 4] = pack(x.x * args.scale, x.y * args.scale);
    }

    float out[V / 8][4] = {};
    float largest[2] = {-1e30f, -1e30f}, sum[2] = {0, 0};
    for (int tile = 0; tile < tiles; ++tile) {
        fetch(tile + 1);
        wait_copies<1>();
        __syncthreads();
        const attend_stage<K, V>& stage = stages[tile % 2];
        float score[attend_keys / 8][4] = {};
#pragma unroll
        for (int step = 0; step < K / 16; ++step) {
#pragma unroll
            for (int j = 0; j < attend_keys / 8; j += 2) {
                std::uint32_t b[4];
                load_matrices(
                    b, shared_address(&stage.keys[j * 8 + lane / 16 * 8 + lane % 8][step * 16 + lane / 8 % 2 * 8]));
                multiply(score[j], q[step], b[0], b[1]);
                multiply(score[j + 1], q[step], b[2], b[3]);
            }
        }
        const int first_key = range.first_key + tile * attend_keys;
        if (first_key + attend_keys - 1 > start + warp * 16 || (tile + 1) * attend_keys > range.keys) {
#pragma unroll
            for (int j = 0; j < attend_keys / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int key = tile * attend_keys + j * 8 + 2 * quad + e % 2;
                    const int last = static_cast<int>(range.of.position) + mine + e / 2 * 8 - range.first_key;
                    if (key > last || key >= range.keys) score[j][e] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = largest[r];
#pragma unroll
            for (int j = 0; j < attend_keys / 8; ++j) top = fmaxf(top, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float shrink = exp2f(largest[r] - top);
            largest[r] = top;
            sum[r] *= shrink;
#pragma unroll
            for (int j = 0; j < attend_keys / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) sum[r] += score[j][2 * r + e] = exp2f(score[j][2 * r + e] - top);
            }
#pragma unroll
            for (int j = 0; j < V / 8; ++j) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int step = 0; step < attend_keys / 16; ++step) {
            const std::uint32_t p[4] = {pack(score[2 * step][0], score[2 * step][1]),
                                        pack(score[2 * step][2], score[2 * step][3]),
                                        pack(score[2 * step + 1][0], score[2 * step + 1][1]),
                                        pack(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
            for (int j = 0; j < V / 8; j += 2) {
                std::uint32_t b[4];
                load_transposed(b, shared_address(&stage.values[step * 16 + lane % 16][j * 8 + lane / 16 * 8]));
                multiply(out[j], p, b[0], b[1]);
                multiply(out[j + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = mine + 8 * r;
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        const long long at = range.of.first_row + row;
        float& total = args.sums[at * args.heads + head];
        const bool sees = row < range.of.rows && range.of.position + row >= range.first_key;
        const float before = sees && range.first_key > 0 ? total : 0.0f;
        __syncwarp();  // four lanes have read what one of them replaces
        if (!sees) continue;
        float* const to = args.out.data + at * args.out.row + head * args.out.head;
        const float now = largest[r] + log2f(sum[r]);
        float factor = 1.0f / sum[r], old = 0;  // of this round and of those before
        if (range.first_key > 0) {
            const float top = fmaxf(before, now), all = exp2f(before - top) + exp2f(now - top);
            old = exp2f(before - top) / all;
            factor *= exp2f(now - top) / all;
            if (quad == 0) total = top + log2f(all);
        } else if (quad == 0) {
            total = now;
        }
#pragma unroll
        for (int j = 0; j < V / 8; ++j) {
            const int column = 8 * j + 2 * quad;
            if (column >= args.value) continue;
            auto& y = *reinterpret_cast<float2*>(to + column);
            float2 x = {out[j][2 * r] * factor, out[j][2 * r + 1] * factor};
            if (range.first_key > 0) x = {x.x + old * y.x, x.y + old * y.y};
            y = x;
        }
    }
}

/// Where things lie in the workspace, for `positions` positions at once.
struct attend_plan {
    std::size_t key_up, sums, latents, position_keys, keys, values, used = 0;

    attend_plan(int rows, int positions, int heads, int latent_width, int rank, int key, int value) {
        const auto n = static_cast<std::size_t>(positions), h = static_cast<std::size_t>(heads);
        key_up = take(h * static_cast<std::size_t>(key * rank) * sizeof(__half));
        sums = take(static_cast<std::size_t>(rows) * h * sizeof(float));
        latents = take(prepared::bytes(positions, rank, 1));
        position_keys = take(n * static_cast<std::size_t>(latent_width - rank) * sizeof(__half));
        keys = take(n * h * static_cast<std::size_t>(key) * sizeof(__half));
        values = take(n * h * static_cast<std::size_t>(value) * sizeof(__half));
    }

private:
    std::size_t take(std::size_t bytes) {
        const std::size_t at = used;
        used += (bytes + 1023) / 1024 * 1024;
        return at;
    }
};

template <int K, int V>
cudaError_t start_attend(const attend_arguments& args, int longest, cudaStream_t stream) {
    constexpr int bytes = 2 * static_cast<int>(sizeof(attend_stage<K, V>));
    const cudaError_t error =
        cudaFuncSetAttribute(attend_kernel<K, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>((longest + attend_rows - 1) / attend_rows), static_cast<unsigned>(args.heads),
                    static_cast<unsigned>(args.round.count));
    attend_kernel<K, V><<<grid, attend_threads, bytes, stream>>>(args);
    return cudaGetLastError();
}

/// Expands and attends to the ranges of a round.
inline cudaError_t attend_round(const expanded_attend_args& args, const key_round& round, const attend_plan& plan,
                                int positions, cudaStream_t stream) {
    unsigned char* const memory = static_cast<unsigned char*>(args.workspace);
    const int heads = args.key_up.count, rank = args.key_up.rows, key = args.key_up.columns, value = args.value_up.rows;
    const int position_key = args.layout.latent_width - rank;
    const prepared latents(memory + plan.latents, positions, rank, 1);
    auto* const position_keys = reinterpret_cast<__half*>(memory + plan.position_keys);
    auto* const keys = reinterpret_cast<__half*>(memory + plan.keys);
    auto* const values = reinterpret_cast<__half*>(memory + plan.values);
    latent_kernel<<<static_cast<unsigned>((round.positions + 7) / 8), 256, 0, stream>>>(
        latent_arguments{round, args.layout, args.layer, rank, latents, position_keys});

    const matrix key_up{memory + plan.key_up, layout::f16, 1, heads * key, rank, rank * 2};
    matrix value_up = args.value_up;
    value_up.rows *= value_up.count, value_up.count = 1;
    const product_target list[] = {{key_up, keys, static_cast<long long>(heads) * key, 0, 1, 0},
                                   {value_up, values, static_cast<long long>(heads) * value, 0, 1, 0}};
    const product_arguments expand{latents, {nullptr, nullptr, round.positions, 0}, nullptr, 1.0f, 0, 0, {}};
    cudaError_t error = start_all_products(expand, list, 2, 0, stream);
    if (error != cudaSuccess) return error;

    int longest = 0;
    for (int i = 0; i < round.count; ++i) longest = std::max(longest, round.range[i].of.rows);
    const attend_arguments attend{args.q,
                                  args.out,
                                  round,
                                  keys,
                                  values,
                                  position_keys,
                                  reinterpret_cast<float*>(memory + plan.sums),
                                  args.scale * 1.44269504f,
                                  heads,
                                  key,
                                  position_key,
                                  value};
    return key + position_key <= 64 && value <= 64 ? start_attend<64, 64>(attend, longest, stream)
                                                   : start_attend<192, 128>(attend, longest, stream);
}

}  // namespace keel::cuda_launch::detail

namespace keel::cuda_launch {

inline std::size_t expanded_attend_bytes(int rows, int positions, int heads, int latent_width, int rank, int key,
                                         int value) {
    return detail::attend_plan(rows, positions, heads, latent_width, rank, key, value).used;
}

inline cudaError_t expanded_attend(const expanded_attend_args& args, cudaStream_t stream) {
    using namespace detail;
    const int heads = args.key_up.count, rank = args.key_up.rows, key = args.key_up.columns, value = args.value_up.rows;
    const int width = args.layout.latent_width, position_key = width - rank;
    if (key % 8 != 0 || position_key % 8 != 0 || value % 8 != 0 || rank % 8 != 0 || key + position_key > 192 ||
        value > 128) {
        return cudaErrorNotSupported;
    }
    int rows = 0, longest = 0;  // `rows` counts from row 0 of the batch, where sums begin
    for (int i = 0; i < args.segment_count; ++i) {
        rows = std::max(rows, args.segments[i].first_row + args.segments[i].rows);
        longest = std::max(longest, static_cast<int>(args.segments[i].position) + args.segments[i].rows);
    }
    if (rows == 0) return cudaSuccess;
    // As many positions at once as fit, in steps that keep the expansion's tiles whole.
    int positions = 256;
    while (attend_plan(rows, positions + 256, heads, width, rank, key, value).used <= args.workspace_bytes &&
           positions < args.segment_count * longest) {
        positions += 256;
    }
    const attend_plan plan(rows, positions, heads, width, rank, key, value);
    if (plan.used > args.workspace_bytes) return cudaErrorInvalidValue;

    auto* const transposed = reinterpret_cast<__half*>(static_cast<unsigned char*>(args.workspace) + plan.key_up);
    const cudaError_t error = visit_layout(args.key_up.type, [&]<layout L>() {
        constexpr int elements = cuda_kernels::format<L>::elements;
        const long long pieces = static_cast<long long>(heads) * rank * ((key + elements - 1) / elements);
        transpose_kernel<L><<<static_cast<unsigned>((pieces + 255) / 256), 256, 0, stream>>>(args.key_up, transposed);
        return cudaGetLastError();
    });
    if (error != cudaSuccess) return error;

    key_round round{};
    const auto finish = [&] {
        if (round.count == 0) return cudaSuccess;
        const cudaError_t done = attend_round(args, round, plan, positions, stream);
        round.count = round.positions = 0;
        return done;
    };
    for (int i = 0; i < args.segment_count; ++i) {
        const segment& s = args.segments[i];
        const int all = s.rows == 0 ? 0 : static_cast<int>(s.position) + s.rows;
        for (int first = 0; first < all;) {
            // One range of a segment per round: the next one adds to what this one leaves.
            const int keys = std::min(all - first, positions - round.positions);
            round.range[round.count++] = {s, first, keys, round.positions};
            round.positions += keys;
            first += keys;
            if (first < all || round.positions == positions || round.count == key_round::most) {
                const cudaError_t done = finish();
                if (done != cudaSuccess) return done;
            }
        }
    }
    return finish();
}

}  // namespace keel::cuda_launch
