// SPDX-License-Identifier: MIT
#include "catch.hpp"
#include "operands.hpp"

#include <keel/backend/cpu/attention.hpp>
#include <keel/backend/reference.hpp>

namespace keel::testing {

namespace {

reference make_reference() {
    return {std::make_shared<reference::device>(backend_options{precision::exact}), index{1} << 24};
}

struct mla_shape {
    index heads, rank, position_dim, own_dim, value_dim;
};

memory_layout mla_layout(const mla_shape& s, dtype cache, index layers = 2) {
    return {.mla_layers = layers, .latent_width = s.rank + s.position_dim, .cache = cache};
}

workspace_limits limits(const mla_shape& s, index rows) {
    return {.rows = rows,
            .heads = s.heads,
            .latent_width = s.rank + s.position_dim,
            .latent_rank = s.rank,
            .mla_key = s.own_dim + s.position_dim,
            .mla_value = s.value_dim};
}

constexpr mla_shape shapes[] = {
    {1, 32, 8, 16, 16}, {3, 40, 5, 7, 9}, {16, 64, 16, 32, 32}, {33, 96, 32, 24, 48}, {32, 64, 32, 32, 64}};

/// Random operands of absorbed attention; scores of about unit size, some much larger.
struct absorbed_operands {
    mla_shape s;
    index rows;
    array q_latent, q_position, out;

    absorbed_operands(const mla_shape& shape, index n, random_numbers& random)
        : s(shape),
          rows(n),
          q_latent(random.normal(n * s.heads * s.rank)),
          q_position(random.normal(n * s.heads * s.position_dim, 3)),
          out(n * s.heads * s.rank) {}

    latent_attend_args args(std::span<const segment> segments, const memory_layout& layout) {
        return {q_latent.as(rows, s.heads, s.rank),
                q_position.as(rows, s.heads, s.position_dim),
                1.0f / std::sqrt(static_cast<float>(s.rank)),
                1,
                segments,
                layout,
                out.as(rows, s.heads, s.rank)};
    }
};

}  // namespace

TEST_CASE("Latent rows are normed and appended, across blocks of the cache") {
    random_numbers random(1);
    for (const mla_shape& s : shapes) {
        for (const dtype cache : {dtype::f32, dtype::f16}) {
            const sequences before(mla_layout(s, cache), {{1, 0}, {3, 254}, {300, 255}}, random);
            const index rows = before.rows(), width = before.layout().latent_width;
            array x = random.normal(rows * width), weight = random.normal(s.rank), y = x;
            sequences expected = before, actual = before;
            make_reference().latent_append(
                {x.as(rows, width), weight.as(s.rank), 1e-5f, 1, expected.segments(), expected.layout()});
            thread_pool pool(2);
            latent_append({y.as(rows, width), weight.as(s.rank), 1e-5f, 1, actual.segments(), actual.layout()}, pool);
            CHECK(relative_error(y, x) <= 1e-6);
            CHECK(relative_error(actual.latents(1), expected.latents(1)) <= (cache == dtype::f32 ? 1e-6 : 1e-4));
            CHECK(actual.latents(0) == before.latents(0));
        }
    }
}

TEST_CASE("Absorbed attention agrees with the plain loops") {
    random_numbers random(2);
    for (const mla_shape& s : shapes) {
        for (const dtype cache : {dtype::f32, dtype::f16}) {
            for (const int threads : {1, 2, 3}) {
                CAPTURE(s.heads, s.rank, cache == dtype::f32, threads);
                sequences sequence(mla_layout(s, cache), {{1, 0}, {2, 255}, {5, 63}, {6, 1100}}, random);
                absorbed_operands x(s, sequence.rows(), random);
                auto args = x.args(sequence.segments(), sequence.layout());
                make_reference().latent_attend(args);
                const array expected = x.out;
                std::fill(x.out.values.begin(), x.out.values.end(), NAN);
                thread_pool pool(threads);
                scratch workspace(latent_attend_scratch_bytes(limits(s, sequence.rows()), threads));
                latent_attend(args, pool, workspace);
                CHECK(relative_error(x.out, expected) <= (cache == dtype::f32 ? 2e-6 : 3e-5));
            }
        }
    }
}

TEST_CASE("Absorbed attention gives the same bits however rows and threads are split") {
    random_numbers random(3);
    for (const mla_shape& s : shapes) {
        sequences sequence(mla_layout(s, dtype::f32), {{1, 700}, {50, 230}}, random);
        absorbed_operands x(s, sequence.rows(), random);
        array expected;
        for (const int threads : {1, 2, 3, 20}) {
            thread_pool pool(threads);
            scratch workspace(latent_attend_scratch_bytes(limits(s, sequence.rows()), threads));
            for (const index most : {50, 1, 7}) {
                CAPTURE(s.heads, threads, most);
                std::fill(x.out.values.begin(), x.out.values.end(), NAN);
                for (index skip = 0; skip < 50; skip += most) {
                    latent_attend(x.args(sequence.segments(skip, most), sequence.layout()), pool, workspace);
                }
                if (expected.values.empty()) expected = x.out;
                CHECK(x.out.values == expected.values);
            }
        }
        CHECK(relative_error(expected, expected) == 0);  // finite
    }
}

TEST_CASE("Absorbed attention with huge scores picks one row") {
    const mla_shape s{2, 32, 8, 16, 16};
    random_numbers random(4);
    sequences sequence(mla_layout(s, dtype::f32), {{1, 500}}, random);
    absorbed_operands x(s, 1, random);
    for (float& q : x.q_latent.values) q *= 1e4f;
    auto args = x.args(sequence.segments(), sequence.layout());
    make_reference().latent_attend(args);
    const array expected = x.out;
    thread_pool pool(2);
    scratch workspace(latent_attend_scratch_bytes(limits(s, 1), 2));
    latent_attend(args, pool, workspace);
    CHECK(relative_error(x.out, expected) <= 1e-3);  // rounding of scores around 1e5
}

TEST_CASE("Expanded attention agrees with the plain loops") {
    random_numbers random(5);
    for (const mla_shape& s : shapes) {
        for (const dtype cache : {dtype::f32, dtype::f16}) {
            for (const int threads : {1, 2, 3, 9}) {
                CAPTURE(s.heads, s.rank, cache == dtype::f32, threads);
                sequences sequence(mla_layout(s, cache), {{1, 300}, {16, 0}, {33, 250}, {70, 64}, {90, 0}}, random);
                const index rows = sequence.rows(), key = s.own_dim + s.position_dim;
                array q = random.normal(rows * s.heads * key), out(rows * s.heads * s.value_dim);
                const float size = 1.0f / std::sqrt(static_cast<float>(s.rank));
                array key_up = random.normal(s.heads * s.rank * s.own_dim, size);
                array value_up = random.normal(s.heads * s.value_dim * s.rank, size);
                const auto matrix = [&](array& of, index m, index n) {
                    const auto* const data = reinterpret_cast<const std::byte*>(of.values.data());
                    return host_matrix{{data, dtype::f32, s.heads, m, n}, nullptr};
                };
                const host_matrix k = matrix(key_up, s.rank, s.own_dim), v = matrix(value_up, s.value_dim, s.rank);
                const expanded_attend_args<host_matrix> args{q.as(rows, s.heads, key),
                                                             k,
                                                             v,
                                                             1.0f / std::sqrt(static_cast<float>(key)),
                                                             1,
                                                             sequence.segments(),
                                                             sequence.layout(),
                                                             out.as(rows, s.heads, s.value_dim)};
                make_reference().expanded_attend(args);
                const array expected = out;
                std::fill(out.values.begin(), out.values.end(), NAN);
                thread_pool pool(threads);
                scratch workspace(expanded_attend_scratch_bytes(limits(s, rows), threads));
                expanded_attend(args, pool, workspace);
                CHECK(relative_error(out, expected) <= 3e-5);
            }
        }
    }
}

}  // namespace keel::testing
