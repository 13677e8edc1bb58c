// SPDX-License-Identifier: MIT
//
// What both forms of latent attention do with a tile of positions: read the cache, and carry a softmax on.
#pragma once

#include <cstddef>

#include <keel/backend/batch.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {
namespace simd {

/// `count` rows of the latent cache as floats, all in one block of it: where they lie, or converted in `memory`.
inline float* latent_rows(const memory_layout& layout, const segment& s, index layer, index position, index count,
                          float* memory) {
    std::byte* const rows = layout.latent_row(s.blocks, layer, position);
    if (layout.cache == dtype::f32) return reinterpret_cast<float*>(rows);
    const f16* const halves = reinterpret_cast<const f16*>(rows);
    const index n = count * layout.latent_width;
    index i = 0;
    for (; i + lanes <= n; i += lanes) store(memory + i, load(halves + i));
    for (; i < n; ++i) memory[i] = to_float(halves[i]);
    return memory;
}

/// The running softmax of `width` columns of scores (positions, width), a multiple of `lanes`: scores become weights
/// relative to the largest score so far, and keep[j] is what sums made with the former largest are to be scaled with.
inline void running_softmax(float* scores, index positions, index width, float* most, float* total, float* keep) {
    for (index j = 0; j < width; j += lanes) {
        floats largest = load(most + j);
        const floats before = largest;
        for (index p = 0; p < positions; ++p) largest = xsimd::max(largest, load(scores + p * width + j));
        const floats scale = exp(before - largest);
        floats sum(0.0f);
        for (index p = 0; p < positions; ++p) {
            const floats weight = exp(load(scores + p * width + j) - largest);
            store(scores + p * width + j, weight);
            sum = sum + weight;
        }
        store(most + j, largest);
        store(keep + j, scale);
        store(total + j, fma(load(total + j), scale, sum));
    }
}

}  // namespace simd
}  // namespace keel::inline KEEL_ABI
