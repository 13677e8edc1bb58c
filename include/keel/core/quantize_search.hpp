// SPDX-License-Identifier: MIT
//
// What the encoders of quantize.hpp share: the search for the scale of a group of elements.
//
// A group holds the 16 or 32 elements that have one scale. Groups are worked on 32 at a time, lying side by side in a
// tile: all loops run over the lanes, one lane per group, without branches, so that any compiler vectorises them.
// A candidate scale proposes codes; least squares answer which scale (and minimum) fits these codes best and how much
// of the sum of squares it explains; the best candidate of each lane stays.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
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

/// Adding 1.5 * 2^23 rounds to an integer, ties to even, which the lowest bits then hold.
inline constexpr float rounding = 0x1.8p23f;

/// The integer nearest to y within [low, high], still with `rounding` added to it. Any y is allowed; a NaN gives low or
/// high. Floats of one sign order as integers, so that nothing here depends on the value. (With the lower bound first
/// g++ 12 makes comparisons and blends of it.)
inline std::int32_t nearest(float y, int low, int high) {
    constexpr std::int32_t zero = std::bit_cast<std::int32_t>(rounding);
    const std::int32_t q = std::bit_cast<std::int32_t>(y + rounding);
    const std::int32_t at_most = q < zero + high ? q : zero + high;
    return at_most > zero + low ? at_most : zero + low;
}

/// 1 / x, and 0 for 0.
inline float reciprocal(float x) { return select(greater(std::fabs(x), 0.0f), 1.0f / x, 0.0f); }

/// The f16 nearest to a scale. Beyond the largest it saturates; a NaN stays one.
inline f16 to_scale(float x) {
    const float at_least = x < -65504.0f ? -65504.0f : x;
    return to_f16(at_least > 65504.0f ? 65504.0f : at_least);
}

/// Grids: the values that the codes of a type stand for. value(y) is the one nearest to y, code(y) its code as stored.

/// The integers in [low, high], stored with an offset.
template <int low, int high>
struct integers {
    static float value(float y) { return std::bit_cast<float>(nearest(y, low, high)) - rounding; }
    static std::uint8_t code(float y) {
        return static_cast<std::uint8_t>(nearest(y, low, high) - std::bit_cast<std::int32_t>(rounding) - low);
    }
};

/// The sixteen values of IQ4_NL and IQ4_XS: counts the midpoints below y.
struct iq4_grid {
    static constexpr float midpoint(int j) { return 0.5f * static_cast<float>(iq4_values[j] + iq4_values[j + 1]); }
    static float value(float y) {
        float v = iq4_values[0];
        for (int j = 0; j < 15; ++j)
            v += select(greater(y, midpoint(j)), static_cast<float>(iq4_values[j + 1] - iq4_values[j]), 0.0f);
        return v;
    }
    static std::uint8_t code(float y) {
        int c = 0;
        for (int j = 0; j < 15; ++j) c += y > midpoint(j);
        return static_cast<std::uint8_t>(c);
    }
};

/// Twice the E2M1 numbers. From 2 on they have one bit of mantissa, to which the bits of y are rounded; below they are
/// integers.
struct mxfp4_grid {
    static float magnitude(float y) {
        const float a = std::fabs(y);
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(a);
        const std::uint32_t rounded = (bits + 0x1FFFFFu + ((bits >> 22) & 1u)) & 0xFFC00000u;
        const std::uint32_t normal = rounded < 0x41400000u ? rounded : 0x41400000u;  // 12
        const float integer = (a + rounding) - rounding;
        return select(greater(2.0f, a), integer, std::bit_cast<float>(normal));
    }
    static float value(float y) { return std::copysign(magnitude(y), y); }
    static std::uint8_t code(float y) {
        const float v = magnitude(y);
        const int c = v < 2.0f ? static_cast<int>(v) : static_cast<int>(std::bit_cast<std::uint32_t>(v) >> 22) - 254;
        return static_cast<std::uint8_t>(y < 0.0f && c > 0 ? c | 8 : c);
    }
};

/// The integers, for candidates that stay within the grid anyway.
struct whole_numbers {
    static float value(float y) { return (y + rounding) - rounding; }
};

/// Sums over the elements of each group, weighted by importance; q stands for the value of the code.
struct scale_sums {
    lanes qq = {}, qx = {};
};

template <bool weighted, class Grid, int N>
scale_sums tally(const tile<N>& t, const lanes& inverse) {
    scale_sums s;
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < lane_count; ++l) {
            const float q = Grid::value(t.x[i][l] * inverse[l]);
            const float wq = weighted ? t.w[i][l] * q : q;
            s.qq[l] += wq * q;
            s.qx[l] += wq * t.x[i][l];
        }
    }
    return s;
}
template <class Grid, int N>
scale_sums tally(const tile<N>& t, const lanes& inverse) {
    return t.weighted ? tally<true, Grid>(t, inverse) : tally<false, Grid>(t, inverse);
}

struct affine_sums {
    lanes q = {}, qq = {}, qx = {};
};

template <bool weighted, class Grid, int N>
affine_sums tally(const tile<N>& t, const lanes& inverse, const lanes& offset) {
    affine_sums s;
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < lane_count; ++l) {
            const float q = Grid::value(t.x[i][l] * inverse[l] + offset[l]);
            const float wq = weighted ? t.w[i][l] * q : q;
            s.q[l] += wq;
            s.qq[l] += wq * q;
            s.qx[l] += wq * t.x[i][l];
        }
    }
    return s;
}

template <class Grid, int N>
affine_sums tally(const tile<N>& t, const lanes& inverse, const lanes& offset) {
    return t.weighted ? tally<true, Grid>(t, inverse, offset) : tally<false, Grid>(t, inverse, offset);
}

/// Positions on the grid to which the extreme element of a group is mapped in turn.
struct sweep {
    float first, last;
    int count;

    float operator[](int c) const {
        return count == 1 ? first : first + (last - first) * static_cast<float>(c) / static_cast<float>(count - 1);
    }
};

/// The scale d of each lane that minimises sum w (x - d q)^2 over the candidates of the sweep.
template <class Grid, int N>
lanes fit_scale(const tile<N>& t, const sweep& positions) {
    lanes unit, scale = {}, best = {};
    for (int l = 0; l < lane_count; ++l) {  // of the extreme element
        unit[l] = reciprocal(select(greater(t.high[l], -t.low[l]), t.high[l], t.low[l]));
    }
    for (int c = 0; c < positions.count; ++c) {
        const float position = positions[c];
        lanes inverse;
        for (int l = 0; l < lane_count; ++l) inverse[l] = position * unit[l];
        const scale_sums s = tally<Grid>(t, inverse);
        for (int l = 0; l < lane_count; ++l) {
            const float fitted = s.qx[l] / (s.qq[l] + 0x1p-100f);
            const float explained = fitted * s.qx[l];
            const std::uint32_t better = greater(explained, best[l]);
            scale[l] = select(better, fitted, scale[l]);
            best[l] = select(better, explained, best[l]);
        }
    }
    return scale;
}

/// x is approximated by scale * q + minimum.
struct affine {
    lanes scale, minimum;
};

/// Sums over the elements of each group, of their weights and of themselves.
struct moments {
    lanes w = {}, x = {};
};

template <int N>
moments total(const tile<N>& t) {
    moments sum;
    if (t.weighted) {
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < lane_count; ++l) {
                sum.w[l] += t.w[i][l];
                sum.x[l] += t.w[i][l] * t.x[i][l];
            }
        }
    } else {
        sum.w.fill(N);
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < lane_count; ++l) sum.x[l] += t.x[i][l];
        }
    }
    return sum;
}

/// The affine map of each lane that minimises sum w (x - scale q - minimum)^2, q in [0, high], over the sweep and, if
/// asked to look around, over 16 neighbours of the best. With `below_zero`, minimum <= 0. The positions are less than
/// high + 0.5.
template <int high, bool below_zero, int N>
affine fit_affine(const tile<N>& t, const sweep& positions, bool look_around) {
    const moments sum = total(t);
    lanes low, per_weight, per_span;
    for (int l = 0; l < lane_count; ++l) {
        low[l] = below_zero && t.low[l] > 0.0f ? 0.0f : t.low[l];
        per_weight[l] = 1.0f / sum.w[l];
        per_span[l] = reciprocal(t.high[l] - low[l]);
    }

    affine fit;
    lanes best;
    for (int l = 0; l < lane_count; ++l) {  // to begin with: all codes 0
        const float mean = sum.x[l] * per_weight[l];
        fit.scale[l] = 0.0f;
        fit.minimum[l] = below_zero && mean > 0.0f ? 0.0f : mean;
        best[l] = fit.minimum[l] * sum.x[l];
    }

    const auto consider = [&]<class Grid>(Grid, const lanes& inverse, const lanes& offset) {
        const affine_sums s = tally<Grid>(t, inverse, offset);
        for (int l = 0; l < lane_count; ++l) {
            const float variance = sum.w[l] * s.qq[l] - s.q[l] * s.q[l];
            const float covariance = sum.w[l] * s.qx[l] - sum.x[l] * s.q[l];
            float scale = covariance / (variance + 0x1p-100f);
            float minimum = (sum.x[l] - scale * s.q[l]) * per_weight[l];
            if constexpr (below_zero) {
                const float alone = s.qx[l] / (s.qq[l] + 0x1p-100f);
                const std::uint32_t above = greater(minimum, 0.0f);
                scale = select(above, alone, scale);
                minimum = select(above, 0.0f, minimum);
            }
            const float explained = scale * s.qx[l] + minimum * sum.x[l];  // of a least-squares fit
            const std::uint32_t better = greater(explained, best[l]);
            fit.scale[l] = select(better, scale, fit.scale[l]);
            fit.minimum[l] = select(better, minimum, fit.minimum[l]);
            best[l] = select(better, explained, best[l]);
        }
    };

    lanes inverse, offset;
    for (int c = 0; c < positions.count; ++c) {
        const float position = positions[c];
        for (int l = 0; l < lane_count; ++l) {
            inverse[l] = position * per_span[l];
            offset[l] = -low[l] * inverse[l];
        }
        consider(whole_numbers{}, inverse, offset);
    }
    if (look_around) {
        const affine around = fit;
        for (int c = 0; c < 16; ++c) {
            const float stretch = 1.0f + (static_cast<float>(c % 4) - 1.5f) * (0.45f / static_cast<float>(high));
            const float shift = (static_cast<float>(c / 4) - 1.5f) * 0.3f;
            for (int l = 0; l < lane_count; ++l) {  // stretched about the middle of the range, then shifted
                const float straight = reciprocal(around.scale[l]), middle = 0.5f * (low[l] + t.high[l]);
                inverse[l] = stretch * straight;
                offset[l] = (middle - around.minimum[l]) * straight - middle * inverse[l] + shift;
            }
            consider(integers<0, high>{}, inverse, offset);
        }
    }
    return fit;
}

/// The codes, in file order, of n elements x that become value / inverse + minimum.
template <class Grid>
void write_codes(const float* x, int n, float inverse, float minimum, std::uint8_t* codes) {
    for (int i = 0; i < n; ++i) codes[i] = Grid::code((x[i] - minimum) * inverse);
}

/// Eight codes at once, the first in the lowest byte.
inline std::uint64_t eight(const std::uint8_t* codes) {
    std::uint64_t word;
    std::memcpy(&word, codes, 8);
    return word;
}

/// qs[i] = low nibble of first[i] and, above it, of second[i]; n is a multiple of 8.
inline void pack_nibbles(const std::uint8_t* first, const std::uint8_t* second, int n, std::uint8_t* qs) {
    constexpr std::uint64_t nibbles = 0x0F0F0F0F0F0F0F0F;
    for (int i = 0; i < n; i += 8) {
        const std::uint64_t word = (eight(first + i) & nibbles) | (eight(second + i) & nibbles) << 4;
        std::memcpy(qs + i, &word, 8);
    }
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
