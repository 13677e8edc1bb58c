// SPDX-License-Identifier: MIT
//
// GGUF, the container of weights and metadata that the llama.cpp ecosystem uses: one file of it, read and checked.
//
//     magic "GGUF"   version u32   tensor count u64   key count u64
//     per key:       the entry described in gguf_value.hpp
//     per tensor:    name (length u64, bytes)   dimension count u32   that many extents u64   type u32   offset u64
//     zero bytes up to the alignment, counted from the start of the file
//     data:          tensor i begins `offset` bytes after the start of the data; each is padded to the alignment
//
// All integers are little-endian and packed. Extents are listed contiguous dimension first (ne0, ne1, ...); a row of
// ne0 elements is cut into the blocks of its type (core/dtype.hpp) and rows follow each other without padding. The
// alignment is the u32 under general.alignment, or 32. Versions 2 and 3 are the same but for big-endian files, which
// version 3 permits, nothing marks (the version's bytes come out swapped), and keel refuses.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf_value.hpp>
#include <keel/io/mapped_file.hpp>
#include <keel/io/name_index.hpp>

namespace keel::inline KEEL_ABI {

/// One tensor of the directory. Name and data point into the mapped file.
struct tensor_info {
    std::string_view name;
    std::uint32_t type_id;   ///< as stored
    const dtype_info* type;  ///< the table's row of type_id, never null; keel may still not compute with it
    index dims[4];           ///< ne0 (contiguous) first, padded with 1; all >= 1; ne0 is a multiple of the block
    int n_dims;              ///< as stored, 0 to 4
    std::span<const std::byte> data;  ///< exactly the tensor's bytes, aligned to at least 8
    int shard;                        ///< which file of a split set, from 0

    [[nodiscard]] std::span<const index> shape() const noexcept { return {dims, static_cast<std::size_t>(n_dims)}; }
};

namespace detail {

/// Largest accepted values; far above every known model, far below what could hurt.
struct gguf_limits {
    static constexpr std::uint64_t keys = 1u << 16;
    static constexpr std::uint64_t tensors = 1u << 20;
    static constexpr std::uint64_t key_bytes = 65'535;
    static constexpr std::uint64_t string_bytes = 64u << 20;
    static constexpr std::uint64_t tensor_name_bytes = 63;
    static constexpr std::uint32_t alignment = 1u << 20;
    static constexpr std::uint64_t shards = 65'535;
};

constexpr bool is_gguf_alignment(std::uint64_t n) {
    return n >= 8 && n <= gguf_limits::alignment && (n & (n - 1)) == 0;
}

constexpr index padded(index bytes, index alignment) { return (bytes + alignment - 1) / alignment * alignment; }

/// Bytes of a tensor with these extents. `fail(text)` throws if there is no such tensor.
template <class Fail>
index tensor_bytes(const dtype_info& type, std::span<const index> dims, Fail&& fail) {
    constexpr index most = std::numeric_limits<index>::max();
    if (dims.size() > 4) fail("has " + std::to_string(dims.size()) + " dimensions, at most 4 are possible");
    const index columns = dims.empty() ? 1 : dims[0];
    index elements = 1;
    for (const index extent : dims) {
        if (extent < 1) fail("has a dimension of " + std::to_string(extent) + ", at least 1 is needed");
        if (elements > most / extent) fail("has more elements than 63 bits can count");
        elements *= extent;
    }
    if (columns % type.block_elements != 0) {
        fail("has rows of " + std::to_string(columns) + " elements, but " + std::string(type.name) +
             " needs multiples of " + std::to_string(type.block_elements));
    }
    const index blocks = elements / type.block_elements;
    if (blocks > most / type.block_bytes) fail("has more bytes than 63 bits can count");
    return blocks * type.block_bytes;
}

/// One file of a set. Stays where it was made: values point to its name.
struct gguf_file {
    using value_index = name_index<gguf_value, &gguf_value::key>;

    explicit gguf_file(mapped_file file) : mapping(std::move(file)), name(mapping.path().string()) {}
    gguf_file(const gguf_file&) = delete;
    gguf_file& operator=(const gguf_file&) = delete;

    [[nodiscard]] const gguf_value* find(std::string_view key) const { return by_key.find(values, key); }
    [[noreturn]] void fail(std::string_view what) const { throw error(errc::format, name, what); }

    mapped_file mapping;
    std::string name;
    std::uint32_t version = 0;
    index alignment = 32;
    std::vector<gguf_value> values;
    value_index by_key;
    std::vector<tensor_info> tensors;
};

/// Walks the metadata part of one file. Every length is compared with what is left of the file before use.
class gguf_reader {
public:
    gguf_reader(gguf_file& file, int shard) : file_(file), bytes_(file.mapping.bytes()), shard_(shard) {}

    void read() {
        const auto magic = text(4, "the magic number");
        if (magic != "GGUF") file_.fail("is not a GGUF file");
        file_.version = number<std::uint32_t>("the version");
        if (file_.version != 0 && (file_.version & 0xFFFFu) == 0) refuse("is a big-endian GGUF file");
        if (file_.version != 2 && file_.version != 3) {
            refuse("is of GGUF version " + std::to_string(file_.version) + ", only 2 and 3 are supported");
        }
        // The smallest tensor entry has 24 bytes, the smallest key 13: length, one character, type, and a value.
        const auto n_tensors = count("the number of tensors", gguf_limits::tensors, 24);
        const auto n_keys = count("the number of keys", gguf_limits::keys, 13);

        file_.values.reserve(n_keys);
        for (std::size_t i = 0; i < n_keys; ++i) file_.values.push_back(value());
        file_.by_key = gguf_file::value_index(file_.values);
        if (const auto* twice = file_.by_key.duplicate(file_.values)) twice->fail("occurs twice");
        read_alignment();

        file_.tensors.reserve(n_tensors);
        std::vector<std::uint64_t> offsets;
        offsets.reserve(n_tensors);
        for (std::size_t i = 0; i < n_tensors; ++i) {
            file_.tensors.push_back(tensor());
            offsets.push_back(number<std::uint64_t>("the offset of a tensor"));
        }
        if (n_tensors != 0) place(offsets);
    }

private:
    [[nodiscard]] std::size_t left() const { return bytes_.size() - position_; }

    [[noreturn]] void refuse(std::string_view what) const { throw error(errc::unsupported, file_.name, what); }

    [[noreturn]] void fail_tensor(std::string_view name, std::string_view what) const {
        file_.fail(std::string("tensor ").append(name).append(" ").append(what));
    }

    std::span<const std::byte> take(std::uint64_t n, std::string_view what) {
        if (n > left()) {
            file_.fail("ends within " + std::string(what) + ": " + std::to_string(n) + " bytes at position " +
                       std::to_string(position_) + ", but the file has " + std::to_string(bytes_.size()));
        }
        const auto taken = bytes_.subspan(position_, static_cast<std::size_t>(n));
        position_ += taken.size();
        return taken;
    }

    std::string_view text(std::uint64_t n, std::string_view what) {
        const auto taken = take(n, what);
        return {reinterpret_cast<const char*>(taken.data()), taken.size()};
    }

    template <class T>
    T number(std::string_view what) {
        T value;
        std::memcpy(&value, take(sizeof value, what).data(), sizeof value);
        return value;
    }

    /// How many entries follow, none smaller than `smallest` bytes.
    std::size_t count(std::string_view what, std::uint64_t most, std::size_t smallest) {
        const auto n = number<std::uint64_t>(what);
        if (n > left() / smallest || n > most) {
            file_.fail("cannot hold what it declares: " + std::string(what) + " is " + std::to_string(n));
        }
        return static_cast<std::size_t>(n);
    }

    std::string_view string(std::string_view what, std::uint64_t most) {
        const auto n = number<std::uint64_t>(what);
        if (n > most) {
            file_.fail(std::string(what) + " has " + std::to_string(n) + " bytes at position " +
                       std::to_string(position_) + ", at most " + std::to_string(most) + " are possible");
        }
        return text(n, what);
    }

    /// A key or the name of a tensor.
    std::string_view identifier(std::string_view what, std::uint64_t most) {
        const auto name = string(what, most);
        if (name.empty()) file_.fail(std::string(what) + " is empty at position " + std::to_string(position_));
        if (name.find('\0') != name.npos) {
            file_.fail(std::string(what) + " holds a NUL byte before position " + std::to_string(position_));
        }
        return name;
    }

    gguf_type value_type(const gguf_value& of) {
        const auto id = number<std::uint32_t>("the type of a key");
        if (id > static_cast<std::uint32_t>(gguf_type::f64))
            of.fail("has an unknown value type: " + std::to_string(id));
        return static_cast<gguf_type>(id);
    }

    gguf_value value() {
        gguf_value v;
        v.file_ = &file_.name;
        v.key_ = identifier("a key", gguf_limits::key_bytes);
        v.type_ = v.element_type_ = value_type(v);
        const std::size_t start = position_;
        if (v.type_ == gguf_type::array) {
            v.element_type_ = value_type(v);
            if (v.element_type_ == gguf_type::array) v.fail("is an array of arrays");
            elements(v, number<std::uint64_t>("the length of an array"));
        } else if (v.type_ == gguf_type::string) {
            string("a string", gguf_limits::string_bytes);
        } else {
            elements(v, 1);
        }
        v.raw_ = bytes_.subspan(start, position_ - start);
        return v;
    }

    void elements(gguf_value& v, std::uint64_t n) {
        const bool strings = v.element_type_ == gguf_type::string;
        const std::size_t smallest = strings ? 8 : scalar_bytes(v.element_type_);  // an empty string is its length
        if (n > left() / smallest) {
            v.fail("declares " + std::to_string(n) + " elements, more than the file can hold");
        }
        if (strings) {
            v.strings_.reserve(static_cast<std::size_t>(n));
            for (std::uint64_t i = 0; i < n; ++i) v.strings_.push_back(string("a string", gguf_limits::string_bytes));
            return;
        }
        const auto packed = take(n * smallest, "a value");
        if (v.element_type_ == gguf_type::boolean &&
            std::ranges::any_of(packed, [](std::byte b) { return b > std::byte{1}; })) {
            v.fail("holds a bool that is neither 0 nor 1");
        }
    }

    void read_alignment() {
        const auto* stated = file_.find("general.alignment");
        if (stated == nullptr) return;
        if (stated->type() != gguf_type::u32) stated->fail("must be of type u32");
        const auto n = stated->as_uint();
        if (!is_gguf_alignment(n)) {
            stated->fail("is " + std::to_string(n) + ", a power of two from 8 to " +
                         std::to_string(gguf_limits::alignment) + " is needed");
        }
        file_.alignment = static_cast<index>(n);
    }

    /// An entry of the directory up to its offset; `data` gets its size, but not yet its place.
    tensor_info tensor() {
        tensor_info t{};
        t.shard = shard_;
        t.name = identifier("the name of a tensor", gguf_limits::tensor_name_bytes);
        const auto n_dims = number<std::uint32_t>("the dimensions of a tensor");
        if (n_dims > 4) fail_tensor(t.name, "has " + std::to_string(n_dims) + " dimensions, at most 4 are possible");
        t.n_dims = static_cast<int>(n_dims);
        std::ranges::fill(t.dims, 1);
        for (int d = 0; d < t.n_dims; ++d) {
            const auto extent = number<std::uint64_t>("the dimensions of a tensor");
            if (!std::in_range<index>(extent)) fail_tensor(t.name, "has a dimension of " + std::to_string(extent));
            t.dims[d] = static_cast<index>(extent);
        }
        t.type_id = number<std::uint32_t>("the type of a tensor");
        t.type = find_dtype(t.type_id);
        if (t.type == nullptr) {
            refuse("tensor " + std::string(t.name) + " is of the unknown type " + std::to_string(t.type_id));
        }
        return t;
    }

    /// Finds every tensor's bytes: inside of the data, aligned, no two of them overlapping. Gaps are allowed.
    void place(std::span<const std::uint64_t> offsets) {
        const auto start = static_cast<std::size_t>(padded(static_cast<index>(position_), file_.alignment));
        if (start > bytes_.size()) file_.fail("ends before its tensor data");
        const auto data = bytes_.subspan(start);
        for (std::size_t i = 0; i < offsets.size(); ++i) {
            tensor_info& t = file_.tensors[i];
            const auto size = static_cast<std::uint64_t>(
                tensor_bytes(*t.type, t.shape(), [&](std::string_view what) { fail_tensor(t.name, what); }));
            if (offsets[i] % static_cast<std::uint64_t>(file_.alignment) != 0) {
                fail_tensor(t.name, "begins at offset " + std::to_string(offsets[i]) +
                                        ", which is not a multiple of the alignment " +
                                        std::to_string(file_.alignment));
            }
            if (offsets[i] > data.size() || size > data.size() - offsets[i]) {
                fail_tensor(t.name, "needs " + std::to_string(size) + " bytes at offset " + std::to_string(offsets[i]) +
                                        ", but the file has " + std::to_string(data.size()) + " bytes of data");
            }
            t.data = data.subspan(static_cast<std::size_t>(offsets[i]), static_cast<std::size_t>(size));
        }
        std::vector<const tensor_info*> by_place;
        by_place.reserve(file_.tensors.size());
        for (const tensor_info& t : file_.tensors) by_place.push_back(&t);
        std::ranges::sort(by_place, {}, [](const tensor_info* t) { return t->data.data(); });
        for (std::size_t i = 1; i < by_place.size(); ++i) {
            const tensor_info& before = *by_place[i - 1];
            if (by_place[i]->data.data() < before.data.data() + before.data.size()) {
                fail_tensor(by_place[i]->name, "overlaps tensor " + std::string(before.name));
            }
        }
    }

    gguf_file& file_;
    std::span<const std::byte> bytes_;
    std::size_t position_ = 0;
    int shard_;
};

}  // namespace detail

}  // namespace keel::inline KEEL_ABI
