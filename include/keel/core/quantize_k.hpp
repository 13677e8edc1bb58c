// SPDX-License-Identifier: MIT
//
// Encoders of the types whose scales are themselves quantised: blocks of 256 elements with one f16 scale (and minimum)
// over the small integer scales (and minimums) of their groups. See quantize.hpp.
//
// Each group is fitted alone; the largest of the fitted scales makes the scale of the block; then each group chooses,
// by the error it would have, among the integers around its own fit; then the scale of the block is fitted again.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/quantize_search.hpp>
#include <keel/core/quantize_tile.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// The scales of the blocks in a tile: `step` per block, repeated in the lane of each of its groups, as its f16
/// decodes; and the integers that multiply it.
struct stepped {
    lanes step = {};    ///< in the data's own unit
    lanes factor = {};  ///< integers

    /// What multiplies the codes of lane l.
    float operator()(int l) const { return step[l] * factor[l]; }
};

/// What a scale is worth once it is stored.
inline float stored(float x) { return to_float(to_scale(x)); }

/// Per lane, the unit of the data where there is any, and 0 where a block is empty, too small or not finite: there
/// every step is 0 in the units of the tile.
template <int N>
lanes inverse_units(const tile<N>& t) {
    lanes inverse;
    for (int l = 0; l < lane_count; ++l) inverse[l] = t.unit[l] >= smallest_unit ? 1.0f / t.unit[l] : 0.0f;
    return inverse;
}

/// Calls f(first, last) for the lanes of each block of 256 elements.
template <int N, class F>
void for_each_block(F&& f) {
    for (int first = 0; first < lane_count; first += 256 / N) f(first, first + 256 / N);
}

/// Scales of groups as integers in [-limit, limit) times one step per block.
template <class Grid, int limit, int N>
stepped fit_stepped_scale(const tile<N>& t, const sweep& positions) {
    const lanes fitted = fit_scale<Grid>(t, positions), inverse_unit = inverse_units(t);
    stepped chosen;
    for_each_block<N>([&](int first, int last) {
        float extreme = 0.0f;
        for (int l = first; l < last; ++l) extreme = std::fabs(fitted[l]) > std::fabs(extreme) ? fitted[l] : extreme;
        for (int l = first; l < last; ++l) chosen.step[l] = stored(extreme * t.unit[l] / -limit);
    });

    lanes best, qq = {}, qx = {};
    best.fill(-std::numeric_limits<float>::infinity());
    for (const float move : {0.0f, -1.0f, 1.0f}) {
        lanes factor, scale, inverse;
        for (int l = 0; l < lane_count; ++l) {
            const float step = chosen.step[l] * inverse_unit[l];
            factor[l] = integers<-limit, limit - 1>::value(fitted[l] * reciprocal(step) + move);
            scale[l] = step * factor[l];
            inverse[l] = reciprocal(scale[l]);
        }
        const scale_sums s = tally<Grid>(t, inverse);
        for (int l = 0; l < lane_count; ++l) {
            const float explained = scale[l] * (2.0f * s.qx[l] - scale[l] * s.qq[l]);
            const std::uint32_t better = greater(explained, best[l]);
            best[l] = select(better, explained, best[l]);
            chosen.factor[l] = select(better, factor[l], chosen.factor[l]);
            qq[l] = select(better, s.qq[l], qq[l]);
            qx[l] = select(better, s.qx[l], qx[l]);
        }
    }

    for_each_block<N>([&](int first, int last) {
        float block_qq = 0.0f, block_qx = 0.0f;
        for (int l = first; l < last; ++l) {
            block_qq += chosen.factor[l] * chosen.factor[l] * qq[l];
            block_qx += chosen.factor[l] * qx[l];
        }
        for (int l = first; l < last; ++l) chosen.step[l] = stored(block_qx * reciprocal(block_qq) * t.unit[l]);
    });
    return chosen;
}

struct stepped_affine {
    stepped scale;
    stepped minimum;  ///< to be subtracted
};

/// Scales and minimums of groups as integers in [0, limit] times one step each per block; codes in [0, high].
template <int high, int limit, int N>
stepped_affine fit_stepped_affine(const tile<N>& t, const sweep& positions) {
    const affine fitted = fit_affine<high, true>(t, positions, true);
    const lanes inverse_unit = inverse_units(t);
    stepped_affine chosen;
    stepped &scale = chosen.scale, &minimum = chosen.minimum;
    for_each_block<N>([&](int first, int last) {
        float largest = 0.0f, lowest = 0.0f;
        for (int l = first; l < last; ++l) {
            largest = fitted.scale[l] > largest ? fitted.scale[l] : largest;
            lowest = fitted.minimum[l] < lowest ? fitted.minimum[l] : lowest;
        }
        for (int l = first; l < last; ++l) {
            scale.step[l] = stored(largest * t.unit[l] / limit);
            minimum.step[l] = stored(-lowest * t.unit[l] / limit);
        }
    });

    const moments sum = total(t);
    lanes best, q = {}, qq = {}, qx = {};
    best.fill(-std::numeric_limits<float>::infinity());
    for (int c = 0; c < 9; ++c) {
        const float scale_move = static_cast<float>(c / 3 - 1), minimum_move = static_cast<float>(c % 3 - 1);
        lanes s, m, d, low, inverse, offset;
        for (int l = 0; l < lane_count; ++l) {
            const float scale_step = scale.step[l] * inverse_unit[l], minimum_step = minimum.step[l] * inverse_unit[l];
            s[l] = integers<0, limit>::value(fitted.scale[l] * reciprocal(scale_step) + scale_move);
            m[l] = integers<0, limit>::value(-fitted.minimum[l] * reciprocal(minimum_step) + minimum_move);
            d[l] = scale_step * s[l];
            low[l] = -minimum_step * m[l];
            inverse[l] = reciprocal(d[l]);
            offset[l] = -low[l] * inverse[l];
        }
        const affine_sums a = tally<integers<0, high>>(t, inverse, offset);
        for (int l = 0; l < lane_count; ++l) {
            const float explained = d[l] * (2.0f * (a.qx[l] - low[l] * a.q[l]) - d[l] * a.qq[l]) +
                                    low[l] * (2.0f * sum.x[l] - low[l] * sum.w[l]);
            const std::uint32_t better = greater(explained, best[l]);
            best[l] = select(better, explained, best[l]);
            scale.factor[l] = select(better, s[l], scale.factor[l]);
            minimum.factor[l] = select(better, m[l], minimum.factor[l]);
            q[l] = select(better, a.q[l], q[l]);
            qq[l] = select(better, a.qq[l], qq[l]);
            qx[l] = select(better, a.qx[l], qx[l]);
        }
    }

    for_each_block<N>([&](int first, int last) {  // least squares over the two steps: sum w (x - d s q + dmin m)^2
        float sq_sq = 0.0f, sq_m = 0.0f, m_m = 0.0f, sq_x = 0.0f, m_x = 0.0f;
        for (int l = first; l < last; ++l) {
            const float s = scale.factor[l], m = minimum.factor[l];
            sq_sq += s * s * qq[l];
            sq_m += s * m * q[l];
            m_m += m * m * sum.w[l];
            sq_x += s * qx[l];
            m_x += m * sum.x[l];
        }
        const float determinant = sq_sq * m_m - sq_m * sq_m;
        if (determinant <= 1e-6f * sq_sq * m_m) return;  // not well determined: the steps stay
        const float d = (sq_x * m_m - m_x * sq_m) / determinant, dmin = (sq_x * sq_m - m_x * sq_sq) / determinant;
        for (int l = first; l < last; ++l) {
            scale.step[l] = stored(d * t.unit[l]);
            minimum.step[l] = stored(dmin * t.unit[l]);
        }
    });
    return chosen;
}

/// Two bits of 256 codes, bits `shift` and `shift` + 1, as Q2_K, Q3_K and Q6_K place them.
inline void pack_pairs(const std::uint8_t* codes, int shift, std::uint8_t* qs) {
    constexpr std::uint64_t pairs = 0x0303030303030303;
    for (int i = 0; i < 64; i += 8) {
        const std::uint8_t* c = codes + i / 32 * 128 + i % 32;
        std::uint64_t word = 0;
        for (int j = 0; j < 4; ++j) word |= ((eight(c + 32 * j) >> shift) & pairs) << (2 * j);
        std::memcpy(qs + i, &word, 8);
    }
}

/// Bit `bit` of 256 codes: that of element 32 b + l goes to bit b of byte l.
inline void pack_bits(const std::uint8_t* codes, int bit, std::uint8_t* bytes) {
    constexpr std::uint64_t bits = 0x0101010101010101;
    for (int l = 0; l < 32; l += 8) {
        std::uint64_t word = 0;
        for (int b = 0; b < 8; ++b) word |= ((eight(codes + 32 * b + l) >> bit) & bits) << b;
        std::memcpy(bytes + l, &word, 8);
    }
}

/// The low nibbles of 256 codes in runs of 2 n: the first n of a run low, the others high.
inline void pack_nibble_runs(const std::uint8_t* codes, int n, std::uint8_t* qs) {
    for (int i = 0; i < 128; i += n) pack_nibbles(codes + 2 * i, codes + 2 * i + n, n, qs + i);
}

/// The reverse of packed_scales: factors in [0, 63] of eight groups.
inline packed_scales pack_scales(const float* scale, const float* minimum) {
    packed_scales p;
    for (int b = 0; b < 4; ++b) {
        const int s = static_cast<int>(scale[b]), m = static_cast<int>(minimum[b]);
        const int s4 = static_cast<int>(scale[b + 4]), m4 = static_cast<int>(minimum[b + 4]);
        p.raw[b] = static_cast<std::uint8_t>(s | (s4 >> 4) << 6);
        p.raw[b + 4] = static_cast<std::uint8_t>(m | (m4 >> 4) << 6);
        p.raw[b + 8] = static_cast<std::uint8_t>((s4 & 15) | (m4 & 15) << 4);
    }
    return p;
}

/// Calls f(block, first lane, codes) for each block with its 256 codes.
template <class Grid, int N, class Scale, class Minimum, class F>
void for_each_encoded(const float* from, index blocks, Scale&& scale, Minimum&& minimum, F&& f) {
    for (index b = 0; b < blocks; ++b) {
        const int first = static_cast<int>(b) * (256 / N);
        std::uint8_t codes[256];
        for (int g = 0; g < 256 / N; ++g) {
            write_codes<Grid>(from + 256 * b + N * g, N, reciprocal(scale(first + g)), minimum(first + g),
                              codes + N * g);
        }
        f(b, first, codes);
    }
}

inline float no_minimum(int) { return 0.0f; }

inline void encode(const tile<16>& t, const float* from, block_q2_k* to, index blocks) {
    const stepped_affine fit = fit_stepped_affine<3, 15>(t, {2.4f, 3.4f, 8});
    const auto minimum = [&](int l) { return -fit.minimum(l); };
    for_each_encoded<integers<0, 3>, 16>(from, blocks, fit.scale, minimum, [&](index b, int first, const auto& codes) {
        for (int k = 0; k < 16; ++k) {
            const int s = static_cast<int>(fit.scale.factor[first + k]),
                      m = static_cast<int>(fit.minimum.factor[first + k]);
            to[b].scales[k] = static_cast<std::uint8_t>(s | m << 4);
        }
        to[b].d.set(to_f16(fit.scale.step[first]));
        to[b].dmin.set(to_f16(fit.minimum.step[first]));
        pack_pairs(codes, 0, to[b].qs);
    });
}

inline void encode(const tile<16>& t, const float* from, block_q3_k* to, index blocks) {
    const stepped fit = fit_stepped_scale<integers<-4, 3>, 32>(t, {-3.0f, -5.0f, 10});
    for_each_encoded<integers<-4, 3>, 16>(from, blocks, fit, no_minimum, [&](index b, int first, const auto& codes) {
        const auto factor = [&](int k) { return static_cast<int>(fit.factor[first + k]) + 32; };
        for (int k = 0; k < 8; ++k)
            to[b].scales[k] = static_cast<std::uint8_t>((factor(k) & 15) | (factor(k + 8) & 15) << 4);
        for (int k = 0; k < 4; ++k) {
            to[b].scales[k + 8] = static_cast<std::uint8_t>(factor(k) >> 4 | (factor(k + 4) >> 4) << 2 |
                                                            (factor(k + 8) >> 4) << 4 | (factor(k + 12) >> 4) << 6);
        }
        to[b].d.set(to_f16(fit.step[first]));
        pack_pairs(codes, 0, to[b].qs);
        pack_bits(codes, 2, to[b].hmask);
    });
}

inline void encode(const tile<32>& t, const float* from, block_q4_k* to, index blocks) {
    const stepped_affine fit = fit_stepped_affine<15, 63>(t, {14.0f, 15.4f, 8});
    const auto minimum = [&](int l) { return -fit.minimum(l); };
    for_each_encoded<integers<0, 15>, 32>(from, blocks, fit.scale, minimum, [&](index b, int first, const auto& codes) {
        to[b].d.set(to_f16(fit.scale.step[first]));
        to[b].dmin.set(to_f16(fit.minimum.step[first]));
        to[b].scales = pack_scales(&fit.scale.factor[first], &fit.minimum.factor[first]);
        pack_nibble_runs(codes, 32, to[b].qs);
    });
}

inline void encode(const tile<32>& t, const float* from, block_q5_k* to, index blocks) {
    const stepped_affine fit = fit_stepped_affine<31, 63>(t, {30.0f, 31.4f, 8});
    const auto minimum = [&](int l) { return -fit.minimum(l); };
    for_each_encoded<integers<0, 31>, 32>(from, blocks, fit.scale, minimum, [&](index b, int first, const auto& codes) {
        to[b].d.set(to_f16(fit.scale.step[first]));
        to[b].dmin.set(to_f16(fit.minimum.step[first]));
        to[b].scales = pack_scales(&fit.scale.factor[first], &fit.minimum.factor[first]);
        pack_nibble_runs(codes, 32, to[b].qs);
        pack_bits(codes, 4, to[b].qh);
    });
}

inline void encode(const tile<16>& t, const float* from, block_q6_k* to, index blocks) {
    const stepped fit = fit_stepped_scale<integers<-32, 31>, 128>(t, {-28.0f, -33.0f, 16});
    for_each_encoded<integers<-32, 31>, 16>(from, blocks, fit, no_minimum, [&](index b, int first, const auto& codes) {
        for (int k = 0; k < 16; ++k) to[b].scales[k] = static_cast<std::int8_t>(fit.factor[first + k]);
        to[b].d.set(to_f16(fit.step[first]));
        pack_nibble_runs(codes, 64, to[b].ql);
        pack_pairs(codes, 4, to[b].qh);
    });
}

inline void encode(const tile<32>& t, const float* from, block_iq4_xs* to, index blocks) {
    const stepped fit = fit_stepped_scale<iq4_grid, 32>(t, {-100.0f, -140.0f, 12});
    for_each_encoded<iq4_grid, 32>(from, blocks, fit, no_minimum, [&](index b, int first, const auto& codes) {
        int high = 0;
        const auto factor = [&](int g) { return static_cast<int>(fit.factor[first + g]) + 32; };
        for (int g = 0; g < 8; ++g) high |= (factor(g) >> 4) << (2 * g);
        for (int g = 0; g < 4; ++g) {
            to[b].scales_l[g] = static_cast<std::uint8_t>((factor(2 * g) & 15) | (factor(2 * g + 1) & 15) << 4);
        }
        to[b].scales_h.set(static_cast<std::uint16_t>(high));
        to[b].d.set(to_f16(fit.step[first]));
        pack_nibble_runs(codes, 16, to[b].qs);
    });
}

}  // namespace detail
}  // namespace keel::inline KEEL_ABI
