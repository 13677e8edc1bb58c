// SPDX-License-Identifier: MIT
//
// What the tests of products share: encoded weights, backends, and how far off rounding may be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/amx.hpp>
#include <keel/backend/host_memory.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

#include "backend/operands.hpp"
#include "catch.hpp"

namespace keel::testing {

/// Encoded weights: every code that the type has, and scales that give weights around 1 / sqrt(columns).
class weights {
public:
    weights(dtype type, index count, index rows, index columns, random_numbers& random)
        : bytes_(static_cast<std::size_t>(count * rows * row_bytes(type, columns)) + 1) {
        for (std::byte& b : bytes_) b = static_cast<std::byte>(random.between(0, 255));
        // From an odd address: blocks have no alignment. Floats in a file do.
        matrix_ = {{bytes_.data() + (info(type).block_elements > 1 ? 1 : 0), type, count, rows, columns}, nullptr};
        const float size = 1.0f / std::sqrt(static_cast<float>(columns));
        visit_blocks(type, [&]<class Block>() {
            auto* const blocks = reinterpret_cast<Block*>(const_cast<std::byte*>(matrix_.data));
            for (index i = 0; i < count * rows * columns / Block::elements; ++i) {
                const array scales = random.uniform(2, 0.2f * size, size);
                const float sign = random.between(0, 1) == 0 ? 1.0f : -1.0f;
                Block& b = blocks[i];
                if constexpr (requires { b.value.set(f16{}); }) b.value.set(to_f16(sign * scales.values[0]));
                if constexpr (requires { b.value.set(bf16{}); }) b.value.set(to_bf16(sign * scales.values[0]));
                if constexpr (requires { b.value.set(0.0f); }) b.value.set(sign * scales.values[0]);
                if constexpr (requires { b.e; }) b.e = static_cast<std::uint8_t>(random.between(118, 122));
                if constexpr (requires { b.d; }) {
                    b.d.set({});
                    std::vector<float> codes(Block::elements);
                    b.d.set(to_f16(1.0f));
                    if constexpr (requires { b.m; }) b.m.set({});
                    if constexpr (requires { b.dmin; }) b.dmin.set({});
                    b.decode(codes.data());
                    float most = 0;
                    for (const float c : codes) most = std::max(most, std::abs(c));
                    b.d.set(to_f16(sign * scales.values[0] / std::max(most, 1.0f)));
                    if constexpr (requires { b.m; }) b.m.set(to_f16(scales.values[1]));
                    if constexpr (requires { b.dmin; }) b.dmin.set(to_f16(scales.values[1] / 15));
                }
            }
        });
    }

    operator const host_matrix&() const { return matrix_; }
    [[nodiscard]] const host_matrix& get() const { return matrix_; }

    [[nodiscard]] std::vector<float> row(index i, index m = 0) const {
        std::vector<float> decoded(static_cast<std::size_t>(matrix_.columns));
        decode_row(matrix_.type, matrix_.row(i, m), decoded.data(), matrix_.columns);
        return decoded;
    }

private:
    std::vector<std::byte> bytes_;
    host_matrix matrix_;
};

inline constexpr workspace_limits limits{.rows = 600,
                                         .columns = 2304,
                                         .experts = 16,
                                         .chosen = 4,
                                         .expert_ff = 256,
                                         .heads = 8,
                                         .head_dim = 256,
                                         .taps = 3,
                                         .latent_width = 64,
                                         .latent_rank = 256,
                                         .mla_key = 256,
                                         .mla_value = 256,
                                         .context = 16};

template <class Backend>
Backend make(precision p, int threads, bool interleave = false) {
    const backend_options options{.precision = p, .threads = threads, .interleave = interleave};
    return {std::make_shared<typename Backend::device>(options), Backend::scratch_bytes(limits, options)};
}

inline bool same_bits(const array& a, const array& b) {
    return a.values.size() == b.values.size() &&
           std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(float)) == 0;
}

/// W x with one backend.
template <class Backend>
array product(Backend& backend, const weights& w, array& x, index n) {
    const host_matrix& m = w;
    array out(n * m.rows);
    backend.matmul(x.as(n, m.columns), {{m, out.as(n, m.rows)}});
    return out;
}

/// What rounding can do to W x: of activations to bytes, which moves x_i by at most s / 2, s = max |x of its 32| / 127,
/// and, were it random, by s / sqrt(12); to bytes with rests, at most s / 256, nearly always half of that; or of
/// weights and activations to bf16, which moves either by at most 2^-8 of itself.
struct rounding {
    double most = 0;      // sum of |w_i| s / 2
    double variance = 0;  // sum of w_i^2 s^2 / 12
    double size = 0;  // sum of |w_i x_i|, to which the float arithmetic's own rounding is relative, and that to bf16

    rounding(const std::vector<float>& w, const float* x) {
        for (std::size_t i = 0; i < w.size(); i += 32) {
            double largest = 0;
            for (std::size_t j = i; j < i + 32; ++j) largest = std::max(largest, std::abs(static_cast<double>(x[j])));
            for (std::size_t j = i; j < i + 32; ++j) {
                const double weight = std::abs(static_cast<double>(w[j]));
                most += weight * largest / 254;
                variance += std::pow(weight * largest / 127, 2) / 12;
                size += weight * std::abs(static_cast<double>(x[j]));
            }
        }
    }
};

/// Whether fast products of many rows round to bf16 instead of bytes.
inline bool rounds_to_halves() {
#if defined(KEEL_AMX)
    return amx::permitted();
#else
    return false;
#endif
}

/// Checks y = W x of n rows against the exact product.
inline void check_rounding(const weights& w, const array& x, index n, const array& y, const array& expected,
                           bool halves) {
    const matrix_view& m = w.get();
    const double finer = m.type == dtype::q8_0 && n <= 8 ? 256 : 1;  // than codes without rests
    double error = 0, variance = 0;
    bool within = true;
    for (index o = 0; o < m.rows; ++o) {
        const std::vector<float> row = w.row(o);
        for (index r = 0; r < n; ++r) {
            const rounding allowed(row, x.values.data() + r * m.columns);
            const auto at = static_cast<std::size_t>(r * m.rows + o);
            const double e = static_cast<double>(y.values[at]) - static_cast<double>(expected.values[at]);
            const double most = halves ? 0x1.02p-7 * allowed.size
                                       : (finer > 1 ? 2 : 1.001) / finer * allowed.most + 1e-6 * allowed.size;
            within = within && std::abs(e) <= most;
            error += e * e;
            variance += allowed.variance;
        }
    }
    CHECK(within);
    // One row's errors are alike in all products with minimums, so that few rows say little.
    if (n == 100) {
        CHECK(std::sqrt(error / variance) < (halves ? 0.6 : 1.5));
        CHECK(std::sqrt(error / variance) > (halves ? 0.05 : 0.6));
    }
}

}  // namespace keel::testing
