// SPDX-License-Identifier: MIT
//
// Experts' networks where each expert has only a few rows of activations and K-quantised weights: products that have to
// keep up with memory. One block on every multiprocessor goes through its share of items, 32 rows of weights each with
// up to 4 rows of activations: 16 rows of W_gate and the same of W_up, or 32 of W_down. A warp keeps a ring of items
// filled; sets of warps take them in turn, and a set's warps split the columns, 256 at a time.
//
// Activations are codes of 16 bits with a scale for every 256 columns. The tensor core multiplies their upper and their
// lower bytes, two columns of a fragment, with the weights' codes: whole numbers that are weighed, 32 columns at a
// time, with the whole numbers that K-quants have for scales. Both operands are rows of bytes, as they come from
// memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <keel/backend/cuda/device.cuh>
#include <keel/backend/cuda/gemm.cuh>
#include <keel/backend/cuda/halves.cuh>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/mma.cuh>
#include <keel/backend/cuda/slot_ring.cuh>
#include <keel/backend/cuda/staging.cuh>

namespace keel::cuda_launch::detail {

/// Up to 4 rows of activations in shared memory, x = scale (256 upper + lower). Byte rows 2 r and 2 r + 1 are the upper
/// and lower bytes of row r; they lie so that eight of them meet no bank conflict.
class byte_rows {
public:
    static constexpr int most_rows = 4;  // whose bytes are the columns of a fragment
    static constexpr int block = 256;    // columns that have a scale

    __device__ byte_rows(unsigned char* memory, int columns) : memory_(memory), columns_(columns) {}

    __host__ __device__ static int bytes(int columns) {
        return 2 * most_rows * (columns + 16 + sums_pitch(columns)) + most_rows * columns / block * 4;
    }

    /// Row r becomes from(r), for all threads of some warps.
    template <class From>
    __device__ void fill(int rows, int warp, int warps, From&& from) const {
        const int lane = static_cast<int>(threadIdx.x) % 32, blocks = columns_ / block;
        for (int i = warp; i < rows * blocks; i += warps) {
            const int row = i / blocks, first = i % blocks * block + 4 * lane;
            const float* const at = from(row) + first;
            const float4 x[2] = {*reinterpret_cast<const float4*>(at),
                                 *reinterpret_cast<const float4*>(at + block / 2)};
            const float largest =
                cuda_kernels::lanes_max(fmaxf(cuda_kernels::largest_of(x[0]), cuda_kernels::largest_of(x[1])));
            const float factor = largest > 0x1p-100f ? largest_code / largest : 0.0f;
            if (lane == 0) scales()[i % blocks * most_rows + row] = largest / largest_code;
#pragma unroll
            for (int half = 0; half < 2; ++half) put(row, first + half * (block / 2), x[half], factor);
        }
    }

    /// B fragments of two units: 2 u and 2 u + 1 are those of unit + u.
    __device__ void load(std::uint32_t (&b)[4], int unit, int lane) const {
        load_matrices(b, shared_address(codes(lane % 8) + 32 * unit + lane / 8 * 16));
    }
    /// B fragment of the sums over 16 codes of eight units.
    __device__ uint2 sums(int unit, int lane) const {
        const std::uint32_t* const at = sums_of(lane / 4) + unit + lane % 4;
        return {at[0], at[4]};
    }
    /// Of the row whose results a lane has: bytes of it are columns 2 (lane % 4) and the next of a C fragment.
    __device__ float scale(int block, int lane) const { return scales()[block * most_rows + lane % 4]; }
    __device__ static float join(float upper, float lower) { return 256.0f * upper + lower; }

private:
    static constexpr float largest_code = 32600;  // less than 127.5 times 256

    /// Of a byte row: halves, two for a unit.
    __host__ __device__ static int sums_pitch(int columns) { return columns / 8 + 16; }

    __device__ void put(int row, int column, const float4& x, float factor) const {
        const int code[4] = {__float2int_rn(x.x * factor), __float2int_rn(x.y * factor), __float2int_rn(x.z * factor),
                             __float2int_rn(x.w * factor)};
        std::uint32_t bytes[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bytes[0] |= (static_cast<std::uint32_t>(code[i] + 128) >> 8 & 0xFFu) << 8 * i;
            bytes[1] |= (static_cast<std::uint32_t>(code[i]) & 0xFFu) << 8 * i;
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            *reinterpret_cast<std::uint32_t*>(codes(2 * row + part) + column) = bytes[part];
            const int sum = cuda_kernels::lanes_sum<4>(__dp4a(static_cast<int>(bytes[part]), 0x01010101, 0));
            if (column % 16 == 0) {
                reinterpret_cast<__half*>(sums_of(2 * row + part))[column / 16] = __int2half_rn(sum);
            }
        }
    }

    __device__ unsigned char* codes(int byte_row) const { return memory_ + byte_row * (columns_ + 16); }
    __device__ std::uint32_t* sums_of(int byte_row) const {
        return reinterpret_cast<std::uint32_t*>(codes(2 * most_rows) + byte_row * sums_pitch(columns_));
    }
    __device__ float* scales() const { return reinterpret_cast<float*>(sums_of(2 * most_rows)); }

    unsigned char* memory_;
    int columns_;
};

/// What a row has besides nibbles: value = d scale code - m minimum. `scales` are those of a block of eight units.
template <layout L>
struct row_format;

/// Scale and minimum of whole units, Q4_K and Q5_K.
struct unit_scales {
    static constexpr int parts = 1;  // of a unit, with a scale of their own

    /// Of the first or second unit of two.
    __device__ static int scale(std::uint32_t two, int unit, int) {
        return static_cast<int>(__byte_perm(two, 0, 0x4440 + 2 * unit));
    }
    /// As an A fragment takes them, for both halves of a unit.
    __device__ static std::uint32_t minima(const unsigned char* scales, int unit) {
        const std::uint32_t minimum = scales[2 * unit + 1];
        return as_bits(__hadd2(as_half2(minimum * 0x00010001u | 0x64006400u), both(-1024.0f)));
    }
    /// d, m.
    __device__ static float2 factors(const unsigned char* behind_scales, int block) {
        return __half22float2(*reinterpret_cast<const __half2*>(behind_scales + 4 * block));
    }
};

template <>
struct row_format<layout::q4_k> : unit_scales {
    /// Adds what codes have above their nibbles.
    __device__ static void add_bits(const unsigned char*, int, int, int, std::uint32_t&, std::uint32_t&) {}
};

template <>
struct row_format<layout::q5_k> : unit_scales {
    __device__ static void add_bits(const unsigned char* row, int units, int unit, int quad, std::uint32_t& low,
                                    std::uint32_t& high) {
        const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(row + 16 * units + 4 * unit) >> quad;
        low |= bits << 4 & 0x10101010u;
        high |= bits & 0x10101010u;
    }
};

/// Scales of 16 elements; what is taken from codes is 32 times the scale.
template <>
struct row_format<layout::q6_k> {
    static constexpr int parts = 2;

    __device__ static int scale(std::uint32_t two, int unit, int part) {
        return static_cast<signed char>(two >> (16 * unit + 8 * part));
    }
    __device__ static std::uint32_t minima(const unsigned char* scales, int unit) {
        const std::uint32_t pair = *reinterpret_cast<const unsigned short*>(scales + 2 * unit);
        return as_bits(__hadd2(as_half2(byte_pair(pair ^ 0x8080u, 0)), both(-1152.0f)));
    }
    __device__ static float2 factors(const unsigned char* behind_scales, int block) {
        const float d = __half2float(*reinterpret_cast<const __half*>(behind_scales + 2 * block));
        return {d, 32.0f * d};
    }
    __device__ static void add_bits(const unsigned char* row, int units, int unit, int quad, std::uint32_t& low,
                                    std::uint32_t& high) {
        const unsigned char* const at = row + 16 * units + 8 * unit + quad / 2 * 4;
        const std::uint32_t bits = *reinterpret_cast<const std::uint32_t*>(at) >> quad % 2 * 4;
        low |= bits << 4 & 0x30303030u;
        high |= bits << 2 & 0x30303030u;
    }
};

/// The 32 rows of weights of an item in shared memory: in four pieces of 8 neighbouring rows, which lie so that two
/// rows of each, eight in all, meet no bank conflict. These are rows 8 r to 8 r + 7 of fragment f, if the two begin
/// with the piece's row 4 f + 2 r.
struct item_rows {
    static constexpr int count = 32, piece = 8, pieces = count / piece;

    int row_bytes;

    __host__ __device__ int at_piece(int p) const {
        const int banks = row_bytes / 16;  // from a row to the next, in units that eight rows take different ones of
        return p * piece * row_bytes + 16 * (banks % 2 != 0 ? 2 * p : banks % 4 == 2 ? p + (p & 2) : p);
    }
    __host__ __device__ int bytes() const { return at_piece(pieces - 1) + piece * row_bytes; }
    __device__ int at_pair(int eighth) const { return at_piece(eighth / 2) + eighth % 2 * row_bytes; }
    /// Which row of the item has the results that the lanes [4 eighth, 4 eighth + 4) have of rows 8 r to 8 r + 7 of f.
    __device__ static int result(int eighth, int f, int r) { return eighth / 2 * piece + 4 * f + 2 * r + eighth % 2; }
};

/// acc[f][r] += 256 columns of a row of weights times row lane % 4 of x, for a warp. `nibbles` and `mine`: the lane's
/// addresses for ldmatrix, and of the first of its rows.
template <layout L>
__device__ void multiply_block(float (&acc)[2][2], const unsigned char* nibbles, const unsigned char* mine,
                               int row_bytes, int units, int block, const byte_rows& x, int lane) {
    using format = row_format<L>;
    const int quad = lane % 4;
    const unsigned char* const scales = mine + weight_unit<L>::factors_at(units) + 16 * block;
    const auto row = [&](int f, int r) { return (4 * f + 2 * r) * row_bytes; };
    int sums[2][4] = {};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        std::uint32_t b[4];
        x.load(b, 8 * block + 2 * pair, lane);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
            std::uint32_t words[4], two[2];  // of both rows: nibbles of the first unit and the next, their scales
            load_matrices(words, shared_address(nibbles + row(f, 0) + 128 * block + 32 * pair));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                two[r] = *reinterpret_cast<const std::uint32_t*>(scales + row(f, r) + 4 * pair);
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                std::uint32_t a[4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    a[r] = words[2 * u + r] & 0x0F0F0F0Fu;
                    a[2 + r] = words[2 * u + r] >> 4 & 0x0F0F0F0Fu;
                    format::add_bits(mine + row(f, r), units, 8 * block + 2 * pair + u, quad, a[r], a[2 + r]);
                }
#pragma unroll
                for (int part = 0; part < format::parts; ++part) {
                    int products[4];
                    if constexpr (format::parts == 1) {
                        multiply_bytes(products, a, b[2 * u], b[2 * u + 1]);
                    } else {
                        multiply_bytes(products, a[2 * part], a[2 * part + 1], b[2 * u + part]);
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[f][e] += format::scale(two[e / 2], u, part) * products[e];
                }
            }
        }
    }
    const uint2 sums_of_x = x.sums(8 * block, lane);
    const float scale = x.scale(block, lane);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
        const unsigned char* const of[2] = {scales + row(f, 0), scales + row(f, 1)};
        const std::uint32_t minima[4] = {format::minima(of[0], quad), format::minima(of[1], quad),
                                         format::minima(of[0], quad + 4), format::minima(of[1], quad + 4)};
        float taken[4] = {};
        multiply(taken, minima, sums_of_x.x, sums_of_x.y);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 factors = format::factors(of[r] - 16 * block + 2 * units, block);
            const float product =
                byte_rows::join(static_cast<float>(sums[f][2 * r]), static_cast<float>(sums[f][2 * r + 1]));
            acc[f][r] += scale * (factors.x * product - factors.y * byte_rows::join(taken[2 * r], taken[2 * r + 1]));
        }
    }
}

/// How the blocks go through items.
struct few_experts_shape {
    static constexpr int most_warps = 18, most_slots = 12;
    static constexpr int most_threads = (most_warps + 1) * 32;

    int warps, sets;        // warps of a set, at most most_warps of all sets
    int slots, slot_bytes;  // of the ring of items; each slot is a set's
    int items;              // of a tile

    /// Of shared memory, besides slots: two tiles' activations; the sums of all warps of a set but one, for one item
    /// and the next.
    __host__ __device__ int sums_of_one() const { return (warps - 1) * 32; }
    int fixed_bytes(int columns) const {
        return 2 * byte_rows::bytes(columns) + 2 * sets * sums_of_one() * static_cast<int>(sizeof(float4));
    }
};

template <int Matrices>
struct few_experts_arguments {
    const row_tile* tiles;
    const int* tile_count;
    const int* pair;  // of a position
    const float* x;   // rows pair / k
    long long x_row;
    int k;
    matrix weight[Matrices];
    const unsigned char* shared[Matrices];  // of one more expert, whose number is the count of the others; or null
    float* out;                             // rows pair: silu(W_gate x) W_up x, or W_down x
    long long out_row;
    few_experts_shape shape;
};

/// A block's share of the items of all tiles. Where an expert has a second tile, its items alternate with those of the
/// first, so that L2 still has the weights when they are asked for again.
class few_experts_share {
public:
    template <int Matrices>
    __device__ explicit few_experts_share(const few_experts_arguments<Matrices>& a)
        : tiles_(a.tiles), count_(*a.tile_count), items_(a.shape.items) {
        const long long all = count_ * items_;
        first_ = static_cast<int>(all * blockIdx.x / gridDim.x);
        last_ = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
    }

    /// Calls f(tiles, count, begin, first, last) for one or two tiles, as one, that the block has a share in: of their
    /// items from `begin` on, [first, last), all counted from the share's first one on.
    template <class F>
    __device__ void for_each(F&& f) const {
        constexpr int rows = byte_rows::most_rows;
        int t = first_ / items_;
        if (t < count_ && tiles_[t].first % (2 * rows) != 0) --t;  // an expert's tiles begin at multiples of 8
        while (t * items_ < last_) {
            row_tile tiles = tiles_[t];
            int count = 1;
            if (tiles.rows == rows && t + 1 < count_ && tiles_[t + 1].first == tiles.first + rows) {
                tiles.rows += tiles_[t + 1].rows, ++count;
            }
            const int begin = t * items_, end = begin + count * items_;
            f(tiles, count, begin - first_, max(begin, first_) - first_, min(end, last_) - first_);
            t += count;
        }
    }

private:
    const row_tile* tiles_;
    int count_, items_, first_, last_;
};

template <layout L, int Matrices>
struct few_experts_block {
    using shape = few_experts_shape;
    using slot_ring = cuda_kernels::slot_ring<shape::most_slots>;
    static constexpr int rows_of_matrix = item_rows::count / Matrices;

    const few_experts_arguments<Matrices>& a;
    slot_ring& ring;
    unsigned char* memory;  // slots, activations, sums
    int lane;

    __device__ item_rows rows() const { return {a.weight[0].row_bytes}; }
    __device__ unsigned char* slot(const slot_ring::cursor& at) const { return memory + at.slot * a.shape.slot_bytes; }
    __device__ unsigned char* behind_slots() const { return memory + a.shape.slots * a.shape.slot_bytes; }
    __device__ static int rows_in(const row_tile& tiles, int which) {
        return min(tiles.rows - which * byte_rows::most_rows, byte_rows::most_rows);
    }
    __device__ byte_rows rows_of(int tile) const {
        const int columns = a.weight[0].columns;
        return {behind_slots() + tile * byte_rows::bytes(columns), columns};
    }

    /// The warp that fills slots.
    __device__ void fill() const {
        slot_ring::cursor at{a.shape.slots};
        few_experts_share(a).for_each([&](const row_tile& tiles, int count, int begin, int first, int last) {
            const int expert = tiles.matrix, row_bytes = a.weight[0].row_bytes;
            const bool shared = expert == a.weight[0].count;
            const long long of_expert = shared ? 0 : static_cast<long long>(expert) * a.weight[0].rows * row_bytes;
#pragma unroll 1
            for (int item = first; item < last; ++item, at.next()) {
                ring.fill(at, item_rows::count * row_bytes, [&](const auto& copy) {
#pragma unroll
                    for (int p = 0; p < item_rows::pieces; ++p) {
                        const int m = p * Matrices / item_rows::pieces;
                        const int row =
                            ((item - begin) >> (count - 1)) * rows_of_matrix + p * item_rows::piece % rows_of_matrix;
                        copy.template whole<true>(
                            slot(at) + rows().at_piece(p),
                            (shared ? a.shared[m] : a.weight[m].data) + of_expert + row * row_bytes,
                            item_rows::piece * row_bytes);
                    }
                });
            }
        });
    }

    /// Warp `part` of a set.
    __device__ void multiply(int set, int part) const {
        const shape& s = a.shape;
        const int users = s.sets * s.warps;
        slot_ring::cursor at{s.slots};
        at.next(set);
        int item = set, turn = 0;
        few_experts_share(a).for_each([&](const row_tile& tiles, int count, int begin, int, int last) {
            named_barrier(1, users * 32);  // nobody needs the tiles before
            for (int i = 0; i < count; ++i) {
                rows_of(i).fill(rows_in(tiles, i), set * s.warps + part, users, [&](int r) {
                    return a.x + a.pair[tiles.first + i * byte_rows::most_rows + r] / a.k * a.x_row;
                });
            }
            named_barrier(1, users * 32);
            for (; item < last; item += s.sets, at.next(s.sets)) {
                const int which = count == 2 ? (item - begin) % 2 : 0;
                float acc[2][2] = {};
                multiply_item(acc, at, part, rows_of(which));
                add_up(acc, set, part, turn, item / s.sets % 2,
                       {tiles.matrix, tiles.first + which * byte_rows::most_rows, rows_in(tiles, which)},
                       ((item - begin) >> (count - 1)) * rows_of_matrix);
                if (++turn == s.warps) turn = 0;
            }
        });
    }

    __device__ void multiply_item(float (&acc)[2][2], const slot_ring::cursor& at, int part, const byte_rows& x) const {
        const int blocks = a.weight[0].columns / byte_rows::block, row_bytes = a.weight[0].row_bytes;
        const unsigned char* const mine = slot(at) + rows().at_pair(lane / 4);
        const unsigned char* const nibbles =
            slot(at) + rows().at_pair(lane % 8) + lane / 8 % 2 * 2 * row_bytes + lane / 16 * 16;
        ring.wait(at);
        for (int block = part; block < blocks; block += a.shape.warps) {
            multiply_block<L>(acc, nibbles, mine, row_bytes, 8 * blocks, block, x, lane);
        }
        ring.release(at);
    }

    /// Warp `turn` of the set adds up what all of them have for an item.
    __device__ void add_up(const float (&acc)[2][2], int set, int part, int turn, int second, const row_tile& tile,
                           int first_row) const {
        const shape& s = a.shape;
        float4* const sums = reinterpret_cast<float4*>(behind_slots() + 2 * byte_rows::bytes(a.weight[0].columns)) +
                             (2 * set + second) * s.sums_of_one() + lane;
        if (part != turn) sums[(part < turn ? part : part - 1) * 32] = {acc[0][0], acc[0][1], acc[1][0], acc[1][1]};
        named_barrier(2 + set, s.warps * 32);
        if (part != turn) return;
        // In the order of the warps, whichever it is.
        float4 total = {0, 0, 0, 0};
        const auto add = [&](const float4& v) { total = {total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w}; };
#pragma unroll 4
        for (int i = 0; i < turn; ++i) add(sums[i * 32]);
        add({acc[0][0], acc[0][1], acc[1][0], acc[1][1]});
#pragma unroll 4
        for (int i = turn; i < s.warps - 1; ++i) add(sums[i * 32]);
        const float all[4] = {total.x, total.y, total.z, total.w};
        const int row_of_x = lane % 4, pair = row_of_x < tile.rows ? a.pair[tile.first + row_of_x] : -1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = item_rows::result(lane / 4, i / 2, i % 2);
            float y = all[i];
            // Half of the lanes have rows of W_gate, the others the same of W_up.
            if (Matrices == 2) y = cuda_kernels::silu(y) * __shfl_xor_sync(~0u, y, 16);
            if (pair >= 0 && row < rows_of_matrix) a.out[pair * a.out_row + first_row + row] = y;
        }
    }
};

/// Grid: (multiprocessors). Behind the sets there is a warp that fills slots.
template <layout L, int Matrices>
__global__ void __launch_bounds__(few_experts_shape::most_threads, 1)
    few_experts_kernel(const __grid_constant__ few_experts_arguments<Matrices> a) {
    using block = few_experts_block<L, Matrices>;
    extern __shared__ uint4 dynamic_memory[];
    __shared__ typename block::slot_ring ring;
    const int warp = static_cast<int>(threadIdx.x) / 32, users = a.shape.sets * a.shape.warps;
    const block here{a, ring, reinterpret_cast<unsigned char*>(dynamic_memory), static_cast<int>(threadIdx.x) % 32};
    if (threadIdx.x == 0) ring.init(a.shape.warps);
    __syncthreads();
    if (warp < users) {
        cuda_kernels::wait_for_previous();
        here.multiply(warp / a.shape.warps, warp % a.shape.warps);
    } else {
        // The list is older than the kernel before W_down's, so that weights need not wait.
        if (Matrices == 2) cuda_kernels::wait_for_previous();
        here.fill();
    }
}

/// Chooses the shape for the weights; false if there is no kernel for them here.
template <int Matrices>
bool shape_few_experts(few_experts_arguments<Matrices>& a) {
    const matrix& m = a.weight[0];
    if (!cuda_kernels::is_k_quant(m.type) || m.columns % 256 != 0 || m.rows % item_rows::count != 0) return false;
    const int blocks = m.columns / 256, rounds = cuda_kernels::ceil_div(blocks, few_experts_shape::most_warps);
    few_experts_shape& s = a.shape;
    s.warps = cuda_kernels::ceil_div(blocks, rounds);
    s.slot_bytes = item_rows{m.row_bytes}.bytes();
    s.items = m.rows * Matrices / item_rows::count;
    for (s.sets = few_experts_shape::most_warps / s.warps; s.sets > 0; --s.sets) {
        const int room = cuda_kernels::shared_bytes_up_to(228 * 1024, 512) - s.fixed_bytes(m.columns);
        s.slots = std::min(room / s.slot_bytes, few_experts_shape::most_slots) / s.sets * s.sets;
        if (s.slots >= 2 * s.sets) return true;
    }
    return false;
}

template <int Matrices>
cudaError_t start_few_experts(const few_experts_arguments<Matrices>& a, cudaStream_t stream) {
    const auto with = [&]<layout L>() {
        const few_experts_shape& s = a.shape;
        return cuda_kernels::start(few_experts_kernel<L, Matrices>, grid_of(cuda_kernels::multiprocessors()),
                                   (s.sets * s.warps + 1) * 32,
                                   s.slots * s.slot_bytes + s.fixed_bytes(a.weight[0].columns), stream, a);
    };
    if (a.weight[0].type == layout::q4_k) return with.template operator()<layout::q4_k>();
    if (a.weight[0].type == layout::q5_k) return with.template operator()<layout::q5_k>();
    return with.template operator()<layout::q6_k>();
}

}  // namespace keel::cuda_launch::detail
