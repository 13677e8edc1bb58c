// SPDX-License-Identifier: MIT
//
// The short convolution in front of the recurrence: causal, one filter per channel, SiLU behind it. All in f32.
#pragma once

#include <algorithm>
#include <cstddef>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace simd {

/// The longest convolution, as read_config() allows.
inline constexpr index max_kernel = 64;

/// Channels whose taps are brought into order together.
inline constexpr index conv_channels = 256;

/// x, history and weights of n <= conv_channels channels. `tap` has room for (K, conv_channels); Kernel is K, or 0 if
/// it is not known when this is compiled.
template <index Kernel>
void convolve(view<float, 2> x, view<float, 2> history, view<const float, 2> weights, float* tap) {
    constexpr index most = Kernel > 0 ? Kernel : max_kernel;
    const index kernel = Kernel > 0 ? Kernel : weights.extent[1];
    const index n = x.extent[1];
    for (index c = 0; c < n; ++c) {
        for (index j = 0; j < kernel; ++j) tap[j * conv_channels + c] = weights.data[c * kernel + j];
    }
    for_lanes(n, [&](index c, auto load, auto store) {
        floats weight[most], window[most];  // of inputs, the oldest first
        for (index j = 0; j < kernel; ++j) weight[j] = load(tap + j * conv_channels + c);
        for (index j = 0; j + 1 < kernel; ++j) window[j] = load(&history(j, c));
        for (index t = 0; t < x.extent[0]; ++t) {
            window[kernel - 1] = load(&x(t, c));
            floats y(0.0f);
            for (index j = 0; j < kernel; ++j) y = fma(weight[j], window[j], y);
            for (index j = 0; j + 1 < kernel; ++j) window[j] = window[j + 1];
            store(&x(t, c), silu(y));
        }
        for (index j = 0; j + 1 < kernel; ++j) store(&history(j, c), window[j]);
    });
}

}  // namespace simd

/// Workspace that short_conv() takes.
inline index short_conv_scratch_bytes(const workspace_limits& limits, int threads) {
    return threads * (limits.taps + 1) * simd::conv_channels * static_cast<index>(sizeof(float)) + arena::alignment;
}

/// Taps are dense.
inline void short_conv(const short_conv_args& a, thread_pool& pool, arena& workspace) {
    const index kernel = a.taps.extent[1];
    const index channels = a.x.extent[1];
    const arena::scope scope(workspace);
    const auto scratch = workspace.take<float>(pool.size(), kernel * simd::conv_channels);
    const auto some_channels = [&](int thread, int threads) {
        const auto [first, count] = share_of(channels, thread, threads, simd::conv_channels);
        for (index c = first; c < first + count; c += simd::conv_channels) {
            const index n = std::min(simd::conv_channels, first + count - c);
            for (const segment& s : a.segments) {
                const auto x = a.x.rows(s.first_row, s.rows).columns(c, n);
                const auto history = a.layout.history(s.recurrent, a.layer)[a.which].columns(c, n);
                const auto convolve = kernel == 4 ? simd::convolve<4> : simd::convolve<0>;
                convolve(x, history, a.taps.rows(c, n), scratch[thread].data);
            }
        }
    };
    if (a.x.size() < 8192) {
        some_channels(0, 1);
    } else {
        pool.parallel(some_channels);
    }
}

}  // namespace keel::inline KEEL_ABI
