// SPDX-License-Identifier: MIT
//
// Small products of f32 matrices that lie in cache: what chunked KDA and attention are made of.
#pragma once

#include <type_traits>
#include <utility>

#include <keel/backend/cpu/simd.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace simd {

/// c(r, j) = sum over d of a(r, d) b(d, j). Every element is one chain of fma in the order of d, whatever the shape.
struct small_product {
    index rows, columns, depth;
    const float* a;  ///< a(r, d) is a[r * a_row + d * a_step]
    index a_row, a_step;
    const float* b;  ///< b(d, j) is b[d * b_step + j]
    index b_step;
    float* c;  ///< c(r, j) is c[r * c_row + j]
    index c_row;
};

/// f(0), ..., f(N - 1), each with its own constant.
template <int N, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
    (std::make_integer_sequence<int, N>{});
}

/// Rows x Vectors of c in registers.
template <int Rows, int Vectors, class Load, class Store, class Start>
[[gnu::always_inline]] inline void multiply_tile(const small_product& p, index row, index column, Load&& load,
                                                 Store&& store, Start&& start) {
    floats sum[Rows][Vectors];
    const auto at = [&](int r, int v) { return p.c + (row + r) * p.c_row + column + v * lanes; };
    unroll<Rows>(
        [&](auto r) { unroll<Vectors>([&](auto v) { sum[r][v] = start(row + r, [&] { return load(at(r, v)); }); }); });
    const float* a = p.a + row * p.a_row;
    const float* b = p.b + column;
    for (index d = 0; d < p.depth; ++d, a += p.a_step, b += p.b_step) {
        floats right[Vectors];
        unroll<Vectors>([&](auto v) { right[v] = load(b + v * lanes); });
        unroll<Rows>([&](auto r) {
            const floats left(a[r * p.a_row]);
            unroll<Vectors>([&](auto v) { sum[r][v] = fma(left, right[v], sum[r][v]); });
        });
    }
    unroll<Rows>([&](auto r) { unroll<Vectors>([&](auto v) { store(at(r, v), sum[r][v]); }); });
}

template <int Vectors, class Load, class Store, class Start>
void multiply_columns(const small_product& p, index column, Load&& load, Store&& store, Start&& start) {
    constexpr int most = lanes >= 16 ? 8 : 4;  // rows that fit into the registers together with two columns
    index row = 0;
    for (; row + most <= p.rows; row += most) multiply_tile<most, Vectors>(p, row, column, load, store, start);
    for (; row + 2 <= p.rows; row += 2) multiply_tile<2, Vectors>(p, row, column, load, store, start);
    if (row < p.rows) multiply_tile<1, Vectors>(p, row, column, load, store, start);
}

/// `start(r, old)` is what c(r, .) begins with; old() is what it holds.
template <class Start>
void multiply(const small_product& p, Start&& start) {
    const auto load_all = [](const float* from) { return load(from); };
    const auto store_all = [](float* to, floats x) { store(to, x); };
    index column = 0;
    for (; column + 2 * lanes <= p.columns; column += 2 * lanes) {
        multiply_columns<2>(p, column, load_all, store_all, start);
    }
    if (column + lanes <= p.columns) {
        multiply_columns<1>(p, column, load_all, store_all, start);
        column += lanes;
    }
    if (const index rest = p.columns - column; rest > 0) {
        multiply_columns<1>(
            p, column, [&](const float* from) { return load_first(from, rest); },
            [&](float* to, floats x) { store_first(to, x, rest); }, start);
    }
}

/// c = a b
inline void multiply(const small_product& p) {
    multiply(p, [](index, auto&&) { return floats(0.0f); });
}

/// c += a b
inline void multiply_onto(const small_product& p) {
    multiply(p, [](index, auto&& old) { return old(); });
}

/// c(r, .) = keep[r] c(r, .) + (a b)(r, .)
inline void multiply_into(const small_product& p, const float* keep) {
    multiply(p, [&](index r, auto&& old) { return floats(keep[r]) * old(); });
}

}  // namespace simd
}  // namespace keel::inline KEEL_ABI
