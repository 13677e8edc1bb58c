// SPDX-License-Identifier: MIT
//
// Operations of the model alone, with the shapes of Kimi-Linear-48B and operands that do not fit into a cache.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/quantize.hpp>

#include "runner.hpp"

namespace bench {

/// A backend with operands for it.
template <keel::backend B>
class workbench {
public:
    workbench(const keel::backend_options& options, const keel::workspace_limits& limits, const operation_sink& sink)
        : b(std::make_shared<typename B::device>(options), B::scratch_bytes(limits, options) + (index{1} << 20)),
          sink_(sink) {}

    using index = keel::index;
    using matrix = typename B::matrix;

    /// Numbers between `from` and `to`, in memory of the backend.
    template <class... Extents>
    keel::view<float, sizeof...(Extents)> floats(float from, float to, Extents... extents) {
        std::vector<float> values(static_cast<std::size_t>((extents * ...)));
        std::uniform_real_distribution<float> draw(from, to);
        for (float& x : values) x = draw(random_);
        return {reinterpret_cast<float*>(upload(values)), extents...};
    }

    /// For each of `rows` rows, `chosen` different ones of `experts`.
    keel::view<std::int32_t, 2> choices(index rows, index chosen, index experts) {
        std::vector<std::int32_t> all(static_cast<std::size_t>(experts)), values;
        for (index i = 0; i < experts; ++i) all[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
        for (index r = 0; r < rows; ++r) {
            std::shuffle(all.begin(), all.end(), random_);
            values.insert(values.end(), all.begin(), all.begin() + chosen);
        }
        return {reinterpret_cast<std::int32_t*>(upload(values)), rows, chosen};
    }

    /// `count` matrices of random weights; a few hundred rows are encoded, and repeated.
    matrix weights(keel::dtype type, index count, index rows, index columns) {
        const index distinct = std::min<index>(count * rows, 256), row_bytes = keel::row_bytes(type, columns);
        const auto store = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(count * rows * row_bytes));
        std::vector<float> row(static_cast<std::size_t>(columns));
        std::normal_distribution<float> draw(0, 1 / std::sqrt(static_cast<float>(columns)));
        for (index i = 0; i < distinct; ++i) {
            for (float& x : row) x = draw(random_);
            keel::encode_row(type, row.data(), store->data() + i * row_bytes, columns);
        }
        for (index i = distinct; i < count * rows; i += distinct) {
            std::memcpy(store->data() + i * row_bytes, store->data(),
                        static_cast<std::size_t>(std::min(distinct, count * rows - i) * row_bytes));
        }
        return b.bind(keel::matrix_view{store->data(), type, count, rows, columns}, store);
    }

    /// A sequence of `rows` rows after `position` others, filled with zeros.
    keel::segment sequence(const keel::memory_layout& layout, index rows, index position) {
        buffers_.push_back(b.allocate(layout.recurrent_bytes()));
        keel::segment s{.first_row = 0, .rows = rows, .position = position, .recurrent = buffers_.back().data()};
        auto& blocks = blocks_.emplace_back();
        for (index p = 0; p < position + rows; p += keel::memory_layout::block_rows) {
            buffers_.push_back(b.allocate(layout.block_bytes()));
            blocks.push_back(buffers_.back().data());
        }
        s.blocks = blocks.data();
        return s;
    }

    /// Runs f(i), i = 0, 1, ..., for a third of a second at least, and reports the median time.
    template <class F>
    void measure(operation what, F&& f) {
        using clock = std::chrono::steady_clock;
        std::vector<double> seconds;
        f(index{0});
        finish();
        const auto begun = clock::now();
        for (index i = 1; seconds.size() < 5 || clock::now() - begun < std::chrono::milliseconds(300); ++i) {
            const auto start = clock::now();
            f(i);
            finish();
            seconds.push_back(std::chrono::duration<double>(clock::now() - start).count());
        }
        std::nth_element(seconds.begin(), seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2),
                         seconds.end());
        what.seconds = seconds[seconds.size() / 2];
        sink_(what);
    }

    /// Frees all operands.
    void clear() {
        buffers_.clear();
        blocks_.clear();
    }

    B b;

private:
    template <class T>
    std::byte* upload(const std::vector<T>& values) {
        const auto bytes = static_cast<index>(values.size() * sizeof(T));
        buffers_.push_back(b.allocate(bytes));
        b.upload(buffers_.back().data(), reinterpret_cast<const std::byte*>(values.data()), bytes);
        return buffers_.back().data();
    }

    /// Waits for the backend, which may work asynchronously.
    void finish() {
        if (buffers_.empty()) return;
        std::byte any;
        b.download(&any, buffers_.front().data(), 1);
    }

    const operation_sink& sink_;
    std::mt19937 random_{1};
    std::deque<typename B::buffer> buffers_;
    std::deque<std::vector<std::byte*>> blocks_;
};

/// Measures kda_mix, if it is for the rows of `one`, the only segment; `recurrence` says what the recurrence in it
/// does.
template <keel::backend B>
void measure_kda_mix(workbench<B>& bench, const keel::memory_layout& layout, keel::index hidden,
                     const keel::segment& one, operation recurrence) {
    using keel::index;
    const std::vector<keel::token> tokens(static_cast<std::size_t>(one.rows));
    if (!bench.b.mixes({tokens, {&one, 1}, {}, &layout})) return;
    const index n = one.rows, heads = layout.heads, dim = layout.head_dim, channels = layout.channels();
    const auto q = bench.floats(-1, 1, n, channels), k = bench.floats(-1, 1, n, channels),
               v = bench.floats(-1, 1, n, channels), decay_low = bench.floats(-1, 1, n, dim),
               gate_low = bench.floats(-1, 1, n, dim), beta = bench.floats(-1, 1, n, heads);
    const auto decay_up = bench.weights(keel::dtype::q8_0, 1, channels, dim),
               gate_up = bench.weights(keel::dtype::q8_0, 1, channels, dim),
               out = bench.weights(keel::dtype::q4_k, 1, hidden, channels);
    const auto taps = bench.floats(-1, 1, channels, layout.taps + 1);
    const auto a = bench.floats(-8, -1, heads), bias = bench.floats(-1, 1, channels), norm = bench.floats(1, 1, dim);
    const auto x = bench.floats(0, 0, n, hidden);
    const index low = 2 * channels * dim, high = channels * hidden;
    recurrence.bytes += static_cast<double>(2 * channels * keel::row_bytes(keel::dtype::q8_0, dim) +
                                            hidden * keel::row_bytes(keel::dtype::q4_k, channels));
    recurrence.operations += 2.0 * static_cast<double>(n * (low + high));
    bench.measure(recurrence, [&](index i) {
        bench.b.kda_mix({.q = q,
                         .k = k,
                         .v = v,
                         .decay_low = decay_low,
                         .gate_low = gate_low,
                         .beta = beta,
                         .decay_up = decay_up,
                         .gate_up = gate_up,
                         .taps_q = taps,
                         .taps_k = taps,
                         .taps_v = taps,
                         .a = a,
                         .dt_bias = bias,
                         .out_norm = norm,
                         .epsilon = 1e-5f,
                         .out = out,
                         .layer = i % layout.kda_layers,
                         .segments = {&one, 1},
                         .layout = layout,
                         .x = x});
    });
}

/// Measures every operation that takes time in a forward pass.
template <keel::backend B>
void operations_of(const keel::backend_options& options, const operation_sink& sink) {
    using keel::dtype;
    using keel::index;
    constexpr index hidden = 2304, heads = 32, dim = 128, rank = 512, position = 64, experts = 256, chosen = 8,
                    ff = 1024;
    constexpr index rows = 512, deepest = 32768;
    workbench<B> bench(options,
                       {.rows = rows,
                        .columns = 9216,
                        .experts = experts,
                        .chosen = chosen,
                        .expert_ff = ff,
                        .heads = heads,
                        .head_dim = dim,
                        .taps = 3,
                        .latent_width = rank + position,
                        .latent_rank = rank,
                        .mla_key = dim + position,
                        .mla_value = dim,
                        .context = deepest + rows},
                       sink);
    const bool fast = options.precision == keel::precision::fast;
    const auto is_integer = [&](dtype t) { return fast && t != dtype::f32 && t != dtype::f16 && t != dtype::bf16; };

    for (const dtype type : {dtype::f32, dtype::f16, dtype::bf16, dtype::q8_0, dtype::q6_k, dtype::q5_k, dtype::q4_k,
                             dtype::q3_k, dtype::q2_k, dtype::q5_0, dtype::q4_0, dtype::iq4_xs, dtype::mxfp4}) {
        const std::string name(keel::info(type).name);
        const index many = (index{1} << 28) / keel::row_bytes(type, hidden);
        const auto product = [&](const std::string& what, index n, index outputs) {
            const auto w = bench.weights(type, 1, outputs, hidden);
            const auto x = bench.floats(-1, 1, n, hidden);
            const auto out = bench.floats(0, 0, n, outputs);
            bench.measure({.name = what + " " + name,
                           .bytes = static_cast<double>(outputs * keel::row_bytes(type, hidden)),
                           .operations = 2.0 * static_cast<double>(n * outputs * hidden),
                           .integer = is_integer(type)},
                          [&](index) {
                              bench.b.matmul(x, {{w, out}});
                          });
            bench.clear();
        };
        product("matmul, 1 row", 1, many);
        product("matmul, 512 rows", rows, 4096);
    }

    for (const dtype down : {dtype::q4_k, dtype::q6_k}) {
        const auto gate = bench.weights(dtype::q4_k, experts, ff, hidden), up = gate;
        const auto w_down = bench.weights(down, experts, hidden, ff);
        const double weight_bytes =
            static_cast<double>(2 * ff * keel::row_bytes(dtype::q4_k, hidden) + hidden * keel::row_bytes(down, ff));
        for (const index n : {index{1}, index{32}, rows}) {
            const auto x = bench.floats(-1, 1, n, hidden);
            const auto weights = bench.floats(0.1f, 0.5f, n, chosen);
            const auto out = bench.floats(0, 0, n, hidden);
            std::vector<keel::view<std::int32_t, 2>> sets;
            for (int i = 0; i < 8; ++i) sets.push_back(bench.choices(n, chosen, experts));
            // How many experts n rows choose among them, on average.
            const double missed = std::pow(1 - static_cast<double>(chosen) / experts, static_cast<double>(n));
            const double used = static_cast<double>(experts) * (1 - missed);
            bench.measure({.name = "experts, " + std::to_string(n) + (n == 1 ? " row" : " rows") + ", down " +
                                   std::string(keel::info(down).name),
                           .bytes = used * weight_bytes,
                           .operations = 6.0 * static_cast<double>(n * chosen * hidden * ff),
                           .integer = is_integer(down)},
                          [&](index i) {
                              bench.b.experts({.x = x,
                                               .chosen = sets[static_cast<std::size_t>(i) % sets.size()],
                                               .weights = weights,
                                               .gate = gate,
                                               .up = up,
                                               .down = w_down,
                                               .out = out});
                          });
            bench.clear();
        }
    }

    const keel::memory_layout layout{.kda_layers = 20,
                                     .heads = heads,
                                     .head_dim = dim,
                                     .taps = 3,
                                     .mla_layers = 1,
                                     .latent_width = rank + position,
                                     .cache = fast ? dtype::f16 : dtype::f32};
    for (const index n : {index{1}, rows}) {
        const auto q = bench.floats(-0.1f, 0.1f, n, heads, dim), k = bench.floats(-0.1f, 0.1f, n, heads, dim);
        const auto v = bench.floats(-1, 1, n, heads, dim), decay = bench.floats(-1, 0, n, heads, dim);
        const auto beta = bench.floats(0, 1, n, heads);
        const auto out = bench.floats(0, 0, n, heads, dim);
        const keel::segment one = bench.sequence(layout, n, 0);
        const auto with = [&](index i) {
            return keel::kda_args{.q = q,
                                  .k = k,
                                  .v = v,
                                  .log_decay = decay,
                                  .beta = beta,
                                  .layer = i % layout.kda_layers,
                                  .segments = {&one, 1},
                                  .layout = layout,
                                  .out = out};
        };
        const operation what{.name = {},
                             .seconds = 0,
                             .bytes = 8.0 * static_cast<double>(layout.state_floats()),
                             .operations = 7.0 * static_cast<double>(n * layout.state_floats())};
        const auto named = [&](const std::string& name) {
            operation o = what;
            o.name = name + ", " + std::to_string(n) + (n == 1 ? " row" : " rows");
            return o;
        };
        bench.measure(named("kda_step"), [&](index i) { bench.b.kda_step(with(i)); });
        if (n > 1) bench.measure(named("kda_chunk"), [&](index i) { bench.b.kda_chunk(with(i)); });
        if constexpr (requires(keel::kda_mix_args<typename B::matrix> mix) { bench.b.kda_mix(mix); }) {
            measure_kda_mix(bench, layout, hidden, one, named("kda_mix"));
        }
        bench.clear();
    }

    const float scale = 1 / std::sqrt(static_cast<float>(dim + position));
    for (const index depth : {index{512}, index{8192}, deepest}) {
        const auto q = bench.floats(-1, 1, index{1}, heads, rank), at = bench.floats(-1, 1, index{1}, heads, position);
        const auto out = bench.floats(0, 0, index{1}, heads, rank);
        const keel::segment one = bench.sequence(layout, 1, depth);
        bench.measure({.name = "latent_attend, 1 row at " + std::to_string(depth),
                       .bytes = static_cast<double>(depth * layout.latent_row_bytes()),
                       .operations = 2.0 * static_cast<double>(depth * heads * (2 * rank + position))},
                      [&](index) {
                          bench.b.latent_attend({.q_latent = q,
                                                 .q_position = at,
                                                 .scale = scale,
                                                 .layer = 0,
                                                 .segments = {&one, 1},
                                                 .layout = layout,
                                                 .out = out});
                      });
        bench.clear();
    }
    const auto key_up = bench.weights(dtype::q5_0, heads, rank, dim),
               value_up = bench.weights(dtype::q4_k, heads, dim, rank);
    for (const index depth : {index{0}, index{8192}}) {
        const auto q = bench.floats(-1, 1, rows, heads, dim + position);
        const auto out = bench.floats(0, 0, rows, heads, dim);
        const keel::segment one = bench.sequence(layout, rows, depth);
        const auto pairs = static_cast<double>(rows * depth + rows * (rows + 1) / 2);
        bench.measure({.name = "expanded_attend, 512 rows at " + std::to_string(depth),
                       .bytes = static_cast<double>((depth + rows) * layout.latent_row_bytes()),
                       .operations = 2.0 * pairs * static_cast<double>(heads * (2 * dim + position))},
                      [&](index) {
                          bench.b.expanded_attend({.q = q,
                                                   .key_up = key_up,
                                                   .value_up = value_up,
                                                   .scale = scale,
                                                   .layer = 0,
                                                   .segments = {&one, 1},
                                                   .layout = layout,
                                                   .out = out});
                      });
        bench.clear();
    }
}

}  // namespace bench
