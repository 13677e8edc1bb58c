// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <keel/core/compiler.hpp>

namespace keel::inline KEEL_ABI {

/// Sizes, positions and strides: signed, so that differences are safe; 64 bits, so that products are.
using index = std::int64_t;

/// A non-owning array of `Rank` dimensions, slowest first, as shapes are written in the papers: (rows, heads,
/// head_dim). The last dimension is contiguous. Trivially copyable; plain arrays, so that it works in device code.
/// Whether the memory is the host's or a device's is the business of the backend that made it.
template <class T, int Rank>
struct view {
    static_assert(Rank >= 1);

    T* data = nullptr;
    index extent[Rank] = {};
    index stride[Rank] = {};  // in elements; stride[Rank - 1] is 1

    view() = default;

    /// A dense view: view<float, 2>{p, rows, columns}.
    template <class... Extents>
        requires(sizeof...(Extents) == Rank && (std::is_convertible_v<Extents, index> && ...))
    KEEL_HD constexpr view(T* p, Extents... extents) : data(p), extent{static_cast<index>(extents)...} {
        index step = 1;
        for (int d = Rank - 1; d >= 0; --d) {
            stride[d] = step;
            step *= extent[d];
        }
    }

    /// A view of mutable elements is a view of constant ones.
    KEEL_HD constexpr operator view<const T, Rank>() const requires(!std::is_const_v<T>) {
        view<const T, Rank> v;
        v.data = data;
        for (int d = 0; d < Rank; ++d) {
            v.extent[d] = extent[d];
            v.stride[d] = stride[d];
        }
        return v;
    }

    template <class... Indices>
        requires(sizeof...(Indices) == Rank)
    KEEL_HD constexpr T& operator()(Indices... at) const {
        const index i[] = {static_cast<index>(at)...};
        index offset = 0;
        for (int d = 0; d < Rank; ++d) offset += i[d] * stride[d];
        return data[offset];
    }

    /// Element or sub-view `i` of the first dimension.
    KEEL_HD constexpr auto operator[](index i) const -> view<T, Rank - 1>
        requires(Rank > 1)
    {
        view<T, Rank - 1> v;
        v.data = data + i * stride[0];
        for (int d = 1; d < Rank; ++d) {
            v.extent[d - 1] = extent[d];
            v.stride[d - 1] = stride[d];
        }
        return v;
    }
    KEEL_HD constexpr T& operator[](index i) const requires(Rank == 1) { return data[i]; }

    /// Entry `i` of the second dimension, for all of the first: (rows, heads, head_dim) becomes (rows, head_dim) of one
    /// head.
    KEEL_HD constexpr view<T, Rank - 1> slice(index i) const requires(Rank > 2) {
        view<T, Rank - 1> v = (*this)[0];
        v.data += i * stride[1];
        v.extent[0] = extent[0];
        v.stride[0] = stride[0];
        return v;
    }

    /// The `count` entries of the first dimension from `first` on.
    KEEL_HD constexpr view rows(index first, index count) const {
        view v = *this;
        v.data += first * stride[0];
        v.extent[0] = count;
        return v;
    }

    /// The `count` entries of the last dimension from `first` on; rows keep their distance.
    KEEL_HD constexpr view columns(index first, index count) const {
        view v = *this;
        v.data += first;
        v.extent[Rank - 1] = count;
        return v;
    }

    /// The last dimension cut into (outer, inner): (rows, heads * head_dim) becomes (rows, heads, head_dim).
    KEEL_HD constexpr view<T, Rank + 1> split(index inner) const {
        view<T, Rank + 1> v;
        v.data = data;
        for (int d = 0; d < Rank; ++d) {
            v.extent[d] = extent[d];
            v.stride[d] = stride[d];
        }
        v.extent[Rank - 1] = extent[Rank - 1] / inner;
        v.stride[Rank - 1] = inner;
        v.extent[Rank] = inner;
        v.stride[Rank] = 1;
        return v;
    }

    KEEL_HD constexpr index size() const {
        index n = 1;
        for (int d = 0; d < Rank; ++d) n *= extent[d];
        return n;
    }

    KEEL_HD constexpr bool dense() const {
        index step = 1;
        for (int d = Rank - 1; d >= 0; --d) {
            if (extent[d] > 1 && stride[d] != step) return false;
            step *= extent[d];
        }
        return true;
    }
};

}  // namespace keel::inline KEEL_ABI
