// SPDX-License-Identifier: MIT
#include <keel/core/quantize.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "catch.hpp"

namespace keel::test {
namespace {

using row = std::vector<float>;

constexpr dtype quantised[] = {dtype::q8_0,   dtype::q4_0,   dtype::q4_1, dtype::q5_0, dtype::q5_1,
                               dtype::q2_k,   dtype::q3_k,   dtype::q4_k, dtype::q5_k, dtype::q6_k,
                               dtype::iq4_nl, dtype::iq4_xs, dtype::mxfp4};

std::vector<std::byte> encoded(dtype type, const row& x, const float* importance = nullptr) {
    const index columns = static_cast<index>(x.size());
    std::vector<std::byte> bytes(static_cast<std::size_t>(row_bytes(type, columns)));
    encode_row(type, x.data(), bytes.data(), columns, importance);
    return bytes;
}

row decoded(dtype type, const std::vector<std::byte>& bytes, std::size_t columns) {
    row x(columns);
    decode_row(type, bytes.data(), x.data(), static_cast<index>(columns));
    return x;
}

row round_trip(dtype type, const row& x, const float* importance = nullptr) {
    return decoded(type, encoded(type, x, importance), x.size());
}

row gaussian(std::size_t columns, unsigned seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    row x(columns);
    for (float& value : x) value = normal(random);
    return x;
}

double squared_error(const row& x, const row& y, const row& weights = {}) {
    double sum = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double difference = static_cast<double>(x[i]) - static_cast<double>(y[i]);
        sum += (weights.empty() ? 1.0 : static_cast<double>(weights[i])) * difference * difference;
    }
    return sum;
}

/// The plainest quantiser for groups of the same size, with exact scales: `levels` + 1 equidistant values from the
/// group's minimum to its maximum, or, symmetric, from minus to plus the largest magnitude.
double plain_squared_error(const row& x, std::size_t group, double levels, bool symmetric) {
    double sum = 0;
    for (std::size_t g = 0; g < x.size(); g += group) {
        const auto [least, most] = std::minmax_element(&x[g], &x[g] + group);
        const double magnitude = std::max(std::fabs(*least), std::fabs(*most));
        const double low = symmetric ? -magnitude : static_cast<double>(*least);
        const double high = symmetric ? magnitude : static_cast<double>(*most);
        for (std::size_t i = g; i < g + group; ++i) {
            const double step = (high - low) / levels;
            const double value = low + step * std::round((static_cast<double>(x[i]) - low) / step);
            sum += (static_cast<double>(x[i]) - value) * (static_cast<double>(x[i]) - value);
        }
    }
    return sum;
}

/// The least error that blocks of 32 with codes [low, high] can have, by trying 2000 scales of either sign.
double exhaustive_squared_error(const row& x, int low, int high) {
    double sum = 0;
    for (std::size_t g = 0; g < x.size(); g += 32) {
        double magnitude = 0, least = std::numeric_limits<double>::infinity();
        for (std::size_t i = g; i < g + 32; ++i) magnitude = std::max(magnitude, std::fabs(static_cast<double>(x[i])));
        for (int c = 1; c <= 2000; ++c) {
            for (const double sign : {-1.0, 1.0}) {
                const double scale = sign * magnitude / -low * (0.5 + c / 2000.0);
                double error = 0;
                for (std::size_t i = g; i < g + 32; ++i) {
                    const double value = static_cast<double>(x[i]);
                    const double q =
                        std::clamp(std::round(value / scale), static_cast<double>(low), static_cast<double>(high));
                    error += (value - scale * q) * (value - scale * q);
                }
                least = std::min(least, error);
            }
        }
        sum += least;
    }
    return sum;
}

}  // namespace

TEST_CASE("encoders are better than the plainest quantiser with exact scales") {
    struct expectation {
        dtype type;
        std::size_t group;
        double levels;
        bool symmetric;
    };
    const expectation expectations[] = {
        {dtype::q8_0, 32, 254, true}, {dtype::q4_0, 32, 14, true},   {dtype::q4_1, 32, 15, false},
        {dtype::q5_0, 32, 30, true},  {dtype::q5_1, 32, 31, false},  {dtype::q2_k, 16, 3, false},
        {dtype::q3_k, 16, 6, true},   {dtype::q4_k, 32, 15, false},  {dtype::q5_k, 32, 31, false},
        {dtype::q6_k, 16, 62, true},  {dtype::iq4_nl, 32, 15, true}, {dtype::iq4_xs, 32, 15, true},
        {dtype::mxfp4, 32, 10, true},
    };
    const row x = gaussian(64 * 256);
    for (const auto& [type, group, levels, symmetric] : expectations) {
        CAPTURE(info(type).name);
        CHECK(squared_error(x, round_trip(type, x)) < plain_squared_error(x, group, levels, symmetric));
    }
}

TEST_CASE("the search finds nearly the best scale there is") {
    const row x = gaussian(32 * 256);
    CHECK(squared_error(x, round_trip(dtype::q4_0, x)) < 1.04 * exhaustive_squared_error(x, -8, 7));
    CHECK(squared_error(x, round_trip(dtype::q5_0, x)) < 1.04 * exhaustive_squared_error(x, -16, 15));
}

TEST_CASE("MXFP4 takes the power of two with the least error, and the nearest codes") {
    const row x = gaussian(32 * 64);
    const row y = round_trip(dtype::mxfp4, x);
    double least_sum = 0;
    for (std::size_t g = 0; g < x.size(); g += 32) {
        double least = std::numeric_limits<double>::infinity();
        for (int e = -20; e < 10; ++e) {
            double error = 0;
            for (std::size_t i = g; i < g + 32; ++i) {
                double nearest = std::numeric_limits<double>::infinity();
                for (const double v : {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}) {
                    nearest = std::min(nearest, std::fabs(std::fabs(static_cast<double>(x[i])) - std::ldexp(v, e)));
                }
                error += nearest * nearest;
            }
            least = std::min(least, error);
        }
        least_sum += least;
    }
    CHECK(squared_error(x, y) == Approx(least_sum).epsilon(1e-5));
    for (std::size_t i = 0; i < x.size(); ++i) REQUIRE(x[i] * y[i] >= 0.0f);
}

TEST_CASE("importance moves the error to where it counts less") {
    const row x = gaussian(16 * 256);
    row importance(x.size());
    std::mt19937 random(2);
    for (float& w : importance) w = std::ldexp(1.0f, static_cast<int>(random() % 12) - 20);
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        const row with = round_trip(type, x, importance.data()), without = round_trip(type, x);
        CHECK(squared_error(x, with, importance) < squared_error(x, without, importance));
    }
}

TEST_CASE("equal importance is no worse than none, whatever it is, and so is zero") {
    const row x = gaussian(8 * 256);
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        const double expected = squared_error(x, round_trip(type, x));
        for (const float value : {0.0f, 1e-30f, 1.0f, 1e30f}) {
            const row importance(x.size(), value);
            CHECK(squared_error(x, round_trip(type, x, importance.data())) < 1.001 * expected);
        }
    }
}

TEST_CASE("a block does not depend on its neighbours, nor on what was in its place") {
    // 23 blocks of 256: more than a tile of the encoders, and no multiple of one.
    const row x = gaussian(23 * 256);
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        const auto whole = encoded(type, x);
        const std::size_t block = static_cast<std::size_t>(info(type).block_elements);
        const std::size_t bytes = static_cast<std::size_t>(info(type).block_bytes);
        for (std::size_t b = 0; b < x.size() / block; ++b) {
            std::vector<std::byte> alone(bytes, std::byte{0xA5});
            encode_row(type, &x[b * block], alone.data(), static_cast<index>(block));
            REQUIRE(std::equal(alone.begin(), alone.end(), whole.begin() + static_cast<std::ptrdiff_t>(b * bytes)));
        }
    }
}

TEST_CASE("encoding what was decoded changes nothing, or next to nothing where scales are quantised on a finer grid") {
    const row x = gaussian(64 * 256);
    for (const dtype type :
         {dtype::q8_0, dtype::q4_0, dtype::q4_1, dtype::q5_0, dtype::q5_1, dtype::q3_k, dtype::mxfp4}) {
        CAPTURE(info(type).name);
        const row once = round_trip(type, x);
        CHECK(round_trip(type, once) == once);
    }
    for (const dtype type : {dtype::q2_k, dtype::q4_k, dtype::q5_k, dtype::q6_k, dtype::iq4_nl, dtype::iq4_xs}) {
        CAPTURE(info(type).name);
        const row once = round_trip(type, x);
        CHECK(squared_error(once, round_trip(type, once)) < 0.04 * squared_error(x, once));
    }
}

TEST_CASE("zeros stay zeros") {
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        CHECK(round_trip(type, row(512, 0.0f)) == row(512, 0.0f));
    }
}

TEST_CASE("constants keep their value") {
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        for (const float value : {0.75f, -0.75f, 3072.0f, -0.1875f}) {
            CAPTURE(value);
            const float tolerance = type == dtype::mxfp4 ? 0.03f : 2e-3f;
            for (const float y : round_trip(type, row(512, value))) {
                REQUIRE(std::fabs(y - value) <= tolerance * std::fabs(value));
            }
        }
    }
}

TEST_CASE("a single large value does not disturb other blocks and is itself kept") {
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        row x = gaussian(2048);
        const row before = round_trip(type, x);
        x[700] = 50.0f;
        const row after = round_trip(type, x);
        CHECK(after[700] == Approx(50.0f).epsilon(0.05));
        for (std::size_t i = 0; i < x.size(); ++i) {
            if (i < 512 || i >= 768) REQUIRE(after[i] == before[i]);
        }
    }
}

TEST_CASE("a large common offset does not hide the differences from types with a minimum") {
    row x = gaussian(1024);
    for (float& value : x) value = 16.0f + value;
    // What storing the minimum as f16 costs near 16 is its rounding; the rest is as without the offset.
    const double rounding = 0.5 * 0x1p-7;
    CHECK(std::sqrt(squared_error(x, round_trip(dtype::q5_1, x)) / 1024) < rounding);
    CHECK(std::sqrt(squared_error(x, round_trip(dtype::q4_1, x)) / 1024) < rounding);
}

TEST_CASE("very small values become zeros, very large ones saturate; nothing becomes NaN") {
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        CHECK(round_trip(type, row(512, std::numeric_limits<float>::denorm_min())) == row(512, 0.0f));
        row tiny = gaussian(512);
        for (float& value : tiny) value *= 1e-36f;
        CHECK(round_trip(type, tiny) == row(512, 0.0f));

        row huge = gaussian(512);
        for (float& value : huge) value = std::clamp(value * 1e38f, -1e37f, 1e37f) * 30.0f;
        for (const float y : round_trip(type, huge)) REQUIRE(std::isfinite(y));

        // Scales among the subnormal numbers of f16 are coarse, but the values stay in range.
        row small = gaussian(512);
        for (float& value : small) value *= 1e-4f;
        for (const float y : round_trip(type, small)) REQUIRE(std::fabs(y) < 2e-5f);
    }
}

TEST_CASE("a block with a NaN or an infinity decodes to NaN, and only that block") {
    constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const row x = gaussian(12 * 256);
    for (const dtype type : quantised) {
        CAPTURE(info(type).name);
        const std::size_t block = static_cast<std::size_t>(info(type).block_elements);
        const row clean = round_trip(type, x);
        for (const float bad : {nan, -nan, inf, -inf}) {
            row broken = x;
            broken[5 * 256 + 3] = bad;
            const row y = round_trip(type, broken);
            for (std::size_t i = 0; i < x.size(); ++i) {
                if (i / block != 5 * 256 / block) {
                    REQUIRE(y[i] == clean[i]);
                } else if (type == dtype::mxfp4) {
                    REQUIRE(std::fabs(y[i]) > 1e38f);
                } else {
                    REQUIRE(std::isnan(y[i]));
                }
            }
        }
    }
}

TEST_CASE("the plain types round element by element") {
    row x = gaussian(100);
    x.insert(x.end(), {0.0f, -0.0f, 1e6f, -1e-9f, std::numeric_limits<float>::infinity(), 3.0e38f});
    CHECK(round_trip(dtype::f32, x) == x);
    const row half = round_trip(dtype::f16, x), brain = round_trip(dtype::bf16, x);
    for (std::size_t i = 0; i < x.size(); ++i) {
        CHECK(half[i] == to_float(to_f16(x[i])));
        CHECK(brain[i] == to_float(to_bf16(x[i])));
    }
}

}  // namespace keel::test
