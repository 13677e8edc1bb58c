// SPDX-License-Identifier: MIT
//
// Quantised weights that were laid out anew at loading: tiles of as many rows as tile_lanes has, one after another, so
// that a thread reads one long stream, and no product has to bring rows side by side first.
//
//   tile   spans of 256 columns, each: d and dmin of the rows (f16, the types with blocks of 256), then its parts
//   part   32 columns: scales (a byte per group and row, or one f16 per row), minimums (a byte per row), then codes
//   codes  in steps of four columns of all rows, (rows, 4): of 4 bits two steps in one byte; of 5 the same, and the
//          upper bits of all steps behind them in one; of 6 three steps, and a fourth in their two upper bits; of 8 as
//          they are
//
// They take as much memory as in the file, but for Q4_K and Q5_K, whose scales and minimums of 6 bits become bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include <keel/backend/cpu/bytes.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/backend/cpu/gemm.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/cpu/tile_lanes.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Whether weights of a type can be interleaved.
template <class Block>
inline constexpr bool interleaves = Block::type == dtype::q4_k || Block::type == dtype::q5_k ||
                                    Block::type == dtype::q6_k || Block::type == dtype::q8_0;

/// Where things are in a tile, in bytes.
template <class Block>
struct tile_layout {
    static constexpr index rows = tile_lanes::rows;
    static constexpr int groups = part_columns / codes<Block>::group;
    static constexpr int steps = part_columns / 4 / groups;  // of a group
    static constexpr index step_bytes = 4 * rows;
    static constexpr bool has_spans = Block::elements == span_columns;
    static constexpr int bits = codes<Block>::bits;

    static constexpr index code_bytes = part_columns * rows * bits / 8;
    static constexpr index factor_bytes = has_spans ? (groups + codes<Block>::has_min) * rows : 2 * rows;
    static constexpr index part_bytes = factor_bytes + code_bytes;
    static constexpr index head_bytes = has_spans ? (1 + codes<Block>::has_min) * 2 * rows : 0;

    /// Bytes in front of part `p`, the head of its span not being among them if the span begins with it.
    static constexpr index offset(index p) { return p * part_bytes + (p + span_parts - 1) / span_parts * head_bytes; }
    static constexpr index bytes(index columns) { return offset(columns / part_columns); }
};

/// unpacked_reader for such a tile.
template <class Block>
class tile_reader {
    using layout = tile_layout<Block>;
    using lanes = tile_lanes;

public:
    explicit tile_reader(const std::byte* tile) : next_(reinterpret_cast<const std::uint8_t*>(tile)) {}

    void enter(index part) {
        if constexpr (layout::has_spans) {
            if (part % span_parts == 0) {
                scale_ = lanes::floats_of_halves(next_);
                if constexpr (codes<Block>::has_min) min_ = lanes::floats_of_halves(next_ + 2 * layout::rows);
                next_ += layout::head_bytes;
            }
        }
        // Far ahead into the second cache, and from there into the first, which cannot wait for as much at a time.
        for (index i = 0; i < layout::part_bytes; i += 64) {
            __builtin_prefetch(next_ + 8192 + i, 0, 2);
            __builtin_prefetch(next_ + 1024 + i, 0, 3);
        }
        part_ = next_;
        next_ += layout::part_bytes;
    }

    template <int K, int Steps>
    void read(lanes::codes* code, lanes::floats& factor, lanes::floats& least) const {
        if constexpr (!layout::has_spans) {
            factor = lanes::floats_of_halves(part_);
        } else if constexpr (codes<Block>::has_min) {
            factor = lanes::multiply(scale_, lanes::floats_of(part_));
            least = lanes::multiply(min_, lanes::floats_of(part_ + layout::rows));
        } else {
            const auto* const scales = reinterpret_cast<const std::int8_t*>(part_);
            factor = lanes::multiply(scale_, lanes::floats_of(scales + K * layout::rows));
        }
        if constexpr (has_minimums<Block> && !codes<Block>::has_min) {
            least = lanes::multiply(factor, lanes::splat(static_cast<float>(bias_of<Block>)));
        }
        const auto byte = [&](int i) {
            return lanes::load_codes(part_ + layout::factor_bytes + i * layout::step_bytes);
        };
        unrolled<Steps>([&]<int S>() {
            constexpr int shift = S % 2 * 4;
            if constexpr (layout::bits == 4) {
                code[S] = lanes::template field<shift, 15>(byte(S / 2));
            } else if constexpr (layout::bits == 5) {
                code[S] = lanes::template join<shift, 15, S - 4, 16>(byte(S / 2), byte(Steps / 2));
            } else if constexpr (layout::bits == 6 && S % 4 < 3) {
                code[S] = lanes::template field<0, 63>(byte(K * 3 + S));
            } else if constexpr (layout::bits == 6) {
                const auto low = lanes::template join<6, 3, 4, 12>(byte(K * 3), byte(K * 3 + 1));
                code[S] = lanes::template join<0, 15, 2, 48>(low, byte(K * 3 + 2));
            } else {
                code[S] = byte(S);
            }
        });
    }

private:
    const std::uint8_t* next_;
    const std::uint8_t* part_ = nullptr;
    lanes::floats scale_ = lanes::zero(), min_ = lanes::zero();
};

/// Lays out the codes of a part, (rows, 32).
template <class Block>
void interleave_codes(const std::uint8_t* rows_of_32, std::uint8_t* to) {
    using layout = tile_layout<Block>;
    std::uint8_t step[part_columns / 4][layout::step_bytes];
    tile_lanes::transpose(rows_of_32, step[0]);
    std::memset(to, 0, layout::code_bytes);
    // Some bits of the codes of a step, into one of the vectors.
    const auto put = [&](int vector, int shift, int s, int first, int count) {
        for (index i = 0; i < layout::step_bytes; ++i) {
            const int field = (step[s][i] >> first) & ((1 << count) - 1);
            to[vector * layout::step_bytes + i] |= static_cast<std::uint8_t>(field << shift);
        }
    };
    for (int s = 0; s < part_columns / 4; ++s) {
        if constexpr (layout::bits <= 5) put(s / 2, s % 2 * 4, s, 0, 4);
        if constexpr (layout::bits == 5) put(part_columns / 8, s, s, 4, 1);
        if constexpr (layout::bits == 6) {
            const int first = s / 4 * 3;
            if (s % 4 < 3) put(first + s % 4, 0, s, 0, 6);
            if (s % 4 == 3) {
                for (int k = 0; k < 3; ++k) put(first + k, 6, s, 2 * k, 2);
            }
        }
        if constexpr (layout::bits == 8) put(s, 0, s, 0, 8);
    }
}

/// Lays out a tile: rows that begin with *w, `stride` blocks apart.
template <class Block>
void interleave_tile(const Block* w, index stride, index columns, std::byte* tile) {
    using layout = tile_layout<Block>;
    constexpr index rows = layout::rows;
    auto* to = reinterpret_cast<std::uint8_t*>(tile);
    const auto put = [](std::uint8_t* at, const auto& value) { std::memcpy(at, &value, sizeof(value)); };
    alignas(64) std::uint8_t code[rows][part_columns];
    if constexpr (!layout::has_spans) {
        for (index p = 0; p < columns / part_columns; ++p, ++w, to += layout::part_bytes) {
            for (index r = 0; r < rows; ++r) {
                put(to + 2 * r, w[r * stride].d);
                simd::store_bytes(code[r], span_codes<Block, 0>(w + r * stride));
            }
            interleave_codes<Block>(code[0], to + layout::factor_bytes);
        }
    } else {
        for (index s = 0; s < columns / span_columns; ++s, ++w) {
            std::uint8_t scales[rows][16];  // and minimums
            for (index r = 0; r < rows; ++r) {
                const Block& b = w[r * stride];
                put(to + 2 * r, b.d);
                if constexpr (codes<Block>::has_min) {
                    put(to + 2 * (rows + r), b.dmin);
                    put(scales[r], unpack(b.scales));
                } else {
                    put(scales[r], b.scales);
                }
            }
            to += layout::head_bytes;
            unrolled<span_parts>([&]<int P>() {
                for (index r = 0; r < rows; ++r) {
                    if constexpr (codes<Block>::has_min) {
                        to[r] = scales[r][P];
                        to[rows + r] = scales[r][span_parts + P];
                    } else {
                        for (int k = 0; k < layout::groups; ++k) to[k * rows + r] = scales[r][P * layout::groups + k];
                    }
                    simd::store_bytes(code[r], span_codes<Block, P>(w + r * stride));
                }
                interleave_codes<Block>(code[0], to + layout::factor_bytes);
                to += layout::part_bytes;
            });
        }
    }
}

/// Weight rows that are shared out together: whole tiles on every instruction set.
inline constexpr index unit_rows = 32;
static_assert(unit_rows % tile_lanes::rows == 0);

/// Bytes of a row of interleaved weights, on average of its tile; 0 for what is used as it lies in the file: other
/// types, and matrices that do not consist of whole units.
inline index interleaved_row_bytes(const matrix_view& w) {
    return visit_blocks(w.type, [&]<class Block>() -> index {
        if constexpr (interleaves<Block>) {
            if (w.rows % unit_rows == 0) return tile_layout<Block>::bytes(w.columns) / tile_lanes::rows;
        }
        return 0;
    });
}

/// Rows of weights as a product takes them: as they lie in a file, or interleaved.
struct weight_rows : matrix_view {
    bool interleaved = false;

    template <class Matrix>
    static weight_rows of(const Matrix& w) {
        if constexpr (requires { w.interleaved; }) return {w, w.interleaved};
        return {w};
    }

    /// Matrix `m` of the `count`.
    [[nodiscard]] weight_rows matrix(index m) const {
        weight_rows one{matrix_view::matrix(m), interleaved};
        if (interleaved) one.data = data + m * rows * interleaved_row_bytes(*this);
        return one;
    }
};

/// Rows of activations as multiply_parts takes them: `count` rows of byte_rows, of the numbers row[0], row[1], ...
template <class Block>
class chosen_rows {
public:
    chosen_rows(const byte_rows& rows, const index* row, index count) {
        for (index t = 0; t < count; ++t) {
            rows_[t] = {rows.code[row[t]].data, rows.rest[row[t]].data, rows.scale[row[t]].data,
                        rows.template minimum_factors<Block>()[row[t]].data};
        }
    }

    [[nodiscard]] const std::int8_t* codes_of(int t, index p) const { return rows_[t].code + p * part_columns; }
    [[nodiscard]] const std::int8_t* rests_of(int t, index p) const { return rows_[t].rest + p * part_columns; }
    [[nodiscard]] float scale_of(int t, index p) const { return rows_[t].scale[p]; }
    template <class, bool Rests>
    [[nodiscard]] float minimum_factor(int t, index g) const {
        static_assert(Rests == takes_rests<Block>);
        return rows_[t].minimum[g];
    }

private:
    struct {
        const std::int8_t *code, *rest;
        const float *scale, *minimum;
    } rows_[few_rows];
};

/// sums[k][t][r] = row r of tile k times row t of x, for `Tiles` tiles. They take turns: memory likes to be read in
/// more than one long stream.
template <class Block, bool Rests, int Tiles, class Rows>
void multiply_interleaved(const std::byte* const (&tile)[Tiles], index columns, const Rows& x, int count,
                          tile_sums (&sums)[Tiles]) {
    const index parts = columns / part_columns;
    const auto run = [&]<int... K>(std::integer_sequence<int, K...>) {
        tile_reader<Block> reader[] = {tile_reader<Block>(tile[K])...};
        for (index p = 0; p < parts; p += span_parts) {
            (multiply_parts<Block, Rests>(reader[K], x, p, std::min<index>(parts, p + span_parts), count, sums[K]),
             ...);
        }
    };
    for (auto& of_tile : sums) {
        for (int t = 0; t < count; ++t) tile_lanes::store(of_tile[t], tile_lanes::zero());
    }
    run(std::make_integer_sequence<int, Tiles>{});
}

}  // namespace detail

/// Lays out weights anew; to: count * rows * detail::interleaved_row_bytes(w) bytes.
inline void interleave(const matrix_view& w, std::byte* to, thread_pool& pool) {
    visit_blocks(w.type, [&]<class Block>() {
        if constexpr (detail::interleaves<Block>) {
            constexpr index rows = detail::tile_lanes::rows;
            const index tile_bytes = detail::tile_layout<Block>::bytes(w.columns);
            pool.parallel_for(w.count * w.rows / rows, [&](index i) {
                const auto* const blocks = reinterpret_cast<const Block*>(w.row(i * rows));
                detail::interleave_tile(blocks, w.columns / Block::elements, w.columns, to + i * tile_bytes);
            });
        }
    });
}

}  // namespace keel::inline KEEL_ABI
