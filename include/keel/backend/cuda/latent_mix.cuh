// SPDX-License-Identifier: MIT
//
// All of an MLA layer between its products, for one row and a short cache: a block takes a head, makes its latent query
// (the weights for that are in shared memory before the previous kernel is done), attends over the whole cache and
// expands the result. The splits of attend_halves.cuh, and the kernels around them, are for long caches.
#pragma once

#include <keel/backend/cuda/attention.cuh>
#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/formats.cuh>
#include <keel/backend/cuda/matvec.cuh>
#include <keel/backend/cuda/mma.cuh>
#include <keel/backend/cuda/one_row.cuh>
#include <keel/backend/cuda/staging.cuh>

namespace keel::cuda_kernels {

/// What shared memory holds: the rows of key_up, then in the same place a tile of the cache; the rows of value_up; a
/// query; what is mixed of the cache.
struct latent_mix_shape {
    static constexpr int threads = 512, warps = threads / warp_size, tile = 64, lanes = 4;
    static constexpr int columns_of_warp = 32, most_rank = warps * columns_of_warp, most_width = most_rank + 256;

    int own, rank, width;  // elements of a query that the keys multiply, of a latent row, of that with its position
    int key_bytes, value_bytes;

    __host__ __device__ int pitch() const { return width + 8; }  // halves from a row of the tile to the next
    __host__ __device__ int first_bytes() const { return max(key_bytes, 2 * tile * pitch()); }
    __host__ __device__ int query_bytes() const {
        return staged::value_bytes(units_of(own)) + fine_codes::bytes(units_of(own));
    }
    __host__ __device__ int mixed_bytes() const {
        return staged::value_bytes(units_of(rank)) + staged::code_bytes(units_of(rank));
    }
    __host__ __device__ int bytes() const { return first_bytes() + value_bytes + query_bytes() + mixed_bytes(); }

    explicit latent_mix_shape(const launch::latent_mix_args& a)
        : own(a.key_up.columns),
          rank(a.key_up.rows),
          width(a.layout.latent_width),
          key_bytes(a.key_up.rows * a.key_up.row_bytes),
          value_bytes(a.value_up.rows * a.value_up.row_bytes) {}
};

/// Grid: (heads, rows); every row is its segment's only one, at a position in the first block of its cache.
__global__ void __launch_bounds__(latent_mix_shape::threads)
    latent_mix_kernel(const __grid_constant__ launch::latent_mix_args a, const latent_mix_shape s) {
    using shape = latent_mix_shape;
    using namespace cuda_launch::detail;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ slot_ring<2> weights;  // key_up, value_up
    __shared__ __align__(16) float scores[2][shape::tile];
    __shared__ __align__(16) __half likely[shape::tile];
    __shared__ __align__(16) __half asked[shape::most_width], fresh[shape::most_width];  // query; own part of the cache
    const int h = blockIdx.x, warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    unsigned char* const values = memory + s.first_bytes();
    unsigned char* const after = values + s.value_bytes;
    const staged query(after, units_of(s.own), true);
    unsigned char* const fine = after + staged::value_bytes(units_of(s.own));
    const staged mixed(after + s.query_bytes(), units_of(s.rank), true);

    start_next();
    if (threadIdx.x == 0) weights.init(1);
    __syncthreads();
    if (warp == 0) {
        weights.fill({2, 0}, memory, a.key_up.data + static_cast<long long>(h) * s.key_bytes, s.key_bytes);
        weights.fill({2, 1}, values, a.value_up.data + static_cast<long long>(h) * s.value_bytes, s.value_bytes);
    }
    const launch::segment& segment = a.segments[blockIdx.y];
    const int r = segment.first_row, last = static_cast<int>(segment.position);
    unsigned char* const first_row = latent_row(a.layout, segment, a.layer, 0);  // all are in one block of the cache
    unsigned char* const cached = first_row + 2 * last * s.width;
    const int column = 4 * threadIdx.x;  // of the row's latent
    float4 norm{};
    if (column < s.rank) norm = *reinterpret_cast<const float4*>(a.norm + column);

    // The query, and the row's own part of the cache.
    wait_for_previous();
    const float* const q = a.q + r * a.q_row + h * a.q_head;
    const bool inside = column < s.width;
    const float4 own = inside ? *reinterpret_cast<const float4*>(a.latent + r * a.latent_row + column) : float4{};
    const float4 part = column < s.own + s.width - s.rank ? *reinterpret_cast<const float4*>(q + column) : float4{};
    const auto put_halves = [](void* to, const float4& x) {
        *reinterpret_cast<uint2*>(to) = {pack(x.x, x.y), pack(x.z, x.w)};
    };
    if (column < s.own) {
        *reinterpret_cast<float4*>(query.values + staged::place(column)) = part;
    } else if (column < s.own + s.width - s.rank) {
        put_halves(asked + s.rank + column - s.own, times(part, {a.scale, a.scale, a.scale, a.scale}));
    }
    if (warp < ceil_div(s.own, 4 * warp_size)) {
        fine_codes::put(fine, units_of(s.own), min(column, s.own - 1) / 32, part, column < s.own);
    }
    const float squares = block_sum(column < s.rank ? squares_of(own) : 0.0f);
    const float factor = 1.0f / sqrtf(squares / static_cast<float>(s.rank) + a.epsilon);
    if (inside) {
        const float4 by = column < s.rank ? float4{factor * norm.x, factor * norm.y, factor * norm.z, factor * norm.w}
                                          : float4{1, 1, 1, 1};
        put_halves(fresh + column, times(own, by));
        if (h == 0) put_halves(cached + 2 * column, times(own, by));
    }

    // Its latent form: four lanes to a row of key_up.
    weights.wait({2, 0});
    for (int i = threadIdx.x / shape::lanes; i < ceil_div(s.rank, 8) * 8; i += shape::threads / shape::lanes) {
        const unsigned char* record = memory + min(i, s.rank - 1) * a.key_up.row_bytes;
        const float total = narrow_product<shape::lanes>(a.key_up.type, record, units_of(s.own), query, fine);
        if (threadIdx.x % shape::lanes == 0 && i < s.rank) asked[i] = __float2half_rn(total * a.scale);
    }
    __syncthreads();
    // A tile of positions at a time. Products are those of 16 queries of which the first is there: lanes 0 to 3.
    __half* const cache = reinterpret_cast<__half*>(memory);  // (tile, pitch)
    const int pitch = s.pitch(), matrix = lane / 8, line = lane % 8, first_column = warp * shape::columns_of_warp;
    const auto left_of = [&](std::uint32_t(&to)[4], const __half* from) {
        const auto two = [&](int i) {
            return lane < 4 ? *reinterpret_cast<const std::uint32_t*>(from + 2 * lane + i) : 0u;
        };
        to[0] = two(0), to[1] = 0, to[2] = two(8), to[3] = 0;
    };
    float largest = -INFINITY, total = 0;
    float sum[shape::columns_of_warp / 8][4] = {};
    for (int from = 0; from <= last; from += shape::tile) {
        const int count = min(shape::tile, last + 1 - from);
        const unsigned char* rows = first_row + 2 * from * s.width;
        for (int t = warp; t < ceil_div(count, 16) * 16; t += shape::warps) {
            for (int c = 8 * lane; c < s.width; c += 8 * warp_size) {
                if (from + t == last) {
                    *reinterpret_cast<uint4*>(cache + t * pitch + c) = *reinterpret_cast<const uint4*>(fresh + c);
                } else {
                    copy_async(cache + t * pitch + c, rows + 2 * (t < count ? t * s.width + c : 0), t < count ? 16 : 0);
                }
            }
        }
        copies_done();
        __syncthreads();
        {  // a warp takes 8 positions and every other 32 columns
            const int position = warp % 8 * 8, half = warp / 8;
            const std::uint32_t right = shared_address(cache + (position + line) * pitch);
            float score[2][4] = {};
#pragma unroll 3
            for (int k = position < count ? 32 * half : s.width; k < s.width; k += 64) {
                std::uint32_t x[4], y[4];
                load_matrices(y, right + 2 * min(k + 8 * matrix, s.width - 8));  // two may be behind the row's end
                left_of(x, asked + k);
                multiply(score[0], x, y[0], y[1]);
                if (k + 16 >= s.width) break;
                left_of(x, asked + k + 16);
                multiply(score[1], x, y[2], y[3]);
            }
            if (lane < 4) {
                *reinterpret_cast<float2*>(scores[half] + position + 2 * lane) = {score[0][0] + score[1][0],
                                                                                  score[0][1] + score[1][1]};
            }
        }
        __syncthreads();
        const auto score_of = [&](int t) { return t < count ? scores[0][t] + scores[1][t] : -INFINITY; };
        const float low = score_of(lane), high = score_of(lane + warp_size);
        const float top = fmaxf(largest, lanes_max(fmaxf(low, high)));
        const float shrink = __expf(largest - top), low_weight = __expf(low - top), high_weight = __expf(high - top);
        total = total * shrink + lanes_sum(low_weight + high_weight);
        largest = top;
        if (warp == 0) {
            likely[lane] = __float2half_rn(low_weight), likely[lane + warp_size] = __float2half_rn(high_weight);
        }
        __syncthreads();
        if (first_column < s.rank) {
            const std::uint32_t right =
                shared_address(cache + (matrix % 2 * 8 + line) * pitch + first_column + matrix / 2 * 8);
#pragma unroll
            for (auto& eight : sum) eight[0] *= shrink, eight[1] *= shrink;
#pragma unroll 1
            for (int k = 0; k < count; k += 16) {
                std::uint32_t x[4];
                left_of(x, likely + k);
#pragma unroll
                for (int j = 0; j < shape::columns_of_warp / 8; j += 2) {
                    std::uint32_t y[4];
                    load_transposed(y, right + 2 * (k * pitch + 8 * j));
                    multiply(sum[j], x, y[0], y[1]);
                    multiply(sum[j + 1], x, y[2], y[3]);
                }
            }
        }
        __syncthreads();
    }
    const float share = 1.0f / total;
    if (first_column < s.rank && lane < 4) {
#pragma unroll
        for (int j = 0; j < shape::columns_of_warp / 8; ++j) {
            *reinterpret_cast<float2*>(mixed.values + staged::place(first_column + 8 * j + 2 * lane)) = {
                sum[j][0] * share, sum[j][1] * share};
        }
    }
    __syncwarp();  // a unit is the warp's own
    for (int unit = warp; unit < units_of(s.rank); unit += shape::warps) {
        put_unit(mixed, unit, mixed.values[staged::place(32 * unit + lane)]);
    }

    weights.wait({2, 1});
    __syncthreads();
    float* const out = a.codes == nullptr ? a.out + r * a.out_row + h * a.value_up.rows
                                          : reinterpret_cast<float*>(memory);  // the cache's tile is not read any more
    visit_format(a.value_up.type, [&]<class Format>() {
        const int rows = a.value_up.rows;
        for (int i = threadIdx.x / shape::lanes; i < ceil_div(rows, 8) * 8; i += shape::threads / shape::lanes) {
            float part_sum[1][1] = {};
            rows_product<Format, true, shape::lanes, space::shared>(values + min(i, rows - 1) * a.value_up.row_bytes, 0,
                                                                    units_of(s.rank), threadIdx.x % shape::lanes, mixed,
                                                                    0, part_sum);
            const float all = lanes_sum<shape::lanes>(part_sum[0][0]);
            if (threadIdx.x % shape::lanes == 0 && i < rows) out[i] = all;
        }
    });
    if (a.codes == nullptr) return;
    __syncthreads();
    const int units = units_of(a.value_up.rows), all_units = gridDim.x * units;
    const staged codes(a.codes + r * staged::code_bytes(all_units), all_units, false);
    for (int unit = warp; unit < units; unit += shape::warps) put_unit(codes, h * units + unit, out[32 * unit + lane]);
}

}  // namespace keel::cuda_kernels

namespace keel::cuda_launch {

bool serves_latent_mix(const latent_mix_args& a) {
    using namespace cuda_kernels;
    const latent_mix_shape s(a);
    const int position = s.width - s.rank;
    return a.layout.half && s.rank % 32 == 0 && s.rank <= latent_mix_shape::most_rank && s.own % 32 == 0 &&
           position % 16 == 0 && s.own + position <= 4 * latent_mix_shape::threads &&
           s.width <= latent_mix_shape::most_width && a.value_up.columns == s.rank &&
           s.bytes() <= shared_bytes_up_to(160 * 1024) && aligned16(a.q, a.latent) && aligned16(a.norm, nullptr) &&
           a.q_row % 4 == 0 && a.q_head % 4 == 0 && a.latent_row % 4 == 0;
}

cudaError_t latent_mix(const latent_mix_args& a, cudaStream_t stream) {
    using namespace cuda_kernels;
    const latent_mix_shape s(a);
    return start(latent_mix_kernel, grid_of(a.key_up.count, a.segment_count), latent_mix_shape::threads, s.bytes(),
                 stream, a, s);
}

}  // namespace keel::cuda_launch
