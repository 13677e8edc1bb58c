// SPDX-License-Identifier: MIT
//
// Reader of safetensors, the format of Hugging Face checkpoints.
//
//     header length N   u64, little-endian
//     header            N bytes of JSON, possibly ending in spaces:
//                       {"NAME": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}, ...,
//                        "__metadata__": {"key": "text", ...}}
//     data              the rest of the file; offsets count from its start
//
// Shapes are slowest dimension first, data is dense and little-endian, and the tensors cover the data without gap or
// overlap. Nothing aligns them: read elements with memcpy.
//
// A large checkpoint is a set of such files and an index, model.safetensors.index.json, whose "weight_map" names the
// file of every tensor.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <filesystem>
#include <iterator>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/json.hpp>
#include <keel/io/mapped_file.hpp>
#include <keel/io/name_index.hpp>

namespace keel::inline KEEL_ABI {

enum class safetensors_dtype {
    boolean,
    u8,
    i8,
    f8_e4m3,
    f8_e5m2,
    f8_e8m0,
    u16,
    i16,
    f16,
    bf16,
    u32,
    i32,
    f32,
    u64,
    i64,
    f64
};

struct safetensors_dtype_info {
    safetensors_dtype id;
    std::string_view name;  ///< as in the header
    index bytes;            ///< of an element
};

inline constexpr safetensors_dtype_info safetensors_dtype_table[] = {
    {safetensors_dtype::boolean, "BOOL", 1},    {safetensors_dtype::u8, "U8", 1},
    {safetensors_dtype::i8, "I8", 1},           {safetensors_dtype::f8_e4m3, "F8_E4M3", 1},
    {safetensors_dtype::f8_e5m2, "F8_E5M2", 1}, {safetensors_dtype::f8_e8m0, "F8_E8M0", 1},
    {safetensors_dtype::u16, "U16", 2},         {safetensors_dtype::i16, "I16", 2},
    {safetensors_dtype::f16, "F16", 2},         {safetensors_dtype::bf16, "BF16", 2},
    {safetensors_dtype::u32, "U32", 4},         {safetensors_dtype::i32, "I32", 4},
    {safetensors_dtype::f32, "F32", 4},         {safetensors_dtype::u64, "U64", 8},
    {safetensors_dtype::i64, "I64", 8},         {safetensors_dtype::f64, "F64", 8},
};

/// One tensor. Its data points into the mapped file.
struct safetensors_tensor {
    std::string name;
    const safetensors_dtype_info* type;  ///< never null
    std::vector<index> shape;            ///< slowest first; empty for a scalar; a dimension may be 0
    std::span<const std::byte> data;     ///< exactly the tensor's bytes, not aligned
    int shard;                           ///< which file of the set, from 0
};

namespace detail {

/// One file: maps it and checks its header.
class safetensors_file {
public:
    safetensors_file(const std::filesystem::path& path, int shard) : mapping_(path), name_(path.string()) {
        const auto bytes = mapping_.bytes();
        std::uint64_t header_bytes = 0;
        if (bytes.size() < sizeof header_bytes) fail("ends within the length of its header");
        std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
        const auto rest = bytes.subspan(sizeof header_bytes);
        if (header_bytes > rest.size() || header_bytes > longest_header) {
            fail("declares a header of " + std::to_string(header_bytes) + " bytes, more than there can be");
        }
        const auto text = rest.first(static_cast<std::size_t>(header_bytes));
        const auto header = json::parse({reinterpret_cast<const char*>(text.data()), text.size()}, name_ + " (header)");
        data_ = rest.subspan(text.size());
        for (const auto& [key, value] : header.as_object()) {
            if (key == "__metadata__") {
                for (const auto& [k, v] : value.as_object()) metadata.emplace_back(k, v.as_string());
            } else {
                tensors.push_back(tensor(key, value, shard));
            }
        }
        check_cover();
    }

    [[noreturn]] void fail(std::string_view what) const { throw error(errc::format, name_, what); }

    [[nodiscard]] const mapped_file& mapping() const noexcept { return mapping_; }

    std::vector<safetensors_tensor> tensors;
    std::vector<std::pair<std::string, std::string>> metadata;

private:
    static constexpr std::uint64_t longest_header = 100'000'000;  // what the format's own library accepts

    [[noreturn]] void fail_tensor(std::string_view name, std::string_view what) const {
        fail(std::string("tensor ").append(name).append(" ").append(what));
    }

    safetensors_tensor tensor(const std::string& name, const json& entry, int shard) const {
        if (name.empty() || name.find('\0') != name.npos) fail("has a tensor whose name is empty or holds a NUL");
        safetensors_tensor t{name, nullptr, {}, {}, shard};
        const auto dtype = entry.require("dtype").as_string();
        const auto* row = std::ranges::find(safetensors_dtype_table, dtype, &safetensors_dtype_info::name);
        if (row == std::end(safetensors_dtype_table)) {
            throw error(errc::unsupported, name_, "tensor " + name + " is of the unknown type " + std::string(dtype));
        }
        t.type = row;

        index size = row->bytes;
        for (const json& extent : entry.require("shape").as_array()) {
            t.shape.push_back(extent.as_int());
            if (t.shape.back() < 0) fail_tensor(name, "has a negative dimension");
            if (t.shape.back() != 0 && size > std::numeric_limits<index>::max() / t.shape.back()) {
                fail_tensor(name, "has more bytes than 63 bits can count");
            }
            size *= t.shape.back();
        }

        const auto offsets = entry.require("data_offsets").as_array();
        if (offsets.size() != 2) fail_tensor(name, "needs two data offsets");
        const index begin = offsets[0].as_int();
        const index end = offsets[1].as_int();
        if (begin < 0 || begin > end || end > static_cast<index>(data_.size())) {
            fail_tensor(name, "has the data offsets " + std::to_string(begin) + " and " + std::to_string(end) +
                                  ", but the file has " + std::to_string(data_.size()) + " bytes of data");
        }
        if (size != end - begin) {
            fail_tensor(name, "needs " + std::to_string(size) + " bytes, but its data offsets span " +
                                  std::to_string(end - begin));
        }
        t.data = data_.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(size));
        return t;
    }

    /// Neither gap nor overlap: each tensor begins where the one before it ends.
    void check_cover() const {
        std::vector<const safetensors_tensor*> by_place;
        by_place.reserve(tensors.size());
        for (const auto& t : tensors) by_place.push_back(&t);
        std::ranges::sort(by_place, {}, [](const auto* t) { return std::pair(t->data.data(), t->data.size()); });
        const std::byte* end = data_.data();
        for (const auto* t : by_place) {
            if (t->data.data() < end) fail_tensor(t->name, "overlaps another tensor");
            if (t->data.data() > end) fail_tensor(t->name, "leaves a gap before its data");
            end += t->data.size();
        }
        if (end != data_.data() + data_.size()) fail("holds data that belongs to no tensor");
    }

    mapped_file mapping_;
    std::string name_;
    std::span<const std::byte> data_;
};

}  // namespace detail

/// An open safetensors file or sharded checkpoint, everything checked. The files stay mapped and tensor data is never
/// copied.
///
/// A handle: copies are cheap and refer to the same files. Everything that it hands out lives as long as any copy of
/// it, or of storage(), does. Immutable, so threads may share it.
class safetensors {
public:
    /// Opens a .safetensors file, the set described by an index (a path that ends in .json), or what a folder holds:
    /// model.safetensors.index.json or else model.safetensors.
    /// Throws errc::file for files that are missing or cannot be mapped, errc::format for damaged ones,
    /// errc::unsupported for element types that keel does not know.
    static safetensors open(const std::filesystem::path& path) {
        std::error_code ignored;
        if (std::filesystem::is_directory(path, ignored)) {
            const auto index_path = path / "model.safetensors.index.json";
            return safetensors(std::filesystem::exists(index_path, ignored) ? index_path : path / "model.safetensors");
        }
        return safetensors(path);
    }

    /// What keeps the mappings alive. Hold a copy next to views that shall outlive the safetensors.
    [[nodiscard]] std::shared_ptr<const void> storage() const noexcept { return contents_; }

    /// The tensors of all files, in file order.
    [[nodiscard]] std::span<const safetensors_tensor> tensors() const noexcept { return contents_->tensors; }

    /// Null if there is no such tensor.
    [[nodiscard]] const safetensors_tensor* find(std::string_view name) const {
        return contents_->by_name.find(tensors(), name);
    }

    /// Throws errc::format, naming file and tensor, if there is no such tensor.
    [[nodiscard]] const safetensors_tensor& require(std::string_view name) const {
        const auto* tensor = find(name);
        if (tensor == nullptr) contents_->fail("tensor " + std::string(name) + " is missing");
        return *tensor;
    }

    /// The texts under __metadata__ of the first file, in file order.
    [[nodiscard]] std::span<const std::pair<std::string, std::string>> metadata() const noexcept {
        return contents_->files.front().metadata;
    }

    /// Tells the operating system how the data is about to be read.
    void advise(access_hint hint) const noexcept {
        for (const auto& file : contents_->files) file.mapping().advise(hint);
    }

    /// Gives back the memory behind a tensor's data, which stays valid (see mapped_file).
    void release(const safetensors_tensor& tensor) const noexcept {
        contents_->files[static_cast<std::size_t>(tensor.shard)].mapping().release(tensor.data);
    }

private:
    struct contents {
        std::string name;
        std::deque<detail::safetensors_file> files;
        std::vector<safetensors_tensor> tensors;
        name_index<safetensors_tensor, &safetensors_tensor::name> by_name;

        [[noreturn]] void fail(std::string_view what) const { throw error(errc::format, name, what); }

        void add(const std::filesystem::path& path) {
            auto& file = files.emplace_back(path, static_cast<int>(files.size()));
            std::ranges::move(file.tensors, std::back_inserter(tensors));
            file.tensors = {};
        }
    };

    explicit safetensors(const std::filesystem::path& path) {
        const auto made = std::make_shared<contents>();
        contents_ = made;
        made->name = path.string();
        if (path.extension() != ".json") {
            made->add(path);
            made->by_name = decltype(made->by_name)(made->tensors);
        } else {
            add_set(*made, path);
        }
    }

    static void add_set(contents& set, const std::filesystem::path& path) {
        const auto document = json::parse_file(path);
        const auto& weight_map = document.require("weight_map");
        std::vector<std::string_view> shards;
        for (const auto& [tensor, file] : weight_map.as_object()) shards.push_back(file_name(file));
        if (shards.empty()) weight_map.fail("lists no tensor");
        std::ranges::sort(shards);
        shards.erase(std::unique(shards.begin(), shards.end()), shards.end());

        for (const auto shard : shards) {
            const auto sibling = path.parent_path() / shard;
            if (std::error_code ignored; !std::filesystem::exists(sibling, ignored)) {
                throw error(errc::file, sibling.string(), "is missing; it belongs to the set of " + set.name);
            }
        }
        for (const auto shard : shards) set.add(path.parent_path() / shard);

        set.by_name = decltype(set.by_name)(set.tensors);
        if (const auto* twice = set.by_name.duplicate(set.tensors)) {
            set.fail("tensor " + twice->name + " is in two files of the set");
        }
        for (const auto& [name, file] : weight_map.as_object()) {
            const auto* tensor = set.by_name.find(set.tensors, name);
            if (tensor == nullptr || shards[static_cast<std::size_t>(tensor->shard)] != file.as_string()) {
                set.fail("tensor " + name + " is not in " + std::string(file.as_string()));
            }
        }
    }

    /// A name in the index is untrusted: it may only be that of a file next to it.
    static std::string_view file_name(const json& entry) {
        const auto name = entry.as_string();
        if (name.empty() || name == "." || name == ".." ||
            name.find_first_of(std::string_view("/\\:\0", 4)) != name.npos) {
            entry.fail("is not the plain name of a file");
        }
        return name;
    }

    std::shared_ptr<const contents> contents_;
};

}  // namespace keel::inline KEEL_ABI
