// SPDX-License-Identifier: MIT
//
// Every operation of the CUDA backend against class reference, which accumulates in double.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <keel/backend/cuda.hpp>
#include <keel/backend/reference.hpp>

#include "catch.hpp"
#include "cuda/operations.hpp"
#include "shortlist.hpp"

namespace keel::testing {

TEST_CASE("every type of weights lies on the GPU with exactly its values") {
    for (const dtype type : all_types) {
        CAPTURE(info(type).name);
        const index block = info(type).block_elements;
        for (const index columns : {block, 3 * block, index{512}, index{2304}}) {
            const random_matrix table(type, 1, 21, columns, 7);
            gpu g(precision::exact);
            const auto m = g.b.bind(table, nullptr);
            const std::vector<token> tokens = {20, 0, 7, 7, 13};
            array out(5 * columns);
            const auto there = g.put(out.as(index{5}, columns));
            g.b.embed({m, tokens, there});
            std::vector<float> expected(static_cast<std::size_t>(5 * columns));
            for (std::size_t i = 0; i < 5; ++i) {
                decode_row(type, table.shape().row(tokens[i]), expected.data() + static_cast<index>(i) * columns,
                           columns);
            }
            CHECK(g.get(there) == expected);
        }
    }
}

TEST_CASE("products with every type of weights, odd numbers of rows") {
    for (const precision p : {precision::exact, precision::fast}) {
        gpu g(p);
        auto host = make_reference();
        random_numbers random(3);
        for (const dtype type : all_types) {
            const index block = info(type).block_elements;
            for (const auto& [rows, columns, n] : std::vector<std::array<index, 3>>{
                     {1, block, 1}, {37, 2304, 1}, {130, 768, 3}, {33, 1280, 2}, {9001, 512, 5}, {61, 256, 17}}) {
                CAPTURE(info(type).name, rows, columns, n, p == precision::fast);
                const random_matrix w(type, 1, rows, columns, 11), w2(dtype::f32, 1, 5, columns, 12);
                array x = random.normal(n * columns), y = random.normal(n * rows), z(n * 5);
                auto expected = y, expected_z = z;
                host.matmul(x.as(n, columns), {{host.bind(w, nullptr), expected.as(n, rows), true},
                                               {host.bind(w2, nullptr), expected_z.as(n, index{5})}});
                const auto mx = g.put(x.as(n, columns)), my = g.put(y.as(n, rows)), mz = g.put(z.as(n, index{5}));
                const auto m = g.b.bind(w, nullptr), m2 = g.b.bind(w2, nullptr);
                g.b.matmul(mx, {{m, my, true}, {m2, mz}});
                CHECK(relative_error(g.get(my), expected.values) <= allowed(type, p, n));
                CHECK(relative_error(g.get(mz), expected_z.values) <= allowed(dtype::f32, p, n));
            }
        }
    }
}

TEST_CASE("norms, alone and on the way into a product") {
    gpu g(precision::exact);
    auto host = make_reference();
    random_numbers random(5);
    for (const auto& [n, columns] : std::vector<std::array<index, 2>>{{1, 64}, {7, 2304}, {3, 61}, {9, 96}}) {
        CAPTURE(n, columns);
        array x = random.normal(n * columns), weight = random.normal(columns), out(n * columns);
        auto expected = out;
        host.rms_norm({x.as(n, columns), weight.as(columns), 1e-5f, expected.as(n, columns)});
        const auto mx = g.put(x.as(n, columns)), mo = g.put(out.as(n, columns));
        const auto mw = g.put(weight.as(columns));
        g.b.rms_norm({mx, mw, 1e-5f, mo});
        CHECK(relative_error(g.get(mo), expected.values) <= 1e-6);

        const random_matrix w(dtype::f16, 1, 43, columns, 1);
        array y(n * 43);
        auto expected_y = y;
        host.matmul(expected.as(n, columns), {{host.bind(w, nullptr), expected_y.as(n, index{43})}});
        const auto my = g.put(y.as(n, index{43}));
        const auto m = g.b.bind(w, nullptr);
        g.b.norm_matmul(mx, mw, 1e-5f, {{m, my}});
        CHECK(relative_error(g.get(my), expected_y.values) <= 2e-6);
    }
}

TEST_CASE("one small matrix per head, on parts of rows") {
    random_numbers random(6);
    for (const precision p : {precision::exact, precision::fast}) {
        gpu g(p);
        auto host = make_reference();
        for (const dtype type : {dtype::f32, dtype::f16, dtype::q8_0, dtype::q4_0}) {
            const bool narrow = is_plain(type);
            const index heads = 3, columns = narrow ? 16 : 128, rest = 8, rows = 35;
            const random_matrix w(type, heads, rows, columns, 2);
            for (const index n : {5, 70}) {
                array x = random.normal(n * heads * (columns + rest)), y(n * heads * rows);
                auto expected = y;
                host.matmul_heads({host.bind(w, nullptr), x.as(n, heads, columns + rest).columns(0, columns),
                                   expected.as(n, heads, rows)});
                const auto mx = g.put(x.as(n, heads, columns + rest)), my = g.put(y.as(n, heads, rows));
                const auto m = g.b.bind(w, nullptr);
                g.b.matmul_heads({m, mx.columns(0, columns), my});
                CHECK(relative_error(g.get(my), expected.values) <= allowed(type, p, narrow ? 1 : n));
            }
        }
    }
}

TEST_CASE("convolution, unit length, gates and the gated norm") {
    random_numbers random(8);
    for (const auto& [heads, dim, taps] : std::vector<std::array<index, 3>>{{2, 32, 3}, {5, 64, 2}, {3, 128, 3}}) {
        CAPTURE(heads, dim, taps);
        gpu g(precision::exact);
        auto host = make_reference();
        const memory_layout layout{.kda_layers = 2, .heads = heads, .head_dim = dim, .taps = taps};
        sequences mine(layout, {{1, 0}, {1, 9}, {2, 3}, {13, 5}, {32, 1}, {33, 0}, {97, 40}, {64, 2}}, random);
        auto theirs = mine;
        const index n = mine.rows(), c = heads * dim;
        array x = random.normal(n * c), weight = random.normal(c * (taps + 1));
        auto expected = x;
        host.short_conv({expected.as(n, c), weight.as(c, taps + 1), 1, 1, theirs.segments(), layout});
        auto mx = g.put(x.as(n, c));
        const auto mw = g.put(weight.as(c, taps + 1));
        g.b.short_conv({mx, mw, 1, 1, g.put(mine), layout});
        g.bring_back();
        CHECK(relative_error(g.get(mx), expected.values) <= 1e-6);
        CHECK(mine.recurrent() == theirs.recurrent());

        host.l2_norm({expected.as(n, heads, dim), 1e-5f});
        g.b.l2_norm({mx.split(dim), 1e-5f});
        CHECK(relative_error(g.get(mx), expected.values) <= 1e-6);

        array f = random.normal(n * c, 20.0f), beta = random.normal(n * heads, 4.0f);
        array a = random.uniform(heads, -8.0f, -0.1f), bias = random.normal(c);
        auto expected_f = f, expected_beta = beta;
        host.kda_gates({expected_f.as(n, heads, dim), expected_beta.as(n, heads), a.as(heads), bias.as(c)});
        const auto mf = g.put(f.as(n, heads, dim));
        const auto mb = g.put(beta.as(n, heads));
        g.b.kda_gates({mf, mb, g.put(a.as(heads)), g.put(bias.as(c))});
        CHECK(relative_error(g.get(mf), expected_f.values) <= 1e-6);
        CHECK(relative_error(g.get(mb), expected_beta.values) <= 1e-6);

        // All of that in one, on the rows that follow.
        array q = random.normal(n * c), k = random.normal(n * c), v = random.normal(n * c);
        auto expected_q = q, expected_k = k, expected_v = v;
        expected_f = f = random.normal(n * c, 20.0f), expected_beta = beta = random.normal(n * heads, 4.0f);
        array* const parts[] = {&expected_q, &expected_k, &expected_v};
        for (int i = 0; i < 3; ++i) {
            host.short_conv({parts[i]->as(n, c), weight.as(c, taps + 1), i, 1, theirs.segments(), layout});
            if (i < 2) host.l2_norm({parts[i]->as(n, heads, dim), 1e-5f});
        }
        host.kda_gates({expected_f.as(n, heads, dim), expected_beta.as(n, heads), a.as(heads), bias.as(c)});
        const auto mq = g.put(q.as(n, c)), mk = g.put(k.as(n, c)), mv = g.put(v.as(n, c));
        const auto all_f = g.put(f.as(n, c)), all_beta = g.put(beta.as(n, heads));
        g.b.kda_inputs({mq, mk, mv, mw, mw, mw, all_f, all_beta, g.put(a.as(heads)), g.put(bias.as(c)), 1e-5f, 1,
                        g.put(mine), layout});
        g.bring_back();
        CHECK(relative_error(g.get(mq), expected_q.values) <= 1e-6);
        CHECK(relative_error(g.get(mk), expected_k.values) <= 1e-6);
        CHECK(relative_error(g.get(mv), expected_v.values) <= 1e-6);
        CHECK(relative_error(g.get(all_f), expected_f.values) <= 1e-6);
        CHECK(relative_error(g.get(all_beta), expected_beta.values) <= 1e-6);
        CHECK(mine.recurrent() == theirs.recurrent());

        array norm = random.normal(dim), gate = random.normal(n * c, 3.0f);
        host.gated_norm({expected.as(n, heads, dim), norm.as(dim), gate.as(n, heads, dim), 1e-5f});
        g.b.gated_norm({mx.split(dim), g.put(norm.as(dim)), g.put(gate.as(n, heads, dim)), 1e-5f});
        CHECK(relative_error(g.get(mx), expected.values) <= 1e-6);
    }
}

TEST_CASE("rows are kept for replays where a sequence asks for it, as many as it has room for") {
    random_numbers random(12);
    gpu g(precision::exact);
    auto host = make_reference();
    const memory_layout layout{.kda_layers = 2, .heads = 3, .head_dim = 32, .taps = 3};
    sequences mine(layout, {{1, 8}, {2, 0}, {9, 3}, {40, 5}}, random);
    const index n = mine.rows(), c = layout.channels();
    std::vector<segment> theirs(mine.segments().begin(), mine.segments().end());
    std::vector<array> kept;
    for (const index capacity : {4, 0, 16, 16}) kept.push_back(random.normal(2 * capacity * layout.kept_floats()));
    auto ours = theirs;
    for (std::size_t i = 0; i < theirs.size(); ++i) {
        const index size = std::ssize(kept[i].values);
        if (size == 0) continue;
        theirs[i].kept_capacity = ours[i].kept_capacity = size / (2 * layout.kept_floats());
        theirs[i].kept = kept[i].values.data();
        ours[i].kept = g.put(kept[i].as(size)).data;
    }
    array q = random.normal(n * c), k = random.normal(n * c), v = random.normal(n * c);
    array low = random.normal(n * layout.head_dim), beta = random.normal(n * layout.heads);
    host.keep(
        {q.as(n, c), k.as(n, c), v.as(n, c), low.as(n, layout.head_dim), beta.as(n, layout.heads), 1, theirs, layout});
    g.b.keep({g.put(q.as(n, c)), g.put(k.as(n, c)), g.put(v.as(n, c)), g.put(low.as(n, layout.head_dim)),
              g.put(beta.as(n, layout.heads)), 1, ours, layout});
    for (std::size_t i = 0; i < ours.size(); ++i) {
        if (ours[i].kept == nullptr) continue;
        CHECK(g.get(view<const float, 1>(ours[i].kept, std::ssize(kept[i].values))) == kept[i].values);
    }
}

TEST_CASE("shortlists of logits are what their definition says, whatever the logits") {
    random_numbers random(13);
    gpu g(precision::fast);
    for (const auto& [n, vocabulary] : std::vector<std::array<index, 2>>{{1, 5}, {3, 300}, {2, 8192}, {70, 163'840}}) {
        CAPTURE(n, vocabulary);
        array logits = random.normal(n * vocabulary, 3.0f);
        const auto row = [&](index i) {
            return std::span(logits.as(n, vocabulary)[i].data, logits.as(n, vocabulary)[i].size());
        };
        for (index i = 0; i < n; i += 4) row(i)[static_cast<std::size_t>(i % 5)] = 90;  // far above all others
        for (index i = 1; i < n; i += 4) std::ranges::fill(row(i), -1.5f);              // all the same
        if (n > 2) {
            for (std::size_t j = 0; j < row(2).size(); ++j)
                row(2)[j] = j % 3 == 0 ? NAN : j % 3 == 1 ? -INFINITY : 1e30f;
            std::ranges::fill(row(n - 1), NAN);
        }
        const auto there = g.put(logits.as(n, vocabulary));
        array unset(n * static_cast<index>(sizeof(shortlist) / sizeof(float)));
        const auto lists = g.put(unset.as(std::ssize(unset.values)));
        const view<shortlist, 1> to(reinterpret_cast<shortlist*>(lists.data), n);
        g.b.shortlist({there, to});
        const auto made = g.get(to);
        const auto by_id = [](shortlist list) {
            std::ranges::sort(list.entries, list.entries + list.listed, {}, &shortlist::entry::id);
            return list;
        };
        for (index i = 0; i < n; ++i) {
            CAPTURE(i);
            const shortlist expected = by_id(shortlist_of(row(i))), mine = by_id(made[static_cast<std::size_t>(i)]);
            CHECK(mine.best == expected.best);
            CHECK(mine.top == expected.top);
            CHECK(mine.vocabulary == expected.vocabulary);
            REQUIRE(mine.listed == expected.listed);
            CHECK(std::ranges::equal(mine.others, expected.others));
            CHECK(std::ranges::equal(std::span(mine.entries).first(static_cast<std::size_t>(mine.listed)),
                                     std::span(expected.entries).first(static_cast<std::size_t>(mine.listed)),
                                     [](auto a, auto b) { return a.id == b.id && a.logit == b.logit; }));
        }
    }
}

TEST_CASE("rows are scattered to where they are wanted, and nowhere else") {
    random_numbers random(14);
    gpu g(precision::exact);
    const index n = 130, columns = 5000;
    array x = random.normal(n * columns), before = random.normal(n * columns);
    const auto mx = g.put(x.as(n, columns)), to = g.put(before.as(n, columns));
    std::vector<float*> rows;
    auto expected = before;
    for (index i = 0; i < n; ++i) {
        rows.push_back(i % 3 == 1 ? nullptr : to[n - 1 - i].data);
        if (rows.back() != nullptr)
            std::ranges::copy_n(x.as(n, columns)[i].data, columns, expected.as(n, columns)[n - 1 - i].data);
    }
    g.b.scatter({mx, rows});
    CHECK(g.get(to) == expected.values);
}

TEST_CASE("the recurrence: several sequences, gates down to -40, the same bits every time") {
    random_numbers random(9);
    for (const index dim : {32, 64, 128, 256}) {
        CAPTURE(dim);
        const index heads = 3;
        const memory_layout layout{.kda_layers = 2, .heads = heads, .head_dim = dim, .taps = 3};
        sequences start(layout, {{1, 0}, {1, 9}, {2, 3}, {37, 5}}, random);
        const index n = start.rows(), c = heads * dim;
        gpu g(precision::exact);
        auto host = make_reference();
        array q = random.normal(n * c), k = random.normal(n * c), v = random.normal(n * c), out(n * c);
        array decay = random.uniform(n * c, -1.0f, 0.0f), beta = random.uniform(n * heads, 0.0f, 1.0f);
        for (std::size_t i = 0; i < decay.values.size(); i += 7) decay.values[i] *= 40;
        host.l2_norm({q.as(n, heads, dim), 1e-5f});
        host.l2_norm({k.as(n, heads, dim), 1e-5f});
        auto theirs = start;
        auto expected = out;
        host.kda_step({q.as(n, heads, dim), k.as(n, heads, dim), v.as(n, heads, dim), decay.as(n, heads, dim),
                       beta.as(n, heads), 1, theirs.segments(), layout, expected.as(n, heads, dim)});
        const auto mq = g.put(q.as(n, heads, dim)), mk = g.put(k.as(n, heads, dim)), mv = g.put(v.as(n, heads, dim)),
                   md = g.put(decay.as(n, heads, dim)), mo = g.put(out.as(n, heads, dim));
        const auto mb = g.put(beta.as(n, heads));
        std::vector<float> first;
        for (int run = 0; run < (dim == 128 ? 1000 : 20); ++run) {
            auto mine = start;
            g.b.kda_step({mq, mk, mv, md, mb, 1, g.put(mine), layout, mo});
            g.bring_back();
            auto all = g.get(mo);
            if (first.empty()) {
                CHECK(relative_error(all, expected.values) <= 2e-6);
                CHECK(relative_error(mine.recurrent(), theirs.recurrent()) <= 2e-6);
                first = all;
            }
            if (all != first) {
                FAIL("run " << run << " differs");
            }
        }
    }
}

TEST_CASE("the latent cache: appending, attention over it, several blocks and sequences") {
    random_numbers random(10);
    for (const precision p : {precision::exact, precision::fast}) {
        for (const auto& [heads, rank, position, cache] :
             std::vector<std::array<index, 4>>{{2, 32, 8, 0}, {32, 512, 64, 0}, {32, 512, 64, 1}, {17, 96, 0, 1}}) {
            CAPTURE(heads, rank, position, cache, p == precision::fast);
            const memory_layout layout{
                .mla_layers = 2, .latent_width = rank + position, .cache = cache == 1 ? dtype::f16 : dtype::f32};
            sequences start(layout, {{1, 0}, {1, 255}, {1, 700}, {3, 254}, {40, 17}}, random);
            const index n = start.rows();
            gpu g(p);
            auto host = make_reference();
            array rows = random.normal(n * (rank + position)), weight = random.normal(rank);
            auto theirs = start, mine = start;
            auto expected_rows = rows;
            host.latent_append(
                {expected_rows.as(n, rank + position), weight.as(rank), 1e-5f, 1, theirs.segments(), layout});
            const auto mr = g.put(rows.as(n, rank + position));
            const auto segments = g.put(mine);
            g.b.latent_append({mr, g.put(weight.as(rank)), 1e-5f, 1, segments, layout});
            g.bring_back();
            CHECK(relative_error(g.get(mr), expected_rows.values) <= 1e-6);
            CHECK(relative_error(mine.latents(1), theirs.latents(1)) <= (cache == 1 ? 1e-4 : 1e-6));
            CHECK(mine.latents(0) == theirs.latents(0));

            array ql = random.normal(n * heads * rank, 0.2f), qp = random.normal(n * heads * (position + 3), 0.2f);
            array out(n * heads * rank);
            auto expected = out;
            const auto part = [&](auto of) { return of.columns(0, position); };
            host.latent_attend({ql.as(n, heads, rank), part(qp.as(n, heads, position + 3)), 0.3f, 1, mine.segments(),
                                layout, expected.as(n, heads, rank)});
            const auto mo = g.put(out.as(n, heads, rank)), ml = g.put(ql.as(n, heads, rank)),
                       mp = g.put(qp.as(n, heads, position + 3));
            g.b.latent_attend({ml, part(mp), 0.3f, 1, segments, layout, mo});
            CHECK(relative_error(g.get(mo), expected.values) <= (p == precision::exact ? 2e-6 : 2e-3));
        }
    }
}

TEST_CASE("the router: ties go to the smaller index, the bias only chooses") {
    random_numbers random(11);
    for (const auto& [n, experts, k] :
         std::vector<std::array<index, 3>>{{1, 8, 2}, {9, 256, 8}, {5, 16, 4}, {3, 896, 16}, {2, 5, 5}}) {
        CAPTURE(n, experts, k);
        gpu g(precision::exact);
        auto host = make_reference();
        array logits = random.normal(n * experts), bias = random.normal(experts, 0.1f);
        for (index e = 0; e < experts; e += 3) bias.values[static_cast<std::size_t>(e)] = 0;
        for (std::size_t e = 0; e < logits.values.size(); e += 3) logits.values[e] = 1.5f;
        std::vector<std::int32_t> chosen(static_cast<std::size_t>(n * k)), none(chosen.size(), -1);
        array weights(n * k);
        const view<std::int32_t, 2> c{chosen.data(), n, k};
        host.route({logits.as(n, experts), bias.as(experts), 2.4f, c, weights.as(n, k)});
        const auto mc = g.put(view<std::int32_t, 2>{none.data(), n, k});
        const auto mw = g.put(weights.as(n, k));
        g.b.route({g.put(logits.as(n, experts)), g.put(bias.as(experts)), 2.4f, mc, mw});
        CHECK(g.get(mc) == chosen);
        CHECK(relative_error(g.get(mw), weights.values) <= 1e-6);
    }
}

TEST_CASE("experts and gated networks") {
    random_numbers random(12);
    for (const precision p : {precision::exact, precision::fast}) {
        gpu g(p);
        auto host = make_reference();
        struct shape {
            dtype up, down;
            index hidden, ff, n;
        };
        for (const shape& s : std::vector<shape>{{dtype::f32, dtype::f32, 64, 33, 5},
                                                 {dtype::f16, dtype::f16, 256, 32, 65},
                                                 {dtype::bf16, dtype::bf16, 256, 64, 16},
                                                 {dtype::q4_k, dtype::q6_k, 512, 256, 5},
                                                 {dtype::q4_k, dtype::q6_k, 512, 256, 77},
                                                 {dtype::q8_0, dtype::q8_0, 96, 32, 5},
                                                 {dtype::q4_k, dtype::f16, 256, 96, 5},
                                                 {dtype::q5_k, dtype::q4_0, 768, 1056, 5}}) {
            const index n = s.n, experts = 7, k = 3;
            CAPTURE(info(s.up).name, info(s.down).name, n, p == precision::fast);
            const random_matrix gate(s.up, experts, s.ff, s.hidden, 1), up(s.up, experts, s.ff, s.hidden, 2),
                down(s.down, experts, s.hidden, s.ff, 3);
            array x = random.normal(n * s.hidden), weights = random.uniform(n * k, 0.1f, 1.0f);
            array out = random.normal(n * s.hidden);
            std::vector<std::int32_t> chosen;
            for (index i = 0; i < n * k; ++i) chosen.push_back(static_cast<std::int32_t>((i * 5 + i / 3) % experts));
            const view<std::int32_t, 2> c{chosen.data(), n, k};
            auto expected = out;
            host.experts({x.as(n, s.hidden), c, weights.as(n, k), host.bind(gate, nullptr), host.bind(up, nullptr),
                          host.bind(down, nullptr), expected.as(n, s.hidden)});
            const auto mg = g.b.bind(gate, nullptr), mu = g.b.bind(up, nullptr), md = g.b.bind(down, nullptr);
            const auto mx = g.put(x.as(n, s.hidden)), mo = g.put(out.as(n, s.hidden));
            const auto mc = g.put(c);
            const auto mw = g.put(weights.as(n, k));
            const double tolerance = 2 * std::max(allowed(s.up, p, n), allowed(s.down, p, n));
            g.b.experts({mx, mc, mw, mg, mu, md, mo});
            const auto once = g.get(mo);
            CHECK(relative_error(once, expected.values) <= tolerance);
            for (int run = 0; run < 1000; ++run) {
                g.b.experts({mx, mc, mw, mg, mu, md, mo});
                if (run % 100 == 99 && g.get(mo) != once) FAIL("run " << run << " differs");
            }

            const random_matrix dense_gate(s.up, 1, s.ff, s.hidden, 4), dense_up(s.up, 1, s.ff, s.hidden, 5),
                dense_down(s.down, 1, s.hidden, s.ff, 6);
            host.swiglu({x.as(n, s.hidden), host.bind(dense_gate, nullptr), host.bind(dense_up, nullptr),
                         host.bind(dense_down, nullptr), expected.as(n, s.hidden), true});
            const auto dg = g.b.bind(dense_gate, nullptr), du = g.b.bind(dense_up, nullptr),
                       dd = g.b.bind(dense_down, nullptr);
            g.b.swiglu({mx, dg, du, dd, mo, true});
            CHECK(relative_error(g.get(mo), expected.values) <= tolerance);
        }
    }
}

TEST_CASE("sums and chosen rows") {
    random_numbers random(13);
    gpu g(precision::exact);
    array x = random.normal(6 * 50), y = random.normal(6 * 50), out(3 * 50);
    const auto mx = g.put(x.as(index{6}, index{50})), my = g.put(y.as(index{6}, index{50}));
    const auto mo = g.put(out.as(index{3}, index{50}));
    g.b.add({mx, my});
    const std::vector<index> rows = {1, 4, 5};
    g.b.gather({mx, rows, mo});
    std::vector<float> expected;
    for (const index r : rows) {
        for (index i = 0; i < 50; ++i) {
            const auto at = static_cast<std::size_t>(r * 50 + i);
            expected.push_back(x.values[at] + y.values[at]);
        }
    }
    CHECK(g.get(mo) == expected);
}

TEST_CASE("GPU memory is a value") {
    gpu g(precision::exact);
    auto a = g.b.allocate(1000);
    std::vector<std::byte> zero(1000), one(1000, std::byte{1}), back(1000, std::byte{7});
    g.b.download(back.data(), a.data(), 1000);
    CHECK(back == zero);
    g.b.upload(a.data(), one.data(), 1000);
    const auto b = a;
    g.b.upload(a.data(), zero.data(), 1000);
    g.b.download(back.data(), b.data(), 1000);
    CHECK(back == one);
    a = b;
    g.b.download(back.data(), a.data(), 1000);
    CHECK(back == one);
}

TEST_CASE("a GPU that is not there, and memory that is not to be had") {
    const auto code_of = [](auto&& f) {
        try {
            f();
        } catch (const error& e) {
            CHECK(std::string(e.what()).find("GPU") != std::string::npos);
            return e.code();
        }
        FAIL("no error");
        return errc::file;
    };
    CHECK(code_of([] { cuda_device({precision::fast, 0, 99}); }) == errc::device);
    CHECK(code_of([] { cuda_device({precision::fast, 0, -1}); }) == errc::device);
    gpu g(precision::fast);
    CHECK(code_of([&] { static_cast<void>(g.b.allocate(index{1} << 45)); }) == errc::capacity);
    CHECK(g.b.allocate(100).size() == 100);
}

}  // namespace keel::testing
