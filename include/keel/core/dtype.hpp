// SPDX-License-Identifier: MIT
//
// Element types: half-width floats, the tensor types of GGUF with their block sizes, and matrices of such a type as
// they lie in memory.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// IEEE binary16 as stored; arithmetic happens in float.
struct f16 {
    std::uint16_t bits;
};

/// The upper half of a binary32 as stored; arithmetic happens in float.
struct bf16 {
    std::uint16_t bits;
};

/// Exact, subnormals included.
constexpr float to_float(f16 h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = h.bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);  // inf, NaN
    if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));         // normal
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(subnormal));
}

constexpr float to_float(bf16 h) { return std::bit_cast<float>(static_cast<std::uint32_t>(h.bits) << 16); }

/// Nearest, ties to even; overflow gives infinity; a NaN stays a quiet NaN. Without branches, so that loops vectorise.
constexpr f16 to_f16(float x) {
    const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    const std::uint32_t magnitude = u & 0x7FFFFFFFu;
    const std::uint32_t a = magnitude < 0x47800000u ? magnitude : 0x47800000u;  // at most 65536
    const std::uint32_t exponent = a & 0x7F800000u;
    const std::uint32_t e = exponent > 0x38800000u ? exponent : 0x38800000u;  // at least 2^-14: below it is subnormal
    // Adding 2^13 times the power of two below x rounds x to f16's last place and leaves the integer, 11 bits for
    // normal numbers, in the low bits. Its top bit carries into the exponent field, which is therefore one too low.
    const std::uint32_t c = e + (13u << 23);
    const std::uint32_t mantissa = std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + std::bit_cast<float>(c)) - c;
    const std::uint32_t h = ((e - 0x38800000u) >> 13) + mantissa;
    const std::uint32_t nan = (0x7F800000u - magnitude) >> 31;  // 1 for a NaN, which has come as far as infinity
    return {static_cast<std::uint16_t>(sign | h | nan << 9)};
}

/// Nearest, ties to even; a NaN stays a quiet NaN.
constexpr bf16 to_bf16(float x) {
    const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<std::uint16_t>(u >> 16 | 0x40u)};
    return {static_cast<std::uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

/// Tensor types that keel computes with; the values are GGUF's type ids.
enum class dtype : std::uint32_t {
    f32 = 0,
    f16 = 1,
    q4_0 = 2,
    q4_1 = 3,
    q5_0 = 6,
    q5_1 = 7,
    q8_0 = 8,
    q2_k = 10,
    q3_k = 11,
    q4_k = 12,
    q5_k = 13,
    q6_k = 14,
    iq4_nl = 20,
    iq4_xs = 23,
    bf16 = 30,
    mxfp4 = 39,
};

/// One row of the table of GGUF tensor types.
struct dtype_info {
    std::uint32_t id;
    std::string_view name;
    index block_elements;  ///< consecutive elements of a row that share a block
    index block_bytes;
    bool supported;  ///< keel decodes and multiplies it
};

/// Every type id that GGUF defines today, whether keel computes with it or only names it in an error.
inline constexpr dtype_info dtype_table[] = {
    {0, "F32", 1, 4, true},         {1, "F16", 1, 2, true},          {2, "Q4_0", 32, 18, true},
    {3, "Q4_1", 32, 20, true},      {6, "Q5_0", 32, 22, true},       {7, "Q5_1", 32, 24, true},
    {8, "Q8_0", 32, 34, true},      {9, "Q8_1", 32, 36, false},      {10, "Q2_K", 256, 84, true},
    {11, "Q3_K", 256, 110, true},   {12, "Q4_K", 256, 144, true},    {13, "Q5_K", 256, 176, true},
    {14, "Q6_K", 256, 210, true},   {15, "Q8_K", 256, 292, false},   {16, "IQ2_XXS", 256, 66, false},
    {17, "IQ2_XS", 256, 74, false}, {18, "IQ3_XXS", 256, 98, false}, {19, "IQ1_S", 256, 50, false},
    {20, "IQ4_NL", 32, 18, true},   {21, "IQ3_S", 256, 110, false},  {22, "IQ2_S", 256, 82, false},
    {23, "IQ4_XS", 256, 136, true}, {24, "I8", 1, 1, false},         {25, "I16", 1, 2, false},
    {26, "I32", 1, 4, false},       {27, "I64", 1, 8, false},        {28, "F64", 1, 8, false},
    {29, "IQ1_M", 256, 56, false},  {30, "BF16", 1, 2, true},        {34, "TQ1_0", 256, 54, false},
    {35, "TQ2_0", 256, 66, false},  {39, "MXFP4", 32, 17, true},     {40, "NVFP4", 64, 36, false},
    {41, "Q1_0", 128, 18, false},   {42, "Q2_0", 64, 18, false},
};

/// The table's row of a type id, or null for an id that GGUF does not define.
constexpr const dtype_info* find_dtype(std::uint32_t id) {
    for (const dtype_info& row : dtype_table) {
        if (row.id == id) return &row;
    }
    return nullptr;
}

constexpr const dtype_info& info(dtype type) { return *find_dtype(static_cast<std::uint32_t>(type)); }

/// Bytes of a row of `columns` elements; `columns` is a multiple of the type's block.
constexpr index row_bytes(dtype type, index columns) {
    return columns / info(type).block_elements * info(type).block_bytes;
}

/// Weight rows as they lie in a file: `count` matrices (experts, heads) of `rows` x `columns`, y = W x. Not owning.
struct matrix_view {
    const std::byte* data = nullptr;  ///< rows follow each other without padding; blocks may be unaligned
    dtype type = dtype::f32;
    index count = 1;
    index rows = 0;
    index columns = 0;  ///< a multiple of the type's block

    [[nodiscard]] constexpr index row_bytes() const { return keel::row_bytes(type, columns); }
    [[nodiscard]] constexpr index matrix_bytes() const { return rows * row_bytes(); }
    [[nodiscard]] constexpr index bytes() const { return count * matrix_bytes(); }

    [[nodiscard]] constexpr const std::byte* row(index i, index matrix = 0) const {
        return data + (matrix * rows + i) * row_bytes();
    }

    /// Matrix `m` of the `count`.
    [[nodiscard]] constexpr matrix_view matrix(index m) const { return {row(0, m), type, 1, rows, columns}; }

    /// Rows [first, first + n) of a single matrix.
    [[nodiscard]] constexpr matrix_view row_range(index first, index n) const {
        return {row(first), type, 1, n, columns};
    }
};

}  // namespace keel::inline KEEL_ABI
