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

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/cpu/tile.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace simd {

/// Tokens that are worked on together.
inline constexpr index kda_tokens = 16;

/// Columns of the state that are worked on together: with 128 rows they fit into half of a first cache.
inline constexpr index kda_columns = 2 * lanes;

/// The state of one head, or some columns of it, cut into slabs of kda_columns columns: where it lies, or, when several
/// tokens pass over it, copied so that a slab is contiguous. (In place the rows of a slab are so far apart, a power of
/// two, that they displace each other from the cache.)
struct kda_state {
    float* data;
    index stride;  // from row to row
    index step;    // from slab to slab

    [[nodiscard]] float* slab(index column) const { return data + column / kda_columns * step; }
};

/// What a thread needs for the tokens of one head that are worked on together.
struct kda_scratch {
    static index floats_per_thread(index dim) {
        const index columns = (dim + kda_columns - 1) / kda_columns * kda_columns;
        return dim + 3 * kda_tokens * dim + 3 * kda_tokens * kda_columns + 2 * kda_tokens * kda_tokens + dim * columns;
    }

    kda_scratch(float* memory, index dim)
        : keep{memory, dim},
          key{keep.data + keep.size(), kda_tokens, dim},
          against{key.data + key.size(), 2 * kda_tokens, dim},
          product{against.data + against.size(), 2 * kda_tokens, kda_columns},
          update{product.data + product.size(), kda_tokens, kda_columns},
          key_key{update.data + update.size(), kda_tokens, kda_tokens},
          query_key{key_key.data + key_key.size(), kda_tokens, kda_tokens},
          state(query_key.data + query_key.size()) {}

    view<float, 1> keep;       // e^G of the tokens so far
    view<float, 2> key;        // (tokens, D): k_i e^{G_t - G_i} for the current t; kda_step: e^g_t
    view<float, 2> against;    // (tokens of k, then tokens of q; D): what is multiplied with the state
    view<float, 2> product;    // (tokens of k, then tokens of q; columns of a slab)
    view<float, 2> update;     // (tokens, columns of a slab): u
    view<float, 2> key_key;    // a_ti
    view<float, 2> query_key;  // b_ti
    float* state;              // slabs
};

/// One head of some tokens of one segment, and some columns of its state.
struct kda_part {
    view<const float, 2> q, k;       // (tokens, D)
    view<const float, 2> v;          // (tokens, columns)
    view<const float, 2> log_decay;  // (tokens, D)
    view<const float, 2> beta;       // (tokens, 1)
    view<float, 2> out;              // (tokens, columns)

    [[nodiscard]] index tokens() const { return q.extent[0]; }
    [[nodiscard]] index dim() const { return q.extent[1]; }
    [[nodiscard]] index columns() const { return v.extent[1]; }

    [[nodiscard]] kda_part rows(index first, index count) const {
        return {q.rows(first, count),         k.rows(first, count),    v.rows(first, count),
                log_decay.rows(first, count), beta.rows(first, count), out.rows(first, count)};
    }
};

/// Calls f(first, count, state) for all tokens of a segment, in order and kda_tokens at a time. `state` are some
/// columns of a head's; `slabs` has room for them.
template <class F>
void for_tokens(index tokens, view<float, 2> state, float* slabs, F&& f) {
    const index dim = state.extent[0], columns = state.extent[1];
    const bool pack = tokens > 8;
    const kda_state in_place{state.data, state.stride[0], kda_columns};
    const kda_state packed{slabs, kda_columns, dim * kda_columns};
    const auto copy = [&](const kda_state& from, const kda_state& to) {
        for (index c = 0; c < columns; c += kda_columns) {
            const index n = std::min(kda_columns, columns - c);
            for (index i = 0; i < dim; ++i) std::copy_n(from.slab(c) + i * from.stride, n, to.slab(c) + i * to.stride);
        }
    };
    if (pack) copy(in_place, packed);
    for (index done = 0; done < tokens; done += kda_tokens) {
        f(done, std::min(kda_tokens, tokens - done), pack ? packed : in_place);
    }
    if (pack) copy(packed, in_place);
}

/// Calls f(thread, segment, head, columns) on all threads, for all heads of all segments, the columns of whose states
/// are cut into `parts`.
template <class F>
void for_heads(const memory_layout& layout, std::span<const segment> segments, index parts, thread_pool& pool, F&& f) {
    const index count = std::ssize(segments);
    pool.parallel([&](int thread, int threads) {
        const auto [first, tasks] = share_of(layout.heads * parts * count, thread, threads);
        for (index task = first; task < first + tasks; ++task) {
            const row_range columns =
                share_of(layout.head_dim, static_cast<int>(task / count % parts), static_cast<int>(parts), kda_columns);
            f(thread, segments[static_cast<std::size_t>(task % count)], task / count / parts, columns);
        }
    });
}

/// Vectors columns of the state, one pass over them.
template <int Vectors>
struct kda_pass {
    struct columns {
        floats of[Vectors];
    };
    struct reads {
        columns key, query;
    };

    float* state;
    index stride, dim;

    /// With Update, rows become decay_i S_i + key_i delta; with Read, what they then are is read: S^T read_key and S^T
    /// read_query.
    template <bool Update, bool Read, class Load, class Store>
    reads run(const float* decay, const float* key, columns delta, const float* read_key, const float* read_query,
              Load load, Store store) const {
        columns with_key, with_query;
        unroll<Vectors>([&](auto v) { with_key.of[v] = with_query.of[v] = floats(0.0f); });
        float* row = state;
        for (index i = 0; i < dim; ++i, row += stride) {
            const auto one = [&](const float* of) { return of == nullptr ? floats(0.0f) : floats(of[i]); };
            const floats d = one(decay), k = one(key), rk = one(read_key), rq = one(read_query);
            unroll<Vectors>([&](auto v) {
                floats s = load(row + v * lanes);
                if constexpr (Update) {
                    s = fma(d, s, k * delta.of[v]);
                    store(row + v * lanes, s);
                }
                if constexpr (Read) {
                    with_key.of[v] = fma(rk, s, with_key.of[v]);
                    with_query.of[v] = fma(rq, s, with_query.of[v]);
                }
            });
        }
        return {with_key, with_query};
    }
};

/// Tokens one after another in Vectors columns, from column j on. The update of one token and the reads of the next are
/// one pass over the state:
///   S <- diag(d) S + k delta^T,   delta = beta (v - S^T (d k)),   o = S^T (d q) + delta (k.q)      with the S before
template <int Vectors, class Load, class Store>
void kda_step_columns(const kda_part& p, const kda_scratch& f, const float* key_query, kda_pass<Vectors> pass, index j,
                      Load load, Store store) {
    const auto read_key = [&](index t) { return f.against[t].data; };
    const auto read_query = [&](index t) { return f.against[kda_tokens + t].data; };
    typename kda_pass<Vectors>::columns delta;
    auto reads = pass.template run<false, true>(nullptr, nullptr, delta, read_key(0), read_query(0), load, store);
    for (index t = 0; t < p.tokens(); ++t) {
        unroll<Vectors>([&](auto v) {
            delta.of[v] = floats(p.beta(t, 0)) * (load(&p.v(t, j + v * lanes)) - reads.key.of[v]);
            store(&p.out(t, j + v * lanes), fma(floats(key_query[t]), delta.of[v], reads.query.of[v]));
        });
        const float* const decay = f.key[t].data;
        if (t + 1 == p.tokens()) {
            pass.template run<true, false>(decay, p.k[t].data, delta, nullptr, nullptr, load, store);
        } else {
            reads = pass.template run<true, true>(decay, p.k[t].data, delta, read_key(t + 1), read_query(t + 1), load,
                                                  store);
        }
    }
}

inline void kda_step_part(const kda_part& p, const kda_state& state, const kda_scratch& scratch) {
    const index dim = p.dim();
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    std::array<float, kda_tokens> key_query;
    for (index t = 0; t < p.tokens(); ++t) {
        const float* const q = p.q[t].data;
        const float* const k = p.k[t].data;
        const float* const g = p.log_decay[t].data;
        float* const decay = scratch.key[t].data;
        float* const key = scratch.against[t].data;
        float* const query = scratch.against[kda_tokens + t].data;
        for_lanes(dim, [&](index i, auto load, auto store) {
            const floats d = exp(load(g + i));
            store(decay + i, d);
            store(key + i, d * load(k + i));
            store(query + i, d * (floats(scale) * load(q + i)));
        });
        key_query[static_cast<std::size_t>(t)] = scale * dot(k, q, dim);
    }
    const auto load_all = [](const float* from) { return load(from); };
    const auto store_all = [](float* to, floats x) { store(to, x); };
    for (index j = 0; j < p.columns(); j += kda_columns) {
        float* const slab = state.slab(j);
        if (j + kda_columns <= p.columns()) {
            const kda_pass<2> pass{slab, state.stride, dim};
            kda_step_columns(p, scratch, key_query.data(), pass, j, load_all, store_all);
            continue;
        }
        for_lanes(p.columns() - j, [&](index i, auto load, auto store) {
            const kda_pass<1> pass{slab + i, state.stride, dim};
            kda_step_columns(p, scratch, key_query.data(), pass, j + i, load, store);
        });
    }
}

/// past <- decay past; answers its products with k and with q.
struct kda_pair {
    float with_key, with_query;
};
inline kda_pair decay_and_multiply(const float* decay, float* past, const float* k, const float* q, index n) {
    floats with_key(0.0f), with_query(0.0f);
    index i = 0;
    for (; i + lanes <= n; i += lanes) {
        const floats x = load(decay + i) * load(past + i);
        store(past + i, x);
        with_key = fma(x, load(k + i), with_key);
        with_query = fma(x, load(q + i), with_query);
    }
    if (const index rest = n - i; rest > 0) {
        const floats x = load_first(decay + i, rest) * load_first(past + i, rest);
        store_first(past + i, x, rest);
        with_key = fma(x, load_first(k + i, rest), with_key);
        with_query = fma(x, load_first(q + i, rest), with_query);
    }
    return {sum(with_key), sum(with_query)};
}

/// u_t = beta_t (v_t - (what the state gives) - sum_{i<t} a_ti u_i) in Vectors columns of a slab, from column j on; v
/// and product are at that slab.
template <int Vectors, class Load, class Store>
void kda_solve(const kda_part& p, const kda_scratch& s, index slab, index j, Load load, Store store) {
    for (index t = 0; t < p.tokens(); ++t) {
        floats rest[Vectors];
        unroll<Vectors>(
            [&](auto v) { rest[v] = load(&p.v(t, slab + j + v * lanes)) - load(&s.product(t, j + v * lanes)); });
        const float* const factor = s.key_key[t].data;
        for (index i = 0; i < t; ++i) {
            const floats a(-factor[i]);
            unroll<Vectors>([&](auto v) { rest[v] = fma(a, load(&s.update(i, j + v * lanes)), rest[v]); });
        }
        const floats beta(p.beta(t, 0));
        unroll<Vectors>([&](auto v) { store(&s.update(t, j + v * lanes), beta * rest[v]); });
    }
}

/// What a chunk of tokens means to each other: e^{G_t} k_t and e^{G_t} q_t, a_ti and b_ti, e^{G_n - G_i} k_i and
/// e^{G_n}. No exponent but g itself is ever exponentiated: e^{G_t - G_i} is the product of the decays between i and t,
/// each at most 1, which neither overflows nor cancels. The scale of the output goes with q.
inline void kda_chunk_factors(const kda_part& p, const kda_scratch& s) {
    const index dim = p.dim();
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    float* const keep = s.keep.data;
    std::fill_n(keep, dim, 1.0f);
    std::fill_n(s.query_key.data, s.query_key.size(), 0.0f);
    for (index t = 0; t < p.tokens(); ++t) {
        const float* const k = p.k[t].data;
        const float* const q = p.q[t].data;
        const float* const g = p.log_decay[t].data;
        float* const decay = s.key[t].data;  // until k itself takes its place
        float* const key = s.against[t].data;
        float* const query = s.against[p.tokens() + t].data;
        for_lanes(dim, [&](index i, auto load, auto store) {
            const floats d = exp(load(g + i));
            const floats all = d * load(keep + i);
            store(decay + i, d);
            store(keep + i, all);
            store(key + i, all * load(k + i));
            store(query + i, all * (floats(scale) * load(q + i)));
        });
        for (index i = 0; i < t; ++i) {
            const kda_pair pair = decay_and_multiply(decay, s.key[i].data, k, q, dim);
            s.key_key(t, i) = pair.with_key;
            s.query_key(t, i) = scale * pair.with_query;
        }
        s.query_key(t, t) = scale * dot(k, q, dim);
        std::copy_n(k, dim, decay);
    }
}

/// The formulas of reference::kda_chunk.
inline void kda_chunk_part(const kda_part& p, const kda_state& state, const kda_scratch& s) {
    const index dim = p.dim();
    const index n = p.tokens();
    kda_chunk_factors(p, s);
    for (index first = 0; first < p.columns(); first += kda_columns) {
        const index columns = std::min(kda_columns, p.columns() - first);
        float* const slab = state.slab(first);
        multiply({.rows = 2 * n,
                  .columns = columns,
                  .depth = dim,
                  .a = s.against.data,
                  .a_row = dim,
                  .a_step = 1,
                  .b = slab,
                  .b_step = state.stride,
                  .c = s.product.data,
                  .c_row = kda_columns});
        if (columns == kda_columns) {
            const auto load_all = [](const float* from) { return load(from); };
            const auto store_all = [](float* to, floats x) { store(to, x); };
            kda_solve<2>(p, s, first, 0, load_all, store_all);
        } else {
            for_lanes(columns, [&](index j, auto load, auto store) { kda_solve<1>(p, s, first, j, load, store); });
        }
        const small_product among_tokens{.rows = n,
                                         .columns = columns,
                                         .depth = n,
                                         .a = s.query_key.data,
                                         .a_row = kda_tokens,
                                         .a_step = 1,
                                         .b = s.update.data,
                                         .b_step = kda_columns,
                                         .c = s.product[n].data,
                                         .c_row = kda_columns};
        multiply_onto(among_tokens);
        for (index t = 0; t < n; ++t) std::copy_n(s.product[n + t].data, columns, &p.out(t, first));
        multiply_into({.rows = dim,
                       .columns = columns,
                       .depth = n,
                       .a = s.key.data,
                       .a_row = 1,
                       .a_step = dim,
                       .b = s.update.data,
                       .b_step = kda_columns,
                       .c = slab,
                       .c_row = state.stride},
                      s.keep.data);
    }
}

/// All heads of all segments, in one of the two forms.
template <class Form>
void kda_recur(const kda_args& a, thread_pool& pool, arena& workspace, Form&& form) {
    const index dim = a.layout.head_dim;
    const index tasks = std::max(a.layout.heads * std::ssize(a.segments), index{1});
    // Few heads: a head's columns are shared out too.
    const index parts = std::clamp((pool.size() - 1) / tasks + 1, index{1}, std::max(dim / kda_columns, index{1}));
    const arena::scope scope(workspace);
    const auto memory = workspace.take<float>(pool.size(), kda_scratch::floats_per_thread(dim));
    for_heads(a.layout, a.segments, parts, pool, [&](int thread, const segment& s, index head, row_range columns) {
        const auto [column, count] = columns;
        const flush_denormals flush;
        const kda_scratch scratch(memory[thread].data, dim);
        const kda_part all =
            kda_part{a.q.slice(head),         a.k.slice(head),         a.v.slice(head).columns(column, count),
                     a.log_decay.slice(head), a.beta.columns(head, 1), a.out.slice(head).columns(column, count)}
                .rows(s.first_row, s.rows);
        const auto state = a.layout.state(s.recurrent, a.layer)[head].columns(column, count);
        for_tokens(s.rows, state, scratch.state,
                   [&](index first, index rows, const kda_state& some) { form(all.rows(first, rows), some, scratch); });
    });
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
    simd::kda_recur(a, pool, workspace, simd::kda_step_part);
}

/// The chunked form: the state is read and written once per sixteen tokens.
inline void kda_chunk(const kda_args& a, thread_pool& pool, arena& workspace) {
    simd::kda_recur(a, pool, workspace, simd::kda_chunk_part);
}

}  // namespace keel::inline KEEL_ABI
