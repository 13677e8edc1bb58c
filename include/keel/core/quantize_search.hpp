// SPDX-License-Identifier: MIT
//
// What the encoders of quantize.hpp share: the search for the scale of a group of elements, 32 groups at a time
// (quantize_tile.hpp). A candidate scale proposes codes; least squares answer which scale (and minimum) fits these
// codes best and how much of the sum of squares it explains; the best candidate of each lane stays.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/quantize_tile.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

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
