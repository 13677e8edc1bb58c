// SPDX-License-Identifier: MIT
#include <keel/backend/cpu.hpp>
#include <keel/backend/reference.hpp>

#include <algorithm>
#include <vector>

#include "backend/products.hpp"
#include "catch.hpp"

namespace keel::testing {

namespace {

constexpr dtype types[] = {dtype::q4_k, dtype::q5_k, dtype::q6_k, dtype::q8_0};

host_matrix interleaved(const cpu& backend, const weights& w) {
    auto copy = backend.interleave(w.get());
    REQUIRE(copy);
    CHECK(copy->interleaved);
    return *copy;
}

array product(cpu& backend, const host_matrix& m, array& x, index n) {
    array out(n * m.rows);
    backend.matmul(x.as(n, m.columns), {{m, out.as(n, m.rows)}});
    return out;
}

}  // namespace

TEST_CASE("products of interleaved weights are off by no more than the rounding of their activations explains") {
    random_numbers random(21);
    auto plain = make<reference>(precision::exact, 1);
    auto fast = make<cpu>(precision::fast, 3, true);
    auto alone = make<cpu>(precision::fast, 1, true);
    for (const dtype type : types) {
        for (const index columns : {32, 96, 256, 768, 2304}) {
            if (columns % info(type).block_elements != 0) continue;
            const index rows = columns == 768 ? 32 : 224;  // a tile, or an odd number of them
            const weights w(type, 1, rows, columns, random);
            const host_matrix m = interleaved(fast, w);
            for (const index n : {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 70, 100, 600}) {
                CAPTURE(info(type).name, columns, n);
                array x = random.normal(n * columns);
                for (float& v : x.values) v += 0.3f;
                const array y = product(fast, m, x, n);
                CHECK(same_bits(y, product(alone, m, x, n)));
                if (n == 600 && columns != 256) continue;  // the check takes long
                check_rounding(w, x, n, y, product(plain, w, x, n), n > 16 && rounds_to_halves());
            }
        }
    }
}

TEST_CASE("interleaved weights beside others, and sums with what is there") {
    random_numbers random(22);
    auto plain = make<reference>(precision::exact, 1);
    auto backend = make<cpu>(precision::fast, 3, true);
    const weights a(dtype::q4_k, 1, 64, 256, random), b(dtype::q6_k, 1, 37, 256, random);
    const weights c(dtype::bf16, 1, 32, 256, random), d(dtype::q8_0, 1, 32, 256, random);
    const host_matrix interleaved_a = interleaved(backend, a), interleaved_d = interleaved(backend, d);
    for (const index n : {1, 3, 6, 20, 90}) {
        array x = random.normal(n * 256);
        const auto run = [&](auto& with, const host_matrix& first, const host_matrix& last) {
            array out = array(std::vector<float>(static_cast<std::size_t>(n * 165), 0.5f));
            const view<float, 2> y = out.as(n, 165);
            with.matmul(x.as(n, 256), {{first, y.columns(0, 64), true},
                                       {b.get(), y.columns(64, 37)},
                                       {c.get(), y.columns(101, 32)},
                                       {last, y.columns(133, 32), true}});
            return out;
        };
        CAPTURE(n);
        CHECK(relative_error(run(backend, interleaved_a, interleaved_d), run(plain, a, d)) < 2e-2);
    }
}

TEST_CASE("networks and experts of interleaved weights") {
    random_numbers random(23);
    auto plain = make<reference>(precision::exact, 1);
    auto backend = make<cpu>(precision::fast, 3, true);
    auto alone = make<cpu>(precision::fast, 1, true);
    constexpr index hidden = 512, width = 256, count = 16, k = 4;
    const auto compare = [&](const auto& run, const weights& gate, const weights& up, const weights& down) {
        const host_matrix g = interleaved(backend, gate), u = interleaved(backend, up), d = interleaved(backend, down);
        const array all = run(backend, g, u, d);
        const array expected = run(plain, gate, up, down);
        // As close as the same weights where they lie in a file.
        const double allowed = std::max(3e-2, 1.01 * relative_error(run(backend, gate, up, down), expected));
        CHECK(relative_error(all, expected) < allowed);
        CHECK(same_bits(all, run(alone, g, u, d)));
        CHECK(relative_error(run(backend, g, up, d), expected) < allowed);  // one of two that share their input
    };
    for (const dtype type : types) {
        const weights gate(type, count, width, hidden, random), up(dtype::q5_k, count, width, hidden, random);
        const weights down(dtype::q6_k, count, hidden, width, random);
        for (const index n : {1, 2, 7, 16, 60}) {
            CAPTURE(info(type).name, n);
            array x = random.normal(n * hidden, 2.0f), weight = random.uniform(n * k, 0.0f, 1.0f);
            std::vector<std::int32_t> chosen(static_cast<std::size_t>(n * k));
            for (std::size_t i = 0; i < chosen.size(); ++i) {
                chosen[i] = static_cast<std::int32_t>(random.between(0, count / k - 1) * k + static_cast<index>(i) % k);
            }
            compare(
                [&](auto& with, const host_matrix& g, const host_matrix& u, const host_matrix& d) {
                    array out(n * hidden);
                    with.experts(experts_args<host_matrix>{x.as(n, hidden),
                                                           view<const std::int32_t, 2>(chosen.data(), n, k),
                                                           weight.as(n, k), g, u, d, out.as(n, hidden)});
                    return out;
                },
                gate, up, down);
        }
        const weights one_gate(type, 1, width, hidden, random), one_up(dtype::q4_k, 1, width, hidden, random);
        const weights one_down(type, 1, hidden, width, random);
        for (const index n : {1, 4, 5, 33}) {
            CAPTURE(info(type).name, n);
            array x = random.normal(n * hidden, 2.0f);
            compare(
                [&](auto& with, const host_matrix& g, const host_matrix& u, const host_matrix& d) {
                    array out(n * hidden);
                    with.swiglu(swiglu_args<host_matrix>{x.as(n, hidden), g, u, d, out.as(n, hidden)});
                    return out;
                },
                one_gate, one_up, one_down);
        }
    }
}

TEST_CASE("what is not interleaved") {
    random_numbers random(24);
    const auto exact = make<cpu>(precision::exact, 1, true), fast = make<cpu>(precision::fast, 1, true);
    const auto off = make<cpu>(precision::fast, 1);
    const weights whole(dtype::q4_k, 2, 64, 256, random), parts(dtype::q4_k, 2, 48, 256, random);
    const weights other(dtype::q3_k, 1, 64, 256, random), floats(dtype::bf16, 1, 64, 256, random);
    CHECK(fast.interleave(whole.get()));
    CHECK_FALSE(exact.interleave(whole.get()));
    CHECK_FALSE(off.interleave(whole.get()));
    CHECK_FALSE(fast.interleave(parts.get()));
    CHECK_FALSE(fast.interleave(other.get()));
    CHECK_FALSE(fast.interleave(floats.get()));
    const backend_options options{.interleave = true};
    CHECK(cpu::interleaved_bytes(whole.get(), options) == 2 * 64 * 148);
    CHECK(cpu::interleaved_bytes(parts.get(), options) == 0);
}

}  // namespace keel::testing
