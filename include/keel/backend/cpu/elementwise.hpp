// SPDX-License-Identifier: MIT
//
// The operations without a product: norms, gates, rows in and out, the router. Each row is computed by one thread,
// always in the same order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace simd {

/// f(first, count) for parts of `items` items of `cost` floats each, on as many threads as it pays to wake: a job costs
/// as much as some ten thousand floats.
template <class F>
void split(thread_pool& pool, index items, index cost, F&& f) {
    if (items < 2 || items * cost < 32768) return f(index{0}, items);
    pool.parallel([&](int thread, int threads) {
        const auto [first, count] = share_of(items, thread, threads);
        if (count > 0) f(first, count);
    });
}

/// 1 / sqrt(mean(x^2) + epsilon)
inline float inverse_rms(const float* x, index n, float epsilon) {
    return 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + epsilon);
}

inline void rms_norm_row(const float* x, const float* weight, float epsilon, index n, float* out) {
    const floats inverse(inverse_rms(x, n, epsilon));
    for_lanes(n, [&](index i, auto load, auto store) { store(out + i, load(x + i) * inverse * load(weight + i)); });
}

inline void l2_norm_row(float* x, float epsilon, index n) {
    const floats inverse(1.0f / std::max(std::sqrt(dot(x, x, n)), epsilon));
    for_lanes(n, [&](index i, auto load, auto store) { store(x + i, load(x + i) * inverse); });
}

inline void sigmoid_row(float* x, index n) {
    for_lanes(n, [&](index i, auto load, auto store) { store(x + i, sigmoid(load(x + i))); });
}

/// a softplus(f + bias); `out` may be f.
inline void log_decay_row(const float* f, const float* bias, float a, index n, float* out) {
    const floats rate(a);
    for_lanes(n,
              [&](index i, auto load, auto store) { store(out + i, rate * softplus(load(f + i) + load(bias + i))); });
}

/// `out` may be x or the gate.
inline void gated_norm_row(const float* x, const float* weight, const float* gate, float epsilon, index n, float* out) {
    const floats inverse(inverse_rms(x, n, epsilon));
    for_lanes(n, [&](index i, auto load, auto store) {
        store(out + i, load(x + i) * inverse * load(weight + i) * sigmoid(load(gate + i)));
    });
}

}  // namespace simd

inline void rms_norm(const rms_norm_args& a, thread_pool& pool) {
    simd::split(pool, a.x.extent[0], a.x.extent[1], [&](index first, index count) {
        for (index r = first; r < first + count; ++r) {
            simd::rms_norm_row(a.x[r].data, a.weight.data, a.epsilon, a.x.extent[1], a.out[r].data);
        }
    });
}

inline void l2_norm(const l2_norm_args& a, thread_pool& pool) {
    const index heads = a.x.extent[1];
    const index dim = a.x.extent[2];
    simd::split(pool, a.x.extent[0] * heads, dim, [&](index first, index count) {
        for (index item = first; item < first + count; ++item) {
            simd::l2_norm_row(a.x[item / heads][item % heads].data, a.epsilon, dim);
        }
    });
}

inline void kda_gates(const kda_gates_args& a, thread_pool& pool) {
    const index heads = a.log_decay.extent[1];
    const index dim = a.log_decay.extent[2];
    for (index r = 0; r < a.beta.extent[0]; ++r) simd::sigmoid_row(a.beta[r].data, heads);
    simd::split(pool, a.log_decay.extent[0] * heads, 8 * dim, [&](index first, index count) {
        for (index item = first; item < first + count; ++item) {
            const index h = item % heads;
            float* const g = a.log_decay[item / heads][h].data;
            simd::log_decay_row(g, a.dt_bias.data + h * dim, a.a[h], dim, g);
        }
    });
}

inline void gated_norm(const gated_norm_args& a, thread_pool& pool) {
    const index heads = a.x.extent[1];
    const index dim = a.x.extent[2];
    simd::split(pool, a.x.extent[0] * heads, 4 * dim, [&](index first, index count) {
        for (index item = first; item < first + count; ++item) {
            float* const x = a.x[item / heads][item % heads].data;
            simd::gated_norm_row(x, a.weight.data, a.gate[item / heads][item % heads].data, a.epsilon, dim, x);
        }
    });
}

/// Matrix: a matrix_view.
template <class Matrix>
void embed(const embed_args<Matrix>& a, thread_pool& pool) {
    simd::split(pool, a.out.extent[0], 8 * a.out.extent[1], [&](index first, index count) {
        for (index r = first; r < first + count; ++r) {
            const std::byte* const row = a.table.row(a.tokens[static_cast<std::size_t>(r)]);
            decode_row(a.table.type, row, a.out[r].data, a.table.columns);
        }
    });
}

inline void add(const add_args& a, thread_pool& pool) {
    using namespace simd;
    simd::split(pool, a.x.extent[0], a.x.extent[1], [&](index first, index count) {
        for (index r = first; r < first + count; ++r) {
            float* const x = a.x[r].data;
            const float* const y = a.y[r].data;
            for_lanes(a.x.extent[1], [&](index i, auto load, auto store) { store(x + i, load(x + i) + load(y + i)); });
        }
    });
}

inline void gather(const gather_args& a, thread_pool& pool) {
    simd::split(pool, a.out.extent[0], a.out.extent[1], [&](index first, index count) {
        for (index r = first; r < first + count; ++r) {
            std::copy_n(a.x[a.rows[static_cast<std::size_t>(r)]].data, a.out.extent[1], a.out[r].data);
        }
    });
}

/// Workspace that route() takes.
inline index route_scratch_bytes(const workspace_limits& limits, int threads) {
    using namespace simd;
    return threads * 2 * (limits.experts + lanes) * static_cast<index>(sizeof(float)) + arena::alignment;
}

inline void route(const route_args& a, thread_pool& pool, arena& workspace) {
    using namespace simd;
    constexpr float taken = -std::numeric_limits<float>::infinity();
    constexpr float lowest = std::numeric_limits<float>::lowest();  // of a score: also that of a NaN
    const index rows = a.logits.extent[0];
    const index experts = a.logits.extent[1];
    const index k = a.chosen.extent[1];
    const index padded = (experts + lanes - 1) / lanes * lanes;
    const arena::scope scope(workspace);
    const auto scratch = workspace.take<float>(pool.size(), 2, padded);

    const auto route_row = [&](const float* logits, float* p, float* score, std::int32_t* chosen, float* weights) {
        std::fill_n(score + padded - lanes, lanes, taken);
        for_lanes(experts, [&](index e, auto load, auto store) {
            const floats probability = sigmoid(load(logits + e));
            const floats biased = probability + load(a.bias.data + e);
            store(p + e, probability);
            store(score + e, xsimd::select(biased >= floats(lowest), biased, floats(lowest)));
        });
        float total = 0;
        for (index slot = 0; slot < k; ++slot) {
            floats most = load(score);
            for (index e = lanes; e < padded; e += lanes) most = xsimd::max(most, load(score + e));
            const index best = std::find(score, score + experts - 1, largest(most)) - score;  // the lowest on a tie
            chosen[slot] = static_cast<std::int32_t>(best);
            score[best] = taken;
            weights[slot] = p[best];
            total += weights[slot];
        }
        for (index slot = 0; slot < k; ++slot) weights[slot] *= a.scale / std::max(total, 0x1p-14f);
    };
    const auto some_rows = [&](int thread, int threads) {
        const auto [first, count] = share_of(rows, thread, threads);
        float* const p = scratch[thread].data;
        for (index r = first; r < first + count; ++r) {
            route_row(a.logits[r].data, p, p + padded, a.chosen[r].data, a.weights[r].data);
        }
    };
    if (rows * experts * k < 32768) {
        some_rows(0, 1);
    } else {
        pool.parallel(some_rows);
    }
}

}  // namespace keel::inline KEEL_ABI
