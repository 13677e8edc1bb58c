// SPDX-License-Identifier: MIT
//
// Latent attention over the cache, in its two forms. Both are small products per tile of positions with a running
// softmax: scores come out as (positions, lanes), lanes being heads or queries, so that no step sums across a register.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <utility>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/cpu/tile.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace simd {

/// Positions that are worked on together, counted from the start of the sequence; a block of the cache holds several.
inline constexpr index attention_tile = 64;
static_assert(memory_layout::block_rows % attention_tile == 0);

/// Positions are dealt out, a tile at a time, to so many parts that threads work on independently; which part a
/// position belongs to depends on nothing but the position.
inline constexpr index attention_parts = 16;

/// Rows of queries that are in the workspace together.
inline constexpr index attention_rows = 8;

/// Queries of one head that go through the expanded form together.
inline constexpr index attention_queries = 2 * lanes;

constexpr index in_lanes(index n) { return (n + lanes - 1) / lanes * lanes; }

inline index tiles(index positions) { return (positions + attention_tile - 1) / attention_tile; }

/// `count` rows of the latent cache as floats, all in one block of it: where they lie, or converted in `memory`.
inline const float* latent_rows(const memory_layout& layout, const segment& s, index layer, index position, index count,
                                float* memory) {
    const std::byte* const rows = layout.latent_row(s.blocks, layer, position);
    if (layout.cache == dtype::f32) return reinterpret_cast<const float*>(rows);
    const f16* const halves = reinterpret_cast<const f16*>(rows);
    const index n = count * layout.latent_width;
    index i = 0;
    for (; i + lanes <= n; i += lanes) store(memory + i, load(halves + i));
    for (; i < n; ++i) memory[i] = to_float(halves[i]);
    return memory;
}

/// The running softmax of `width` columns of scores (positions, width), a multiple of `lanes`: scores become weights
/// relative to the largest score so far, and keep[j] is what sums made with the former largest are to be scaled with.
inline void running_softmax(float* scores, index positions, index width, float* most, float* total, float* keep) {
    for (index j = 0; j < width; j += lanes) {
        floats largest = load(most + j);
        const floats before = largest;
        for (index p = 0; p < positions; ++p) largest = xsimd::max(largest, load(scores + p * width + j));
        const floats scale = exp(before - largest);
        floats sum(0.0f);
        for (index p = 0; p < positions; ++p) {
            const floats weight = exp(load(scores + p * width + j) - largest);
            store(scores + p * width + j, weight);
            sum = sum + weight;
        }
        store(most + j, largest);
        store(keep + j, scale);
        store(total + j, fma(load(total + j), scale, sum));
    }
}

}  // namespace simd

inline void latent_append(const latent_append_args& a, thread_pool& pool) {
    using namespace simd;
    const index rank = a.weight.extent[0];
    const index width = a.layout.latent_width;
    for (const segment& s : a.segments) {
        simd::split(pool, s.rows, 2 * width, [&](index first, index count) {
            for (index i = first; i < first + count; ++i) {
                float* const row = a.rows[s.first_row + i].data;
                simd::rms_norm_row(row, a.weight.data, a.epsilon, rank, row);
                std::byte* const to = a.layout.latent_row(s.blocks, a.layer, s.position + i);
                if (a.layout.cache == dtype::f32) {
                    std::memcpy(to, row, static_cast<std::size_t>(a.layout.latent_row_bytes()));
                    continue;
                }
                f16* const halves = reinterpret_cast<f16*>(to);
                index c = 0;
                for (; c + lanes <= width; c += lanes) store(halves + c, load(row + c));
                for (; c < width; ++c) halves[c] = to_f16(row[c]);
            }
        });
    }
}

namespace simd {

/// Absorbed attention of up to attention_rows rows: what they share, and the three steps, each of independent tasks.
class latent_attention {
public:
    struct query {
        const segment* of = nullptr;
        index row = 0;      // in the batch
        index visible = 0;  // positions
    };

    static index scratch_bytes(const workspace_limits& limits, int threads) {
        const index heads = in_lanes(limits.heads);
        const index per_row =
            limits.latent_width * heads + attention_parts * (limits.heads * limits.latent_rank + 2 * heads);
        const index per_thread = attention_tile * (limits.latent_width + heads) + heads;
        return (attention_rows * per_row + threads * per_thread) * static_cast<index>(sizeof(float)) +
               5 * arena::alignment;
    }

    latent_attention(const latent_attend_args& args, int threads, arena& workspace)
        : args_(args),
          heads_(args.q_latent.extent[1]),
          rank_(args.q_latent.extent[2]),
          width_(args.layout.latent_width),
          lanes_(in_lanes(heads_)),
          transposed_(workspace.take<float>(attention_rows, width_, lanes_)),
          mixed_(workspace.take<float>(attention_rows, attention_parts, heads_, rank_)),
          most_(workspace.take<float>(attention_rows, attention_parts, lanes_)),
          total_(workspace.take<float>(attention_rows, attention_parts, lanes_)),
          memory_(workspace.take<float>(threads, attention_tile * (width_ + lanes_) + lanes_)) {}

    /// The scaled query of row `r` as (latent and position part, heads): entries [first, first + count).
    void transpose(const query& q, index r, index first, index count) const {
        for (index c = first; c < first + count; ++c) {
            const bool latent = c < rank_;
            const view<const float, 2> from = latent ? args_.q_latent[q.row] : args_.q_position[q.row];
            const float* const column = from.data + (latent ? c : c - rank_);
            float* const to = &transposed_(r, c, 0);
            for (index h = 0; h < heads_; ++h) to[h] = args_.scale * column[h * from.stride[0]];
            std::fill(to + heads_, to + lanes_, 0.0f);
        }
    }

    /// Row `r` over its positions of part `part`.
    void attend(const query& q, index r, index part, int thread) const {
        float* const scores = memory_[thread].data + attention_tile * width_;
        float* const keep = scores + attention_tile * lanes_;
        float* const most = &most_(r, part, 0);
        float* const total = &total_(r, part, 0);
        std::fill_n(most, lanes_, -std::numeric_limits<float>::infinity());
        std::fill_n(total, lanes_, 0.0f);
        for (index tile = part; tile < tiles(q.visible); tile += attention_parts) {
            const index first = tile * attention_tile;
            const index count = std::min(attention_tile, q.visible - first);
            const float* const rows = latent_rows(args_.layout, *q.of, args_.layer, first, count, memory_[thread].data);
            multiply({.rows = count,
                      .columns = lanes_,
                      .depth = width_,
                      .a = rows,
                      .a_row = width_,
                      .a_step = 1,
                      .b = &transposed_(r, 0, 0),
                      .b_step = lanes_,
                      .c = scores,
                      .c_row = lanes_});
            running_softmax(scores, count, lanes_, most, total, keep);
            const small_product mix{.rows = heads_,
                                    .columns = rank_,
                                    .depth = count,
                                    .a = scores,
                                    .a_row = 1,
                                    .a_step = lanes_,
                                    .b = rows,
                                    .b_step = width_,
                                    .c = &mixed_(r, part, 0, 0),
                                    .c_row = rank_};
            tile == part ? multiply(mix) : multiply_into(mix, keep);
        }
    }

    /// The parts of row `r` and head `h` put together.
    void combine(const query& q, index r, index h) const {
        const index parts = std::min(attention_parts, tiles(q.visible));
        float weight[attention_parts];
        float largest = most_(r, 0, h);
        for (index part = 1; part < parts; ++part) largest = std::max(largest, most_(r, part, h));
        for (index part = 0; part < parts; ++part) weight[part] = most_(r, part, h) - largest;
        for_lanes(parts, [&](index i, auto load, auto store) { store(weight + i, exp(load(weight + i))); });
        float sum = 0;
        for (index part = 0; part < parts; ++part) sum = std::fma(weight[part], total_(r, part, h), sum);
        for (index part = 0; part < parts; ++part) weight[part] /= sum;
        float* const out = args_.out[q.row][h].data;
        for_lanes(rank_, [&](index c, auto load, auto store) {
            floats mixed(0.0f);
            for (index part = 0; part < parts; ++part) {
                mixed = fma(floats(weight[part]), load(&mixed_(r, part, h, c)), mixed);
            }
            store(out + c, mixed);
        });
    }

    [[nodiscard]] index heads() const { return heads_; }
    [[nodiscard]] index width() const { return width_; }

private:
    const latent_attend_args& args_;
    index heads_, rank_, width_, lanes_;
    view<float, 3> transposed_;  // (rows, R + P, lanes)
    view<float, 4> mixed_;       // (rows, parts, H, R): sum of weights and latents, not yet divided
    view<float, 3> most_;        // (rows, parts, lanes): largest score
    view<float, 3> total_;       // (rows, parts, lanes): sum of the weights
    view<float, 2> memory_;      // per thread: a tile of the cache, its scores, what a new largest score scales with
};

}  // namespace simd

/// Workspace that latent_attend() takes.
inline index latent_attend_scratch_bytes(const workspace_limits& limits, int threads) {
    return simd::latent_attention::scratch_bytes(limits, threads);
}

/// A row's result depends on its query and on the positions that it sees, and not on the other rows or on the threads:
/// the positions' parts are summed up each on its own, in order, and then put together in order.
inline void latent_attend(const latent_attend_args& a, thread_pool& pool, arena& workspace) {
    constexpr index query_columns = 64;
    const arena::scope scope(workspace);
    const simd::latent_attention pass(a, pool.size(), workspace);
    const index pieces = (pass.width() + query_columns - 1) / query_columns;

    simd::latent_attention::query rows[simd::attention_rows];
    index n = 0;
    const auto attend = [&] {
        index parts = 0;
        for (index r = 0; r < n; ++r) parts = std::max(parts, simd::tiles(rows[r].visible));
        parts = std::min(parts, simd::attention_parts);
        pool.parallel_for(n * pieces, [&](index task) {
            const index first = task % pieces * query_columns;
            pass.transpose(rows[task / pieces], task / pieces, first, std::min(query_columns, pass.width() - first));
        });
        pool.parallel([&](int thread, int threads) {
            const auto [first, count] = share_of(n * parts, thread, threads);
            for (index task = first; task < first + count; ++task) {
                pass.attend(rows[task % n], task % n, task / n, thread);  // rows of a sequence share what they read
            }
        });
        pool.parallel_for(n * pass.heads(), [&](index task) {
            pass.combine(rows[task / pass.heads()], task / pass.heads(), task % pass.heads());
        });
        n = 0;
    };
    for (const segment& s : a.segments) {
        for (index i = 0; i < s.rows; ++i) {
            rows[n++] = {&s, s.first_row + i, s.position + i + 1};
            if (n == simd::attention_rows) attend();
        }
    }
    if (n > 0) attend();
}

namespace simd {

/// Expanded attention of one head: keys and values are made per tile of positions and used by all queries.
class expanded_attention {
public:
    static index floats_per_thread(index rows, index key, index value, index latent_width) {
        const index queries = (rows + attention_queries - 1) / attention_queries * attention_queries;
        return latent_width * (key + value) + attention_tile * (latent_width + key + value + attention_queries) +
               queries * (key + 2) + attention_queries;
    }

    template <class Matrix>
    expanded_attention(const expanded_attend_args<Matrix>& a, const segment& s, index head, index first, index rows,
                       float* memory)
        : layout_(a.layout),
          segment_(s),
          layer_(a.layer),
          rank_(a.value_up.columns),
          own_(a.key_up.columns),
          key_(a.q.extent[2]),
          value_(a.value_up.rows),
          rows_(rows),
          position_(s.position + first),
          out_(a.out.rows(s.first_row + first, rows).slice(head)) {
        const auto take = [&](index n) { return std::exchange(memory, memory + n); };
        const index groups = (rows + attention_queries - 1) / attention_queries;
        key_up_ = take(rank_ * own_);
        value_up_ = take(rank_ * value_);
        latent_ = take(attention_tile * layout_.latent_width);
        keys_ = take(attention_tile * key_);
        values_ = take(attention_tile * value_);
        scores_ = take(attention_tile * attention_queries);
        query_ = take(groups * key_ * attention_queries);
        most_ = take(groups * attention_queries);
        total_ = take(groups * attention_queries);
        keep_ = take(attention_queries);

        for (index c = 0; c < rank_; ++c) decode_row(a.key_up.type, a.key_up.row(c, head), key_up_ + c * own_, own_);
        for (index v = 0; v < value_; ++v) {
            decode_row(a.value_up.type, a.value_up.row(v, head), latent_, rank_);
            for (index c = 0; c < rank_; ++c) value_up_[c * value_ + v] = latent_[c];
        }
        std::fill_n(query_, groups * key_ * attention_queries, 0.0f);
        for (index r = 0; r < rows; ++r) {
            const float* const q = a.q[s.first_row + first + r][head].data;
            float* const to = query_ + r / attention_queries * key_ * attention_queries + r % attention_queries;
            for (index c = 0; c < key_; ++c) to[c * attention_queries] = a.scale * q[c];
        }
        std::fill_n(most_, groups * attention_queries, -std::numeric_limits<float>::infinity());
        std::fill_n(total_, groups * attention_queries, 0.0f);
    }

    void run() {
        const index visible = position_ + rows_;  // by the last row
        for (index first = 0; first < visible; first += attention_tile) {
            const index count = std::min(attention_tile, visible - first);
            expand(first, count);
            const index sees = std::max(first - position_, index{0});  // the first row that does
            for (index r = sees / attention_queries * attention_queries; r < rows_; r += attention_queries) {
                attend(r, std::min(attention_queries, rows_ - r), first, count);
            }
        }
        for (index r = 0; r < rows_; ++r) {
            const floats inverse(1.0f / total_[r]);
            float* const out = out_[r].data;
            for_lanes(value_, [&](index v, auto load, auto store) { store(out + v, load(out + v) * inverse); });
        }
    }

private:
    /// Keys (count, N + P) and values (count, V).
    void expand(index first, index count) {
        const index width = layout_.latent_width;
        const float* const rows = latent_rows(layout_, segment_, layer_, first, count, latent_);
        small_product up{.rows = count,
                         .columns = own_,
                         .depth = rank_,
                         .a = rows,
                         .a_row = width,
                         .a_step = 1,
                         .b = key_up_,
                         .b_step = own_,
                         .c = keys_,
                         .c_row = key_};
        multiply(up);
        up.columns = up.b_step = up.c_row = value_;
        up.b = value_up_;
        up.c = values_;
        multiply(up);
        for (index p = 0; p < count; ++p) std::copy_n(rows + p * width + rank_, key_ - own_, keys_ + p * key_ + own_);
    }

    /// Rows [r, r + n) over positions [first, first + count).
    void attend(index r, index n, index first, index count) {
        multiply({.rows = count,
                  .columns = attention_queries,
                  .depth = key_,
                  .a = keys_,
                  .a_row = key_,
                  .a_step = 1,
                  .b = query_ + r * key_,
                  .b_step = attention_queries,
                  .c = scores_,
                  .c_row = attention_queries});
        for (index p = std::max(position_ + r + 1 - first, index{0}); p < count; ++p) {
            const index blind = std::min(first + p - position_ - r, attention_queries);  // rows before this position
            std::fill_n(scores_ + p * attention_queries, blind, -std::numeric_limits<float>::infinity());
        }
        running_softmax(scores_, count, attention_queries, most_ + r, total_ + r, keep_);
        const small_product mix{.rows = n,
                                .columns = value_,
                                .depth = count,
                                .a = scores_,
                                .a_row = 1,
                                .a_step = attention_queries,
                                .b = values_,
                                .b_step = value_,
                                .c = out_[r].data,
                                .c_row = out_.stride[0]};
        first == 0 ? multiply(mix) : multiply_into(mix, keep_);
    }

    const memory_layout& layout_;
    const segment& segment_;
    index layer_, rank_, own_, key_, value_, rows_, position_;
    view<float, 2> out_;  // (rows, V)
    float *key_up_, *value_up_, *latent_, *keys_, *values_, *scores_, *query_, *most_, *total_, *keep_;
};

}  // namespace simd

/// Workspace that expanded_attend() takes.
inline index expanded_attend_scratch_bytes(const workspace_limits& limits, int threads) {
    const index per_thread =
        simd::expanded_attention::floats_per_thread(limits.rows, limits.mla_key, limits.mla_value, limits.latent_width);
    return threads * per_thread * static_cast<index>(sizeof(float)) + arena::alignment;
}

/// Matrix: a matrix_view. Work is cut along heads, and along the queries where there are fewer heads than threads.
template <class Matrix>
void expanded_attend(const expanded_attend_args<Matrix>& a, thread_pool& pool, arena& workspace) {
    const index heads = a.q.extent[1];
    for (const segment& s : a.segments) {
        const index parts = std::clamp((pool.size() - 1) / heads + 1, index{1},
                                       (s.rows + simd::attention_queries - 1) / simd::attention_queries);
        const arena::scope scope(workspace);
        const auto memory = workspace.take<float>(
            pool.size(),
            simd::expanded_attention::floats_per_thread(s.rows, a.q.extent[2], a.value_up.rows, a.layout.latent_width));
        pool.parallel([&](int thread, int threads) {
            const auto [first_task, count] = share_of(heads * parts, thread, threads);
            for (index task = first_task; task < first_task + count; ++task) {
                const auto [first, rows] =
                    share_of(s.rows, static_cast<int>(task % parts), static_cast<int>(parts), simd::attention_queries);
                simd::expanded_attention(a, s, task / parts, first, rows, memory[thread].data).run();
            }
        });
    }
}

}  // namespace keel::inline KEEL_ABI
