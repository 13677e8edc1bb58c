// SPDX-License-Identifier: MIT
//
// Expanded latent attention, for many queries of a sequence. Per head and tile of positions, keys and values are made
// from the latents once and then meet all queries, a group at a time. Scores are (positions, queries of the group) and
// results (V, queries), so that the queries are the lanes and no step sums across lanes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <utility>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/amx.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/softmax.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/cpu/tile.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace simd {

/// Positions that are expanded together; a block of the cache holds several such tiles.
inline constexpr index expanded_tile = 128;
static_assert(memory_layout::block_rows % expanded_tile == 0);

/// Queries of a group.
inline constexpr index expanded_group = 32;

struct expanded_shape {
    index rank, own, position, value;  // R, N, P, V
    index rows;                        // queries of a head

    [[nodiscard]] index key() const { return own + position; }
    [[nodiscard]] index expansion() const { return own + value; }
    [[nodiscard]] index width() const { return rank + position; }
    [[nodiscard]] index groups() const { return (rows + expanded_group - 1) / expanded_group; }
};

/// The products of one head, in f32.
class expanded_in_vectors {
public:
    static index floats_for(const expanded_shape& s) {
        return (s.rank + expanded_tile) * s.expansion() + s.groups() * s.key() * expanded_group;
    }

    expanded_in_vectors(const expanded_shape& shape, float* memory)
        : shape_(shape),
          weights_(memory),
          expanded_(weights_ + shape.rank * shape.expansion()),
          query_(expanded_ + expanded_tile * shape.expansion()) {}

    /// The weights of the expansion, (R, N + V).
    void set_weights(const float* weights) { std::copy_n(weights, shape_.rank * shape_.expansion(), weights_); }

    /// The queries of a group, (N + P, group).
    void set_query(index group, const float* query) {
        std::copy_n(query, shape_.key() * expanded_group, query_ + group * shape_.key() * expanded_group);
    }

    /// Keys and values of `count` latent rows.
    void expand(const float* latents, index count) {
        latents_ = latents;
        multiply({.rows = count,
                  .columns = shape_.expansion(),
                  .depth = shape_.rank,
                  .a = latents,
                  .a_row = shape_.width(),
                  .a_step = 1,
                  .b = weights_,
                  .b_step = shape_.expansion(),
                  .c = expanded_,
                  .c_row = shape_.expansion()});
    }

    /// scores(p, r) = key_p query_r
    void score(index group, index count, float* scores) const {
        small_product p{.rows = count,
                        .columns = expanded_group,
                        .depth = shape_.own,
                        .a = expanded_,
                        .a_row = shape_.expansion(),
                        .a_step = 1,
                        .b = query_ + group * shape_.key() * expanded_group,
                        .b_step = expanded_group,
                        .c = scores,
                        .c_row = expanded_group};
        multiply(p);
        p.depth = shape_.position;
        p.a = latents_ + shape_.rank;
        p.a_row = shape_.width();
        p.b += shape_.own * expanded_group;
        multiply_onto(p);
    }

    /// out(v, r) += sum over p of value_p(v) weights(p, r)
    void mix(index count, const float* weights, float* out) const {
        multiply_onto({.rows = shape_.value,
                       .columns = expanded_group,
                       .depth = count,
                       .a = expanded_ + shape_.own,
                       .a_row = 1,
                       .a_step = shape_.expansion(),
                       .b = weights,
                       .b_step = expanded_group,
                       .c = out,
                       .c_row = expanded_group});
    }

private:
    expanded_shape shape_;
    float *weights_, *expanded_, *query_;
    const float* latents_ = nullptr;
};

#if defined(KEEL_AMX)

/// The same on the matrix unit, all operands split in two.
class expanded_in_tiles {
public:
    static bool fits(const expanded_shape& s) {
        const auto fit = [](index n) { return n % amx::block == 0; };
        return fit(s.rank) && fit(s.expansion()) && fit(s.own) && fit(s.key()) && fit(s.value) && amx::permitted();
    }

    static index floats_for(const expanded_shape& s) {
        return s.rank * s.expansion() + s.groups() * s.key() * expanded_group +
               expanded_tile * (s.rank + s.expansion() + s.key() + 2 * s.value + expanded_group);
    }

    expanded_in_tiles(const expanded_shape& shape, float* memory) : shape_(shape) {
        const auto take = [&](index n) { return std::exchange(memory, memory + n); };
        const auto take_split = [&](index n) {
            bf16* const of = reinterpret_cast<bf16*>(take(n));
            return amx::split{of, of + n};
        };
        weights_ = take_split(shape.rank * shape.expansion());
        query_ = take_split(shape.groups() * shape.key() * expanded_group);
        latents_ = take_split(expanded_tile * shape.rank);
        keys_ = take_split(expanded_tile * shape.key());
        values_ = take_split(expanded_tile * shape.value);
        mixing_ = take_split(expanded_tile * expanded_group);
        expanded_ = take(expanded_tile * shape.expansion());
        transposed_ = take(expanded_tile * shape.value);
    }

    void set_weights(const float* weights) {
        const index n = shape_.expansion();
        for (index c = 0; c < shape_.rank; c += 2) {
            amx::split_pair(weights + c * n, weights + (c + 1) * n, n, weights_.from(c * n));
        }
    }

    void set_query(index group, const float* query) {
        for (index c = 0; c < shape_.key(); c += 2) {
            amx::split_pair(query + c * expanded_group, query + (c + 1) * expanded_group, expanded_group,
                            query_.from((group * shape_.key() + c) * expanded_group));
        }
    }

    void expand(const float* latents, index count) {
        const index rank = shape_.rank, key = shape_.key(), n = shape_.expansion();
        for (index p = 0; p < count; ++p) {
            amx::split_row(latents + p * shape_.width(), rank, latents_.from(p * rank));
            amx::split_row(latents + p * shape_.width() + rank, shape_.position, keys_.from(p * key + shape_.own));
        }
        for (index p = count; p < expanded_tile; ++p) {  // rows that do not exist are zero
            std::fill_n(latents_.high + p * rank, rank, bf16{});
            std::fill_n(latents_.low + p * rank, rank, bf16{});
        }
        amx::multiply<false>({.rows = expanded_tile,
                              .columns = n,
                              .depth = rank,
                              .a = latents_,
                              .a_row = rank,
                              .b = weights_,
                              .b_row = 2 * n,
                              .c = expanded_,
                              .c_row = n});
        for (index p = 0; p < expanded_tile; ++p) amx::split_row(expanded_ + p * n, shape_.own, keys_.from(p * key));
        for (index p = 0; p < expanded_tile; p += 16) {
            for (index v = 0; v < shape_.value; v += 16) {
                amx::transpose(expanded_ + p * n + shape_.own + v, n, transposed_ + v * expanded_tile + p,
                               expanded_tile);
            }
        }
        for (index v = 0; v < shape_.value; ++v) {
            amx::split_row(transposed_ + v * expanded_tile, expanded_tile, values_.from(v * expanded_tile));
        }
    }

    void score(index group, index, float* scores) const {
        amx::multiply<false>({.rows = expanded_tile,
                              .columns = expanded_group,
                              .depth = shape_.key(),
                              .a = keys_,
                              .a_row = shape_.key(),
                              .b = query_.from(group * shape_.key() * expanded_group),
                              .b_row = 2 * expanded_group,
                              .c = scores,
                              .c_row = expanded_group});
    }

    void mix(index count, float* weights, float* out) const {
        std::fill_n(weights + count * expanded_group, (expanded_tile - count) * expanded_group, 0.0f);
        for (index p = 0; p < expanded_tile; p += 2) {
            amx::split_pair(weights + p * expanded_group, weights + (p + 1) * expanded_group, expanded_group,
                            mixing_.from(p * expanded_group));
        }
        amx::multiply<true>({.rows = shape_.value,
                             .columns = expanded_group,
                             .depth = expanded_tile,
                             .a = values_,
                             .a_row = expanded_tile,
                             .b = mixing_,
                             .b_row = 2 * expanded_group,
                             .c = out,
                             .c_row = expanded_group});
    }

private:
    amx::session session_;
    expanded_shape shape_;
    amx::split weights_, query_, latents_, keys_, values_, mixing_;
    float *expanded_, *transposed_;
};

#endif

/// One head of some queries of a sequence.
template <class Products>
class expanded_attention {
public:
    static index floats_per_thread(const expanded_shape& s) {
        const index preparing = std::max(s.rank * s.expansion() + s.rank, s.key() * expanded_group);
        const index working = expanded_tile * (s.width() + expanded_group) + expanded_group;
        return Products::floats_for(s) + s.groups() * (s.value + 2) * expanded_group + std::max(preparing, working);
    }

    /// Rows [first, first + shape.rows) of the segment.
    template <class Matrix>
    expanded_attention(const expanded_attend_args<Matrix>& a, const segment& s, const expanded_shape& shape, index head,
                       index first, float* memory)
        : shape_(shape),
          segment_(s),
          position_(s.position + first),
          products_(shape, memory),
          sums_(memory + Products::floats_for(shape)),
          most_(sums_ + shape.groups() * shape.value * expanded_group),
          total_(most_ + shape.groups() * expanded_group),
          rest_(total_ + shape.groups() * expanded_group) {
        float* const weights = rest_;
        float* const row = weights + shape.rank * shape.expansion();
        for (index c = 0; c < shape.rank; ++c) {
            decode_row(a.key_up.type, a.key_up.row(c, head), weights + c * shape.expansion(), shape.own);
        }
        for (index v = 0; v < shape.value; ++v) {
            decode_row(a.value_up.type, a.value_up.row(v, head), row, shape.rank);
            for (index c = 0; c < shape.rank; ++c) weights[c * shape.expansion() + shape.own + v] = row[c];
        }
        products_.set_weights(weights);

        float* const query = rest_;
        for (index group = 0; group < shape.groups(); ++group) {
            const index r = group * expanded_group, n = std::min(expanded_group, shape.rows - r);
            std::fill_n(query, shape.key() * expanded_group, 0.0f);
            for (index i = 0; i < n; ++i) {
                const float* const q = a.q[s.first_row + first + r + i][head].data;
                for (index c = 0; c < shape.key(); ++c) query[c * expanded_group + i] = a.scale * q[c];
            }
            products_.set_query(group, query);
        }
        std::fill_n(sums_, shape.groups() * shape.value * expanded_group, 0.0f);
        std::fill_n(most_, shape.groups() * expanded_group, -std::numeric_limits<float>::infinity());
        std::fill_n(total_, shape.groups() * expanded_group, 0.0f);
    }

    /// `out` is (rows, V).
    void run(const memory_layout& layout, index layer, view<float, 2> out) {
        const index visible = position_ + shape_.rows;  // by the last row
        for (index first = 0; first < visible; first += expanded_tile) {
            const index count = std::min(expanded_tile, visible - first);
            products_.expand(latent_rows(layout, segment_, layer, first, count, rest_), count);
            const index sees = std::max(first - position_, index{0});  // the first row that does
            for (index group = sees / expanded_group; group < shape_.groups(); ++group) attend(group, first, count);
        }
        for (index r = 0; r < shape_.rows; ++r) {
            const float* const column = sums_ + r / expanded_group * shape_.value * expanded_group + r % expanded_group;
            const float inverse = 1.0f / total_[r];
            float* const to = out[r].data;
            for (index v = 0; v < shape_.value; ++v) to[v] = inverse * column[v * expanded_group];
        }
    }

private:
    /// A group over positions [first, first + count).
    void attend(index group, index first, index count) {
        float* const scores = rest_ + expanded_tile * shape_.width();
        float* const keep = scores + expanded_tile * expanded_group;
        float* const sums = sums_ + group * shape_.value * expanded_group;
        const index r = group * expanded_group;
        products_.score(group, count, scores);
        for (index p = std::max(position_ + r + 1 - first, index{0}); p < count; ++p) {
            const index blind = std::min(first + p - position_ - r, expanded_group);  // rows before this position
            std::fill_n(scores + p * expanded_group, blind, -std::numeric_limits<float>::infinity());
        }
        running_softmax(scores, count, expanded_group, most_ + r, total_ + r, keep);
        for (index j = 0; j < expanded_group; j += lanes) {
            const floats scale = load(keep + j);
            for (index v = 0; v < shape_.value; ++v) {
                store(sums + v * expanded_group + j, scale * load(sums + v * expanded_group + j));
            }
        }
        products_.mix(count, scores, sums);
    }

    expanded_shape shape_;
    const segment& segment_;
    index position_;
    Products products_;
    float *sums_, *most_, *total_, *rest_;
};

template <class Products, class Matrix>
void expanded_attend_segment(const expanded_attend_args<Matrix>& a, const segment& s, expanded_shape shape,
                             thread_pool& pool, arena& workspace) {
    const index heads = a.q.extent[1];
    const index parts = std::clamp((pool.size() - 1) / heads + 1, index{1}, shape.groups());
    const arena::scope scope(workspace);
    const auto memory = workspace.take<float>(pool.size(), expanded_attention<Products>::floats_per_thread(shape));
    pool.parallel([&](int thread, int threads) {
        const auto [first_task, count] = share_of(heads * parts, thread, threads);
        for (index task = first_task; task < first_task + count; ++task) {
            const auto [first, rows] =
                share_of(s.rows, static_cast<int>(task % parts), static_cast<int>(parts), expanded_group);
            const index head = task / parts;
            expanded_shape mine = shape;
            mine.rows = rows;
            expanded_attention<Products> attention(a, s, mine, head, first, memory[thread].data);
            attention.run(a.layout, a.layer, a.out.rows(s.first_row + first, rows).slice(head));
        }
    });
}

}  // namespace simd

/// Workspace that expanded_attend() takes.
inline index expanded_attend_scratch_bytes(const workspace_limits& limits, int threads) {
    const index position = limits.latent_width - limits.latent_rank;
    const simd::expanded_shape shape{limits.latent_rank, limits.mla_key - position, position, limits.mla_value,
                                     limits.rows};
    index floats = simd::expanded_attention<simd::expanded_in_vectors>::floats_per_thread(shape);
#if defined(KEEL_AMX)
    floats = std::max(floats, simd::expanded_attention<simd::expanded_in_tiles>::floats_per_thread(shape));
#endif
    return threads * floats * static_cast<index>(sizeof(float)) + arena::alignment;
}

/// Matrix: a matrix_view. Work is cut along heads, and along the queries where there are fewer heads than threads.
template <class Matrix>
void expanded_attend(const expanded_attend_args<Matrix>& a, thread_pool& pool, arena& workspace) {
    const index own = a.key_up.columns;
    for (const segment& s : a.segments) {
        const simd::expanded_shape shape{a.value_up.columns, own, a.q.extent[2] - own, a.value_up.rows, s.rows};
#if defined(KEEL_AMX)
        if (simd::expanded_in_tiles::fits(shape)) {
            simd::expanded_attend_segment<simd::expanded_in_tiles>(a, s, shape, pool, workspace);
            continue;
        }
#endif
        simd::expanded_attend_segment<simd::expanded_in_vectors>(a, s, shape, pool, workspace);
    }
}

}  // namespace keel::inline KEEL_ABI
