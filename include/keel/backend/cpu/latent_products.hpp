// SPDX-License-Identifier: MIT
//
// The products of absorbed attention with a tile of the latent cache: scores of its positions, and sums of its rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/amx.hpp>
#include <keel/backend/cpu/intrinsics.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/softmax.hpp>
#include <keel/backend/cpu/tile.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace simd {

/// Positions that are worked on together, counted from the start of the sequence; a block of the cache holds several.
inline constexpr index attention_tile = 64;
static_assert(memory_layout::block_rows % attention_tile == 0);

/// Positions are dealt out, a tile at a time, to so many parts that threads work on independently; which part a
/// position belongs to depends on nothing but the position.
inline constexpr index attention_parts = 16;

/// A row of queries, and whose cache it sees how much of.
struct latent_query {
    const segment* of = nullptr;
    index row = 0;      // in the batch
    index visible = 0;  // positions
};

/// What the products of a tile work on: H rounded up to lanes.
struct latent_shape {
    index heads, rank, width, lanes;

    /// From a head's sums to the next one's: a line of the cache more than R, which is a power of two as a rule, so
    /// that 32 heads of a column do not meet in a few sets.
    [[nodiscard]] index sums_row() const { return rank + 16; }
};

/// The products of a tile in f32; `query` is (R + P, lanes).
class latent_in_vectors {
public:
    static constexpr index floats_for(const latent_shape& s) { return attention_tile * s.width; }

    latent_in_vectors(const latent_shape& shape, const float* query, float* memory)
        : shape_(shape), query_(query), memory_(memory) {}

    /// `count` rows of the cache from position `first` on.
    const float* read(const latent_attend_args& a, const latent_query& q, index first, index count) {
        return latent_rows(a.layout, *q.of, a.layer, first, count, memory_);
    }

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

    /// mixed(h, .) = keep[h] mixed(h, .) + sum over p of weights(p, h) row_p; without `keep` it begins with zero. Rows
    /// of `mixed` are sums_row() apart.
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
                              .c_row = shape_.sums_row()};
        keep == nullptr ? multiply(p) : multiply_into(p, keep);
    }

private:
    latent_shape shape_;
    const float* query_;
    float* memory_;
};

#if defined(KEEL_AMX)

/// The same on the matrix unit, all operands split in two; a row of an f16 cache loses nothing. Both products read the
/// cache itself and split a block of it just before it is used: what they keep fits into the first cache.
class latent_in_tiles {
public:
    static bool fits(const latent_shape& s) {
        return s.heads % amx::block == 0 && s.rank % amx::block == 0 && s.width % amx::block == 0 && amx::permitted();
    }
    static constexpr index floats_for(const latent_shape& s) {
        return s.width * s.lanes + attention_tile * (s.width / 2 + 2 * s.lanes);
    }

    latent_in_tiles(const latent_shape& shape, const float* query, float* memory) : shape_(shape) {
        const auto take_split = [&](index n) {
            bf16* const of = reinterpret_cast<bf16*>(std::exchange(memory, memory + n));
            return amx::split{of, of + n};
        };
        query_ = take_split(shape.width * shape.lanes);
        weights_ = take_split(attention_tile * shape.lanes);
        turned_ = std::exchange(memory, memory + attention_tile * shape.lanes);
        padded_ = reinterpret_cast<f16*>(memory);
        for (index c = 0; c < shape.width; c += amx::block) {  // columns c + i and c + 16 + i are pairs
            for (index i = 0; i < amx::tile_rows; ++i) {
                const float* const row = query + (c + i) * shape.lanes;
                amx::split_pair(row, row + amx::tile_rows * shape.lanes, shape.lanes,
                                query_.from((c + 2 * i) * shape.lanes));
            }
        }
    }

    /// Rows of an f16 cache, completed with zeros where a tile ends early. score() will ask for the next tile's.
    const f16* read(const latent_attend_args& a, const latent_query& q, index first, index count) {
        const auto from = [&](index position) {
            return reinterpret_cast<const f16*>(a.layout.latent_row(q.of->blocks, a.layer, position));
        };
        const f16* const rows = from(first);
        const index next = first + attention_parts * attention_tile;
        next_ = next < q.visible ? from(next) : rows;
        if (count == attention_tile) return rows;
        std::copy_n(rows, count * shape_.width, padded_);
        std::fill_n(padded_ + count * shape_.width, (attention_tile - count) * shape_.width, f16{});
        return padded_;
    }

    void score(const f16* rows, index, float* scores) const {
        const index width = shape_.width;
        split_block block;
        for (index h = 0; h < shape_.lanes; h += amx::block) {
            for (index p = 0; p < attention_tile; p += amx::block) {
                amx::block_sum<false> sum(scores + p * shape_.lanes + h, shape_.lanes);
                for (index c = 0; c < width; c += amx::block) {
                    for (index i = 0; i < amx::block; ++i) {
                        const index at = (p + i) * width + c;
                        amx::pair_halves(rows + at, rows + at + amx::tile_rows, block.high[i], block.low[i]);
                        _mm_prefetch(reinterpret_cast<const char*>(next_ + at), _MM_HINT_T1);
                    }
                    sum.add(block.all(), amx::block, query_.from(c * shape_.lanes + 2 * h), 2 * shape_.lanes);
                }
            }
        }
    }

    void mix(const f16* rows, index count, float* weights, const float* keep, float* mixed) const {
        const index width = shape_.width, rank = shape_.rank, heads = shape_.heads, sums_row = shape_.sums_row();
        std::fill_n(weights + count * shape_.lanes, (attention_tile - count) * shape_.lanes, 0.0f);
        for (index p = 0; p < attention_tile; p += 16) {
            for (index h = 0; h < heads; h += 16) {
                amx::transpose(weights + p * shape_.lanes + h, shape_.lanes, turned_ + h * attention_tile + p,
                               attention_tile);
            }
        }
        for (index h = 0; h < heads; ++h) {
            amx::split_row(turned_ + h * attention_tile, attention_tile, weights_.from(h * attention_tile));
            float* const sums = mixed + h * sums_row;
            if (keep == nullptr) {
                std::fill_n(sums, rank, 0.0f);
            } else if (keep[h] != 1) {  // seldom, once many positions have been seen
                for (index c = 0; c < rank; c += lanes) store(sums + c, floats(keep[h]) * load(sums + c));
            }
        }
        split_block block;
        for (index h = 0; h < heads; h += amx::block) {
            for (index c = 0; c < rank; c += amx::block) {
                amx::block_sum<true> sum(mixed + h * sums_row + c, sums_row);
                for (index p = 0; p < attention_tile; p += amx::block) {
                    for (index i = 0; i < amx::block; ++i) {
                        const f16* const row = rows + (p + i / 2 * 2) * width + c + i % 2 * amx::tile_rows;
                        amx::pair_halves(row, row + width, block.high[i], block.low[i]);
                    }
                    sum.add(weights_.from(h * attention_tile + p), attention_tile, block.all(), 2 * amx::block);
                }
            }
        }
    }

private:
    /// A block as left operand, or as the pairs of rows of a right one.
    struct split_block {
        alignas(64) bf16 high[amx::block][amx::block];
        alignas(64) bf16 low[amx::block][amx::block];
        amx::split all() { return {high[0], low[0]}; }
    };

    amx::session session_;
    latent_shape shape_;
    amx::split query_, weights_;
    float* turned_;
    f16* padded_;
    const f16* next_ = nullptr;
};

#endif

}  // namespace simd
}  // namespace keel::inline KEEL_ABI
