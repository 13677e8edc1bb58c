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

/// The weights (n, K) of n channels in the order in which convolve() reads them, (K, n).
template <index Kernel>
void order_taps(view<const float, 2> weights, view<float, 2> taps) {
    const index kernel = Kernel > 0 ? Kernel : weights.extent[1];
    for (index c = 0; c < weights.extent[0]; ++c) {
        for (index j = 0; j < kernel; ++j) taps(j, c) = weights.data[c * kernel + j];
    }
}

/// y, which may be x, of n channels from x, taps (K, n) and a history that moves on with x. Kernel is K, or 0 if it is
/// not known when this is compiled.
template <index Kernel>
void convolve(view<const float, 2> x, view<float, 2> history, view<const float, 2> taps, view<float, 2> y) {
    constexpr index most = Kernel > 0 ? Kernel : max_kernel;
    const index kernel = Kernel > 0 ? Kernel : taps.extent[0];
    for_lanes(x.extent[1], [&](index c, auto load, auto store) {
        floats tap[most], window[most];  // of inputs, the oldest first
        for (index j = 0; j < kernel; ++j) tap[j] = load(&taps(j, c));
        for (index j = 0; j + 1 < kernel; ++j) window[j] = load(&history(j, c));
        for (index t = 0; t < x.extent[0]; ++t) {
            window[kernel - 1] = load(&x(t, c));
            floats sum(0.0f);
            for (index j = 0; j < kernel; ++j) sum = fma(tap[j], window[j], sum);
            for (index j = 0; j + 1 < kernel; ++j) window[j] = window[j + 1];
            store(&y(t, c), silu(sum));
        }
        for (index j = 0; j + 1 < kernel; ++j) store(&history(j, c), window[j]);
    });
}

/// f.operator()<Kernel>(), see convolve().
template <class F>
void visit_kernel(index kernel, F&& f) {
    kernel == 4 ? f.template operator()<4>() : f.template operator()<0>();
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
            const view<float, 2> taps(scratch[thread].data, kernel, n);
            simd::visit_kernel(kernel, [&]<index Kernel>() {
                simd::order_taps<Kernel>(a.taps.rows(c, n), taps);
                for (const segment& s : a.segments) {
                    const auto x = a.x.rows(s.first_row, s.rows).columns(c, n);
                    const auto history = a.layout.history(s.recurrent, a.layer)[a.which].columns(c, n);
                    simd::convolve<Kernel>(x, history, taps, x);
                }
            });
        }
    };
    if (a.x.size() < 8192) {
        some_channels(0, 1);
    } else {
        pool.parallel(some_channels);
    }
}

}  // namespace keel::inline KEEL_ABI
