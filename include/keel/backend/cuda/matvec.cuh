// SPDX-License-Identifier: MIT
//
// Products of quantised matrices with few rows of activations: every weight is read once, with 16-byte loads, and
// decoded in registers. Also the embedding's rows.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>

namespace keel::cuda_kernels {

/// Puts a row of activations into shared memory. four(i) returns its elements i to i + 3, zeros behind the end; eight
/// lanes make a unit.
template <class F>
__device__ inline void stage(const staged& x, int units, bool floats, bool codes, F&& four) {
    for (int i = threadIdx.x; i < ceil_div(units * 8, warp_size) * warp_size; i += blockDim.x) {
        const int u = i / 8, part = i % 8;
        const bool inside = u < units;
        const float4 v = inside ? four(4 * i) : float4{};
        if (floats && inside) *reinterpret_cast<float4*>(x.values + staged::place(4 * i)) = v;
        if (!codes) continue;
        const float largest = lanes_max<8>(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        const int a = __float2int_rn(v.x * inverse), b = __float2int_rn(v.y * inverse),
                  c = __float2int_rn(v.z * inverse), d = __float2int_rn(v.w * inverse);
        const int sum = lanes_sum<4>(a + b + c + d);
        const int other = __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
        if (!inside) continue;
        *reinterpret_cast<int*>((part < 4 ? x.first : x.second) + 16 * u + part % 4 * 4) =
            (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
        if (part == 0) {
            x.scale[u] = largest / 127.0f;
            x.sums[u] = (sum & 0xFFFF) | other << 16;
        }
    }
}

/// 1 / rms of a row, in all threads.
__device__ inline float inverse_rms(const float* x, int columns, float epsilon) {
    float squares = 0;
    for (int i = 4 * threadIdx.x; i < columns; i += 4 * blockDim.x) {
        const float4 v = load_four(x, i, columns);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(columns) + epsilon);
}

/// Adds a piece's products with N staged rows; `distance` lies between these in shared memory.
template <class Format, bool Codes, int N>
__device__ inline void add_products(const typename Format::piece& w, int p, const staged& x, int distance,
                                    float (&sum)[N]) {
    if constexpr (Codes && Format::integer) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            staged row = x;
            row.first += n * distance;
            row.second += n * distance;
            row.scale += n * distance / 4;
            row.sums += n * distance / 4;
            sum[n] += Format::dot(w, row, p);
        }
    } else {
        float values[Format::elements];
        Format::decode(w, values);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float* v = x.values + n * distance / 4 + staged::place(p * Format::elements);
#pragma unroll
            for (int i = 0; i < Format::elements; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(v + i);
                sum[n] += values[i] * four.x;
                sum[n] += values[i + 1] * four.y;
                sum[n] += values[i + 2] * four.z;
                sum[n] += values[i + 3] * four.w;
            }
        }
    }
}

/// A lane's part of the product of one record with N staged rows: pieces lane, lane + Lanes, ...; `ahead` of them are
/// loaded before the first is used.
template <class Format, bool Codes, int Lanes, int N>
__device__ inline void row_product(const unsigned char* row, int units, int lane, const staged& x, int distance,
                                   float (&sum)[N]) {
    constexpr int ahead = N > 2 ? 2 : 4;
    const int pieces = units * (32 / Format::elements);
    int p = lane;
    for (; p + (ahead - 1) * Lanes < pieces; p += ahead * Lanes) {
        typename Format::piece w[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) w[i] = Format::load(row, units, p + i * Lanes);
#pragma unroll
        for (int i = 0; i < ahead; ++i) add_products<Format, Codes>(w[i], p + i * Lanes, x, distance, sum);
    }
    for (; p < pieces; p += Lanes) {
        add_products<Format, Codes>(Format::load(row, units, p), p, x, distance, sum);
    }
}

inline constexpr int matvec_threads = 256;

/// Groups of `Lanes` lanes take a row of a matrix each. Grid: (blocks, tiles of N rows of x, heads).
template <int N, int Lanes, bool Codes>
__global__ void __launch_bounds__(matvec_threads, N > 4 ? 2 : 4)
    matvec_kernel(const __grid_constant__ launch::matvec_args a, const bool floats, const bool codes) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int units = units_of(a.columns);
    const int distance = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    const int first = blockIdx.y * N;
    const int count = min(N, a.rows - first);
    wait_for_previous();
    for (int n = 0; n < N; ++n) {
        const staged to(memory + n * distance, units, floats);
        const float* x = a.x + (first + min(n, count - 1)) * a.x_row + blockIdx.z * a.x_head;
        if (a.before == launch::prologue::rms_norm) {
            const float scale = inverse_rms(x, a.columns, a.epsilon);
            stage(to, units, floats, codes, [&](int i) {
                const float4 v = load_four(x, i, a.columns), w = load_four(a.norm, i, a.columns);
                return float4{v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
            });
        } else if (a.before == launch::prologue::head_norm) {
            const float* squares = a.squares + (first + min(n, count - 1)) * (a.columns / a.head_dim * a.slabs);
            stage(to, units, floats, codes, [&](int i) {
                float sum = 0;
                for (int s = 0; s < a.slabs; ++s) sum += squares[i / a.head_dim * a.slabs + s];
                const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
                const float4 v = load_four(x, i, a.columns);
                return float4{v.x * scale, v.y * scale, v.z * scale, v.w * scale};
            });
        } else {
            stage(to, units, floats, codes, [&](int i) { return load_four(x, i, a.columns); });
        }
    }
    __syncthreads();

    constexpr int rows_at_once = warp_size / Lanes;
    const staged x(memory, units, floats);
    const int lane = threadIdx.x % Lanes;
    int group = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size;
    for (int i = 0, before = 0; i < a.products; ++i) {
        const launch::product& product = a.list[i];
        const int groups = ceil_div(product.weight.rows, rows_at_once);
        for (; group < before + groups; group += gridDim.x * blockDim.x / warp_size) {
            const int r = (group - before) * rows_at_once + threadIdx.x % warp_size / Lanes;
            const long long record =
                static_cast<long long>(blockIdx.z) * product.weight.rows + min(r, product.weight.rows - 1);
            const unsigned char* row = product.weight.data + record * product.weight.row_bytes;
            float sum[N] = {};
            visit_format(product.weight.type, [&]<class Format>() {
                row_product<Format, Codes, Lanes>(row, units, lane, x, distance, sum);
            });
#pragma unroll
            for (int n = 0; n < N; ++n) {
                sum[n] = lanes_sum<Lanes>(sum[n]);
                if (lane != n % Lanes || n >= count || r >= product.weight.rows) continue;
                float* out = product.out + (first + n) * product.out_row + blockIdx.z * product.out_head + r;
                *out = product.accumulate ? *out + sum[n] : sum[n];
            }
        }
        before += groups;
    }
}

template <int N, int Lanes>
cudaError_t start_matvec(const launch::matvec_args& a, int groups, bool floats, bool codes, int row_bytes,
                         cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(groups, matvec_threads / warp_size)),
                    static_cast<unsigned>(ceil_div(a.rows, N)), static_cast<unsigned>(a.heads));
    return start(a.quantise ? matvec_kernel<N, Lanes, true> : matvec_kernel<N, Lanes, false>, grid, matvec_threads,
                 N * row_bytes, stream, a, floats, codes);
}

__global__ void embed_kernel(const __grid_constant__ launch::embed_args a) {
    wait_for_previous();
    const int units = units_of(a.table.columns);
    const unsigned char* row = a.table.data + static_cast<long long>(a.tokens[blockIdx.x]) * a.table.row_bytes;
    float* out = a.out + blockIdx.x * a.out_row;
    visit_format(a.table.type, [&]<class Format>() {
        constexpr int elements = Format::elements;
        for (int p = threadIdx.x; p < units * (32 / elements); p += blockDim.x) {
            float values[elements];
            Format::decode(Format::load(row, units, p), values);
            for (int i = 0; i < elements && p * elements + i < a.table.columns; ++i) out[p * elements + i] = values[i];
        }
    });
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

cudaError_t matvec(const matvec_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    bool floats = false, codes = false;
    int rows = 0;
    for (int i = 0; i < a.products; ++i) {
        (a.quantise && is_integer(a.list[i].weight.type) ? codes : floats) = true;
        rows += a.list[i].weight.rows;
    }
    const int units = units_of(a.columns);
    const int row_bytes = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    const bool narrow = rows >= 8192 || a.columns < 1024;
    const auto with = [&]<int N>() {
        int groups = 0;
        for (int i = 0; i < a.products; ++i) groups += ceil_div(a.list[i].weight.rows, narrow ? 4 : 1);
        return narrow ? start_matvec<N, 8>(a, groups, floats, codes, row_bytes, stream)
                      : start_matvec<N, 32>(a, groups, floats, codes, row_bytes, stream);
    };
    constexpr int enough = 96 * 1024;
    const int fit = enough / row_bytes;
    if (a.rows > 4 && fit >= 8) return with.template operator()<8>();
    if (a.rows > 2 && fit >= 4) return with.template operator()<4>();
    if (a.rows > 1 && fit >= 2) return with.template operator()<2>();
    return with.template operator()<1>();
}

cudaError_t embed(const embed_args& a, cudaStream_t stream) {
    return cuda_kernels::start(cuda_kernels::embed_kernel, dim3(static_cast<unsigned>(a.rows)), 128, 0, stream, a);
}

}  // namespace keel::cuda_launch
