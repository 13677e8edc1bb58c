// SPDX-License-Identifier: MIT
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "catch.hpp"
#include "operands.hpp"

#include <keel/backend/cpu/convolution.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/kda.hpp>
#include <keel/backend/reference.hpp>

namespace keel::testing {

namespace {

reference make_reference() {
    return {std::make_shared<reference::device>(backend_options{precision::exact}), index{1} << 22};
}

enum class form { step, chunk };

void run(form how, const kda_args& a, thread_pool& pool) {
    scratch workspace(kda_scratch_bytes(a.layout.head_dim, pool.size()));
    how == form::step ? kda_step(a, pool, workspace) : kda_chunk(a, pool, workspace);
}

struct golden_case {
    index tokens, heads, dim;
    std::map<std::string, array> arrays;
};

std::vector<golden_case> golden_cases() {
    const std::string folder = KEEL_TEST_DATA "/golden/";
    std::ifstream about_file(folder + "kda_op.json");
    const auto about = nlohmann::json::parse(about_file);
    std::ifstream file(folder + about.at("file").get<std::string>(), std::ios::binary);
    std::vector<golden_case> cases;
    for (const auto& entry : about.at("cases")) {
        golden_case c{entry.at("T"), entry.at("H"), entry.at("D"), {}};
        const std::string prefix = entry.at("case").get<std::string>() + ".";
        for (const auto& of : about.at("arrays")) {
            const std::string name = of.at("name");
            if (!name.starts_with(prefix)) continue;
            index size = 1;
            for (const index n : of.at("shape")) size *= n;
            array values(size);
            file.seekg(of.at("offset").get<std::streamoff>());
            file.read(reinterpret_cast<char*>(values.values.data()), size * 4);
            REQUIRE(file);
            c.arrays[name.substr(prefix.size())] = values;
        }
        cases.push_back(c);
    }
    return cases;
}

/// Random operands of kda_step and kda_chunk.
struct kda_operands {
    index rows, heads, dim;
    array q, k, v, log_decay, beta, out;

    kda_operands(index n, index h, index d, float steepest, random_numbers& random)
        : rows(n),
          heads(h),
          dim(d),
          q(random.normal(n * h * d)),
          k(random.normal(n * h * d)),
          v(random.normal(n * h * d)),
          log_decay(random.uniform(n * h * d, -1.0f, 0.0f)),
          beta(random.uniform(n * h, 0.01f, 0.99f)),
          out(n * h * d) {
        for (float& g : log_decay.values) g *= g * g * steepest;  // most near zero, some steep
        reference plain = make_reference();
        plain.l2_norm({q.as(n, h, d), 1e-5f});
        plain.l2_norm({k.as(n, h, d), 1e-5f});
        for (float& g : log_decay.values) g = -std::abs(g);
    }

    kda_args args(std::span<const segment> segments, const memory_layout& layout) {
        return {q.as(rows, heads, dim),
                k.as(rows, heads, dim),
                v.as(rows, heads, dim),
                log_decay.as(rows, heads, dim),
                beta.as(rows, heads),
                0,
                segments,
                layout,
                out.as(rows, heads, dim)};
    }
};

memory_layout kda_layout(index heads, index dim, index layers = 1) {
    return {.kda_layers = layers, .heads = heads, .head_dim = dim, .taps = 3};
}

}  // namespace

TEST_CASE("KDA agrees with the float64 oracle, for any gate") {
    for (golden_case& c : golden_cases()) {
        for (const form how : {form::step, form::chunk}) {
            for (const int threads : {1, 3}) {
                CAPTURE(c.tokens, c.heads, c.dim, how == form::step, threads);
                thread_pool pool(threads);
                random_numbers random(1);
                sequences sequence(kda_layout(c.heads, c.dim), {{c.tokens, 0}}, random);
                sequence.set_state(0, c.arrays["S0"].values);
                array out(c.tokens * c.heads * c.dim);
                const auto operand = [&](const char* name) { return c.arrays[name].as(c.tokens, c.heads, c.dim); };
                run(how,
                    {operand("q"), operand("k"), operand("v"), operand("g"), c.arrays["beta"].as(c.tokens, c.heads), 0,
                     sequence.segments(), sequence.layout(), out.as(c.tokens, c.heads, c.dim)},
                    pool);
                CHECK(relative_error(out, c.arrays["o"]) <= 1e-5);
                CHECK(relative_error(sequence.state(0), c.arrays["S1"].values) <= 1e-5);
            }
        }
    }
}

TEST_CASE("KDA agrees with the plain loops for any shape") {
    random_numbers random(2);
    for (const index dim : {5, 24, 32, 40, 64, 96, 128, 136}) {
        for (const index heads : {1, 3}) {
            for (const index rows : {1, 2, 15, 16, 17, 47, 70}) {
                const sequences before(kda_layout(heads, dim, 2), {{1, 5}, {3, 0}, {rows, 9}}, random);
                kda_operands x(before.rows(), heads, dim, 40, random);
                sequences expected = before;
                kda_args args = x.args(expected.segments(), expected.layout());
                args.layer = 1;
                make_reference().kda_step(args);
                const array expected_out = x.out;
                for (const form how : {form::step, form::chunk}) {
                    CAPTURE(dim, heads, rows, how == form::step);
                    sequences actual = before;
                    thread_pool pool(static_cast<int>(1 + rows % 3));
                    std::fill(x.out.values.begin(), x.out.values.end(), NAN);
                    args.segments = actual.segments();
                    run(how, args, pool);
                    CHECK(relative_error(x.out, expected_out) <= 5e-6);
                    CHECK(relative_error(actual.recurrent(), expected.recurrent()) <= 5e-6);
                }
            }
        }
    }
}

TEST_CASE("KDA token by token gives the same bits however rows and threads are split") {
    random_numbers random(3);
    for (const index dim : {32, 40, 128}) {
        const sequences before(kda_layout(4, dim), {{1, 0}, {20, 7}, {50, 1}}, random);
        kda_operands x(before.rows(), 4, dim, 20, random);
        sequences whole = before;
        thread_pool one(1);
        run(form::step, x.args(whole.segments(), whole.layout()), one);
        const array expected = x.out;
        for (const int threads : {1, 2, 3, 16}) {
            thread_pool pool(threads);
            for (const index most : {1, 7, 50}) {
                CAPTURE(dim, threads, most);
                sequences split = before;
                std::fill(x.out.values.begin(), x.out.values.end(), NAN);
                for (index skip = 0; skip < 50; skip += most) {
                    run(form::step, x.args(split.segments(skip, most), split.layout()), pool);
                }
                CHECK(x.out.values == expected.values);
                CHECK(split.recurrent() == whole.recurrent());
            }
        }
    }
}

TEST_CASE("KDA with the steepest decays forgets and stays finite") {
    random_numbers random(4);
    for (const form how : {form::step, form::chunk}) {
        sequences sequence(kda_layout(1, 32), {{40, 0}}, random);
        kda_operands x(40, 1, 32, 1, random);
        std::fill(x.log_decay.values.begin(), x.log_decay.values.end(), -1e30f);
        thread_pool pool(1);
        run(how, x.args(sequence.segments(), sequence.layout()), pool);
        // o_t = k_t.q_t beta_t v_t / sqrt(D)
        for (index t = 0; t < 40; ++t) {
            float product = 0;
            for (index i = 0; i < 32; ++i) product += x.k.as(40, 32)(t, i) * x.q.as(40, 32)(t, i);
            product *= x.beta.as(40)[t] / std::sqrt(32.0f);
            for (index j = 0; j < 32; ++j) {
                CHECK(std::abs(x.out.as(40, 32)(t, j) - product * x.v.as(40, 32)(t, j)) < 1e-6f);
            }
        }
    }
}

TEST_CASE("The short convolution agrees with the plain loops, and with itself however rows are split") {
    random_numbers random(5);
    for (const index taps : {0, 1, 3, 5}) {
        for (const index dim : {5, 64, 128}) {
            memory_layout layout = kda_layout(3, dim, 2);
            layout.taps = taps;
            const sequences before(layout, {{1, 0}, {2, 3}, {40, 1}}, random);
            const index rows = before.rows();
            const index channels = layout.channels();
            const array x = random.normal(rows * channels);
            array weights = random.normal(channels * (taps + 1));
            const auto weight = weights.as(channels, taps + 1);
            sequences plain = before;
            array expected = x;
            for (int which = 0; which < 3; ++which) {
                make_reference().short_conv(
                    {expected.as(rows, channels), weight, which, 1, plain.segments(), plain.layout()});
            }
            array whole;
            for (const index most : {64, 1, 7}) {
                CAPTURE(taps, dim, most);
                thread_pool pool(static_cast<int>(1 + most % 3));
                scratch workspace(short_conv_scratch_bytes({.taps = taps}, pool.size()));
                sequences split = before;
                array y = x;
                for (int which = 0; which < 3; ++which) {
                    for (index skip = 0; skip < 40; skip += most) {
                        short_conv({y.as(rows, channels), weight, which, 1, split.segments(skip, most), split.layout()},
                                   pool, workspace);
                    }
                }
                CHECK(relative_error(y, expected) <= 1e-6);
                CHECK(relative_error(split.recurrent(), plain.recurrent()) <= 1e-6);
                if (whole.values.empty()) whole = y;
                CHECK(y.values == whole.values);
            }
        }
    }
}

TEST_CASE("Normalised heads, gates and gated norm agree with the plain loops") {
    random_numbers random(6);
    for (const index dim : {5, 32, 128}) {
        for (const index rows : {1, 3, 70}) {
            const index heads = 5;
            CAPTURE(dim, rows);
            thread_pool pool(static_cast<int>(rows % 3 + 1));
            reference plain = make_reference();

            array x = random.normal(rows * heads * dim);
            std::fill_n(x.values.begin(), dim, 0.0f);
            array y = x;
            plain.l2_norm({x.as(rows, heads, dim), 1e-5f});
            l2_norm({y.as(rows, heads, dim), 1e-5f}, pool);
            CHECK(relative_error(y, x) <= 1e-6);

            array g = random.normal(rows * heads * dim, 20), beta = random.normal(rows * heads, 5);
            array a = random.uniform(heads, -8, -0.1f), bias = random.normal(heads * dim, 3);
            array fast_g = g, fast_beta = beta;
            plain.kda_gates({g.as(rows, heads, dim), beta.as(rows, heads), a.as(heads), bias.as(heads * dim)});
            kda_gates({fast_g.as(rows, heads, dim), fast_beta.as(rows, heads), a.as(heads), bias.as(heads * dim)},
                      pool);
            CHECK(relative_error(fast_beta, beta) <= 1e-6);
            for (std::size_t i = 0; i < g.values.size(); ++i) {  // each one: small decays matter as much as large ones
                CHECK(std::abs(fast_g.values[i] - g.values[i]) <= 2e-6f * std::abs(g.values[i]) + 1e-30f);
                CHECK(fast_g.values[i] <= 0.0f);
            }

            array gate = random.normal(rows * heads * dim, 3), weight = random.normal(dim);
            array z = y;
            plain.gated_norm({y.as(rows, heads, dim), weight.as(dim), gate.as(rows, heads, dim), 1e-5f});
            gated_norm({z.as(rows, heads, dim), weight.as(dim), gate.as(rows, heads, dim), 1e-5f}, pool);
            CHECK(relative_error(z, y) <= 1e-6);
        }
    }
}

}  // namespace keel::testing
