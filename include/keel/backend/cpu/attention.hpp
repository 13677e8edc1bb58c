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

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/expanded.hpp>
#include <keel/backend/cpu/latent_products.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/softmax.hpp>
#include <keel/backend/cpu/threads.hpp>
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

/// From how many positions on it pays to split operands for the matrix unit: one full tile.
inline constexpr index matrix_unit_from = attention_tile;

/// Rows of queries that are in the workspace together.
inline constexpr index attention_rows = 8;

constexpr index in_lanes(index n) { return (n + lanes - 1) / lanes * lanes; }

inline index tiles(index positions) { return (positions + attention_tile - 1) / attention_tile; }

/// Absorbed attention of up to attention_rows rows: what they share, and the three steps, each of independent tasks.
class latent_attention {
public:
    static index scratch_bytes(const workspace_limits& limits, int threads) {
        const latent_shape s{limits.heads, limits.latent_rank, limits.latent_width, in_lanes(limits.heads)};
        const index per_row = s.width * s.lanes + attention_parts * (s.heads * s.sums_row() + 2 * s.lanes);
        return (attention_rows * per_row + threads * floats_per_thread(s)) * static_cast<index>(sizeof(float)) +
               5 * arena::alignment;
    }

    latent_attention(const latent_attend_args& args, int threads, arena& workspace)
        : args_(args),
          shape_{args.q_latent.extent[1], args.q_latent.extent[2], args.layout.latent_width,
                 in_lanes(args.q_latent.extent[1])},
          transposed_(workspace.take<float>(attention_rows, shape_.width, shape_.lanes)),
          mixed_(workspace.take<float>(attention_rows, attention_parts, shape_.heads, shape_.sums_row())),
          most_(workspace.take<float>(attention_rows, attention_parts, shape_.lanes)),
          total_(workspace.take<float>(attention_rows, attention_parts, shape_.lanes)),
          memory_(workspace.take<float>(threads, floats_per_thread(shape_))) {
#if defined(KEEL_AMX)
        in_tiles_ = args.layout.cache == dtype::f16 && latent_in_tiles::fits(shape_);
#endif
    }

    /// The scaled query of row `r` as (latent and position part, heads): entries [first, first + count).
    void transpose(const latent_query& q, index r, index first, index count) const {
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
    void attend(const latent_query& q, index r, index part, int thread) const {
#if defined(KEEL_AMX)
        if (in_tiles_ && q.visible >= matrix_unit_from) return attend_with<latent_in_tiles>(q, r, part, thread);
#endif
        attend_with<latent_in_vectors>(q, r, part, thread);
    }

    /// The parts of row `r` and head `h` put together.
    void combine(const latent_query& q, index r, index h) const {
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
        return attention_tile * s.lanes + s.lanes + products;
    }

    template <class Products>
    void attend_with(const latent_query& q, index r, index part, int thread) const {
        float* const scores = memory_[thread].data;
        float* const keep = scores + attention_tile * shape_.lanes;
        float* const most = &most_(r, part, 0);
        float* const total = &total_(r, part, 0);
        float* const mixed = &mixed_(r, part, 0, 0);
        Products products(shape_, &transposed_(r, 0, 0), keep + shape_.lanes);
        std::fill_n(most, shape_.lanes, -std::numeric_limits<float>::infinity());
        std::fill_n(total, shape_.lanes, 0.0f);
        for (index tile = part; tile < tiles(q.visible); tile += attention_parts) {
            const index first = tile * attention_tile;
            const index count = std::min(attention_tile, q.visible - first);
            const auto* const rows = products.read(args_, q, first, count);
            products.score(rows, count, scores);
            running_softmax(scores, count, shape_.lanes, most, total, keep);
            products.mix(rows, count, scores, tile == part ? nullptr : keep, mixed);
        }
    }

    const latent_attend_args& args_;
    latent_shape shape_;
    [[maybe_unused]] bool in_tiles_ = false;
    view<float, 3> transposed_;  // (rows, R + P, lanes)
    view<float, 4> mixed_;       // (rows, parts, H, R and more): sum of weights and latents, not yet divided
    view<float, 3> most_;        // (rows, parts, lanes): largest score
    view<float, 3> total_;       // (rows, parts, lanes): sum of the weights
    view<float, 2> memory_;      // per thread: scores of a tile, what a new largest scales with, products'
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

    simd::latent_query rows[simd::attention_rows];
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
