// SPDX-License-Identifier: MIT
//
// The kernels for one row of activations against class reference; small ones as well, for the checkers of memory and
// races.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include <keel/backend/cuda.hpp>
#include <keel/backend/reference.hpp>

#include "catch.hpp"
#include "cuda/operations.hpp"

namespace keel::testing {
namespace {

/// Three matrices of K-quants with one input, of which one adds to what is there; `repeats` give the same bits.
void check_products(gpu& g, random_numbers& random, index columns, index rows, int repeats) {
    CAPTURE(columns, rows);
    auto host = make_reference();
    const random_matrix w4(dtype::q4_k, 1, rows, columns, 31), w5(dtype::q5_k, 1, 130, columns, 32),
        w6(dtype::q6_k, 1, 2 * rows, columns, 33);
    const index all[] = {rows, 130, 2 * rows};
    array x = random.normal(columns), norm = random.uniform(columns, 0.5f, 2.0f), h(columns);
    const auto m4 = g.b.bind(w4, nullptr), m5 = g.b.bind(w5, nullptr), m6 = g.b.bind(w6, nullptr);
    const auto mx = g.put(x.as(index{1}, columns));
    const auto mn = g.put(norm.as(columns));
    host.rms_norm({x.as(index{1}, columns), norm.as(columns), 1e-5f, h.as(index{1}, columns)});
    for (const bool normed : {false, true}) {
        CAPTURE(normed);
        array y[3];
        view<float, 2> there[3];
        for (int i = 0; i < 3; ++i) {
            y[i] = random.normal(all[i]);
            there[i] = g.put(y[i].as(index{1}, all[i]));
        }
        host.matmul((normed ? h : x).as(index{1}, columns),
                    {{host.bind(w4, nullptr), y[0].as(index{1}, all[0])},
                     {host.bind(w5, nullptr), y[1].as(index{1}, all[1])},
                     {host.bind(w6, nullptr), y[2].as(index{1}, all[2]), true}});
        const std::initializer_list<linear<cuda::matrix>> products = {
            {m4, there[0]}, {m5, there[1]}, {m6, there[2], true}};
        const auto run = [&] { normed ? g.b.norm_matmul(mx, mn, 1e-5f, products) : g.b.matmul(mx, products); };
        run();
        for (int i = 0; i < 3; ++i) CHECK(relative_error(g.get(there[i]), y[i].values) <= 2e-2);
        const auto once = g.get(there[0]);
        for (int i = 0; i < repeats; ++i) run();
        CHECK(g.get(there[0]) == once);
    }
}

struct sparse_shape {
    dtype up, down;
    index hidden, ff, experts, k;
    bool shared;
};

void check_sparse(gpu& g, precision p, random_numbers& random, const sparse_shape& s,
                  std::initializer_list<index> counts) {
    auto host = make_reference();
    const random_matrix gate(s.up, s.experts, s.ff, s.hidden, 1), up(s.up, s.experts, s.ff, s.hidden, 2),
        down(s.down, s.experts, s.hidden, s.ff, 3), shared_gate(s.up, 1, s.ff, s.hidden, 4),
        shared_up(s.up, 1, s.ff, s.hidden, 5), shared_down(s.down, 1, s.hidden, s.ff, 6),
        router(dtype::f32, 1, s.experts, s.hidden, 7);
    const auto mg = g.b.bind(gate, nullptr), mu = g.b.bind(up, nullptr), md = g.b.bind(down, nullptr),
               mr = g.b.bind(router, nullptr), sg = g.b.bind(shared_gate, nullptr), su = g.b.bind(shared_up, nullptr),
               sd = g.b.bind(shared_down, nullptr);
    array norm = random.uniform(s.hidden, 0.5f, 2.0f), bias = random.normal(s.experts, 0.1f);
    const auto mn = g.put(norm.as(s.hidden)), mb = g.put(bias.as(s.experts));
    for (const index n : counts) {
        CAPTURE(info(s.up).name, info(s.down).name, s.hidden, s.experts, n, p == precision::fast);
        array x = random.normal(n * s.hidden), h(n * s.hidden), logits(n * s.experts), weights(n * s.k),
              y(n * s.hidden);
        const auto mx = g.put(x.as(n, s.hidden));
        std::vector<std::int32_t> chosen(static_cast<std::size_t>(n * s.k));
        const view<std::int32_t, 2> c{chosen.data(), n, s.k};
        host.rms_norm({x.as(n, s.hidden), norm.as(s.hidden), 1e-5f, h.as(n, s.hidden)});
        host.matmul(h.as(n, s.hidden), {{host.bind(router, nullptr), logits.as(n, s.experts)}});
        host.route({logits.as(n, s.experts), bias.as(s.experts), 2.4f, c, weights.as(n, s.k)});
        host.experts({h.as(n, s.hidden), c, weights.as(n, s.k), host.bind(gate, nullptr), host.bind(up, nullptr),
                      host.bind(down, nullptr), y.as(n, s.hidden)});
        if (s.shared) {
            host.swiglu({h.as(n, s.hidden), host.bind(shared_gate, nullptr), host.bind(shared_up, nullptr),
                         host.bind(shared_down, nullptr), y.as(n, s.hidden), true});
        }
        g.b.moe({mx, mn, 1e-5f, mr, mb, 2.4f, s.k, mg, mu, md, s.shared ? &sg : nullptr, s.shared ? &su : nullptr,
                 s.shared ? &sd : nullptr});
        auto added = g.get(mx);
        for (std::size_t i = 0; i < added.size(); ++i) added[i] -= x.values[i];
        const double tolerance = 2 * std::max(allowed(s.up, p, n), allowed(s.down, p, n));
        CHECK(relative_error(added, y.values) <= std::max(tolerance, 2e-5));
    }
}

struct latent_shape {
    dtype key, value, project;
    index heads, own, position, rank, out;
};

/// latent_mix against the operations that it stands for, one row each of sequences of these lengths.
void check_latent_mix(gpu& g, random_numbers& random, const latent_shape& s, const std::vector<index>& lengths) {
    CAPTURE(info(s.key).name, info(s.value).name, info(s.project).name, s.heads, s.own, s.position, s.rank, s.out,
            lengths);
    auto host = make_reference();
    const memory_layout layout{.mla_layers = 2, .latent_width = s.rank + s.position, .cache = dtype::f16};
    std::vector<sequences::shape> shapes;
    for (const index length : lengths) shapes.push_back({1, length});
    sequences theirs(layout, shapes, random);
    auto mine = theirs;
    const index n = theirs.rows();
    const index hidden = 96;
    const random_matrix key(s.key, s.heads, s.rank, s.own, 41), value(s.value, s.heads, s.out, s.rank, 42),
        project(s.project, 1, hidden, s.heads * s.out, 43);
    array q = random.normal(n * s.heads * (s.own + s.position)), latent = random.normal(n * (s.rank + s.position)),
          norm = random.uniform(s.rank, 0.5f, 2.0f), out(n * s.heads * s.out), x = random.normal(n * hidden);
    const auto there = g.put(q.as(n, s.heads, s.own + s.position));
    const auto there_x = g.put(x.as(n, hidden));
    const auto mk = g.b.bind(key, nullptr), mv = g.b.bind(value, nullptr), mo = g.b.bind(project, nullptr);
    const auto there_latent = g.put(latent.as(n, s.rank + s.position));
    const auto there_norm = g.put(norm.as(s.rank));
    const auto of = [&](std::span<const segment> segments) -> latent_mix_args<cuda::matrix> {
        return {there, there_latent, there_norm, mk, mv, 1e-5f, 0.3f, 1, segments, layout, mo, there_x};
    };
    const auto args = of(g.put(mine));
    segment longer = args.segments.front();
    longer.position = 192;
    CHECK(!g.b.mixes(of({&longer, 1})));
    REQUIRE(g.b.mixes(args));
    g.b.latent_mix(args);
    g.bring_back();

    host.latent_append({latent.as(n, s.rank + s.position), norm.as(s.rank), 1e-5f, 1, theirs.segments(), layout});
    const view<float, 3> asked = q.as(n, s.heads, s.own + s.position);
    array q_latent(n * s.heads * s.rank), mixed(n * s.heads * s.rank);
    host.matmul_heads({host.bind(key, nullptr), asked.columns(0, s.own), q_latent.as(n, s.heads, s.rank)});
    host.latent_attend({q_latent.as(n, s.heads, s.rank), asked.columns(s.own, s.position), 0.3f, 1, theirs.segments(),
                        layout, mixed.as(n, s.heads, s.rank)});
    host.matmul_heads({host.bind(value, nullptr), mixed.as(n, s.heads, s.rank), out.as(n, s.heads, s.out)});
    array added(n * hidden);
    host.matmul(out.as(n, s.heads * s.out), {{host.bind(project, nullptr), added.as(n, hidden)}});
    CHECK(relative_error(mine.latents(1), theirs.latents(1)) <= 1e-4);
    CHECK(mine.latents(0) == theirs.latents(0));
    const auto difference = [&] {
        auto values = g.get(there_x);
        for (std::size_t i = 0; i < values.size(); ++i) values[i] -= x.values[i];
        return values;
    };
    const double tolerance = allowed(s.value, precision::fast) + allowed(s.project, precision::fast);
    const auto once = g.get(there_x);
    CHECK(relative_error(difference(), added.values) <= std::max(tolerance, 3e-3));
    for (int i = 0; i < 20; ++i) {
        g.b.upload(reinterpret_cast<std::byte*>(there_x.data), reinterpret_cast<const std::byte*>(x.values.data()),
                   there_x.size() * static_cast<index>(sizeof(float)));
        g.b.latent_mix(args);
        CHECK(g.get(there_x) == once);
    }
}

}  // namespace

TEST_CASE("one row through several matrices of K-quants at once, with and without the norm") {
    gpu g(precision::fast);
    random_numbers random(21);
    for (const index columns : {index{256}, index{768}, index{2304}, index{4096}, index{9216}}) {
        for (const index rows : {index{37}, index{4099}}) check_products(g, random, columns, rows, 200);
    }
}

TEST_CASE("small products of one row") {
    gpu g(precision::fast);
    random_numbers random(23);
    check_products(g, random, 512, 37, 2);
}

TEST_CASE("a sparse layer with its norm, router and shared network, one row and few") {
    for (const precision p : {precision::exact, precision::fast}) {
        gpu g(p);
        random_numbers random(22);
        for (const sparse_shape& s : std::vector<sparse_shape>{{dtype::q4_k, dtype::q6_k, 2304, 1024, 64, 8, true},
                                                               {dtype::q4_k, dtype::q4_k, 512, 256, 256, 8, true},
                                                               {dtype::q5_k, dtype::q5_k, 768, 512, 12, 3, false},
                                                               {dtype::q6_k, dtype::q6_k, 256, 768, 320, 8, true},
                                                               {dtype::q4_k, dtype::q4_k, 256, 2048, 16, 4, true},
                                                               {dtype::q8_0, dtype::q8_0, 96, 32, 16, 2, true}}) {
            check_sparse(g, p, random, s, {1, 3});
        }
    }
}

TEST_CASE("a small sparse layer of one row") {
    gpu g(precision::fast);
    random_numbers random(24);
    check_sparse(g, precision::fast, random, {dtype::q4_k, dtype::q6_k, 256, 256, 16, 4, true}, {1});
}

TEST_CASE("an MLA layer behind its first products, few rows over short caches") {
    gpu g(precision::fast);
    random_numbers random(25);
    for (const latent_shape& s :
         std::vector<latent_shape>{{dtype::q8_0, dtype::q4_k, dtype::q4_k, 32, 128, 64, 512, 128},
                                   {dtype::q8_0, dtype::q6_k, dtype::q6_k, 8, 64, 16, 256, 96},
                                   {dtype::q8_0, dtype::q6_k, dtype::q8_0, 5, 64, 16, 256, 96},
                                   {dtype::f16, dtype::q8_0, dtype::f16, 3, 32, 32, 96, 35},
                                   {dtype::q4_0, dtype::f32, dtype::f32, 2, 96, 0, 64, 8}}) {
        for (const index length : {0, 1, 15, 16, 63, 64, 130, 191}) check_latent_mix(g, random, s, {length});
        check_latent_mix(g, random, s, {7, 100});
    }
}

TEST_CASE("a small MLA layer of one row") {
    gpu g(precision::fast);
    random_numbers random(26);
    check_latent_mix(g, random, {dtype::q8_0, dtype::q4_k, dtype::q8_0, 3, 64, 16, 256, 32}, {70});
}

}  // namespace keel::testing
