// SPDX-License-Identifier: MIT
//
// Reader of GGUF: the metadata and the tensors of a file or of a set of files. gguf_file.hpp describes the format.
//
// A large model may be a set of files PREFIX-00001-of-00003.gguf, ..., each a complete GGUF with its own data. All
// carry split.no (from 0), split.count and split.tensors.count (of the whole set); the other metadata is in the first.
// A tensor is never divided between files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf_file.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

/// "-00002-of-00003.gguf" for shard 1 of 3.
inline std::string split_suffix(std::uint64_t shard, std::uint64_t count) {
    const unsigned long long number = shard + 1, of = count;
    char text[64];
    std::snprintf(text, sizeof text, "-%05llu-of-%05llu.gguf", number, of);
    return text;
}

}  // namespace detail

/// An open GGUF file or split set: its metadata and its tensor directory, everything checked. The files stay mapped
/// and tensor data is never copied.
///
/// A handle: copies are cheap and refer to the same file. Everything that it hands out (values, strings, tensors,
/// data) lives as long as any copy of it, or of storage(), does. Immutable, so threads may share it.
class gguf {
public:
    /// Opens a file, or the whole set if `path` is the first file of one.
    /// Throws errc::file for files that are missing or cannot be mapped, errc::format for damaged ones,
    /// errc::unsupported for versions and tensor types outside of GGUF, errc::argument for a later file of a set.
    static gguf open(const std::filesystem::path& path) { return gguf(mapped_file(path)); }

    /// Reads a single file that is in memory already (see mapped_file), named `name` in messages.
    static gguf from_memory(std::string name, std::span<const std::byte> bytes) {
        return gguf(mapped_file(std::move(name), bytes));
    }

    /// What keeps the mapping alive. Hold a copy next to views that shall outlive the gguf.
    [[nodiscard]] std::shared_ptr<const void> storage() const noexcept { return contents_; }

    [[nodiscard]] const std::filesystem::path& path() const noexcept { return first().mapping.path(); }
    [[nodiscard]] std::uint32_t version() const noexcept { return first().version; }
    [[nodiscard]] index alignment() const noexcept { return first().alignment; }
    [[nodiscard]] int shards() const noexcept { return static_cast<int>(contents_->files.size()); }

    /// What is kept besides the mapping: where values, the strings of arrays, and tensors lie.
    [[nodiscard]] index memory_bytes() const noexcept {
        std::size_t bytes = contents_->tensors.capacity() * sizeof(tensor_info);
        for (const auto& file : contents_->files) {
            for (const gguf_value& value : file.values) bytes += value.memory_bytes();
        }
        return static_cast<index>(bytes);
    }

    /// Tells the operating system how the tensor data is about to be read.
    void advise(access_hint hint) const noexcept {
        for (const auto& file : contents_->files) file.mapping.advise(hint);
    }

    /// Gives back the memory behind a tensor's data, which stays valid (see mapped_file).
    void release(const tensor_info& tensor) const noexcept {
        contents_->files[static_cast<std::size_t>(tensor.shard)].mapping.release(tensor.data);
    }

    // Metadata: find_... answers nothing for a missing key and throws errc::format, naming file and key, for a value of
    // another kind; require_... throws for a missing key too. Integers of any width are taken if the value fits.

    /// All entries, in file order.
    [[nodiscard]] std::span<const gguf_value> values() const noexcept { return first().values; }

    [[nodiscard]] const gguf_value* find_value(std::string_view key) const { return first().find(key); }
    [[nodiscard]] const gguf_value& require_value(std::string_view key) const {
        const auto* value = find_value(key);
        if (value == nullptr) first().fail("key " + std::string(key) + " is missing");
        return *value;
    }

    [[nodiscard]] std::optional<std::uint64_t> find_uint(
        std::string_view key, std::uint64_t max = std::numeric_limits<std::uint64_t>::max()) const {
        return find_as(key, [max](const gguf_value& v) { return v.as_uint(max); });
    }
    [[nodiscard]] std::optional<std::int64_t> find_int(std::string_view key) const {
        return find_as(key, [](const gguf_value& v) { return v.as_int(); });
    }
    [[nodiscard]] std::optional<double> find_float(std::string_view key) const {
        return find_as(key, [](const gguf_value& v) { return v.as_float(); });
    }
    [[nodiscard]] std::optional<bool> find_bool(std::string_view key) const {
        return find_as(key, [](const gguf_value& v) { return v.as_bool(); });
    }
    [[nodiscard]] std::optional<std::string_view> find_string(std::string_view key) const {
        return find_as(key, [](const gguf_value& v) { return v.as_string(); });
    }
    [[nodiscard]] std::optional<gguf_array> find_array(std::string_view key) const {
        return find_as(key, [](const gguf_value& v) { return v.as_array(); });
    }

    [[nodiscard]] std::uint64_t require_uint(std::string_view key,
                                             std::uint64_t max = std::numeric_limits<std::uint64_t>::max()) const {
        return require_value(key).as_uint(max);
    }
    [[nodiscard]] std::int64_t require_int(std::string_view key) const { return require_value(key).as_int(); }
    [[nodiscard]] double require_float(std::string_view key) const { return require_value(key).as_float(); }
    [[nodiscard]] bool require_bool(std::string_view key) const { return require_value(key).as_bool(); }
    [[nodiscard]] std::string_view require_string(std::string_view key) const { return require_value(key).as_string(); }
    [[nodiscard]] gguf_array require_array(std::string_view key) const { return require_value(key).as_array(); }

    /// The tensors of all files, in file order.
    [[nodiscard]] std::span<const tensor_info> tensors() const noexcept { return contents_->tensors; }

    /// Null if there is no such tensor.
    [[nodiscard]] const tensor_info* find(std::string_view name) const {
        return contents_->by_name.find(tensors(), name);
    }

    /// Throws errc::format, naming file and tensor, if there is no such tensor.
    [[nodiscard]] const tensor_info& require(std::string_view name) const {
        const auto* tensor = find(name);
        if (tensor == nullptr) first().fail("tensor " + std::string(name) + " is missing");
        return *tensor;
    }

private:
    struct contents {
        std::deque<detail::gguf_file> files;  // a deque, because its elements never move
        std::vector<tensor_info> tensors;
        name_index<tensor_info, &tensor_info::name> by_name;

        const detail::gguf_file& add(mapped_file mapping) {
            auto& file = files.emplace_back(std::move(mapping));
            detail::gguf_reader(file, static_cast<int>(files.size()) - 1).read();
            tensors.insert(tensors.end(), file.tensors.begin(), file.tensors.end());
            file.tensors = {};
            return file;
        }
    };

    explicit gguf(mapped_file mapping) {
        const auto made = std::make_shared<contents>();
        contents_ = made;
        made->add(std::move(mapping));
        if (find_uint("split.count").value_or(1) > 1) add_others(*made);
        made->by_name = decltype(made->by_name)(made->tensors);
        if (const auto* twice = made->by_name.duplicate(made->tensors)) {
            first().fail("tensor " + std::string(twice->name) + " occurs twice");
        }
    }

    /// The further files of a set. Their names follow from the first one's; nothing in a file can choose a path.
    void add_others(contents& set) {
        const auto count = require_uint("split.count", detail::gguf_limits::shards);
        const auto number = require_uint("split.no");
        const auto n_tensors = require_uint("split.tensors.count");
        if (number != 0) {
            throw error(errc::argument, first().name,
                        "is file " + std::to_string(number + 1) + " of a set of " + std::to_string(count) +
                            "; open the first, whose name ends in " + detail::split_suffix(0, count));
        }
        const auto suffix = detail::split_suffix(0, count);
        auto prefix = path().filename().string();
        if (!prefix.ends_with(suffix)) {
            first().fail("is the first of " + std::to_string(count) + " files, so that its name must end in " + suffix);
        }
        prefix.resize(prefix.size() - suffix.size());

        const auto sibling = [&](std::uint64_t i) {
            return path().parent_path() / (prefix + detail::split_suffix(i, count));
        };
        for (std::uint64_t i = 1; i < count; ++i) {
            if (std::error_code ignored; !std::filesystem::exists(sibling(i), ignored)) {
                throw error(errc::file, sibling(i).string(), "is missing; it belongs to the set of " + first().name);
            }
        }
        for (std::uint64_t i = 1; i < count; ++i) {
            const auto before = set.tensors.size();
            const auto& file = set.add(mapped_file(sibling(i)));
            const auto expect = [&](std::string_view key, std::uint64_t expected) {
                const auto* value = file.find(key);
                if (value == nullptr) file.fail("key " + std::string(key) + " is missing");
                if (value->as_uint() != expected) {
                    value->fail("is " + std::to_string(value->as_uint()) + ", but this file's place in its set needs " +
                                std::to_string(expected));
                }
            };
            expect("split.no", i);
            expect("split.count", count);
            expect("split.tensors.count", n_tensors);
            if (set.tensors.size() == before) file.fail("holds no tensor, although it continues a split set");
        }
        if (set.tensors.size() != n_tensors) {
            first().fail("declares " + std::to_string(n_tensors) + " tensors for its set, but the files hold " +
                         std::to_string(set.tensors.size()));
        }
    }

    [[nodiscard]] const detail::gguf_file& first() const noexcept { return contents_->files.front(); }

    template <class As>
    [[nodiscard]] auto find_as(std::string_view key, As as) const -> std::optional<decltype(as(first().values[0]))> {
        const auto* value = find_value(key);
        if (value == nullptr) return std::nullopt;
        return as(*value);
    }

    std::shared_ptr<const contents> contents_;
};

}  // namespace keel::inline KEEL_ABI
