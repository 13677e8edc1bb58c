// SPDX-License-Identifier: MIT
#include <keel/backend/cpu.hpp>
#include <keel/backend/reference.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include "backend/products.hpp"
#include "catch.hpp"

namespace keel::testing {

namespace {

constexpr dtype all_types[] = {dtype::f32,  dtype::f16,    dtype::bf16,   dtype::q8_0, dtype::q4_0, dtype::q4_1,
                               dtype::q5_0, dtype::q5_1,   dtype::q2_k,   dtype::q3_k, dtype::q4_k, dtype::q5_k,
                               dtype::q6_k, dtype::iq4_nl, dtype::iq4_xs, dtype::mxfp4};

}  // namespace

TEST_CASE("exact products have the values of plain loops, and bits that no split changes") {
    random_numbers random(1);
    auto plain = make<reference>(precision::exact, 1);
    auto one = make<cpu>(precision::exact, 1);
    auto three = make<cpu>(precision::exact, 3);
    for (const dtype type : all_types) {
        CAPTURE(info(type).name);
        for (const index columns : {32, 96, 256, 768, 2304}) {
            if (columns % info(type).block_elements != 0) continue;
            CAPTURE(columns);
            const weights w(type, 1, 37, columns, random);
            array x = random.normal(100 * columns);
            const array all = product(one, w, x, 100);
            CHECK(relative_error(all, product(plain, w, x, 100)) < 1e-6);
            CHECK(same_bits(all, product(three, w, x, 100)));
            for (const index n : {1, 2, 3, 7, 16, 33}) {
                CAPTURE(n);
                array part(std::vector<float>(x.values.end() - n * columns, x.values.end()));
                const array expected(std::vector<float>(all.values.end() - n * 37, all.values.end()));
                CHECK(same_bits(product(three, w, part, n), expected));
            }
        }
    }
}

TEST_CASE("float weights may have any number of columns") {
    random_numbers random(2);
    auto plain = make<reference>(precision::exact, 1);
    for (const precision p : {precision::exact, precision::fast}) {
        auto fast = make<cpu>(p, 2);
        for (const dtype type : {dtype::f32, dtype::f16, dtype::bf16}) {
            for (const index columns : {1, 5, 31, 77}) {
                CAPTURE(info(type).name, columns);
                const weights w(type, 1, 19, columns, random);
                array x = random.normal(6 * columns);
                CHECK(relative_error(product(fast, w, x, 6), product(plain, w, x, 6)) < 1e-6);
            }
        }
    }
}

TEST_CASE("fast products are off by no more than the rounding of their activations explains") {
    random_numbers random(3);
    auto plain = make<reference>(precision::exact, 1);
    auto fast = make<cpu>(precision::fast, 3);
    constexpr index rows = 37;
    for (const dtype type : all_types) {
        CAPTURE(info(type).name);
        for (const index columns : {32, 96, 256, 768, 2304}) {
            if (columns % info(type).block_elements != 0) continue;
            const weights w(type, 1, rows, columns, random);
            for (const index n : {1, 2, 3, 7, 16, 33, 100}) {
                CAPTURE(columns, n);
                array x = random.normal(n * columns);
                for (float& v : x.values) v += 0.3f;  // an offset, as real activations have
                const array expected = product(plain, w, x, n);
                const array y = product(fast, w, x, n);
                const bool quantised = info(type).block_elements > 1;
                const bool halves =
                    n > (type == dtype::q8_0 ? 8 : 4) && rounds_to_halves() && (quantised || type == dtype::bf16);
                if (!quantised && !halves) {
                    CHECK(relative_error(y, expected) < 1e-6);
                    continue;
                }
                check_rounding(w, x, n, y, expected, halves);
            }
        }
    }
}

TEST_CASE("a value that is not finite reaches the product") {
    random_numbers random(4);
    for (const precision p : {precision::exact, precision::fast}) {
        auto backend = make<cpu>(p, 1);
        for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
            for (const index n : {1, 16}) {
                const weights w(dtype::q4_k, 1, 5, 256, random);
                array x = random.normal(n * 256);
                x.values[77] = bad;
                const array y = product(backend, w, x, n);
                for (std::size_t o = 0; o < 5; ++o) CHECK_FALSE(std::isfinite(y.values[o]));
                for (std::size_t o = 5; o < y.values.size(); ++o) CHECK(std::isfinite(y.values[o]));
            }
        }
    }
}

TEST_CASE("rows of zeros, huge and tiny activations keep their size") {
    random_numbers random(5);
    auto plain = make<reference>(precision::exact, 1);
    auto fast = make<cpu>(precision::fast, 1);
    for (const float size : {0.0f, 1e-20f, 1e20f}) {
        for (const index n : {1, 7}) {
            const weights w(dtype::q6_k, 1, 20, 512, random);
            array x = random.normal(n * 512, size);
            const array y = product(fast, w, x, n);
            const array expected = product(plain, w, x, n);
            for (std::size_t i = 0; i < y.values.size(); ++i) {
                CHECK(std::abs(y.values[i] - expected.values[i]) <= 0.1f * size);
            }
        }
    }
}

TEST_CASE("several products of one input, rows that are not dense, and sums with what is there") {
    random_numbers random(6);
    for (const precision p : {precision::exact, precision::fast}) {
        auto plain = make<reference>(precision::exact, 1);
        auto backend = make<cpu>(p, 3);
        const double tolerance = p == precision::exact ? 1e-6 : 2e-2;
        const weights a(dtype::q4_k, 1, 70, 256, random), b(dtype::f32, 1, 3, 256, random);
        const weights c(dtype::q8_0, 1, 130, 256, random);
        for (const index n : {1, 3, 20, 90, 600}) {
            CAPTURE(n);
            array wide = random.normal(n * 300);
            const view<const float, 2> x = wide.as(n, 300).columns(17, 256);
            const auto run = [&](auto& with) {
                array out = array(std::vector<float>(static_cast<std::size_t>(n * 250), 0.5f));
                const view<float, 2> y = out.as(n, 250);
                with.matmul(x, {{a.get(), y.columns(1, 70), true},
                                {b.get(), y.columns(71, 3)},
                                {c.get(), y.columns(100, 130), true}});
                return out;
            };
            const array expected = run(plain);
            const array y = run(backend);
            CHECK(relative_error(y, expected) < tolerance);
            for (index r = 0; r < n; ++r) {
                for (const index column : {0, 74, 99, 230, 249})
                    CHECK(y.values[static_cast<std::size_t>(r * 250 + column)] == 0.5f);
            }
        }
    }
}

TEST_CASE("one matrix per head") {
    random_numbers random(7);
    auto plain = make<reference>(precision::exact, 1);
    constexpr index heads = 5, columns = 96, rows = 40;
    for (const precision p : {precision::exact, precision::fast}) {
        auto backend = make<cpu>(p, 3);
        for (const dtype type : {dtype::f32, dtype::q8_0, dtype::q5_1}) {
            const weights w(type, heads, rows, columns, random);
            for (const index n : {1, 3, 18}) {
                CAPTURE(info(type).name, n);
                array wide = random.normal(n * heads * 128);
                const view<const float, 3> x = wide.as(n, heads, 128).columns(32, columns);
                const auto run = [&](auto& with, index first, index count) {
                    array out(count * heads * rows);
                    with.matmul_heads(
                        matmul_heads_args<host_matrix>{w.get(), x.rows(first, count), out.as(count, heads, rows)});
                    return out;
                };
                const array all = run(backend, 0, n);
                CHECK(relative_error(all, run(plain, 0, n)) <
                      (p == precision::exact || type == dtype::f32 ? 1e-6 : 2e-2));
                if (p == precision::exact) {
                    const array last = run(backend, n - 1, 1);
                    CHECK(
                        same_bits(last, array(std::vector<float>(all.values.end() - heads * rows, all.values.end()))));
                }
            }
        }
    }
}

TEST_CASE("swiglu") {
    random_numbers random(8);
    auto plain = make<reference>(precision::exact, 1);
    for (const precision p : {precision::exact, precision::fast}) {
        auto backend = make<cpu>(p, 3);
        for (const dtype type : {dtype::bf16, dtype::q4_0, dtype::q4_1}) {
            const weights gate(type, 1, 96, 256, random), up(type, 1, 96, 256, random),
                down(dtype::q8_0, 1, 256, 96, random);
            for (const index n : {1, 4, 5, 33}) {
                CAPTURE(info(type).name, n);
                array x = random.normal(n * 256, 2.0f);
                const auto run = [&](auto& with, index first, index count, bool accumulate) {
                    array out = array(std::vector<float>(static_cast<std::size_t>(count * 256), 1.0f));
                    with.swiglu(swiglu_args<host_matrix>{x.as(n, index{256}).rows(first, count), gate.get(), up.get(),
                                                         down.get(), out.as(count, index{256}), accumulate});
                    return out;
                };
                for (const bool accumulate : {false, true}) {
                    const array all = run(backend, 0, n, accumulate);
                    CHECK(relative_error(all, run(plain, 0, n, accumulate)) < (p == precision::exact ? 1e-6 : 3e-2));
                    if (p == precision::exact) {
                        const array last = run(backend, n - 1, 1, accumulate);
                        CHECK(same_bits(last, array(std::vector<float>(all.values.end() - 256, all.values.end()))));
                    }
                }
            }
        }
    }
}

TEST_CASE("experts, however the rows choose them") {
    random_numbers random(9);
    auto plain = make<reference>(precision::exact, 1);
    constexpr index hidden = 256, width = 64, count = 16, k = 4;
    for (const precision p : {precision::exact, precision::fast}) {
        auto backend = make<cpu>(p, 3);
        auto alone = make<cpu>(p, 1);
        for (const dtype type : {dtype::f16, dtype::q4_k, dtype::q6_k}) {
            const weights gate(type, count, width, hidden, random), up(type, count, width, hidden, random);
            const weights down(dtype::q5_0, count, hidden, width, random);
            for (const index n : {1, 2, 7, 60}) {
                array x = random.normal(n * hidden, 2.0f);
                array weight = random.uniform(n * k, 0.0f, 1.0f);
                std::vector<std::int32_t> chosen(static_cast<std::size_t>(n * k));
                for (const int balance : {0, 1, 2}) {  // anywhere; nearly all to the same; one expert several times
                    CAPTURE(info(type).name, n, balance);
                    for (std::size_t i = 0; i < chosen.size(); ++i) {
                        const index slot = static_cast<index>(i) % k;
                        const index any = random.between(0, count / k - 1) * k + slot;
                        const index same = i == 5 ? 14 : slot, one_of_two = any / 4 % 2 + 3;
                        chosen[i] = static_cast<std::int32_t>(balance == 0 ? any : balance == 1 ? same : one_of_two);
                    }
                    const auto run = [&](auto& with, index first, index rows) {
                        array out = array(std::vector<float>(static_cast<std::size_t>(rows * hidden), 7.0f));
                        const view<const std::int32_t, 2> all(chosen.data(), n, k);
                        with.experts(experts_args<host_matrix>{x.as(n, hidden).rows(first, rows), all.rows(first, rows),
                                                               weight.as(n, k).rows(first, rows), gate.get(), up.get(),
                                                               down.get(), out.as(rows, hidden)});
                        return out;
                    };
                    const array all = run(backend, 0, n);
                    CHECK(relative_error(all, run(plain, 0, n)) < (p == precision::exact ? 1e-6 : 3e-2));
                    CHECK(same_bits(all, run(alone, 0, n)));
                    if (p == precision::exact) {
                        for (const index r : {index{0}, n / 2, n - 1}) {
                            const auto at = all.values.begin() + r * hidden;
                            CHECK(same_bits(run(backend, r, 1), array(std::vector<float>(at, at + hidden))));
                        }
                    }
                }
            }
        }
    }
}

}  // namespace keel::testing
