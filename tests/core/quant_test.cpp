// SPDX-License-Identifier: MIT
#include <keel/core/quant.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "catch.hpp"

// Inside keel, because <strings.h> has a function ::index.
namespace keel::test {

namespace {

constexpr dtype all_types[] = {dtype::f32,  dtype::f16,    dtype::bf16,   dtype::q8_0, dtype::q4_0, dtype::q4_1,
                               dtype::q5_0, dtype::q5_1,   dtype::q2_k,   dtype::q3_k, dtype::q4_k, dtype::q5_k,
                               dtype::q6_k, dtype::iq4_nl, dtype::iq4_xs, dtype::mxfp4};

std::vector<std::byte> from_hex(const std::string& hex) {
    std::vector<std::byte> bytes(hex.size() / 2);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<std::byte>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
    }
    return bytes;
}

/// Blocks of random bytes with their values as the C reference of GGUF decodes them.
nlohmann::json vectors() {
    std::ifstream file(KEEL_TEST_DATA "/quant_vectors.json");
    REQUIRE(file.good());
    return nlohmann::json::parse(file);
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

/// The value of a binary16 from its definition, in binary64.
double f16_value(std::uint32_t h) {
    const double mantissa = h & 0x3FF;
    const int exponent = static_cast<int>((h >> 10) & 31);
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

}  // namespace

TEST_CASE("every quantised type decodes to the bits of the reference vectors") {
    std::vector<dtype> seen;
    for (const auto& vector : vectors()) {
        const dtype_info* row = find_dtype(vector.at("id").get<std::uint32_t>());
        REQUIRE(row != nullptr);
        CAPTURE(row->name);
        CHECK(row->name == vector.at("type").get<std::string>());
        CHECK(row->block_elements == vector.at("block_elements").get<index>());
        CHECK(row->block_bytes == vector.at("block_bytes").get<index>());
        if (!row->supported) continue;

        const dtype type = static_cast<dtype>(row->id);
        const auto data = from_hex(vector.at("data_hex"));
        const auto expected = from_hex(vector.at("f32_le_hex"));
        const index columns = static_cast<index>(expected.size() / sizeof(float));
        REQUIRE(row_bytes(type, columns) == static_cast<index>(data.size()));

        // Once as it is, once from an odd address: blocks have no alignment.
        for (const std::size_t shift : {std::size_t{0}, std::size_t{1}}) {
            std::vector<std::byte> moved(data.size() + shift);
            std::copy(data.begin(), data.end(), moved.begin() + static_cast<std::ptrdiff_t>(shift));
            std::vector<float> decoded(static_cast<std::size_t>(columns));
            decode_row(type, moved.data() + shift, decoded.data(), columns);
            CHECK(std::memcmp(decoded.data(), expected.data(), expected.size()) == 0);
        }
        seen.push_back(type);
    }
    for (const dtype type : all_types) {
        CAPTURE(info(type).name);
        CHECK((type == dtype::f32 || std::find(seen.begin(), seen.end(), type) != seen.end()));
    }
}

TEST_CASE("f32 rows decode to themselves") {
    const std::vector<float> values = {0.0f, -0.0f, 1.5f, std::numeric_limits<float>::denorm_min(),
                                       std::numeric_limits<float>::infinity()};
    std::vector<float> decoded(values.size());
    decode_row(dtype::f32, reinterpret_cast<const std::byte*>(values.data()), decoded.data(), 5);
    CHECK(std::memcmp(decoded.data(), values.data(), values.size() * sizeof(float)) == 0);
}

TEST_CASE("visit_blocks finds the block of each type and refuses others by number") {
    for (const dtype type : all_types) {
        CHECK(visit_blocks(type, []<class Block>() { return Block::type; }) == type);
    }
    try {
        visit_blocks(static_cast<dtype>(16), []<class Block>() {});
        FAIL("no exception");
    } catch (const error& e) {
        CHECK(e.code() == errc::unsupported);
        CHECK(std::string(e.what()).find("16") != std::string::npos);
    }
}

TEST_CASE("the E8M0 scale of MXFP4 is 2^(e - 128), subnormals included") {
    for (int e = 0; e < 256; ++e) {
        CHECK(std::bit_cast<float>(e8m0_half_bits(static_cast<std::uint8_t>(e))) == std::ldexp(1.0f, e - 128));
    }
}

TEST_CASE("all f16 values convert exactly and come back") {
    int wrong = 0;
    for (std::uint32_t h = 0; h < 0x10000; ++h) {
        const f16 half{static_cast<std::uint16_t>(h)};
        const float value = to_float(half);
        const f16 back = to_f16(value);
        if ((h & 0x7C00) != 0x7C00) {
            wrong += value != f16_value(h) || std::signbit(value) != (h >= 0x8000) || back.bits != h;
        } else if ((h & 0x3FF) == 0) {
            wrong += !std::isinf(value) || std::signbit(value) != (h >= 0x8000) || back.bits != h;
        } else {
            wrong += !std::isnan(value) || (back.bits & 0x7E00) != 0x7E00;
        }
    }
    CHECK(wrong == 0);
}

TEST_CASE("to_f16 rounds to nearest, ties to even") {
    // Between neighbours low and high (the even one is known from its last bit): the midpoint, which binary32 holds
    // exactly, goes to the even one; the binary32 values next to the midpoint go to the nearer.
    int wrong = 0;
    for (std::uint32_t h = 0; h < 0x7C00; ++h) {
        const double high = h == 0x7BFF ? 65536.0 : f16_value(h + 1);
        const float middle = static_cast<float>((f16_value(h) + high) / 2);
        const float below = std::nextafter(middle, 0.0f), above = std::nextafter(middle, 1e30f);
        for (const float sign : {1.0f, -1.0f}) {
            const std::uint32_t bit = sign < 0 ? 0x8000 : 0;
            wrong += to_f16(sign * below).bits != (h | bit);
            wrong += to_f16(sign * above).bits != ((h + 1) | bit);
            wrong += to_f16(sign * middle).bits != ((h % 2 == 0 ? h : h + 1) | bit);
        }
    }
    CHECK(wrong == 0);
    CHECK(to_f16(std::numeric_limits<float>::max()).bits == 0x7C00);
    CHECK(to_f16(-std::numeric_limits<float>::infinity()).bits == 0xFC00);
    CHECK(to_f16(-std::numeric_limits<float>::denorm_min()).bits == 0x8000);
    CHECK((to_f16(std::numeric_limits<float>::quiet_NaN()).bits & 0x7E00) == 0x7E00);
}

TEST_CASE("all bf16 values convert exactly and come back; rounding is to nearest, ties to even") {
    int wrong = 0;
    for (std::uint32_t h = 0; h < 0x10000; ++h) {
        const bf16 half{static_cast<std::uint16_t>(h)};
        const float value = to_float(half);
        const bool nan = (h & 0x7FFF) > 0x7F80;
        wrong += bits(value) != h << 16;
        wrong += nan ? to_bf16(value).bits != (h | 0x40) : to_bf16(value).bits != h;
        if ((h & 0x7F80) == 0x7F80) continue;
        const std::uint32_t up = h + 1;  // away from zero
        wrong += to_bf16(std::bit_cast<float>((h << 16) + 0x7FFF)).bits != h;
        wrong += to_bf16(std::bit_cast<float>((h << 16) + 0x8000)).bits != (h % 2 == 0 ? h : up);
        wrong += to_bf16(std::bit_cast<float>((h << 16) + 0x8001)).bits != up;
    }
    CHECK(wrong == 0);
}

TEST_CASE("a matrix_view finds its rows, matrices and parts") {
    // Three matrices of 4 x 512 in Q4_K: 288 bytes per row.
    std::vector<std::byte> data(3 * 4 * 288);
    const matrix_view w{data.data(), dtype::q4_k, 3, 4, 512};
    CHECK(w.row_bytes() == 288);
    CHECK(w.matrix_bytes() == 4 * 288);
    CHECK(w.bytes() == static_cast<index>(data.size()));
    CHECK(w.row(2, 1) == data.data() + (4 + 2) * 288);

    const matrix_view second = w.matrix(1);
    CHECK(second.data == data.data() + 4 * 288);
    CHECK(second.count == 1);
    CHECK(second.rows == 4);
    CHECK(second.columns == 512);
    CHECK(second.bytes() == w.matrix_bytes());

    const matrix_view middle = second.row_range(1, 2);
    CHECK(middle.data == w.row(1, 1));
    CHECK(middle.rows == 2);
    CHECK(middle.columns == 512);
    CHECK(middle.type == dtype::q4_k);
}

}  // namespace keel::test
