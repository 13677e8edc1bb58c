// SPDX-License-Identifier: MIT
//
// What a product takes its activations as: it depends on its weights and on how many rows there are.
#pragma once

#include <algorithm>
#include <cstddef>

#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/activations.hpp>
#include <keel/backend/cpu/codes.hpp>
#include <keel/backend/cpu/gemm.hpp>
#include <keel/backend/cpu/interleaved.hpp>
#include <keel/backend/cpu/matrix_unit.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// What a product takes its activations as: as they are, rounded to bytes, or rounded to bf16.
enum class operand { floats, bytes, halves };

inline operand operand_of(precision wanted, const weight_rows& w, [[maybe_unused]] index count) {
    if (wanted == precision::exact) return operand::floats;
    const bool quantised = info(w.type).block_elements > 1;
#if defined(KEEL_AMX)
    if (w.interleaved) return count > byte_panels::rows && amx::permitted() ? operand::halves : operand::bytes;
    const bool fits = w.columns % part_columns == 0 && (quantised || w.type == dtype::bf16);
    const bool fine = quantised && info(w.type).block_bytes >= info(w.type).block_elements;  // see takes_rests
    if (count > (fine ? rows_with_rests : few_rows) && fits && amx::permitted()) return operand::halves;
#endif
    return quantised ? operand::bytes : operand::floats;
}

/// Activations of a product, and what they are rounded to if its weights want that.
struct activations {
    index count = 0;         // rows of the product
    view<const float, 2> x;  // row n of the product is row source[n] of x and of rows; without source it is row n
    const index* source = nullptr;
    operand as = operand::floats;      // for the products that want them rounded
    bool left = false, right = false;  // which operands halves would be: left ones for interleaved weights
    byte_rows rows = {};               // few of them
    byte_panels panels = {};           // many, in the product's order
#if defined(KEEL_AMX)
    half_panels halves = {};  // as panels
#endif

    static constexpr index panel_rows = byte_panels::rows;

    /// Decides what to round to for these weights, too. Interleaved ones want another kind of halves than those that
    /// lie as in a file; both can take bytes.
    void serve(precision wanted, const weight_rows& w) {
        const operand its = operand_of(wanted, w, count);
        if (its == operand::floats) return;
        (w.interleaved ? left : right) = true;
        as = left && right ? operand::bytes : std::max(as, its);
    }

    [[nodiscard]] bool few() const { return count <= few_rows; }
    [[nodiscard]] index row(index n) const { return source == nullptr ? n : source[n]; }

    /// Takes memory for values rounded to `as`.
    void take(arena& memory) {
        const index columns = x.extent[1];
#if defined(KEEL_AMX)
        if (as == operand::halves) halves = half_panels::take(memory, count, columns);
#endif
        if (as == operand::bytes && few()) rows = byte_rows::take(memory, count, columns);
        if (as == operand::bytes && !few()) panels = byte_panels::take(memory, count, columns);
    }
    /// Bytes that take() takes, at most, for n rows.
    static constexpr index bytes(index n, index columns) {
        index most = std::max(byte_rows::bytes(std::min(n, few_rows), columns), byte_panels::bytes(n, columns));
#if defined(KEEL_AMX)
        most = std::max(most, half_panels::bytes(n, columns));
#endif
        return most;
    }

    /// What is rounded in one go: a row, or a panel.
    [[nodiscard]] index pieces() const { return few() ? count : byte_panels::count(count); }

    void fill(index piece) const {
        if (as == operand::bytes && few()) return rows.quantise(piece, x[row(piece)].data);
        const index first = piece * panel_rows;
        const int n = static_cast<int>(std::min<index>(panel_rows, count - first));
        const auto from = [&](int i) { return x[row(first + i)].data; };
#if defined(KEEL_AMX)
        if (as == operand::halves) return halves.fill(piece, n, left, from);
#endif
        panels.fill(piece, n, from);
    }
};

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
