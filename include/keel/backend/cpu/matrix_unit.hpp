// SPDX-License-Identifier: MIT
//
// Products of weight rows with many activation rows on Intel's matrix unit. Weights become bf16, scales and minimums
// included, as they lie: a row of 32 columns is a row of a left operand, so that nothing is transposed. Activations are
// right operands, pairs of columns side by side. Interleaved weights are right operands, and activations left ones.
// Both are rounded once, to 8 bits; sums are f32.
#pragma once

#include <keel/backend/cpu/amx.hpp>

#if defined(KEEL_AMX)

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <keel/backend/cpu/codes.hpp>
#include <keel/backend/cpu/dot.hpp>
#include <keel/backend/cpu/interleaved.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Rows of activations in panels of 16 rows. Per panel and part of 32 columns a right operand, (16 pairs of columns, 16
/// rows, 2), or a left one, (16 rows, 32).
struct half_panels {
    static constexpr int rows = 16;
    static constexpr index part_size = rows * part_columns;

    index parts = 0;
    bf16* value = nullptr;

    static constexpr index count(index n) { return (n + rows - 1) / rows; }

    static half_panels take(arena& memory, index n, index columns) {
        return {columns / part_columns, memory.take<bf16>(count(n) * rows * columns).data};
    }
    static constexpr index bytes(index n, index columns) {
        return count(n) * rows * columns * static_cast<index>(sizeof(bf16)) + arena::alignment;
    }

    [[nodiscard]] bf16* panel(index p) const { return value + p * parts * part_size; }

    /// Fills panel `p` with rows source(0), ..., source(n - 1), and zeros.
    template <class F>
    void fill(index p, int n, bool left, F&& source) const {
        alignas(64) std::uint32_t pairs[rows][rows];
        std::memset(pairs, 0, sizeof(pairs));
        const float* row[rows];
        for (int i = 0; i < n; ++i) row[i] = source(i);
        bf16* to = panel(p);
        for (index part = 0; part < parts; ++part, to += part_size) {
            for (int i = 0; i < n; ++i) {
                const float* const x = row[i] + part * part_columns;
                _mm512_store_si512(pairs[i], amx::halves_of(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)));
            }
            if (left) {
                std::memcpy(to, pairs, sizeof(pairs));
            } else {
                amx::transpose(reinterpret_cast<const float*>(pairs), rows, reinterpret_cast<float*>(to), rows);
            }
        }
    }
};

/// 32 weights, the columns of part P, given the factors of their span.
template <class Block, int P>
void store_part(const Block* b, const float* scale, const float* min, bf16* to) {
    constexpr int group = codes<Block>::group;
    const __m256i code = span_codes<Block, P>(b).v;
    const auto weights = [&](int half, __m512 codes) {
        const int k = (P * part_columns + half * 16) / group;
        const __m512 s = _mm512_set1_ps(scale[k]);
        if constexpr (has_minimums<Block>) return _mm512_fmsub_ps(codes, s, _mm512_set1_ps(min[k]));
        return _mm512_mul_ps(codes, s);
    };
    if constexpr (codes<Block>::bits <= 5 && group == part_columns) {
        // Few codes: what each of them means, looked up.
        alignas(64) static constexpr float all[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                      16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
        const __m512 low = weights(0, _mm512_load_ps(all));
        const __m512i table = codes<Block>::bits <= 4
                                  ? _mm512_castsi256_si512(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)))
                                  : amx::halves_of(low, weights(0, _mm512_load_ps(all + 16)));
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(code), table));
    } else {
        const auto floats = [](__m128i c) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(c)); };
        _mm512_storeu_si512(to, amx::halves_of(weights(0, floats(_mm256_castsi256_si128(code))),
                                               weights(1, floats(_mm256_extracti128_si256(code, 1)))));
    }
}

/// How a product with n activation rows goes through its weights: `columns` columns of 32 rows become a block, which
/// meets all activations; and `blocks` blocks of the same columns have their turn before the next columns do. Of many
/// activations only some columns fit into the second cache, so that these are used for several blocks. For few, it is
/// the weights that take time.
struct weight_walk {
    index columns, blocks;
};
constexpr weight_walk walk_for(index n) { return n > 64 ? weight_walk{512, 4} : weight_walk{2560, 1}; }

/// Which rows of a matrix a block has: runs of 8 rows, `apart` rows from each other. Where reading the weights is what
/// takes time, these are far apart, for memory likes to be read in a few long streams.
struct block_rows {
    static constexpr index run = 8, most = 4 * run;

    index first, apart, count;

    /// Block k of the rows [first, last).
    static constexpr block_rows at(index k, index first, index last, bool far_apart) {
        const index full = (last - first) / most, before = k * most;
        if (k == full || !far_apart) return {first + before, run, std::min(most, last - first - before)};
        return {first + k * run, full * run, most};
    }

    [[nodiscard]] constexpr index row(index i) const { return first + i / run * apart + i % run; }
};

/// A block of weights as left operands, (parts of 32 columns, rows, 32).
struct weight_block {
    static constexpr index rows = block_rows::most;
    static_assert(rows == 2 * amx::tile_rows);

    bf16* value;

    /// Converts the first `n` columns at *w; rows are `stride` blocks apart. The runs take turns.
    template <class Block>
    void fill(const Block* w, index stride, const block_rows& from, index n) const {
        for (index r = 0; r < block_rows::run; ++r) {
            for (index c = 0; c < n; c += span_columns) {
                const index parts = std::min<index>(span_parts, (n - c) / part_columns);
                for (index i = r; i < from.count; i += block_rows::run) {
                    const Block* const b = w + from.row(i) * stride + c / Block::elements;
                    prefetch_after(b);
                    fill_span(b, parts, value + (c / part_columns * rows + i) * part_columns);
                }
            }
        }
    }

    /// Converts the first `n` columns of what the reader of a tile comes to next, as right operands: per part and 16
    /// rows (16 pairs of columns, 16 rows, 2).
    template <class Block>
    void fill(tile_reader<Block> from, index n) const {
        constexpr int groups = tile_layout<Block>::groups, steps = tile_layout<Block>::steps;
        bf16* to = value;
        for (index part = 0; part < n / part_columns; ++part, to += next_part) {
            from.enter(part);
            unrolled<groups>([&]<int K>() {
                tile_lanes::codes code[steps];
                tile_lanes::floats factor, least;
                from.template read<K, steps>(code, factor, least);
                for (int s = 0; s < steps; ++s) {
                    bf16* const pairs = to + (K * steps + s) * 2 * part_columns;
                    store_pairs(code[s].low, factor.low, least.low, pairs);
                    store_pairs(code[s].high, factor.high, least.high, pairs + next_part / 2);
                }
            });
        }
    }

private:
    static constexpr index next_part = rows * part_columns;

    /// Four columns of 16 rows: two pairs.
    static void store_pairs(__m512i codes, __m512 factor, __m512 least, bf16* to) {
        const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                                      7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const auto weights = [&]<int Byte>() {
            const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * Byte), _mm512_set1_epi32(255));
            return _mm512_fmsub_ps(_mm512_cvtepi32_ps(code), factor, least);
        };
        const auto store = [&](index pair, __m512 even, __m512 odd) {
            const __m512i both = _mm512_permutexvar_epi16(side_by_side, amx::halves_of(even, odd));
            _mm512_storeu_si512(to + pair * part_columns, both);
        };
        store(0, weights.template operator()<0>(), weights.template operator()<1>());
        store(1, weights.template operator()<2>(), weights.template operator()<3>());
    }

    template <class Block>
    static void fill_span(const Block* b, index parts, bf16* to) {
        if constexpr (is_float_block<Block>) {
            for (; parts > 0; --parts, b += part_columns, to += next_part) {
                _mm512_storeu_si512(to, _mm512_loadu_si512(b));
            }
        } else {
            alignas(64) float scale[16], min[16];
            if (parts == span_parts) {
                span_factors(b, scale, min);
                amx::finish_stores();  // a factor for all lanes comes from memory for nothing, and from a register not
                unrolled<span_parts>([&]<int P>() { store_part<Block, P>(b, scale, min, to + P * next_part); });
            } else if constexpr (Block::elements == part_columns) {
                for (; parts > 0; --parts, ++b, to += next_part) {
                    part_factors(*b, scale[0], min[0]);
                    store_part<Block, 0>(b, scale, min, to);
                }
            }
        }
    }
};

/// Activation rows that meet a block of weights before the next one is converted.
inline constexpr index matrix_unit_rows = 512;

/// Memory that one thread needs for a product with n activation rows.
constexpr index matrix_unit_scratch(index n, index columns) {
    const weight_walk few = walk_for(1), walk = walk_for(n);
    const index block = weight_block::rows * std::min(columns, std::max(few.columns, walk.columns));
    const index panels = half_panels::count(std::min(n, matrix_unit_rows));
    const index sums = walk.blocks * panels * weight_block::rows * half_panels::rows;
    return block * static_cast<index>(sizeof(bf16)) + sums * static_cast<index>(sizeof(float)) + 2 * arena::alignment;
}

/// Sums of a block of weight rows and `Panels` panels: per panel two tiles, (16 weight rows, 16 activation rows) each,
/// or (16 activation rows, 16 weight rows) if the weights are right operands.
template <int Panels, bool Right>
void multiply_block(const bf16* weights, const bf16* x, index next_panel, index parts, bool begin, float* sums) {
    constexpr index tile = 256, row_bytes = 64;
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Panels == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, row_bytes);
        _tile_loadd(1, sums + tile, row_bytes);
        if constexpr (Panels == 2) {
            _tile_loadd(2, sums + 2 * tile, row_bytes);
            _tile_loadd(3, sums + 3 * tile, row_bytes);
        }
    }
    for (index p = 0; p < parts; ++p) {
        const bf16* const w = weights + p * weight_block::rows * part_columns;
        _tile_loadd(4, w, row_bytes);
        _tile_loadd(5, w + amx::tile_rows * part_columns, row_bytes);
        _tile_loadd(6, x + p * half_panels::part_size, row_bytes);
        if constexpr (Panels == 2) _tile_loadd(7, x + next_panel + p * half_panels::part_size, row_bytes);
        if constexpr (Right) {
            _tile_dpbf16ps(0, 6, 4);
            _tile_dpbf16ps(1, 6, 5);
            if constexpr (Panels == 2) {
                _tile_dpbf16ps(2, 7, 4);
                _tile_dpbf16ps(3, 7, 5);
            }
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (Panels == 2) {
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, row_bytes);
    _tile_stored(1, sums + tile, row_bytes);
    if constexpr (Panels == 2) {
        _tile_stored(2, sums + 2 * tile, row_bytes);
        _tile_stored(3, sums + 3 * tile, row_bytes);
    }
}

/// A block of weights times `n` panels, the first at x: adds to the sums of each, (n, two tiles).
template <bool Right>
void multiply_block(const weight_block& weights, const bf16* x, index next_panel, index n, index parts, bool begin,
                    float* sums) {
    constexpr index size = weight_block::rows * half_panels::rows;
    amx::finish_stores();
    index p = 0;
    for (; p + 2 <= n; p += 2, x += 2 * next_panel, sums += 2 * size) {
        multiply_block<2, Right>(weights.value, x, next_panel, parts, begin, sums);
    }
    if (p < n) multiply_block<1, Right>(weights.value, x, next_panel, parts, begin, sums);
    amx::finish_stores();
}

/// Rows [first, last) of a matrix as they lie in a file, block after block.
template <class Block>
struct blocks_of_rows {
    static constexpr bool right = false;

    const Block* w;
    index stride, first, last;  // stride: blocks of a row
    bool far_apart;

    [[nodiscard]] index count() const { return (last - first + weight_block::rows - 1) / weight_block::rows; }

    void fill(const weight_block& block, index k, index column, index n) const {
        block.fill(w + column / Block::elements, stride, block_rows::at(k, first, last, far_apart), n);
    }

    /// Calls emit(t, o, values, number of values) for activation rows t below n, whose sums with block k are two tiles.
    template <class Emit>
    void hand_out(index k, index n, const float* sums, Emit&& emit) const {
        constexpr index rows = weight_block::rows, tile = amx::tile_rows * half_panels::rows;
        const block_rows from = block_rows::at(k, first, last, far_apart);
        const index run = far_apart ? block_rows::run : rows;
        alignas(64) float turned[half_panels::rows][rows];
        amx::transpose(sums, half_panels::rows, turned[0], rows);
        amx::transpose(sums + tile, half_panels::rows, turned[0] + amx::tile_rows, rows);
        for (index t = 0; t < n; ++t) {
            for (index r = 0; r < from.count; r += run) {
                emit(t, from.row(r), turned[t] + r, std::min(run, from.count - r));
            }
        }
    }
};

/// Rows [first, last) of an interleaved matrix, tile after tile.
template <class Block>
struct blocks_of_tiles {
    static constexpr bool right = true;
    static_assert(weight_block::rows == tile_lanes::rows);

    const std::byte* w;
    index tile_bytes, first, last;

    [[nodiscard]] index count() const { return (last - first) / weight_block::rows; }

    void fill(const weight_block& block, index k, index column, index n) const {
        const std::byte* const tile = w + (first / weight_block::rows + k) * tile_bytes;
        block.fill(tile_reader<Block>(tile + tile_layout<Block>::offset(column / part_columns)), n);
    }

    template <class Emit>
    void hand_out(index k, index n, const float* sums, Emit&& emit) const {
        constexpr index tile = half_panels::rows * amx::tile_rows;
        const index o = first + k * weight_block::rows;
        for (index t = 0; t < n; ++t) {
            emit(t, o, sums + t * amx::tile_rows, amx::tile_rows);
            emit(t, o + amx::tile_rows, sums + tile + t * amx::tile_rows, amx::tile_rows);
        }
    }
};

/// Blocks of weights times `count` activation rows: calls emit(n, o, values, number of values).
template <class Blocks, class Emit>
void multiply_halves(const Blocks& weights, index columns, const half_panels& x, index count, arena& scratch,
                     Emit&& emit) {
    const weight_walk walk = walk_for(count);
    const index blocks = weights.count(), next_panel = x.parts * half_panels::part_size;
    const arena::scope scope(scratch);
    const weight_block block{scratch.take<bf16>(weight_block::rows * std::min(columns, walk.columns)).data};
    const auto sums = scratch.take<float>(walk.blocks, half_panels::count(std::min(count, matrix_unit_rows)),
                                          weight_block::rows * half_panels::rows);
    const amx::session session;
    const auto multiply = [&](index group, index n, index panels) {
        for (index c = 0; c < columns; c += walk.columns) {
            const index width = std::min(walk.columns, columns - c);
            const bf16* const values = x.panel(n / half_panels::rows) + c / part_columns * half_panels::part_size;
            for (index k = group; k < std::min(blocks, group + walk.blocks); ++k) {
                weights.fill(block, k, c, width);
                multiply_block<Blocks::right>(block, values, next_panel, panels, width / part_columns, c == 0,
                                              sums[k - group].data);
            }
        }
    };
    for (index n = 0; n < count; n += matrix_unit_rows) {
        const index some = std::min(matrix_unit_rows, count - n);
        for (index group = 0; group < blocks; group += walk.blocks) {
            multiply(group, n, half_panels::count(some));
            for (index k = group; k < std::min(blocks, group + walk.blocks); ++k) {
                for (index i = 0; i < some; i += half_panels::rows) {
                    weights.hand_out(k, std::min<index>(half_panels::rows, some - i),
                                     sums[k - group][i / half_panels::rows].data,
                                     [&](index t, index o, const float* values, index n_values) {
                                         emit(n + i + t, o, values, n_values);
                                     });
                }
            }
        }
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI

#endif
