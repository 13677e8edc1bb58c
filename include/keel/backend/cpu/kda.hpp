// SPDX-License-Identifier: MIT
//
// Kimi Delta Attention. The heads are independent, and within a head so are the columns of the state (a column per
// element of the value): work is cut along both, and how it is cut changes no bit. All arithmetic is f32.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/cpu/tile.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace simd {

/// While it lives, this thread's arithmetic takes denormal numbers for zero: what a strong decay leaves behind would
/// otherwise cost a hundred cycles each time it is touched.
class flush_denormals {
public:
#if defined(__SSE__)
    flush_denormals() { _mm_setcsr(saved_ | 0x8040u); }  // flush to zero, denormals are zero
    ~flush_denormals() { _mm_setcsr(saved_); }
#else
    flush_denormals() = default;
#endif
    flush_denormals(const flush_denormals&) = delete;
    flush_denormals& operator=(const flush_denormals&) = delete;

#if defined(__SSE__)
private:
    unsigned saved_ = _mm_getcsr();
#endif
};

/// Channels that the convolution works on at a time, so that they stay in the first cache.
inline constexpr index conv_channels = 256;

/// `taps` is K - 1; x, history and weights point at the first of n <= conv_channels channels. `tap` has room for
/// (K, conv_channels).
inline void convolve(view<float, 2> x, view<float, 2> history, view<const float, 2> weights, index taps, float* tap,
                     float* before) {
    const index n = x.extent[1];
    for (index j = 0; j <= taps; ++j) {
        for (index c = 0; c < n; ++c) tap[j * conv_channels + c] = weights(c, j);
    }
    // Row t of `before` modulo K is the input of token t - taps.
    const index kernel = taps + 1;
    const auto input = [&](index t) { return before + t % kernel * conv_channels; };
    for (index j = 0; j < taps; ++j) std::copy_n(history[j].data, n, input(j));
    for (index t = 0; t < x.extent[0]; ++t) {
        float* const row = x[t].data;
        std::copy_n(row, n, input(t + taps));
        for_lanes(n, [&](index c, auto load, auto store) {
            floats y(0.0f);
            for (index j = 0; j < kernel; ++j) y = fma(load(tap + j * conv_channels + c), load(input(t + j) + c), y);
            store(row + c, silu(y));
        });
    }
    for (index j = 0; j < taps; ++j) std::copy_n(input(x.extent[0] + j), n, history[j].data);
}

}  // namespace simd

/// Workspace that short_conv() takes.
inline index short_conv_scratch_bytes(index taps, int threads) {
    return threads * 2 * (taps + 1) * simd::conv_channels * static_cast<index>(sizeof(float)) + arena::alignment;
}

inline void short_conv(const short_conv_args& a, thread_pool& pool, arena& workspace) {
    const index taps = a.layout.taps;
    const index channels = a.x.extent[1];
    const arena::scope scope(workspace);
    const auto scratch = workspace.take<float>(pool.size(), 2, (taps + 1) * simd::conv_channels);
    const auto some_channels = [&](int thread, int threads) {
        const auto [first, count] = share_of(channels, thread, threads, simd::conv_channels);
        for (index c = first; c < first + count; c += simd::conv_channels) {
            const index n = std::min(simd::conv_channels, first + count - c);
            for (const segment& s : a.segments) {
                simd::convolve(a.x.rows(s.first_row, s.rows).columns(c, n),
                               a.layout.history(s.recurrent, a.layer)[a.which].columns(c, n), a.taps.rows(c, n), taps,
                               scratch[thread][0].data, scratch[thread][1].data);
            }
        }
    };
    if (a.x.size() < 8192) {
        some_channels(0, 1);
    } else {
        pool.parallel(some_channels);
    }
}

inline void l2_norm(const l2_norm_args& a, thread_pool& pool) {
    using namespace simd;
    const index heads = a.x.extent[1];
    const index dim = a.x.extent[2];
    simd::split(pool, a.x.extent[0] * heads, dim, [&](index first, index count) {
        for (index item = first; item < first + count; ++item) {
            float* const x = a.x[item / heads][item % heads].data;
            const floats inverse(1.0f / std::max(std::sqrt(dot(x, x, dim)), a.epsilon));
            for_lanes(dim, [&](index i, auto load, auto store) { store(x + i, load(x + i) * inverse); });
        }
    });
}

inline void kda_gates(const kda_gates_args& a, thread_pool& pool) {
    using namespace simd;
    const index heads = a.log_decay.extent[1];
    const index dim = a.log_decay.extent[2];
    for (index r = 0; r < a.beta.extent[0]; ++r) {
        float* const beta = a.beta[r].data;
        for_lanes(heads, [&](index h, auto load, auto store) { store(beta + h, sigmoid(load(beta + h))); });
    }
    simd::split(pool, a.log_decay.extent[0] * heads, 8 * dim, [&](index first, index count) {
        for (index item = first; item < first + count; ++item) {
            const index h = item % heads;
            float* const g = a.log_decay[item / heads][h].data;
            const float* const bias = a.dt_bias.data + h * dim;
            const floats rate(a.a[h]);
            for_lanes(dim, [&](index i, auto load, auto store) {
                store(g + i, rate * softplus(load(g + i) + load(bias + i)));
            });
        }
    });
}

inline void gated_norm(const gated_norm_args& a, thread_pool& pool) {
    using namespace simd;
    const index heads = a.x.extent[1];
    const index dim = a.x.extent[2];
    simd::split(pool, a.x.extent[0] * heads, 4 * dim, [&](index first, index count) {
        for (index item = first; item < first + count; ++item) {
            float* const x = a.x[item / heads][item % heads].data;
            const float* const gate = a.gate[item / heads][item % heads].data;
            const floats inverse(simd::inverse_rms(x, dim, a.epsilon));
            for_lanes(dim, [&](index i, auto load, auto store) {
                store(x + i, load(x + i) * inverse * load(a.weight.data + i) * sigmoid(load(gate + i)));
            });
        }
    });
}

namespace simd {

/// Tokens that are worked on together: enough to read the state seldom.
inline constexpr index kda_chunk_tokens = 16;

/// What a thread needs for one chunk of one head.
struct kda_scratch {
    static index floats_per_thread(index dim) {
        return dim + 6 * kda_chunk_tokens * dim + 2 * kda_chunk_tokens * kda_chunk_tokens;
    }

    kda_scratch(float* memory, index dim)
        : keep{memory, dim},
          key{keep.data + dim, kda_chunk_tokens, dim},
          against{key.data + key.size(), 2 * kda_chunk_tokens, dim},
          product{against.data + against.size(), 2 * kda_chunk_tokens, dim},
          update{product.data + product.size(), kda_chunk_tokens, dim},
          key_key{update.data + update.size(), kda_chunk_tokens, kda_chunk_tokens},
          query_key{key_key.data + key_key.size(), kda_chunk_tokens, kda_chunk_tokens} {}

    view<float, 1> keep;       // e^G of the chunk's last token so far
    view<float, 2> key;        // (tokens, D): k_i e^{G_t - G_i} for the current t; kda_step: e^g_t
    view<float, 2> against;    // (tokens of k, then tokens of q; D): what is multiplied with the state
    view<float, 2> product;    // (tokens of k, then tokens of q; columns)
    view<float, 2> update;     // (tokens, columns): u
    view<float, 2> key_key;    // a_ti
    view<float, 2> query_key;  // b_ti
};

/// One head of some tokens of one segment: the rows [first, first + tokens) of the batch and the state's columns
/// [column, column + columns).
struct kda_part {
    const kda_args& args;
    index head, first, tokens, column, columns;

    [[nodiscard]] const float* q(index t) const { return args.q[first + t][head].data; }
    [[nodiscard]] const float* k(index t) const { return args.k[first + t][head].data; }
    [[nodiscard]] const float* v(index t) const { return args.v[first + t][head].data + column; }
    [[nodiscard]] const float* log_decay(index t) const { return args.log_decay[first + t][head].data; }
    [[nodiscard]] float beta(index t) const { return args.beta(first + t, head); }
    [[nodiscard]] float* out(index t) const { return args.out[first + t][head].data + column; }
};

/// Calls f(part, state, scratch) for all heads, segments and chunks of tokens, in order within a head and segment;
/// `state` points at the part's columns.
template <class F>
void for_each_part(const kda_args& a, thread_pool& pool, arena& workspace, F&& f) {
    const index dim = a.layout.head_dim;
    const index segments = static_cast<index>(a.segments.size());
    const index heads = a.layout.heads;
    // Few heads: a head's columns are shared out too.
    const index slabs = std::clamp((pool.size() - 1) / std::max(heads * segments, index{1}) + 1, index{1},
                                   std::max(dim / (2 * lanes), index{1}));
    const arena::scope scope(workspace);
    const auto memory = workspace.take<float>(pool.size(), kda_scratch::floats_per_thread(dim));
    pool.parallel([&](int thread, int threads) {
        const flush_denormals flush;
        const kda_scratch scratch(memory[thread].data, dim);
        const auto [first_task, count] = share_of(heads * slabs * segments, thread, threads);
        for (index task = first_task; task < first_task + count; ++task) {
            const segment& s = a.segments[static_cast<std::size_t>(task % segments)];
            const index head = task / segments / slabs;
            const auto [column, columns] =
                share_of(dim, static_cast<int>(task / segments % slabs), static_cast<int>(slabs), 2 * lanes);
            float* const state = a.layout.state(s.recurrent, a.layer)[head].data + column;
            for (index done = 0; done < s.rows; done += kda_chunk_tokens) {
                const index tokens = std::min(kda_chunk_tokens, s.rows - done);
                f(kda_part{a, head, s.first_row + done, tokens, column, columns}, state, scratch);
            }
        }
    });
}

/// Tokens one after another in Vectors columns of the state. It is read once more than there are tokens: the update of
/// one token and the reads of the next are one pass,
///   S <- diag(d) S + k delta^T,   delta = beta (v - S^T (d k)),   o = S^T (d q) + delta (k.q)      with the S before
template <int Vectors, class Load, class Store>
void kda_step_columns(const kda_part& p, const kda_scratch& f, const float* key_query, float* state, index j,
                      Load&& load, Store&& store) {
    const index dim = p.args.layout.head_dim;
    floats read[Vectors], out[Vectors], delta[Vectors];
    const auto clear = [&] { unroll<Vectors>([&](auto v) { read[v] = out[v] = floats(0.0f); }); };
    const auto read_row = [&](index t, index i, auto v, floats s) {
        read[v] = fma(floats(f.against(t, i)), s, read[v]);
        out[v] = fma(floats(f.against(kda_chunk_tokens + t, i)), s, out[v]);
    };
    clear();
    for (index i = 0; i < dim; ++i) {
        unroll<Vectors>([&](auto v) { read_row(0, i, v, load(state + i * dim + j + v * lanes)); });
    }
    for (index t = 0; t < p.tokens; ++t) {
        unroll<Vectors>([&](auto v) {
            delta[v] = floats(p.beta(t)) * (load(p.v(t) + j + v * lanes) - read[v]);
            store(p.out(t) + j + v * lanes, fma(floats(key_query[t]), delta[v], out[v]));
        });
        clear();
        const float* const key = p.k(t);
        const float* const decay = f.key[t].data;
        const bool last = t + 1 == p.tokens;
        const auto update = [&](index i, auto v) {
            float* const at = state + i * dim + j + v * lanes;
            const floats s = fma(floats(decay[i]), load(at), floats(key[i]) * delta[v]);
            store(at, s);
            return s;
        };
        if (last) {
            for (index i = 0; i < dim; ++i) unroll<Vectors>([&](auto v) { update(i, v); });
        } else {
            for (index i = 0; i < dim; ++i) unroll<Vectors>([&](auto v) { read_row(t + 1, i, v, update(i, v)); });
        }
    }
}

inline void kda_step_part(const kda_part& p, float* state, const kda_scratch& scratch) {
    const index dim = p.args.layout.head_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    std::array<float, kda_chunk_tokens> key_query;
    for (index t = 0; t < p.tokens; ++t) {
        const float* const q = p.q(t);
        const float* const k = p.k(t);
        const float* const g = p.log_decay(t);
        float* const decay = scratch.key[t].data;
        float* const key = scratch.against[t].data;
        float* const query = scratch.against[kda_chunk_tokens + t].data;
        for_lanes(dim, [&](index i, auto load, auto store) {
            const floats d = exp(load(g + i));
            store(decay + i, d);
            store(key + i, d * load(k + i));
            store(query + i, d * (floats(scale) * load(q + i)));
        });
        key_query[static_cast<std::size_t>(t)] = scale * dot(k, q, dim);
    }
    constexpr int vectors = lanes >= 16 ? 4 : 2;
    const auto load_all = [](const float* from) { return load(from); };
    const auto store_all = [](float* to, floats x) { store(to, x); };
    index j = 0;
    for (; j + vectors * lanes <= p.columns; j += vectors * lanes) {
        kda_step_columns<vectors>(p, scratch, key_query.data(), state, j, load_all, store_all);
    }
    for_lanes(p.columns - j, [&](index i, auto load, auto store) {
        kda_step_columns<1>(p, scratch, key_query.data(), state, j + i, load, store);
    });
}

/// The formulas of reference::kda_chunk. No exponent but g itself is ever exponentiated: e^{G_t - G_i} is the product
/// of the decays between i and t, each at most 1, which neither overflows nor cancels.
inline void kda_chunk_part(const kda_part& p, float* state, const kda_scratch& s) {
    const index dim = p.args.layout.head_dim;
    const index n = p.tokens;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    std::fill_n(s.keep.data, dim, 1.0f);
    std::fill_n(s.query_key.data, s.query_key.size(), 0.0f);
    for (index t = 0; t < n; ++t) {
        const float* const k = p.k(t);
        const float* const g = p.log_decay(t);
        float* const decay = s.key[t].data;  // until k itself takes its place
        float* const keep = s.keep.data;
        float* const key = s.against[t].data;
        float* const query = s.against[n + t].data;
        const float* const q = p.q(t);
        for_lanes(dim, [&](index i, auto load, auto store) {
            const floats d = exp(load(g + i));
            const floats all = d * load(keep + i);
            store(decay + i, d);
            store(keep + i, all);
            store(key + i, all * load(k + i));
            store(query + i, all * (floats(scale) * load(q + i)));
        });
        for (index i = 0; i < t; ++i) {
            float* const past = s.key[i].data;
            floats with_key(0.0f), with_query(0.0f);
            for_lanes(dim, [&](index c, auto load, auto store) {
                const floats x = load(decay + c) * load(past + c);
                store(past + c, x);
                with_key = fma(x, load(k + c), with_key);
                with_query = fma(x, load(q + c), with_query);
            });
            s.key_key(t, i) = sum(with_key);
            s.query_key(t, i) = scale * sum(with_query);
        }
        s.query_key(t, t) = scale * dot(k, q, dim);
        std::copy_n(k, dim, decay);
    }

    multiply({.rows = 2 * n,
              .columns = p.columns,
              .depth = dim,
              .a = s.against.data,
              .a_row = dim,
              .a_step = 1,
              .b = state,
              .b_step = dim,
              .c = s.product.data,
              .c_row = dim});
    for (index t = 0; t < n; ++t) {
        const float* const v = p.v(t);
        const float* const read = s.product[t].data;
        float* const u = s.update[t].data;
        for_lanes(p.columns, [&](index j, auto load, auto store) {
            floats rest = load(v + j) - load(read + j);
            for (index i = 0; i < t; ++i) rest = fma(floats(-s.key_key(t, i)), load(s.update[i].data + j), rest);
            store(u + j, floats(p.beta(t)) * rest);
        });
    }
    for (index t = 0; t < n; ++t) std::copy_n(s.product[n + t].data, p.columns, p.out(t));
    multiply({.rows = n,
              .columns = p.columns,
              .depth = n,
              .a = s.query_key.data,
              .a_row = kda_chunk_tokens,
              .a_step = 1,
              .b = s.update.data,
              .b_step = dim,
              .c = p.out(0),
              .c_row = p.args.out.stride[0]},
             [](index, auto&& old) { return old(); });
    multiply_into({.rows = dim,
                   .columns = p.columns,
                   .depth = n,
                   .a = s.key.data,
                   .a_row = 1,
                   .a_step = dim,
                   .b = s.update.data,
                   .b_step = dim,
                   .c = state,
                   .c_row = dim},
                  s.keep.data);
}

}  // namespace simd

/// Workspace that kda_step() and kda_chunk() take.
inline index kda_scratch_bytes(index head_dim, int threads) {
    const index per_thread = simd::kda_scratch::floats_per_thread(head_dim);
    return threads * per_thread * static_cast<index>(sizeof(float)) + arena::alignment;
}

/// One pass over the state per token, which stays in the first cache for the tokens of a segment. The same bits however
/// a sequence is cut into segments.
inline void kda_step(const kda_args& a, thread_pool& pool, arena& workspace) {
    simd::for_each_part(a, pool, workspace, simd::kda_step_part);
}

/// The chunked form: the state is read and written once per sixteen tokens.
inline void kda_chunk(const kda_args& a, thread_pool& pool, arena& workspace) {
    simd::for_each_part(a, pool, workspace, simd::kda_chunk_part);
}

}  // namespace keel::inline KEEL_ABI
