// SPDX-License-Identifier: MIT
//
// The encoders' view of a row: groups of elements that have one scale, 32 of them side by side.
//
// All loops of the search (quantize_search.hpp) run over the lanes, one lane per group, without branches, so that any
// compiler vectorises them.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// More than 16: g++ unrolls shorter loops before it can vectorise them.
inline constexpr int lane_count = 32;

/// One value per lane.
template <class T>
struct lanes_of {
    T v[lane_count];

    T& operator[](int l) { return v[l]; }
    const T& operator[](int l) const { return v[l]; }
    void fill(T x) {
        for (T& lane : v) lane = x;
    }
};
using lanes = lanes_of<float>;

/// 32 groups of N elements. Element i of the group in lane l is origin[l] + x[i][l] times unit[l].
template <int N>
struct tile {
    float x[N][lane_count];  ///< in [-1, 1], or in [0, 2] where the least element is the origin
    float w[N][lane_count];  ///< importance, positive; set if weighted, and otherwise 1
    bool weighted = false;
    lanes low, high;  ///< the least and the greatest x
    lanes unit;       ///< the largest magnitude of the block that the group is part of; NaN if one is not finite
    lanes origin;     ///< 0, or the least element of the group
};

/// Blocks whose elements are all smaller than this are encoded as zeros: their scale would be zero in f16 anyway.
inline constexpr float smallest_unit = 0x1p-100f;

/// The largest magnitude of n values; NaN if one of them is infinite or NaN. Floats without sign order as integers.
inline float largest_magnitude(const float* x, int n) {
    std::uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFFu;
        largest = largest > magnitude ? largest : magnitude;
    }
    return largest < 0x7F800000u ? std::bit_cast<float>(largest) : std::numeric_limits<float>::quiet_NaN();
}

/// All ones if a > b, otherwise zero. Choosing with masks keeps branches, which hinder vectorising, out of the loops.
inline std::uint32_t greater(float a, float b) { return a > b ? ~0u : 0u; }

inline float select(std::uint32_t mask, float yes, float no) {
    return std::bit_cast<float>((std::bit_cast<std::uint32_t>(yes) & mask) |
                                (std::bit_cast<std::uint32_t>(no) & ~mask));
}

/// The bits of floats as integers of the same order; and back again.
inline std::int32_t in_order(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

/// Fills the tile with `blocks` blocks of `elements` elements, measured from zero or from the least of each group.
/// Lanes without a group, and blocks that are too small, get zeros; blocks that are not finite may get NaN.
template <bool from_least, int N>
void load(tile<N>& t, const float* from, int elements, index blocks) {
    static constexpr float zeros[N] = {};
    const int groups = elements / N;
    const float* source[lane_count];
    for (int l = 0; l < lane_count; ++l) source[l] = l / groups < blocks ? from + l * N : zeros;
    lanes_of<std::int32_t> least, most;
    least.fill(std::numeric_limits<std::int32_t>::max());
    most.fill(std::numeric_limits<std::int32_t>::min());
    for (int quad = 0; quad < N; quad += 4) {  // copied first, so that what is transposed lies together
        float four[lane_count][4];
        for (int l = 0; l < lane_count; ++l) std::memcpy(four[l], source[l] + quad, sizeof four[l]);
        for (int l = 0; l < lane_count; ++l) {
            for (int i = 0; i < 4; ++i) {
                t.x[quad + i][l] = four[l][i];
                const std::int32_t x = in_order(std::bit_cast<std::int32_t>(four[l][i]));
                least[l] = least[l] < x ? least[l] : x;
                most[l] = most[l] > x ? most[l] : x;
            }
        }
    }
    lanes low, high;
    lanes_of<std::uint32_t> largest;  // magnitudes
    for (int l = 0; l < lane_count; ++l) {
        low[l] = std::bit_cast<float>(in_order(least[l]));
        high[l] = std::bit_cast<float>(in_order(most[l]));
        const std::uint32_t below = std::bit_cast<std::uint32_t>(low[l]) & 0x7FFFFFFFu,
                            above = std::bit_cast<std::uint32_t>(high[l]) & 0x7FFFFFFFu;
        largest[l] = below > above ? below : above;
    }
    for (int first = 0; groups > 1 && first < lane_count; first += groups) {
        std::uint32_t of_block = 0;
        for (int l = first; l < first + groups; ++l) of_block = of_block > largest[l] ? of_block : largest[l];
        for (int l = first; l < first + groups; ++l) largest[l] = of_block;
    }
    lanes origin, factor;
    for (int l = 0; l < lane_count; ++l) {
        constexpr auto infinity = std::bit_cast<std::uint32_t>(std::numeric_limits<float>::infinity());
        constexpr auto smallest = std::bit_cast<std::uint32_t>(smallest_unit);
        const std::uint32_t usable = largest[l] - smallest < infinity - smallest ? ~0u : 0u;
        const std::uint32_t finite = largest[l] < infinity ? ~0u : 0u;
        const float unit = std::bit_cast<float>(largest[l]);
        factor[l] = select(usable, 1.0f / unit, 0.0f);
        t.unit[l] = select(finite, unit, std::numeric_limits<float>::quiet_NaN());
        const std::uint32_t narrow = greater(std::numeric_limits<float>::infinity(), high[l] - low[l]);
        origin[l] = from_least ? select(narrow, low[l], 0.0f) : 0.0f;
        t.low[l] = (low[l] - origin[l]) * factor[l];
        t.high[l] = (high[l] - origin[l]) * factor[l];
    }
    t.origin = origin;
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < lane_count; ++l) {
            t.x[i][l] = (from_least ? t.x[i][l] - origin[l] : t.x[i][l]) * factor[l];
        }
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
