// SPDX-License-Identifier: MIT
//
// Latent attention over the cache: rows go in, and the absorbed form for few queries; expanded.hpp has the form for
// many. Work is cut so that each score is one lane of a register, and no step sums across lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <utility>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/amx.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/expanded.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/softmax.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/cpu/tile.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

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

/// Positions that are worked on together, counted from the start of the sequence; a block of the cache holds several.
inline constexpr index attention_tile = 64;
static_assert(memory_layout::block_rows % attention_tile == 0);

/// Positions are dealt out, a tile at a time, to so many parts that threads work on independently; which part a
/// position belongs to depends on nothing but the position.
inline constexpr index attention_parts = 16;

/// From how many positions on it pays to split operands for the matrix unit.
inline constexpr index matrix_unit_from = 512;

/// Rows of queries that are in the workspace together.
inline constexpr index attention_rows = 8;

constexpr index in_lanes(index n) { return (n + lanes - 1) / lanes * lanes; }

inline index tiles(index positions) { return (positions + attention_tile - 1) / attention_tile; }

/// What the products of a tile work on: H rounded up to lanes.
struct latent_shape {
    index heads, rank, width, lanes;
};

/// The products of a tile in f32; `query` is (R + P, lanes).
class latent_in_vectors {
public:
    static constexpr index floats_for(const latent_shape&) { return 0; }

    latent_in_vectors(const latent_shape& shape, const float* query, float*) : shape_(shape), query_(query) {}

    /// scores(p, h) = row_p query_h for `count` rows of the cache
    void score(const float* rows, index count, float* scores) const {
        multiply({.rows = count,
                  .columns = shape_.lanes,
                  .depth = shape_.width,
                  .a = rows,
                  .a_row = shape_.width,
                  .a_step = 1,
                  .b = query_,
                  .b_step = shape_.lanes,
                  .c = scores,
                  .c_row = shape_.lanes});
    }

    /// mixed(h, .) = keep[h] mixed(h, .) + sum over p of weights(p, h) row_p; without `keep` it begins with zero.
    void mix(const float* rows, index count, const float* weights, const float* keep, float* mixed) const {
        const small_product p{.rows = shape_.heads,
                              .columns = shape_.rank,
                              .depth = count,
                              .a = weights,
                              .a_row = 1,
                              .a_step = shape_.lanes,
                              .b = rows,
                              .b_step = shape_.width,
                              .c = mixed,
                              .c_row = shape_.rank};
        keep == nullptr ? multiply(p) : multiply_into(p, keep);
    }

private:
    latent_shape shape_;
    const float* query_;
};

#if defined(KEEL_AMX)

/// The same on the matrix unit, all operands split in two (a row of an f16 cache loses nothing). Where a tile of the
/// cache ends early, rows and weights are completed with zeros.
class latent_in_tiles {
public:
    static bool fits(const latent_shape& s) {
        return s.heads % amx::block == 0 && s.rank % amx::block == 0 && s.width % amx::block == 0 && amx::permitted();
    }
    static constexpr index floats_for(const latent_shape& s) {
        return s.width * s.lanes + attention_tile * (s.width + s.rank + 2 * s.lanes);
    }

    latent_in_tiles(const latent_shape& shape, const float* query, float* memory) : shape_(shape) {
        const auto take_split = [&](index n) {
            bf16* const of = reinterpret_cast<bf16*>(std::exchange(memory, memory + n));
            return amx::split{of, of + n};
        };
        query_ = take_split(shape.width * shape.lanes);
        rows_ = take_split(attention_tile * shape.width);
        row_pairs_ = take_split(attention_tile * shape.rank);
        weights_ = take_split(attention_tile * shape.lanes);
        turned_ = memory;
        for (index c = 0; c < shape.width; c += 2) {
            const float* const row = query + c * shape.lanes;
            amx::split_pair(row, row + shape.lanes, shape.lanes, query_.from(c * shape.lanes));
        }
    }

    /// `rows` is the thread's copy of a tile of an f16 cache.
    void score(float* rows, index count, float* scores) const {
        const index width = shape_.width;
        std::fill_n(rows + count * width, (attention_tile - count) * width, 0.0f);
        for (index p = 0; p < attention_tile; ++p) amx::split_row(rows + p * width, width, rows_.from(p * width));
        amx::multiply<false>({.rows = attention_tile,
                              .columns = shape_.lanes,
                              .depth = width,
                              .a = rows_,
                              .a_row = width,
                              .b = query_,
                              .b_row = 2 * shape_.lanes,
                              .c = scores,
                              .c_row = shape_.lanes});
    }

    void mix(const float* rows, index count, float* weights, const float* keep, float* mixed) const {
        const index width = shape_.width, rank = shape_.rank, heads = shape_.heads;
        std::fill_n(weights + count * shape_.lanes, (attention_tile - count) * shape_.lanes, 0.0f);
        for (index p = 0; p < attention_tile; p += 16) {
            for (index h = 0; h < heads; h += 16) {
                amx::transpose(weights + p * shape_.lanes + h, shape_.lanes, turned_ + h * attention_tile + p,
                               attention_tile);
            }
        }
        for (index h = 0; h < heads; ++h) {
            amx::split_row(turned_ + h * attention_tile, attention_tile, weights_.from(h * attention_tile));
            const floats scale(keep == nullptr ? 0.0f : keep[h]);
            float* const row = mixed + h * rank;
            for (index c = 0; c < rank; c += lanes) {
                store(row + c, keep == nullptr ? floats(0.0f) : scale * load(row + c));
            }
        }
        for (index p = 0; p < attention_tile; p += 2) {
            amx::split_pair(rows + p * width, rows + (p + 1) * width, rank, row_pairs_.from(p * rank));
        }
        amx::multiply<true>({.rows = heads,
                             .columns = rank,
                             .depth = attention_tile,
                             .a = weights_,
                             .a_row = attention_tile,
                             .b = row_pairs_,
                             .b_row = 2 * rank,
                             .c = mixed,
                             .c_row = rank});
    }

private:
    amx::session session_;
    latent_shape shape_;
    amx::split query_, rows_, row_pairs_, weights_;
    float* turned_;
};

#endif

/// Absorbed attention of up to attention_rows rows: what they share, and the three steps, each of independent tasks.
class latent_attention {
public:
    struct query {
        const segment* of = nullptr;
        index row = 0;      // in the batch
        index visible = 0;  // positions
    };

    static index scratch_bytes(const workspace_limits& limits, int threads) {
        const latent_shape s{limits.heads, limits.latent_rank, limits.latent_width, in_lanes(limits.heads)};
        const index per_row = s.width * s.lanes + attention_parts * (s.heads * s.rank + 2 * s.lanes);
        return (attention_rows * per_row + threads * floats_per_thread(s)) * static_cast<index>(sizeof(float)) +
               5 * arena::alignment;
    }

    latent_attention(const latent_attend_args& args, int threads, arena& workspace)
        : args_(args),
          shape_{args.q_latent.extent[1], args.q_latent.extent[2], args.layout.latent_width,
                 in_lanes(args.q_latent.extent[1])},
          transposed_(workspace.take<float>(attention_rows, shape_.width, shape_.lanes)),
          mixed_(workspace.take<float>(attention_rows, attention_parts, shape_.heads, shape_.rank)),
          most_(workspace.take<float>(attention_rows, attention_parts, shape_.lanes)),
          total_(workspace.take<float>(attention_rows, attention_parts, shape_.lanes)),
          memory_(workspace.take<float>(threads, floats_per_thread(shape_))) {
#if defined(KEEL_AMX)
        in_tiles_ = args.layout.cache == dtype::f16 && latent_in_tiles::fits(shape_);
#endif
    }

    /// The scaled query of row `r` as (latent and position part, heads): entries [first, first + count).
    void transpose(const query& q, index r, index first, index count) const {
        for (index c = first; c < first + count; ++c) {
            const bool latent = c < shape_.rank;
            const view<const float, 2> from = latent ? args_.q_latent[q.row] : args_.q_position[q.row];
            const float* const column = from.data + (latent ? c : c - shape_.rank);
            float* const to = &transposed_(r, c, 0);
            for (index h = 0; h < shape_.heads; ++h) to[h] = args_.scale * column[h * from.stride[0]];
            std::fill(to + shape_.heads, to + shape_.lanes, 0.0f);
        }
    }

    /// Row `r` over its positions of part `part`. An f32 cache promises the accuracy of f32 products.
    void attend(const query& q, index r, index part, int thread) const {
#if defined(KEEL_AMX)
        if (in_tiles_ && q.visible >= matrix_unit_from) return attend_with<latent_in_tiles>(q, r, part, thread);
#endif
        attend_with<latent_in_vectors>(q, r, part, thread);
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
        for_lanes(shape_.rank, [&](index c, auto load, auto store) {
            floats mixed(0.0f);
            for (index part = 0; part < parts; ++part) {
                mixed = fma(floats(weight[part]), load(&mixed_(r, part, h, c)), mixed);
            }
            store(out + c, mixed);
        });
    }

    [[nodiscard]] index heads() const { return shape_.heads; }
    [[nodiscard]] index width() const { return shape_.width; }

private:
    static index floats_per_thread(const latent_shape& s) {
        index products = latent_in_vectors::floats_for(s);
#if defined(KEEL_AMX)
        products = std::max(products, latent_in_tiles::floats_for(s));
#endif
        return attention_tile * (s.width + s.lanes) + s.lanes + products;
    }

    template <class Products>
    void attend_with(const query& q, index r, index part, int thread) const {
        float* const memory = memory_[thread].data;
        float* const scores = memory + attention_tile * shape_.width;
        float* const keep = scores + attention_tile * shape_.lanes;
        float* const most = &most_(r, part, 0);
        float* const total = &total_(r, part, 0);
        float* const mixed = &mixed_(r, part, 0, 0);
        const Products products(shape_, &transposed_(r, 0, 0), keep + shape_.lanes);
        std::fill_n(most, shape_.lanes, -std::numeric_limits<float>::infinity());
        std::fill_n(total, shape_.lanes, 0.0f);
        for (index tile = part; tile < tiles(q.visible); tile += attention_parts) {
            const index first = tile * attention_tile;
            const index count = std::min(attention_tile, q.visible - first);
            float* const rows = latent_rows(args_.layout, *q.of, args_.layer, first, count, memory);
            products.score(rows, count, scores);
            running_softmax(scores, count, shape_.lanes, most, total, keep);
            products.mix(rows, count, scores, tile == part ? nullptr : keep, mixed);
        }
    }

    const latent_attend_args& args_;
    latent_shape shape_;
    [[maybe_unused]] bool in_tiles_ = false;
    view<float, 3> transposed_;  // (rows, R + P, lanes)
    view<float, 4> mixed_;       // (rows, parts, H, R): sum of weights and latents, not yet divided
    view<float, 3> most_;        // (rows, parts, lanes): largest score
    view<float, 3> total_;       // (rows, parts, lanes): sum of the weights
    view<float, 2> memory_;  // per thread: a tile of the cache, its scores, what a new largest scales with, products'
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

}  // namespace keel::inline KEEL_ABI
