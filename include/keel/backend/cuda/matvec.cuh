// SPDX-License-Identifier: MIT
//
// Products of quantised matrices with few rows of activations: every weight is read once, copied to shared memory while
// the previous kernel still runs, and decoded in registers. Also the embedding's rows.
#pragma once

#include <climits>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/f32_rows.cuh>
#include <keel/backend/cuda/formats.cuh>
#include <keel/backend/cuda/one_row.cuh>
#include <keel/backend/cuda/staging.cuh>

namespace keel::cuda_kernels {

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
            sum[n] += Format::dot(w, unit_codes(row, p));
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

/// A lane's part of the products of `Rows` records, `pitch` bytes apart, with N staged rows: pieces lane, lane + Lanes,
/// ...; `ahead` of them are loaded before the first is used. In what order a record's products are added depends on
/// nothing but Format and Lanes.
template <class Format, bool Codes, int Lanes, space From, int Rows, int N>
__device__ inline void rows_product(const unsigned char* first, long long pitch, int units, int lane, const staged& x,
                                    int distance, float (&sum)[Rows][N]) {
    constexpr int size = Rows * sizeof(typename Format::piece);
    constexpr int ahead = N > 2 || size > 64 ? 1 : size > 32 ? 2 : Lanes == 8 ? 3 : 4;
    const int pieces = units * (32 / Format::elements);
    int p = lane;
#pragma unroll 1
    for (; p + (ahead - 1) * Lanes < pieces; p += ahead * Lanes) {
        typename Format::piece w[ahead][Rows];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
#pragma unroll
            for (int j = 0; j < Rows; ++j) {
                w[i][j] = Format::template load<From>(first + j * pitch, units, p + i * Lanes);
            }
        }
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
#pragma unroll
            for (int j = 0; j < Rows; ++j) {
                add_products<Format, Codes>(w[i][j], p + i * Lanes, x, distance, sum[j]);
            }
        }
    }
#pragma unroll 1
    for (; p < pieces; p += Lanes) {
#pragma unroll
        for (int j = 0; j < Rows; ++j) {
            add_products<Format, Codes>(Format::template load<From>(first + j * pitch, units, p), p, x, distance,
                                        sum[j]);
        }
    }
}

/// The product of a record in shared memory with a short row of activations, which are not rounded to 8 bits: as floats
/// in `x`, as fine_codes in `fine`. In all of `Lanes` neighbouring lanes.
template <int Lanes>
__device__ inline float narrow_product(launch::layout type, const unsigned char* record, int units, const staged& x,
                                       const unsigned char* fine) {
    const int lane = threadIdx.x % Lanes;
    float sum[1][1] = {};
    if (type == launch::layout::q8_0) {
        using of = format<launch::layout::q8_0>;
        for (int u = lane; u < units; u += Lanes) {
            sum[0][0] += fine_codes::dot(of::load<space::shared>(record, units, u), fine, units, u);
        }
    } else {
        visit_format(type, [&]<class Format>() {
            rows_product<Format, false, Lanes, space::shared>(record, 0, units, lane, x, 0, sum);
        });
    }
    return lanes_sum<Lanes>(sum[0][0]);
}

/// Rows of a matrix that a warp multiplies in one go, `Each` by every group of `Lanes` lanes. They are copied to shared
/// memory as early as possible (before the kernel waits for the previous one), or, if they do not fit there, read where
/// they are.
template <int Lanes, int Each = 1>
struct row_tile {
    static_assert(Each == 1 || Each == 2);
    static constexpr int groups = warp_size / Lanes, each = Each, rows = groups * each;

    const unsigned char* data;  // record of the first row
    int count, row_bytes;       // at most `rows`; 0: there is nothing to do
    launch::layout type;

    __device__ row_tile(const launch::matrix& m, long long first, int count_)
        : data(m.data + first * m.row_bytes), count(max(0, min(rows, count_))), row_bytes(m.row_bytes), type(m.type) {}

    /// A warp begins to copy the rows to `to`.
    __device__ void fetch(unsigned char* to) const { begin_copy(to, data, count * row_bytes); }

    /// Row `j` of the calling lane's; it may be behind the last.
    __device__ static int row(int j = 0) { return threadIdx.x % warp_size / Lanes + j * groups; }

    /// Adds a lane's part of the products with N staged rows; Format is that of `type`.
    template <class Format, bool Codes, space From, int N>
    __device__ void multiply(const unsigned char* slot, int units, const staged& x, int distance,
                             float (&sum)[each][N]) const {
        const int first = min(row(0), count - 1), second = min(row(1), count - 1);
        const unsigned char* from = (From == space::shared ? slot : data) + static_cast<long long>(first) * row_bytes;
        rows_product<Format, Codes, Lanes, From>(from, (second - first) * row_bytes, units, threadIdx.x % Lanes, x,
                                                 distance, sum);
    }
};

// Warps of a block: at least those that stage, and as many as there is work for.
inline constexpr int matvec_least = 10, matvec_warps = 16;

/// A tile of one of a kernel's products; `tile` counts through all of them.
template <class Tile>
struct product_tile {
    const launch::product* of = nullptr;
    int row = 0;

    __device__ product_tile(const launch::matvec_args& a, int tile) {
#pragma unroll 1
        for (int i = 0; i < a.products; ++i) {
            const int tiles = ceil_div(a.list[i].weight.rows, Tile::rows);
            if (tile < tiles) {
                of = a.list + i;
                row = tile * Tile::rows;
                return;
            }
            tile -= tiles;
        }
    }
    __device__ Tile rows() const {
        const launch::matrix& m = of->weight;
        return {m, static_cast<long long>(blockIdx.z) * m.rows + row, m.rows - row};
    }
};

/// Puts activations that are codes already into shared memory, scales divided by the rms of their heads.
__device__ inline void stage_codes(const staged& to, int units, const launch::matvec_args& a, int row) {
    const staged from(const_cast<unsigned char*>(a.codes) + row * a.codes_row, units, false);
    for (int i = threadIdx.x; i < 2 * units; i += blockDim.x) {
        reinterpret_cast<uint4*>(to.first)[i] = reinterpret_cast<const uint4*>(from.first)[i];
    }
    const float* of_row = a.squares + row * units;
    for (int u = threadIdx.x; u < units; u += blockDim.x) {
        const int2 mark = from.marks[u];
        float sum = 0;
        for (int s = 0; s < a.slabs; ++s) sum += of_row[u / a.slabs * a.slabs + s];
        const float scale =
            a.squares == nullptr ? 1.0f : 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
        to.marks[u] = {__float_as_int(__int_as_float(mark.x) * scale), mark.y};
    }
}

/// Writes rms_norm(x) of a row as codes, for kernels to come. `memory` is shared, code_bytes() of it.
__device__ inline void put_codes(const launch::matvec_args& a, int row, unsigned char* memory, float* squares) {
    const int units = units_of(a.columns), bytes = staged::code_bytes(units);
    const staged here(memory, units, false);
    stage_weighted(here, units, false, true, blockDim.x, a.x + row * a.x_row, a.norm, a.columns, squares);
    __syncthreads();
    const float factor = inverse_rms(squares, blockDim.x, a.columns, a.epsilon);
    for (int u = threadIdx.x; u < units; u += blockDim.x) {
        here.marks[u].x = __float_as_int(__int_as_float(here.marks[u].x) * factor);
    }
    __syncthreads();
    uint4* to = reinterpret_cast<uint4*>(a.put_codes + static_cast<long long>(row) * bytes);
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) to[i] = reinterpret_cast<const uint4*>(memory)[i];
    __syncthreads();
}

/// The first `warps` warps of a block multiply, each with a slot of shared memory for its next tile of weights.
/// Grid: (blocks, tiles of N rows of x, heads), and one more block where codes are to be written.
template <int N, int Lanes, bool Codes, space From>
__global__ void __launch_bounds__(matvec_warps* warp_size, N > 1 ? 1 : 2)
    matvec_kernel(const __grid_constant__ launch::matvec_args a, const bool floats, const bool codes, const int warps,
                  const int slot_bytes) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ float squares[N][matvec_warps];
    using tile_of = row_tile<Lanes>;
    const int units = units_of(a.columns);
    const int distance = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    const int first = blockIdx.y * N, count = min(N, a.rows - first);
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const int blocks = a.put_codes == nullptr ? gridDim.x : gridDim.x - 1;
    unsigned char* const slot = memory + N * distance + warp * slot_bytes;

    // Warps of a block take tiles that are far apart: every block has its share of each matrix.
    const int step = warps * blocks;
    int tile = warp < warps && blockIdx.x < blocks ? warp * blocks + blockIdx.x : INT_MAX / 2;
    product_tile<tile_of> at(a, tile);
    const auto fetch = [&] {
        if (From == space::shared && at.of != nullptr) at.rows().fetch(slot);
    };
    start_next();
    fetch();
    if (threadIdx.x == 0 && a.before == launch::prologue::rms_norm && a.columns % 4 == 0 && aligned16(a.norm, a.norm)) {
        prefetch(reinterpret_cast<const unsigned char*>(a.norm), a.columns * 4);
    }
    wait_for_previous();
    if (blockIdx.x == blocks) {
        for (int n = 0; n < count; ++n) put_codes(a, first + n, memory, squares[n]);
        return;
    }
    for (int n = 0; n < N; ++n) {
        const staged to(memory + n * distance, units, floats);
        const int row = first + min(n, count - 1);
        const float* x = a.x + row * a.x_row + blockIdx.z * a.x_head;
        if (a.before == launch::prologue::codes) {
            stage_codes(to, units, a, row);
        } else if (a.before == launch::prologue::head_norm) {
            const float* of_row = a.squares + row * (a.columns / a.head_dim * a.slabs);
            stage(to, units, floats, codes, blockDim.x, [&](int i) -> eight {  // whole heads of 32 elements or more
                float sum = 0;
                for (int s = 0; s < a.slabs; ++s) sum += of_row[i / a.head_dim * a.slabs + s];
                const float scale = 1.0f / sqrtf(sum / static_cast<float>(a.head_dim) + a.epsilon);
                const float4 scales{scale, scale, scale, scale};
                const float4* from = reinterpret_cast<const float4*>(x + i);
                return {times(from[0], scales), times(from[1], scales)};
            });
        } else {
            stage_weighted(to, units, floats, codes, blockDim.x, x, a.norm, a.columns, squares[n]);
        }
    }
    __syncthreads();
    float factor[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        factor[n] =
            a.before == launch::prologue::rms_norm ? inverse_rms(squares[n], blockDim.x, a.columns, a.epsilon) : 1.0f;
    }

    const staged x(memory, units, floats);
    while (at.of != nullptr) {
        const tile_of rows = at.rows();
        const launch::product& product = *at.of;
        // Lane n of a group keeps the result of row n of x, and of row n + Lanes. What it is added to is asked for
        // before it is needed.
        constexpr int results = ceil_div(N, Lanes);
        float *out[results], before[results];
#pragma unroll
        for (int i = 0; i < results; ++i) {
            const int n = lane % Lanes + i * Lanes;
            const bool mine = n < count && tile_of::row() < rows.count;
            out[i] = mine ? product.out + (first + n) * product.out_row + blockIdx.z * product.out_head + at.row +
                                tile_of::row()
                          : nullptr;
            before[i] = mine && product.accumulate ? *out[i] : 0.0f;
        }
        float sum[1][N] = {};
        copies_done();
        __syncwarp();
        visit_format(rows.type, [&]<class Format>() {
            rows.template multiply<Format, Codes, From>(slot, units, x, distance, sum);
        });
        tile += step;
        at = product_tile<tile_of>(a, tile);
        __syncwarp();
        fetch();
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float total = lanes_sum<Lanes>(sum[0][n]) * factor[n];
            float* const to = out[n / Lanes];
            if (lane % Lanes == n % Lanes && to != nullptr) *to = before[n / Lanes] + total;
        }
    }
}

template <int N, int Lanes>
cudaError_t start_matvec(const launch::matvec_args& a, bool floats, bool codes, int row_bytes, cudaStream_t stream) {
    using tile_of = row_tile<Lanes>;
    int tiles = 0, widest = 0;
    for (int i = 0; i < a.products; ++i) {
        tiles += ceil_div(a.list[i].weight.rows, tile_of::rows);
        widest = max(widest, a.list[i].weight.row_bytes);
    }
    const int slot_bytes = tile_of::rows * widest;
    // How many threads add up squares depends on the weights alone: so do the sums, to the bit.
    const int row_tiles = max(1, ceil_div(a.rows, N)), for_one_row = max(1, min(tiles, multiprocessors() / a.heads));
    const int most = max(matvec_least, min(matvec_warps, ceil_div(tiles, for_one_row))), threads = most * warp_size;
    const int blocks = max(1, for_one_row / row_tiles);
    const bool rounds = tiles > 4 * blocks * matvec_warps;
    const int wanted =
        (rounds ? 200 : 112) * 1024;  // leaves room for the kernels before and behind, unless this is long
    const int fit = (shared_bytes_up_to(wanted) - N * row_bytes) / slot_bytes;
    const int warps = min(min(most, ceil_div(tiles, blocks)), fit);
    const auto with = [&]<space From>(int x, int working, int bytes) {
        const dim3 grid(static_cast<unsigned>(x + (a.put_codes == nullptr ? 0 : 1)),
                        static_cast<unsigned>(ceil_div(a.rows, N)), static_cast<unsigned>(a.heads));
        constexpr bool may_round = Lanes > 4;  // narrower rows are not
        return start(a.quantise ? matvec_kernel<N, Lanes, may_round, From> : matvec_kernel<N, Lanes, false, From>, grid,
                     threads, N * row_bytes + working * bytes, stream, a, floats, codes, working, bytes);
    };
    constexpr int worth = 4;  // fewer warps than that do not keep a multiprocessor busy
    return warps >= worth || (warps > 0 && warps * blocks >= tiles)
               ? with.template operator()<space::shared>(blocks, warps, slot_bytes)
               : with.template operator()<space::global>(ceil_div(tiles, most), most, 0);
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
    if (serves_one_row(a)) return start_one_row(a, stream);
    if (f32_rows::serves(a)) return start_f32_rows(a, stream);
    bool floats = false, codes = false;
    int rows = 0;
    for (int i = 0; i < a.products; ++i) {
        (a.quantise && is_integer(a.list[i].weight.type) ? codes : floats) = true;
        rows += a.list[i].weight.rows;
    }
    const int units = units_of(a.columns);
    const int row_bytes = (floats ? staged::value_bytes(units) : 0) + (codes ? staged::code_bytes(units) : 0);
    const bool tiny = a.columns <= 128 && !codes, narrow = rows >= 4096 || a.columns < 1024;
    const auto with = [&]<int N>() {
        return tiny     ? start_matvec<N, 4>(a, floats, codes, row_bytes, stream)
               : narrow ? start_matvec<N, 8>(a, floats, codes, row_bytes, stream)
                        : start_matvec<N, 32>(a, floats, codes, row_bytes, stream);
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
