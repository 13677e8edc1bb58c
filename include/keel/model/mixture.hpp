// SPDX-License-Identifier: MIT
//
// Which type each tensor of a file gets. A file type is either a plain type, for every matrix, or a mixture, which
// spends more bits where docs/quality.md found them to matter most.
#pragma once

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Whether a tensor of this name is one of the small ones that always stay f32: norms, convolutions, router, decay and
/// biases. `dims` has the contiguous extent first.
inline bool stays_f32(std::string_view name, std::span<const index> dims) {
    const auto extents_above_one = std::count_if(dims.begin(), dims.end(), [](index n) { return n > 1; });
    return extents_above_one < 2 || !name.ends_with(".weight") || name.ends_with("_norm.weight") ||
           name.ends_with("ffn_gate_inp.weight") || name.find("ssm_conv1d") != name.npos;
}

/// `wanted`, or what takes its place if rows of `columns` elements cannot have it: the type with blocks of 32 that
/// needs about as many bits, and f16 if there are not even blocks of 32.
inline dtype fitting(dtype wanted, index columns) {
    if (columns % info(wanted).block_elements == 0) return wanted;
    if (columns % 32 != 0) return dtype::f16;
    if (wanted == dtype::q6_k) return dtype::q8_0;
    return wanted == dtype::q5_k ? dtype::q5_0 : dtype::iq4_nl;
}

/// The type that a name such as "q4_k" or "BF16" stands for, if keel has it.
inline std::optional<dtype> find_type(std::string_view name) {
    const auto same = [](char a, char b) {
        return std::tolower(static_cast<unsigned char>(a)) == std::tolower(static_cast<unsigned char>(b));
    };
    for (const dtype_info& row : dtype_table) {
        if (row.supported && std::ranges::equal(row.name, name, same)) return static_cast<dtype>(row.id);
    }
    return std::nullopt;
}

namespace detail {

/// '*' stands for any characters; everything else for itself.
inline bool matches(std::string_view pattern, std::string_view name) {
    const std::size_t star = pattern.find('*');
    if (star == pattern.npos) return pattern == name;
    if (!name.starts_with(pattern.substr(0, star))) return false;
    const std::string_view rest = pattern.substr(star + 1);
    for (std::size_t i = star; i <= name.size(); ++i) {
        if (matches(rest, name.substr(i))) return true;
    }
    return false;
}

/// Types by kind of matrix. The routed experts are nearly all of the weights and, each for itself, the least sensitive:
/// what every token passes through gets more bits. The embedding comes between the two, and K_h is hardly sensitive.
struct mixture {
    std::string_view name;
    std::uint32_t file_type;  // what general.file_type calls it
    dtype experts, embedding, key_rows, others;

    [[nodiscard]] constexpr dtype of(std::string_view tensor) const {
        if (tensor.ends_with("_exps.weight")) return experts;
        if (tensor == "token_embd.weight") return embedding;
        return tensor.ends_with(".attn_k_b.weight") ? key_rows : others;
    }
};

inline constexpr mixture mixtures[] = {
    {"q5_k_m", 17, dtype::q5_k, dtype::q6_k, dtype::q5_k, dtype::q6_k},
    {"q4_k_m", 15, dtype::q4_k, dtype::q5_k, dtype::q5_k, dtype::q6_k},
};

/// general.file_type of plain types.
inline std::uint32_t file_type_of(dtype type) {
    constexpr std::pair<dtype, std::uint32_t> ids[] = {
        {dtype::f32, 0},     {dtype::f16, 1},     {dtype::q4_0, 2},  {dtype::q4_1, 3},
        {dtype::q8_0, 7},    {dtype::q5_0, 8},    {dtype::q5_1, 9},  {dtype::q2_k, 10},
        {dtype::q3_k, 12},   {dtype::q4_k, 14},   {dtype::q5_k, 16}, {dtype::q6_k, 18},
        {dtype::iq4_nl, 25}, {dtype::iq4_xs, 30}, {dtype::bf16, 32}, {dtype::mxfp4, 38}};
    return std::ranges::find(ids, type, &std::pair<dtype, std::uint32_t>::first)->second;
}

}  // namespace detail

/// "blk.*.attn_v.weight" and the type for what it matches.
struct tensor_type_override {
    std::string pattern;
    dtype type;
};

/// Chooses the type of each tensor.
class type_choice {
public:
    /// `name` is a mixture (q4_k_m, q5_k_m) or a plain type, in any case. Overrides come first, and the first
    /// that matches decides; they do not concern tensors that stay f32. Throws errc::argument for an unknown name.
    explicit type_choice(std::string_view name, std::vector<tensor_type_override> overrides = {})
        : overrides_(std::move(overrides)), used_(overrides_.size()) {
        std::string lower(name);
        for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
        const auto* const mix = std::ranges::find(detail::mixtures, lower, &detail::mixture::name);
        if (mix != std::end(detail::mixtures)) {
            types_ = *mix;
        } else if (const auto plain = find_type(name)) {
            types_ = {info(*plain).name, detail::file_type_of(*plain), *plain, *plain, *plain, *plain};
        } else {
            std::string known;
            for (const auto& row : detail::mixtures) {
                if (!find_type(row.name)) known.append(row.name).append(", ");
            }
            for (const dtype_info& row : dtype_table) {
                if (row.supported) known.append(row.name).append(", ");
            }
            known.resize(known.size() - 2);
            throw error(errc::argument, name, "is not a type; there are " + known);
        }
    }

    [[nodiscard]] dtype operator()(std::string_view name, std::span<const index> dims) {
        if (stays_f32(name, dims)) return dtype::f32;
        for (std::size_t i = 0; i < overrides_.size(); ++i) {
            if (!detail::matches(overrides_[i].pattern, name)) continue;
            used_[i] = true;
            return fitting(overrides_[i].type, dims[0]);
        }
        return fitting(types_.of(name), dims[0]);
    }

    /// Throws errc::argument for an override that no tensor has needed: it is probably misspelt.
    void check_all_used() const {
        for (std::size_t i = 0; i < overrides_.size(); ++i) {
            if (!used_[i]) throw error(errc::argument, overrides_[i].pattern, "matches no tensor that may be encoded");
        }
    }

    [[nodiscard]] std::uint32_t file_type() const { return types_.file_type; }

private:
    detail::mixture types_ = {};
    std::vector<tensor_type_override> overrides_;
    std::vector<bool> used_;
};

}  // namespace keel::inline KEEL_ABI
