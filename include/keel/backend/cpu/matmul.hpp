// SPDX-License-Identifier: MIT
//
// Products of weights with activations: which kernel serves which, and how the rows of weights are shared out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <span>
#include <type_traits>

#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/activations.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/backend/cpu/dot.hpp>
#include <keel/backend/cpu/gemm.hpp>
#include <keel/backend/cpu/interleaved.hpp>
#include <keel/backend/cpu/matrix_unit.hpp>
#include <keel/backend/cpu/operand.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Memory that one thread needs for a product of n rows and `columns` columns.
constexpr index product_scratch([[maybe_unused]] index n, index columns) {
    const index rows_of_floats = 4 * columns * static_cast<index>(sizeof(float)) + arena::alignment;
    index most = std::max(rows_of_floats, weight_tile::bytes(columns));
#if defined(KEEL_AMX)
    most = std::max(most, matrix_unit_scratch(n, columns));
#endif
    return (most + arena::alignment - 1) / arena::alignment * arena::alignment;
}

/// Calls emit(n, row, value, 1) with the products of each activation row and R rows of weights in floats, the first of
/// which is row `first`; the others follow `apart` rows from each other.
template <class T, int R, class Emit>
void multiply_floats(const T* const (&w)[R], index columns, const activations& in, index first, index apart,
                     Emit&& emit) {
    index n = 0;
    const auto take = [&]<int N>() {
        const float* x[N];
        for (int i = 0; i < N; ++i) x[i] = in.x[in.row(n + i)].data;
        float out[N][R];
        dot_floats(w, x, columns, out);
        for (int i = 0; i < N; ++i) {
            for (int r = 0; r < R; ++r) emit(n + i, first + r * apart, &out[i][r], 1);
        }
        n += N;
    };
    while (n + 4 <= in.count) take.template operator()<4>();
    while (n < in.count) take.template operator()<1>();
}

/// The same for blocks and activations in bytes, few of them.
template <class Block, int R, class Emit>
void multiply_few(const Block* w, index stride, index columns, const activations& in, index first, index apart,
                  Emit&& emit) {
    index n = 0;
    const auto take = [&]<int N>() {
        index rows[N];
        for (int i = 0; i < N; ++i) rows[i] = in.row(n + i);
        float out[N][R];
        dot_bytes<Block, R, N>(w + first * stride, apart * stride, columns, in.rows, rows, out);
        for (int i = 0; i < N; ++i) {
            for (int r = 0; r < R; ++r) emit(n + i, first + r * apart, &out[i][r], 1);
        }
        n += N;
    };
    while (n + 4 <= in.count) take.template operator()<4>();
    if (n + 2 <= in.count) take.template operator()<2>();
    if (n < in.count) take.template operator()<1>();
}

/// Calls f.operator()<Rests>(x, n, count) for each panel x of activations in bytes: rows n to n + count - 1, with their
/// rests or not.
template <class Block, class F>
void for_panels(const activations& in, F&& f) {
    for (index n = 0; n < in.count; n += byte_panels::rows) {
        const byte_panels x = in.panels.from(n / byte_panels::rows);
        const int count = static_cast<int>(std::min<index>(byte_panels::rows, in.count - n));
        if (takes_rests<Block> && in.count <= rows_with_rests) {
            f.template operator()<takes_rests<Block>>(x, n, count);
        } else {
            f.template operator()<false>(x, n, count);
        }
    }
}

/// multiply_rows for an interleaved matrix; the range consists of whole tiles.
template <class Block, class Emit>
void multiply_tiles(const weight_rows& w, row_range range, const activations& in, [[maybe_unused]] arena& scratch,
                    Emit&& emit) {
    constexpr index rows = tile_lanes::rows;
    const index tile_bytes = tile_layout<Block>::bytes(w.columns);
#if defined(KEEL_AMX)
    if (in.as == operand::halves) {
        const blocks_of_tiles<Block> all{w.data, tile_bytes, range.first, range.first + range.count};
        return multiply_halves(all, w.columns, in.halves, in.count, scratch, emit);
    }
#endif
    // The tiles that are multiplied together are half of the range apart.
    const auto multiply = [&]<int Tiles, bool Rests>(index first, index apart, const auto& x, index n, int count) {
        const std::byte* tile[Tiles];
        for (int k = 0; k < Tiles; ++k) tile[k] = w.data + (first + k * apart) / rows * tile_bytes;
        alignas(64) tile_sums sums[Tiles];
        multiply_interleaved<Block, Rests>(tile, w.columns, x, count, sums);
        for (int k = 0; k < Tiles; ++k) {
            for (int t = 0; t < count; ++t) emit(n + t, first + k * apart, sums[k][t], rows);
        }
    };
    const auto for_tiles = [&](auto&& f) {
        const index pairs = range.count / rows / 2;
        for (index k = 0; k < pairs; ++k) f.template operator()<2>(range.first + k * rows, pairs * rows);
        for (index o = 2 * pairs * rows; o < range.count; o += rows) {
            f.template operator()<1>(range.first + o, index{0});
        }
    };
    if (in.few()) {
        index row[few_rows];
        for (index n = 0; n < in.count; ++n) row[n] = in.row(n);
        const chosen_rows<Block> x(in.rows, row, in.count);
        for_tiles([&]<int Tiles>(index first, index apart) {
            multiply.template operator()<Tiles, takes_rests<Block>>(first, apart, x, 0, static_cast<int>(in.count));
        });
    } else {
        for_tiles([&]<int Tiles>(index first, index apart) {
            for_panels<Block>(in, [&]<bool Rests>(const byte_panels& x, index n, int count) {
                multiply.template operator()<Tiles, Rests>(first, apart, x, n, count);
            });
        });
    }
}

/// Rows [range.first, + range.count) of W x for all activations: calls emit(n, o, values, count) with the products of
/// activation row n and weight rows o to o + count - 1, each once.
template <class Emit>
void multiply_rows(precision wanted, const weight_rows& w, row_range range, const activations& in, arena scratch,
                   Emit&& emit) {
    const index last = range.first + range.count;
    const bool rounded = operand_of(wanted, w, in.count) != operand::floats;
    const operand as = rounded ? in.as : operand::floats;
    visit_blocks(w.type, [&]<class Block>() {
        if constexpr (interleaves<Block>) {
            if (w.interleaved) return multiply_tiles<Block>(w, range, in, scratch, emit);
        }
        const auto* const blocks = reinterpret_cast<const Block*>(w.data);
        const index stride = w.columns / Block::elements;
        // Four rows together. Where reading them is what takes time, they are far apart: memory likes to be read in a
        // few long streams.
        const auto for_rows = [&](auto&& f) {
            const index groups = range.count / 4, apart = in.few() ? groups : 1, step = in.few() ? 1 : 4;
            for (index g = 0; g < groups; ++g) f.template operator()<4>(range.first + g * step, apart);
            for (index o = range.first + 4 * groups; o < last; ++o) f.template operator()<1>(o, index{1});
        };
#if defined(KEEL_AMX)
        if constexpr (Block::type != dtype::f32 && Block::type != dtype::f16) {
            if (as == operand::halves) {
                const bool far_apart = walk_for(in.count).blocks == 1;
                const blocks_of_rows<Block> all{blocks, stride, range.first, last, far_apart};
                return multiply_halves(all, w.columns, in.halves, in.count, scratch, emit);
            }
        }
#endif
        if constexpr (is_float_block<Block>) {
            using element = std::remove_cvref_t<decltype(Block{}.value.get())>;
            for_rows([&]<int R>(index o, index apart) {
                const element* rows[R];
                for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const element*>(w.row(o + r * apart));
                multiply_floats(rows, w.columns, in, o, apart, emit);
            });
        } else if (as == operand::floats) {
            float* const decoded = scratch.take<float>(4, w.columns).data;
            for_rows([&]<int R>(index o, index apart) {
                const float* rows[R];
                for (int r = 0; r < R; ++r) {
                    decode_columns(blocks + (o + r * apart) * stride, decoded + r * w.columns, w.columns);
                    rows[r] = decoded + r * w.columns;
                }
                multiply_floats(rows, w.columns, in, o, apart, emit);
            });
        } else if (in.few()) {
            for_rows([&]<int R>(index o, index apart) {
                multiply_few<Block, R>(blocks, stride, w.columns, in, o, apart, emit);
            });
        } else {
            const weight_tile tile = weight_tile::take(scratch, w.columns);
            alignas(64) tile_sums sums;
            for (index o = range.first; o < last; o += tile_lanes::rows) {
                const int rows = static_cast<int>(std::min<index>(tile_lanes::rows, last - o));
                tile.unpack(blocks + o * stride, stride, rows, w.columns);
                for_panels<Block>(in, [&]<bool Rests>(const byte_panels& x, index n, int count) {
                    multiply_panel<Block, Rests>(tile, x, count, sums);
                    for (int t = 0; t < count; ++t) emit(n + t, o, sums[t], rows);
                });
            }
        }
    });
}

/// A product as a part of a job.
struct product {
    weight_rows weight;  // one matrix
    const activations* in;
    view<float, 2> out;  // (in->count, rows of weight)
    bool accumulate;

    [[nodiscard]] index units() const { return (weight.rows + unit_rows - 1) / unit_rows; }

    /// Roughly the time that a unit takes: to read it, and to multiply it.
    [[nodiscard]] index cost() const { return weight.row_bytes() + weight.columns * in->count / 8; }
};

template <class Task>
index cost_of(std::span<const Task> tasks) {
    index cost = 0;
    for (const Task& task : tasks) cost += task.units() * task.cost();
    return cost;
}

/// Calls f(task, units) for the units that begin in [from, to) of what all units of the tasks cost, one after another.
/// A task has units() and the cost() of one.
template <class Task, class F>
void for_units(std::span<const Task> tasks, index from, index to, F&& f) {
    index before = 0;
    for (const Task& task : tasks) {
        const auto unit_at = [&](index cost) {
            return std::clamp<index>((cost - before + task.cost() - 1) / task.cost(), 0, task.units());
        };
        const index first = from <= before ? 0 : unit_at(from);
        const index last = to <= before ? 0 : unit_at(to);
        if (first < last) f(task, row_range{first, last - first});
        before += task.units() * task.cost();
    }
}

/// The weight rows of some units.
constexpr row_range rows_of_units(row_range units, index rows) {
    const index first = units.first * unit_rows;
    return {first, std::min(rows, first + units.count * unit_rows) - first};
}

/// Computes all products in one job.
inline void multiply_all(std::span<const product> products, precision wanted, thread_pool& pool, arena& memory) {
    index columns = 0, rows = 0;
    for (const product& p : products) {
        columns = std::max(columns, p.weight.columns);
        rows = std::max(rows, p.in->count);
    }
    const arena::scope scope(memory);
    const auto scratch = memory.take<std::byte>(pool.size(), product_scratch(rows, columns));
    dealt_work work(cost_of(products));
    pool.parallel([&](int share, int shares) {
        const arena own(scratch[share].data, scratch.extent[1]);
        const auto multiply = [&](const product& p, row_range units) {
            multiply_rows(wanted, p.weight, rows_of_units(units, p.weight.rows), *p.in, own,
                          [&](index n, index o, const float* values, index count) {
                              float* const out = &p.out(n, o);
                              for (index i = 0; i < count; ++i) out[i] = p.accumulate ? out[i] + values[i] : values[i];
                          });
        };
        work.run(share, shares, [&](index from, index to) { for_units(products, from, to, multiply); });
    });
}

/// From how many values on it is quicker to quantise with all threads.
inline constexpr index worth_a_job = 32768;

/// Rounds several activations of the same shape, with threads if it is worth it.
inline void round_all(std::span<const activations> all, thread_pool& pool) {
    const activations& any = all.front();
    const index pieces = any.pieces(), total = static_cast<index>(all.size()) * pieces;
    const auto one = [&](index i) { all[static_cast<std::size_t>(i / pieces)].fill(i % pieces); };
    if (static_cast<index>(all.size()) * any.x.extent[0] * any.x.extent[1] < worth_a_job) {
        for (index i = 0; i < total; ++i) one(i);
    } else {
        pool.parallel_for(total, one);
    }
}

}  // namespace detail

/// Memory that matmul and matmul_heads take from the workspace, for `inputs` (one, or the heads) inputs of `columns`.
constexpr index matmul_scratch_bytes(index rows, index inputs, index columns, int threads) {
    const index bytes = detail::activations::bytes(rows, columns);
    const index each = static_cast<index>(sizeof(detail::activations) + sizeof(detail::product));
    return inputs * (bytes + each) + threads * detail::product_scratch(rows, columns) + 16 * arena::alignment;
}

/// out = W x, or out += W x, of several matrices with the same input, as one job.
template <class Matrix>
void matmul(view<const float, 2> x, std::initializer_list<linear<Matrix>> products, precision wanted, thread_pool& pool,
            arena& memory) {
    const arena::scope scope(memory);
    detail::activations in{.count = x.extent[0], .x = x};
    for (const auto& p : products) in.serve(wanted, detail::weight_rows::of(p.weight));
    if (in.as != detail::operand::floats) {
        in.take(memory);
        detail::round_all({&in, 1}, pool);
    }
    const auto list = memory.take<detail::product>(products.size());
    index count = 0;
    for (const auto& p : products) list[count++] = {detail::weight_rows::of(p.weight), &in, p.out, p.accumulate};
    detail::multiply_all({list.data, products.size()}, wanted, pool, memory);
}

/// y_h = W_h x_h.
template <class Matrix>
void matmul_heads(const matmul_heads_args<Matrix>& a, precision wanted, thread_pool& pool, arena& memory) {
    const arena::scope scope(memory);
    const auto heads = static_cast<std::size_t>(a.weight.count);
    const auto inputs = memory.take<detail::activations>(heads);
    const auto list = memory.take<detail::product>(heads);
    const auto weight = detail::weight_rows::of(a.weight);
    for (index h = 0; h < a.weight.count; ++h) {
        inputs[h] = {.count = a.x.extent[0], .x = a.x.slice(h)};
        inputs[h].serve(wanted, weight);
        inputs[h].take(memory);
        list[h] = {weight.matrix(h), &inputs[h], a.out.slice(h), false};
    }
    if (inputs[0].as != detail::operand::floats) detail::round_all({inputs.data, heads}, pool);
    detail::multiply_all({list.data, heads}, wanted, pool, memory);
}

}  // namespace keel::inline KEEL_ABI
