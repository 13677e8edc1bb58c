// SPDX-License-Identifier: MIT
//
// Builds small GGUF files byte by byte, independently of keel's writer, so that tests can break one field at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "support.hpp"

namespace keel_test {

inline std::string gguf_string(std::string_view text) { return le<std::uint64_t>(text.size()) + std::string(text); }

/// A key with its value type and the value's bytes.
inline std::string gguf_entry(std::string_view key, std::uint32_t type, std::string_view value) {
    return gguf_string(key) + le(type) + std::string(value);
}

inline std::string gguf_array_of(std::uint32_t element_type, std::uint64_t count, std::string_view elements) {
    return le(element_type) + le(count) + std::string(elements);
}

struct gguf_bytes {
    struct tensor {
        std::string name;
        std::vector<std::uint64_t> dims;
        std::uint32_t type = 0;
        std::uint64_t offset = 0;
        std::optional<std::uint32_t> n_dims{};  // if not the number of dims
    };

    std::string magic = "GGUF";
    std::uint32_t version = 3;
    std::optional<std::uint64_t> n_tensors{};  // if not the number of tensors
    std::optional<std::uint64_t> n_keys{};     // if not the number of keys
    std::vector<std::string> keys{
        gguf_entry("general.architecture", 8, gguf_string("kimi-linear")),
        gguf_entry("a.count", 4, le<std::uint32_t>(7)),
        gguf_entry("a.flags", 9, gguf_array_of(7, 3, std::string_view("\1\0\1", 3))),
        gguf_entry("a.words", 9, gguf_array_of(8, 3, gguf_string("one") + gguf_string("") + gguf_string("three"))),
    };
    std::vector<tensor> tensors{{"first", {4, 2}, 0, 0}, {"second.weight", {32, 1, 1}, 8, 32}};
    std::size_t alignment = 32;
    std::string data = std::string(32, 'f') + std::string(34, 'q');

    /// Where the data begins.
    std::size_t data_start() const { return (header().size() + alignment - 1) / alignment * alignment; }

    std::string build() const {
        auto out = header();
        if (!tensors.empty()) out.resize(data_start());
        return out + data;
    }

private:
    std::string header() const {
        std::string out = magic + le(version) + le<std::uint64_t>(n_tensors.value_or(tensors.size())) +
                          le<std::uint64_t>(n_keys.value_or(keys.size()));
        for (const auto& key : keys) out += key;
        for (const auto& t : tensors) {
            out += gguf_string(t.name) + le(t.n_dims.value_or(static_cast<std::uint32_t>(t.dims.size())));
            for (const auto extent : t.dims) out += le(extent);
            out += le(t.type) + le(t.offset);
        }
        return out;
    }
};

}  // namespace keel_test
