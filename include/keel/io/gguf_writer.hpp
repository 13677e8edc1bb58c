// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <ranges>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf.hpp>
#include <keel/io/output_file.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

/// A byte string that grows by GGUF's encodings.
class gguf_encoder {
public:
    template <gguf_scalar T>
    void number(T value) {
        std::byte encoded[sizeof value];
        std::memcpy(encoded, &value, sizeof value);
        append(encoded);
    }
    void string(std::string_view text) {
        number<std::uint64_t>(text.size());
        append(std::as_bytes(std::span(text)));
    }
    void append(std::span<const std::byte> bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }
    void pad(index alignment) { bytes_.resize(static_cast<std::size_t>(padded(size(), alignment))); }

    [[nodiscard]] index size() const { return static_cast<index>(bytes_.size()); }
    [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

private:
    std::vector<std::byte> bytes_;
};

}  // namespace detail

/// Writes a GGUF file, version 3, or a split set. In this order: metadata and declarations of all tensors; the data of
/// every tensor, in the order of declaration, in pieces of any size; finish(). Files appear under their names only
/// then. Memory: the metadata and the directory, never tensor data.
///
/// Misuse throws errc::argument and names the key or the tensor; a full disk throws errc::file and names the path.
/// general.alignment, if set, is obeyed; split.* keys are the writer's own.
class gguf_writer {
public:
    /// Writes to `target`. With a `split_size` above 0, in bytes, a model that does not fit into one file of this size
    /// becomes a set: out.gguf gives out-00001-of-00003.gguf and so on. Only a file with a single tensor may be larger.
    explicit gguf_writer(std::filesystem::path target, existing_file policy = existing_file::keep, index split_size = 0)
        : target_(std::move(target)), policy_(policy), split_size_(split_size) {
        output_file::check_target(target_, policy_);
    }

    /// The type in the file is that of `value`: pass std::uint32_t for u32. A key that is set again keeps its place.
    template <gguf_scalar T>
    void set(std::string_view key, T value) {
        detail::gguf_encoder encoded;
        encoded.number(value);
        put(key, gguf_type_of<T>(), encoded.bytes());
    }
    void set(std::string_view key, std::string_view text) {
        detail::gguf_encoder encoded;
        encoded.string(text);
        put(key, gguf_type::string, encoded.bytes());
    }
    /// A range of scalars or of strings.
    template <std::ranges::forward_range Range>
    void set_array(std::string_view key, const Range& elements) {
        using element = std::ranges::range_value_t<Range>;
        constexpr bool scalars = gguf_scalar<element>;
        static_assert(scalars || std::convertible_to<element, std::string_view>);
        detail::gguf_encoder encoded;
        if constexpr (scalars)
            encoded.number(static_cast<std::uint32_t>(gguf_type_of<element>()));
        else
            encoded.number(static_cast<std::uint32_t>(gguf_type::string));
        encoded.number(static_cast<std::uint64_t>(std::ranges::distance(elements)));
        for (const auto& x : elements) {
            if constexpr (scalars)
                encoded.number(static_cast<element>(x));
            else
                encoded.string(x);
        }
        put(key, gguf_type::array, encoded.bytes());
    }
    /// The same key with the same bytes.
    void copy(const gguf_value& value) { put(value.key(), value.type(), value.raw()); }
    /// All metadata but what describes a split.
    void copy_metadata(const gguf& from) {
        for (const auto& value : from.values()) {
            if (!value.key().starts_with(split_prefix)) copy(value);
        }
    }

    /// Announces a tensor: extents with ne0, the contiguous one, first. Types that keel cannot compute with are fine.
    void declare(std::string_view name, const dtype_info& type, std::span<const index> dims) {
        require_unstarted(name);
        require_name("the name of a tensor", name, detail::gguf_limits::tensor_name_bytes);
        const auto refuse = [&](std::string_view what) { throw error(errc::argument, name, what); };
        const index bytes = detail::tensor_bytes(type, dims, refuse);
        if (tensors_.size() == detail::gguf_limits::tensors) refuse("is one tensor more than a file may have");
        if (bytes > most_bytes - total_bytes_) refuse("makes the file larger than a file can be");
        if (!names_.emplace(name).second) refuse("is declared twice");
        total_bytes_ += bytes;
        tensors_.push_back({std::string(name), &type, {dims.begin(), dims.end()}, bytes});
    }
    void declare(std::string_view name, dtype type, std::span<const index> dims) { declare(name, info(type), dims); }

    /// The next bytes of the tensor whose turn it is; `name` must be its name.
    void write(std::string_view name, std::span<const std::byte> piece) {
        if (!started_) start();
        if (next_ == tensors_.size()) throw error(errc::argument, name, "comes after the last declared tensor");
        const planned& tensor = tensors_[next_];
        if (tensor.name != name)
            throw error(errc::argument, name, "was given bytes when it is the turn of " + tensor.name);
        if (static_cast<index>(piece.size()) > tensor.bytes - written_) {
            throw error(errc::argument, name, "was given more than its " + std::to_string(tensor.bytes) + " bytes");
        }
        files_.back().write(piece);
        written_ += static_cast<index>(piece.size());
        if (written_ < tensor.bytes) return;

        const std::vector<std::byte> padding(
            static_cast<std::size_t>(detail::padded(tensor.bytes, alignment_) - tensor.bytes));
        files_.back().write(padding);
        ++next_;
        written_ = 0;
        if (files_.size() < shards_.size() && next_ == shards_[files_.size()].first) open_next();
    }

    /// Checks that all data came, and gives the files their names. Answers the paths written.
    std::vector<std::filesystem::path> finish() {
        if (!started_) start();
        if (files_.empty()) throw error(errc::argument, target_.string(), "is finished already");
        if (next_ < tensors_.size()) {
            const planned& tensor = tensors_[next_];
            throw error(errc::argument, tensor.name,
                        "has " + std::to_string(written_) + " of its " + std::to_string(tensor.bytes) + " bytes");
        }
        files_.back().finish();
        std::vector<std::filesystem::path> paths;
        for (const auto& file : files_) paths.push_back(file.path());
        // The first file is the one that users open: it comes last, when its set is complete.
        while (!files_.empty()) {
            files_.back().commit();
            files_.pop_back();
        }
        return paths;
    }

private:
    static constexpr std::string_view split_prefix = "split.";
    static constexpr std::string_view alignment_key = "general.alignment";

    static constexpr index most_bytes = index{1} << 62;  // leaves room for padding

    struct entry {
        std::string key;
        gguf_type type;
        std::vector<std::byte> raw;
    };
    struct planned {
        std::string name;
        const dtype_info* type;
        std::vector<index> dims;
        index bytes;
    };
    struct shard {
        std::size_t first;  // of its tensors
        std::size_t count;
    };

    void require_unstarted(std::string_view name) const {
        if (started_) throw error(errc::argument, name, "comes too late: the header is written");
    }

    void require_name(std::string_view what, std::string_view name, std::uint64_t most) const {
        if (!name.empty() && name.size() <= most && name.find('\0') == name.npos) return;
        throw error(errc::argument, target_.string(),
                    std::string(what) + " must have 1 to " + std::to_string(most) + " bytes, none of them NUL");
    }

    void put(std::string_view key, gguf_type type, std::span<const std::byte> raw) {
        require_unstarted(key);
        const auto refuse = [&](std::string_view what) { throw error(errc::argument, key, what); };
        require_name("a key", key, detail::gguf_limits::key_bytes);
        if (key.starts_with(split_prefix)) refuse("is set by the writer itself");
        if (key == alignment_key) {
            std::uint32_t n = 0;
            if (type == gguf_type::u32) std::memcpy(&n, raw.data(), sizeof n);
            if (!detail::is_gguf_alignment(n)) refuse("must be a power of two from 8 on, of type u32");
            alignment_ = static_cast<index>(n);
        }
        entry value{std::string(key), type, {raw.begin(), raw.end()}};
        const auto same = std::ranges::find(values_, key, &entry::key);
        if (same != values_.end())
            *same = std::move(value);
        else
            values_.push_back(std::move(value));
    }

    void start() {
        plan();
        for (std::size_t i = 0; i < shards_.size(); ++i) output_file::check_target(shard_path(i), policy_);
        started_ = true;
        open_next();
    }

    /// Fills file after file. The size of a file is that of its header, padded, and of its tensors, each padded.
    void plan() {
        shards_ = {{0, 0}};
        if (split_size_ <= 0) {
            shards_[0].count = tensors_.size();
            return;
        }
        index header = metadata(0, true).size();
        index data = 0;
        for (std::size_t i = 0; i < tensors_.size(); ++i) {
            const index more_header = directory(i, i + 1).size();
            const index more_data = detail::padded(tensors_[i].bytes, alignment_);
            const bool fits = detail::padded(header + more_header, alignment_) + data + more_data <= split_size_;
            if (!fits && shards_.back().count > 0) {
                shards_.push_back({i, 0});
                header = metadata(shards_.size() - 1, true).size();
                data = 0;
            }
            ++shards_.back().count;
            header += more_header;
            data += more_data;
        }
        if (shards_.size() > detail::gguf_limits::shards) {
            throw error(errc::argument, target_.string(),
                        "would be split into " + std::to_string(shards_.size()) + " files, at most " +
                            std::to_string(detail::gguf_limits::shards) + " are possible");
        }
    }

    [[nodiscard]] std::filesystem::path shard_path(std::size_t i) const {
        if (shards_.size() == 1) return target_;
        auto path = target_;
        if (path.extension() == ".gguf") path.replace_extension();
        path += detail::split_suffix(i, shards_.size());
        return path;
    }

    /// Closes the file that is complete and begins the next with its header.
    void open_next() {
        const std::size_t i = files_.size();
        if (i > 0) files_.back().finish();
        auto header = metadata(i, shards_.size() > 1);
        header.append(directory(shards_[i].first, shards_[i].first + shards_[i].count).bytes());
        header.pad(alignment_);
        files_.emplace_back(shard_path(i), policy_);
        files_.back().write(header.bytes());
    }

    /// The header of file i up to its directory.
    [[nodiscard]] detail::gguf_encoder metadata(std::size_t i, bool is_split) const {
        std::vector<const entry*> values;
        for (const entry& value : values_) {
            if (i == 0 || value.key == alignment_key) values.push_back(&value);
        }
        detail::gguf_encoder out;
        out.append(std::as_bytes(std::span("GGUF", 4)));
        out.number(std::uint32_t{3});
        out.number(static_cast<std::uint64_t>(shards_[i].count));
        out.number(static_cast<std::uint64_t>(values.size() + (is_split ? 3 : 0)));
        for (const entry* value : values) {
            out.string(value->key);
            out.number(static_cast<std::uint32_t>(value->type));
            out.append(value->raw);
        }
        if (is_split) {
            const auto add = [&](std::string_view key, auto number) {
                out.string(key);
                out.number(static_cast<std::uint32_t>(gguf_type_of<decltype(number)>()));
                out.number(number);
            };
            add("split.no", static_cast<std::uint16_t>(i));
            add("split.count", static_cast<std::uint16_t>(shards_.size()));
            add("split.tensors.count", static_cast<std::int32_t>(tensors_.size()));
        }
        return out;
    }

    /// The directory entries of tensors first to last - 1, which share a file.
    [[nodiscard]] detail::gguf_encoder directory(std::size_t first, std::size_t last) const {
        detail::gguf_encoder out;
        index offset = 0;
        for (std::size_t i = first; i < last; ++i) {
            const planned& tensor = tensors_[i];
            out.string(tensor.name);
            out.number(static_cast<std::uint32_t>(tensor.dims.size()));
            for (const index extent : tensor.dims) out.number(static_cast<std::uint64_t>(extent));
            out.number(tensor.type->id);
            out.number(static_cast<std::uint64_t>(offset));
            offset += detail::padded(tensor.bytes, alignment_);
        }
        return out;
    }

    std::filesystem::path target_;
    existing_file policy_;
    index split_size_;
    index alignment_ = 32;
    std::vector<entry> values_;
    std::vector<planned> tensors_;
    std::set<std::string, std::less<>> names_;
    index total_bytes_ = 0;

    bool started_ = false;
    std::vector<shard> shards_;
    std::vector<output_file> files_;  // the last is being written, those before are complete but not named yet
    std::size_t next_ = 0;            // tensor whose turn it is
    index written_ = 0;               // bytes of it
};

}  // namespace keel::inline KEEL_ABI
