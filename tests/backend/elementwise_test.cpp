// SPDX-License-Identifier: MIT
#include <set>

#include "catch.hpp"
#include "operands.hpp"

#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/reference.hpp>

namespace keel::testing {

namespace {

reference make_reference() {
    return {std::make_shared<reference::device>(backend_options{precision::exact}), index{1} << 22};
}

}  // namespace

TEST_CASE("Root mean square norms agree with the plain loops, also in place and on some columns") {
    random_numbers random(1);
    for (const index columns : {1, 7, 64, 100, 2304}) {
        for (const index rows : {1, 2, 70}) {
            CAPTURE(columns, rows);
            thread_pool pool(static_cast<int>(rows % 3 + 1));
            array x = random.normal(rows * (columns + 3)), weight = random.normal(columns);
            array expected(rows * columns), actual(rows * columns);
            const auto part = x.as(rows, columns + 3).columns(0, columns);
            make_reference().rms_norm({part, weight.as(columns), 1e-5f, expected.as(rows, columns)});
            rms_norm({part, weight.as(columns), 1e-5f, actual.as(rows, columns)}, pool);
            CHECK(relative_error(actual, expected) <= 1e-6);
            const array before = x;
            rms_norm({part, weight.as(columns), 1e-5f, part}, pool);
            for (index r = 0; r < rows; ++r) {
                for (index c = 0; c < columns; ++c) CHECK(part(r, c) == actual.as(rows, columns)(r, c));
                for (index c = columns; c < columns + 3; ++c) {
                    const auto at = static_cast<std::size_t>(r * (columns + 3) + c);
                    CHECK(x.values[at] == before.values[at]);
                }
            }
        }
    }
}

TEST_CASE("Rows are embedded, added and gathered as they are") {
    random_numbers random(2);
    for (const index columns : {3, 64, 1000}) {
        const index rows = 60;
        CAPTURE(columns);
        thread_pool pool(3);
        array table = random.normal(100 * columns);
        std::vector<token> tokens;
        std::vector<index> wanted;
        for (index r = 0; r < rows; ++r) tokens.push_back(static_cast<token>(random.between(0, 99)));
        for (index r = 0; r < rows; r += 7) wanted.push_back(r);
        const matrix_view matrix{reinterpret_cast<const std::byte*>(table.values.data()), dtype::f32, 1, 100, columns};

        array x(rows * columns);
        embed(embed_args<matrix_view>{matrix, tokens, x.as(rows, columns)}, pool);
        array y = random.normal(rows * columns), sum = x;
        add({sum.as(rows, columns), y.as(rows, columns)}, pool);
        const index n = static_cast<index>(wanted.size());
        array chosen(n * columns);
        gather({sum.as(rows, columns), wanted, chosen.as(n, columns)}, pool);
        for (index i = 0; i < n; ++i) {
            for (index c = 0; c < columns; ++c) {
                const index r = wanted[static_cast<std::size_t>(i)];
                const float embedded = table.as(100, columns)(tokens[static_cast<std::size_t>(r)], c);
                CHECK(x.as(rows, columns)(r, c) == embedded);
                CHECK(chosen.as(n, columns)(i, c) == embedded + y.as(rows, columns)(r, c));
            }
        }
    }
}

TEST_CASE("The router chooses as the plain loops do, the lower index on a tie") {
    random_numbers random(3);
    for (const index experts : {1, 5, 16, 60, 256}) {
        for (const index rows : {1, 90}) {
            const index k = std::min<index>(experts, 8);
            CAPTURE(experts, rows);
            thread_pool pool(static_cast<int>(rows % 3 + 1));
            scratch workspace(route_scratch_bytes({.experts = experts}, pool.size()));
            array logits = random.normal(rows * experts, 2), bias = random.normal(experts, 0.1f);
            // Half of the experts are exactly like their neighbours.
            for (index e = 1; e < experts; e += 2) {
                bias.values[static_cast<std::size_t>(e)] = bias.values[static_cast<std::size_t>(e - 1)];
                for (index r = 0; r < rows; ++r) logits.as(rows, experts)(r, e) = logits.as(rows, experts)(r, e - 1);
            }
            std::vector<std::int32_t> chosen(static_cast<std::size_t>(rows * k), -1), expected = chosen;
            array weights(rows * k), expected_weights(rows * k);
            make_reference().route({logits.as(rows, experts),
                                    bias.as(experts),
                                    2.5f,
                                    {expected.data(), rows, k},
                                    expected_weights.as(rows, k)});
            route({logits.as(rows, experts), bias.as(experts), 2.5f, {chosen.data(), rows, k}, weights.as(rows, k)},
                  pool, workspace);
            CHECK(chosen == expected);
            CHECK(relative_error(weights, expected_weights) <= 1e-6);
        }
    }
}

TEST_CASE("The router stays within its experts when logits are not numbers") {
    thread_pool pool(1);
    scratch workspace(route_scratch_bytes({.experts = 20}, 1));
    array logits(std::vector<float>(20, NAN)), bias(20), weights(8);
    logits.values[7] = -INFINITY;
    std::vector<std::int32_t> chosen(8, -1);
    route({logits.as(1, 20), bias.as(20), 1.0f, {chosen.data(), 1, 8}, weights.as(1, 8)}, pool, workspace);
    CHECK(std::set<std::int32_t>(chosen.begin(), chosen.end()).size() == 8);
    CHECK(chosen[0] == 7);
    for (const std::int32_t e : chosen) CHECK((e >= 0 && e < 20));
}

}  // namespace keel::testing
