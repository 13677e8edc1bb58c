// SPDX-License-Identifier: MIT
//
// Gated feed-forward networks, one or many: rows are sorted by expert, so that the rows of an expert form one product.
// Two jobs, however many experts there are: gate and up with the activation between them, then down with the weights.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>

#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/matmul.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// The rows of one expert.
struct expert_task {
    weight_rows gate, up, down;
    index first;      // of its rows, in the order by expert
    activations in;   // to gate and up
    activations mid;  // to down

    [[nodiscard]] index units() const { return (gate.rows + unit_rows - 1) / unit_rows; }
    [[nodiscard]] index cost() const { return gate.row_bytes() + gate.columns * in.count / 8; }
};

/// Where the products of the experts come from and go to; rows in the order by expert.
struct expert_rows {
    view<const float, 2> x;
    const index* token;   // row of x and of out
    const float* weight;  // null: all 1
    view<float, 2> out;
    bool accumulate;  // add to what `out` holds
};

/// Rows of gate and up that are multiplied at a time, if there are many rows of activations.
inline constexpr index gate_rows = unit_rows;

/// Floats that a thread needs for the results of gate, or of up, at a time.
constexpr index gate_floats(index rows, index width) {
    return std::max(rows * gate_rows, std::min(rows, few_rows) * width);
}

/// Rounds one of the activations of each task, if the weights that it is multiplied with want that.
inline void round_tasks(view<expert_task, 1> tasks, activations expert_task::*member,
                        std::initializer_list<weight_rows> weights, precision wanted, thread_pool& pool,
                        arena& memory) {
    const activations& any = tasks[0].*member;
    const index columns = any.x.extent[1];
    for (index i = 0; i < tasks.extent[0]; ++i) {
        activations& in = tasks[i].*member;
        for (const weight_rows& w : weights) in.serve(wanted, w);
    }
    // Few rows of one token's experts are the same row: rounded once.
    const auto is_shared = [&](const activations& in) {
        return in.source != nullptr && in.few() && in.as == operand::bytes;
    };
    const bool shared = std::any_of(tasks.data, tasks.data + tasks.extent[0],
                                    [&](const expert_task& task) { return is_shared(task.*member); });
    const byte_rows all = shared ? byte_rows::take(memory, any.x.extent[0], columns) : byte_rows{};
    index pieces = 0, rows = 0;
    for (index i = 0; i < tasks.extent[0]; ++i) {
        activations& in = tasks[i].*member;
        if (in.as == operand::floats) continue;
        rows += in.count;
        if (is_shared(in)) {
            in.rows = all;
        } else {
            in.take(memory);
            pieces += in.pieces();
        }
    }
    const auto fill = [&](int share, int shares) {
        if (shared) {
            const row_range mine = share_of(any.x.extent[0], share, shares);
            for (index r = mine.first; r < mine.first + mine.count; ++r) all.quantise(r, any.x[r].data);
        }
        const row_range mine = share_of(pieces, share, shares);
        index first = 0;  // piece of a task
        for (index i = 0; i < tasks.extent[0]; ++i) {
            const activations& in = tasks[i].*member;
            if (is_shared(in) || in.as == operand::floats) continue;
            const index end = std::min(first + in.pieces(), mine.first + mine.count);
            for (index p = std::max(first, mine.first); p < end; ++p) in.fill(p - first);
            first += in.pieces();
        }
    };
    if (rows == 0) return;
    if (rows * columns < worth_a_job) {
        fill(0, 1);
    } else {
        pool.parallel(fill);
    }
}

/// mid = silu(gate x) * (up x), for all tasks in one job.
inline void gate_and_up(std::span<const expert_task> tasks, view<float, 2> mid, precision wanted, thread_pool& pool,
                        arena& memory) {
    index most = 0;
    for (const expert_task& task : tasks) most = std::max(most, task.in.count);
    const index width = tasks.front().gate.rows;
    const arena::scope scope(memory);
    const auto scratch = memory.take<std::byte>(pool.size(), product_scratch(most, tasks.front().gate.columns));
    const auto results = memory.take<float>(pool.size(), 2, gate_floats(most, width));
    dealt_work work(cost_of(tasks));
    pool.parallel([&](int share, int shares) {
        const arena own(scratch[share].data, scratch.extent[1]);
        // Rows [first, first + count) of gate and up. Few rows of activations leave all of them room in the first
        // cache.
        const auto multiply = [&](const expert_task& task, index first, index count) {
            const row_range rows{first, count};
            const auto into = [&](view<float, 2> to) {
                return [=](index n, index o, const float* values, index some) {
                    std::copy_n(values, some, &to(n, o - first));
                };
            };
            const view<float, 2> gate(results[share][0].data, task.in.count, count);
            const view<float, 2> up(results[share][1].data, task.in.count, count);
            multiply_rows(wanted, task.gate, rows, task.in, own, into(gate));
            multiply_rows(wanted, task.up, rows, task.in, own, into(up));
            for (index n = 0; n < task.in.count; ++n) {
                float* const to = &mid(task.first + n, first);
                simd::for_lanes(count, [&](index i, auto load, auto store) {
                    store(to + i, simd::silu(load(&gate(n, i))) * load(&up(n, i)));
                });
            }
        };
        const auto multiply_units = [&](const expert_task& task, row_range units) {
            const row_range rows = rows_of_units(units, task.gate.rows);
            const index step = task.in.few() ? rows.count : gate_rows, end = rows.first + rows.count;
            for (index o = rows.first; o < end; o += step) multiply(task, o, std::min(step, end - o));
        };
        work.run(share, shares, [&](index from, index to) { for_units(tasks, from, to, multiply_units); });
    });
}

/// out (+)= sum of weight (down mid), expert after expert; a share works on some columns of out.
inline void down(std::span<const expert_task> tasks, const expert_rows& rows, precision wanted, thread_pool& pool,
                 arena& memory) {
    const weight_rows& first = tasks.front().down;
    index most = 0;
    for (const expert_task& task : tasks) most = std::max(most, task.mid.count);
    const arena::scope scope(memory);
    const auto scratch = memory.take<std::byte>(pool.size(), product_scratch(most, first.columns));
    dealt_work work((first.rows + unit_rows - 1) / unit_rows);
    pool.parallel([&](int share, int shares) {
        const arena own(scratch[share].data, scratch.extent[1]);
        work.run(share, shares, [&](index from, index to) {
            const row_range mine = rows_of_units({from, to - from}, first.rows);
            if (!rows.accumulate) {
                for (index r = 0; r < rows.out.extent[0]; ++r) std::fill_n(&rows.out(r, mine.first), mine.count, 0.0f);
            }
            for (const expert_task& task : tasks) {
                multiply_rows(wanted, task.down, mine, task.mid, own,
                              [&](index n, index o, const float* values, index count) {
                                  const index row = task.first + n;
                                  const float weight = rows.weight == nullptr ? 1.0f : rows.weight[row];
                                  float* const out = &rows.out(rows.token == nullptr ? row : rows.token[row], o);
                                  for (index i = 0; i < count; ++i) out[i] += weight * values[i];
                              });
            }
        });
    });
}

/// Runs the tasks, whose gate, up, down, first and in.count are set.
inline void feed_forward(view<expert_task, 1> tasks, const expert_rows& rows, precision wanted, thread_pool& pool,
                         arena& memory) {
    const expert_task& last = tasks[tasks.extent[0] - 1];
    const index count = last.first + last.in.count;
    const index width = last.gate.rows;
    const std::span<const expert_task> all(tasks.data, static_cast<std::size_t>(tasks.extent[0]));
    const auto mid = memory.take<float>(count, width);
    for (index i = 0; i < tasks.extent[0]; ++i) {
        expert_task& task = tasks[i];
        task.in.x = rows.x;
        if (rows.token != nullptr) task.in.source = rows.token + task.first;
        task.mid = {.count = task.in.count, .x = mid.rows(task.first, task.in.count)};
    }
    {
        const arena::scope scope(memory);
        round_tasks(tasks, &expert_task::in, {last.gate, last.up}, wanted, pool, memory);
        gate_and_up(all, mid, wanted, pool, memory);
    }
    round_tasks(tasks, &expert_task::mid, {last.down}, wanted, pool, memory);
    down(all, rows, wanted, pool, memory);
}

}  // namespace detail

/// Memory that swiglu (with one expert) and experts take from the workspace, for `pairs` pairs of a row and an expert
/// of `width`.
constexpr index experts_scratch_bytes(index rows, index pairs, index experts, index columns, index width, int threads) {
    const auto bytes = [&](index widest) {
        const index in_panels = std::min(pairs, (pairs / detail::activations::panel_rows + experts)) *
                                detail::activations::panel_rows;  // the last panel of each expert is not full
        return detail::byte_rows::bytes(rows, widest) + detail::activations::bytes(in_panels, widest) +
               std::min(pairs, experts) * 4 * arena::alignment;
    };
    const index each_expert = static_cast<index>(sizeof(detail::expert_task) + sizeof(index));
    const index each_pair =
        width * static_cast<index>(sizeof(float)) + static_cast<index>(sizeof(index) + sizeof(float));
    const index each_thread = detail::product_scratch(rows, std::max(columns, width)) +
                              2 * detail::gate_floats(rows, width) * static_cast<index>(sizeof(float));
    return experts * each_expert + pairs * each_pair + threads * each_thread + std::max(bytes(columns), bytes(width)) +
           16 * arena::alignment;
}

/// out (+)= W_down (silu(W_gate x) * (W_up x)).
template <class Matrix>
void swiglu(const swiglu_args<Matrix>& a, precision wanted, thread_pool& pool, arena& memory) {
    const arena::scope scope(memory);
    const auto task = memory.take<detail::expert_task>(1);
    using rows = detail::weight_rows;
    task[0] = {rows::of(a.gate), rows::of(a.up), rows::of(a.down), 0, {.count = a.x.extent[0], .x = {}}, {}};
    detail::feed_forward(task, {a.x, nullptr, nullptr, a.out, a.accumulate}, wanted, pool, memory);
}

/// out = sum over the chosen experts e of w_e swiglu_e(x), in the order of the experts' numbers.
template <class Matrix>
void experts(const experts_args<Matrix>& a, precision wanted, thread_pool& pool, arena& memory) {
    const arena::scope scope(memory);
    const index n = a.chosen.extent[0], k = a.chosen.extent[1], count = n * k;
    const auto ends = memory.take<index>(a.gate.count);  // where the rows of each expert end, in the order by expert
    std::fill_n(ends.data, ends.size(), index{0});
    for (index r = 0; r < n; ++r) {
        for (index slot = 0; slot < k; ++slot) ++ends[a.chosen(r, slot)];
    }
    index used = 0;
    for (index e = 0, end = 0; e < a.gate.count; ++e) {
        used += ends[e] > 0;
        end += ends[e];
        ends[e] = end;
    }
    if (used == 0) return;
    const auto tasks = memory.take<detail::expert_task>(used);
    using rows = detail::weight_rows;
    const rows gate = rows::of(a.gate), up = rows::of(a.up), down = rows::of(a.down);
    for (index e = 0, task = 0, first = 0; e < a.gate.count; first = ends[e++]) {
        if (ends[e] == first) continue;
        tasks[task++] = {gate.matrix(e), up.matrix(e), down.matrix(e), first, {.count = ends[e] - first, .x = {}}, {}};
    }
    const auto source = memory.take<index>(count);
    const auto weight = memory.take<float>(count);
    for (index r = n - 1; r >= 0; --r) {
        for (index slot = k - 1; slot >= 0; --slot) {
            const index at = --ends[a.chosen(r, slot)];
            source[at] = r;
            weight[at] = a.weights(r, slot);
        }
    }
    detail::feed_forward(tasks, {a.x, source.data, weight.data, a.out, false}, wanted, pool, memory);
}

}  // namespace keel::inline KEEL_ABI
