// SPDX-License-Identifier: MIT
#include <keel/core/view.hpp>

#include <numeric>
#include <type_traits>
#include <vector>

#include "catch.hpp"

// Inside keel, because <strings.h> has a function ::index.
namespace keel::test {

static_assert(std::is_trivially_copyable_v<view<float, 3>>);
static_assert(std::is_convertible_v<view<float, 2>, view<const float, 2>>);
static_assert(!std::is_convertible_v<view<const float, 2>, view<float, 2>>);

namespace {

struct numbers {
    std::vector<int> values = std::vector<int>(2 * 3 * 4);
    numbers() { std::iota(values.begin(), values.end(), 0); }
    view<int, 3> cube() { return {values.data(), 2, 3, 4}; }
    view<int, 2> matrix() { return {values.data(), 6, 4}; }
};

}  // namespace

TEST_CASE("a dense view indexes with the last dimension contiguous") {
    numbers n;
    const auto v = n.cube();
    CHECK(v.size() == 24);
    CHECK(v.dense());
    CHECK(v(1, 2, 3) == 23);
    CHECK(v(0, 1, 0) == 4);
    CHECK(v[1](2, 3) == 23);
    CHECK(v[1][2][3] == 23);
    v(1, 0, 2) = -1;
    CHECK(n.values[14] == -1);
}

TEST_CASE("rows and columns cut without copying") {
    numbers n;
    const auto v = n.matrix();

    const auto rows = v.rows(2, 3);
    CHECK(rows.extent[0] == 3);
    CHECK(rows(0, 1) == 9);
    CHECK(rows.dense());

    const auto columns = v.columns(1, 2);
    CHECK(columns.extent[1] == 2);
    CHECK(columns(5, 1) == 22);
    CHECK(columns.stride[0] == 4);
    CHECK(columns.size() == 12);
    CHECK_FALSE(columns.dense());
    CHECK(columns.rows(3, 1).dense());  // one row is dense however far the next would be
}

TEST_CASE("split cuts the last dimension in two, also in a view with gaps") {
    numbers n;
    const auto heads = n.matrix().split(2);
    CHECK(heads.extent[0] == 6);
    CHECK(heads.extent[1] == 2);
    CHECK(heads.extent[2] == 2);
    CHECK(heads(3, 1, 0) == 14);
    CHECK(heads.dense());

    const auto cut = n.cube().columns(2, 2).split(1);
    CHECK(cut(1, 2, 1, 0) == 23);
    CHECK_FALSE(cut.dense());
}

TEST_CASE("a view of mutable elements becomes one of constant elements") {
    numbers n;
    const view<const int, 2> v = n.matrix().columns(1, 3);
    CHECK(v(1, 0) == 5);
    CHECK(v.stride[0] == 4);
    CHECK(v.extent[1] == 3);
}

TEST_CASE("a view starts empty") {
    const view<float, 2> v;
    CHECK(v.data == nullptr);
    CHECK(v.size() == 0);
}

}  // namespace keel::test
