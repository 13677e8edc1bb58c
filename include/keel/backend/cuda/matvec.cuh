// SPDX-License-Identifier: MIT
//
// Products of quantised matrices with few rows of activations: every weight is read once, with 16-byte loads, and
// decoded in registers. Also the embedding's rows.
#pragma once

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>

namespace keel::cuda_kernels {

/// Puts a row of activations into shared memory. four(i) returns its elements i to i + 3, zeros behind the end; eight
/// lanes make a unit. What four() loads is loaded for several turns before the first is used.
template <int turns, class F>
__device__ inline void stage(const staged& x, int units, bool floats, bool codes, F&& four) {
    const int end = ceil_div(units * 8, warp_size) * warp_size;
    for (int base = threadIdx.x; base < end; base += turns * blockDim.x) {
        float4 of_turn[turns];
#pragma unroll
        for (int t = 0; t < turns; ++t) {
            const int i = base + t * blockDim.x;
            of_turn[t] = i < units * 8 ? four(4 * i) : float4{};
        }
#pragma unroll
        for (int t = 0; t < turns; ++t) {
            const int i = base + t * blockDim.x, u = i / 8, part = i % 8;
            if (i >= end) break;  // for all of a warp
            const float4 v = of_turn[t];
            const bool inside = u < units;
            if (floats && inside) *reinterpret_cast<float4*>(x.values + staged::place(4 * i)) = v;
            if (!codes) continue;
            const float largest = lanes_max<8>(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
            const float inverse = largest > 0 ? __fdividef(127.0f, largest) : 0.0f;
            const int q0 = __float2int_rn(v.x * inverse), q1 = __float2int_rn(v.y * inverse),
                      q2 = __float2int_rn(v.z * inverse), q3 = __float2int_rn(v.w * inverse);
            const int sum = lanes_sum<4>(q0 + q1 + q2 + q3);
            const int other = __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
            if (!inside) continue;
            *reinterpret_cast<int*>((part < 4 ? x.first : x.second) + 16 * u + part % 4 * 4) =
                (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | q3 << 24;
            if (part == 0) x.marks[u] = {__float_as_int(largest * (1 / 127.0f)), (sum & 0xFFFF) | other << 16};
        }
    }
}

/// Stages x * weight and leaves sums of squares of x, one per warp: products with it have to be multiplied with
/// inverse_rms(squares) in the end. `weight` null: x alone. All threads; a barrier must follow.
__device__ inline void stage_weighted(const staged& to, int units, bool floats, bool codes, const float* x,
                                      const float* weight, int columns, float* squares) {
    float sum = 0;
    const auto with = [&]<int turns>(auto&& load) {
        stage<turns>(to, units, floats, codes, [&](int i) {
            float4 v = load(x, i);
            if (weight == nullptr) return v;
            const float4 w = load(weight, i);
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            return float4{v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w};
        });
    };
    if (aligned16(x, weight) && columns % 32 == 0) {
        with.template operator()<3>([&](const float* p, int i) { return *reinterpret_cast<const float4*>(p + i); });
    } else {
        with.template operator()<1>([&](const float* p, int i) { return load_four(p, i, columns); });
    }
    sum = lanes_sum(sum);
    if (threadIdx.x % warp_size == 0) squares[threadIdx.x / warp_size] = sum;
}

/// From the sums of squares of the block's warps, behind a barrier.
__device__ inline float inverse_rms(const float* squares, int columns, float epsilon) {
    float sum = 0;
    for (int w = 0; w < blockDim.x / warp_size; ++w) sum += squares[w];
    return 1.0f / sqrtf(sum / static_cast<float>(columns) + epsilon);
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
            row.marks += n * distance / 8;
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
template <class Format, bool Codes, int Lanes, memory From = memory::global, int N>
__device__ inline void row_product(const unsigned char* row, int units, int lane, const staged& x, int distance,
                                   float (&sum)[N]) {
    constexpr int size = sizeof(typename Format::piece);
    constexpr int ahead = N > 2 || size > 32 ? 2 : Lanes == 8 ? 3 : 4;
    const int pieces = units * (32 / Format::elements);
    int p = lane;
#pragma unroll 1
    for (; p + (ahead - 1) * Lanes < pieces; p += ahead * Lanes) {
        typename Format::piece w[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) w[i] = Format::template load<From>(row, units, p + i * Lanes);
#pragma unroll
        for (int i = 0; i < ahead; ++i) add_products<Format, Codes>(w[i], p + i * Lanes, x, distance, sum);
    }
#pragma unroll 1
    for (; p < pieces; p += Lanes) {
        add_products<Format, Codes>(Format::template load<From>(row, units, p), p, x, distance, sum);
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
    __shared__ float squares[N][matvec_threads / warp_size];
    constexpr int rows_at_once = warp_size / Lanes;
    const int first_group = (blockIdx.x * blockDim.x + threadIdx.x) / warp_size;
    if (threadIdx.x % warp_size == 0) {  // the warp's rows start on their way from memory
#pragma unroll 1
        for (int i = 0, before = 0; i < a.products; ++i) {
            const launch::matrix& w = a.list[i].weight;
            const int r = (first_group - before) * rows_at_once;
            if (r >= 0 && r < w.rows) {
                prefetch(w.data + (static_cast<long long>(blockIdx.z) * w.rows + r) * w.row_bytes,
                         min(rows_at_once, w.rows - r) * w.row_bytes);
            }
            before += ceil_div(w.rows, rows_at_once);
        }
    }
    wait_for_previous();
    for (int n = 0; n < N; ++n) {
        const staged to(memory + n * distance, units, floats);
        const int row = first + min(n, count - 1);
        if (a.before == launch::prologue::codes) {
            const staged from(const_cast<unsigned char*>(a.codes) + row * a.codes_row, units, false);
            for (int i = threadIdx.x; i < 2 * units; i += blockDim.x) {
                reinterpret_cast<uint4*>(to.first)[i] = reinterpret_cast<const uint4*>(from.first)[i];
            }
            const float* of_row = a.squares + row * units;
            for (int u = threadIdx.x; u < units; u += blockDim.x) {
                const int2 mark = from.marks[u];
                float sum = 0;
                for (int s = 0; s < a.slabs; ++s) sum += of_row[u / a.slabs * a.slabs + s];
                const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
                to.marks[u] = {__float_as_int(__int_as_float(mark.x) * scale), mark.y};
            }
            continue;
        }
        const float* x = a.x + row * a.x_row + blockIdx.z * a.x_head;
        if (a.before == launch::prologue::head_norm) {
            const float* of_row = a.squares + row * (a.columns / a.head_dim * a.slabs);
            stage<2>(to, units, floats, codes, [&](int i) {
                float sum = 0;
#pragma unroll 4
                for (int s = 0; s < a.slabs; ++s) sum += of_row[i / a.head_dim * a.slabs + s];
                const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
                const float4 v = *reinterpret_cast<const float4*>(x + i);  // whole heads of 32 elements or more
                return float4{v.x * scale, v.y * scale, v.z * scale, v.w * scale};
            });
        } else {
            stage_weighted(to, units, floats, codes, x, a.norm, a.columns, squares[n]);
        }
    }
    __syncthreads();
    float factor[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        factor[n] = a.before == launch::prologue::rms_norm ? inverse_rms(squares[n], a.columns, a.epsilon) : 1.0f;
    }

    const staged x(memory, units, floats);
    const int lane = threadIdx.x % Lanes;
    int group = first_group;
#pragma unroll 1
    for (int i = 0, before = 0; i < a.products; ++i) {
        const launch::product& product = a.list[i];
        const int groups = ceil_div(product.weight.rows, rows_at_once);
#pragma unroll 1
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
                sum[n] = lanes_sum<Lanes>(sum[n]) * factor[n];
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
