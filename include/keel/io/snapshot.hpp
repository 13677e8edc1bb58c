// SPDX-License-Identifier: MIT
//
// A sequence on disk. Little-endian; sections follow each other, each padded with zeros to a multiple of 64 bytes:
//
//     header      snapshot_header: magic, version, checksum of everything else, what made it, sizes of the sections
//     tokens      i32 each
//     states      snapshot_state each: checkpoints by their lengths, at last the state of the sequence
//     logits      f32 each, those behind the states one after another, as far as they are known
//     recurrent   of each state, a section for each: its recurrent part, see memory_layout
//     blocks      the latent cache, block after block
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <keel/core/checksum.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/mapped_file.hpp>
#include <keel/io/output_file.hpp>

namespace keel::inline KEEL_ABI {

struct snapshot_header {
    static constexpr std::uint64_t expected_magic = 0x50414E534C45454Bu;  // "KEELSNAP"
    static constexpr std::uint64_t expected_version = 3;

    std::uint64_t magic = expected_magic;
    std::uint64_t version = expected_version;
    std::uint64_t checksum = 0;
    std::uint64_t model = 0;                   ///< fingerprint of the model that the state belongs to
    std::array<std::uint64_t, 8> layout = {};  ///< of the state's memory
    std::uint64_t tokens = 0;
    std::uint64_t states = 0;
    std::uint64_t marked = 0;           ///< how many tokens the marked checkpoint holds, plus 1; 0: none is marked
    std::uint64_t logits = 0;           ///< of all states
    std::uint64_t recurrent_bytes = 0;  ///< of each state
    std::uint64_t blocks = 0;
    std::uint64_t block_bytes = 0;
    std::uint64_t unused[5] = {};
};
static_assert(sizeof(snapshot_header) == 192 && std::is_trivially_copyable_v<snapshot_header>);

struct snapshot_state {
    std::uint64_t tokens = 0;      ///< how many of the tokens it holds
    std::uint64_t has_logits = 0;  ///< 1 or 0
};

namespace detail {

constexpr std::size_t snapshot_padding(std::size_t bytes) { return (64 - bytes % 64) % 64; }

inline std::span<const std::byte> bytes_of(const snapshot_header& header) {
    return std::as_bytes(std::span(&header, 1));
}

}  // namespace detail

/// Writes a snapshot: the header's sections one by one. The file appears under its name when it is complete, replacing
/// an older one in one step. Throws errc::file.
class snapshot_writer {
public:
    snapshot_writer(const std::filesystem::path& path, const snapshot_header& header)
        : file_(path, existing_file::replace), header_(header) {
        file_.write(detail::bytes_of(header_));
        sum_.add(detail::bytes_of(header_));
    }

    /// A section, or a part of one whose size is a multiple of 64.
    void write(std::span<const std::byte> section) {
        static constexpr std::byte zeros[64] = {};
        for (const auto part : {section, std::span<const std::byte>(zeros, detail::snapshot_padding(section.size()))}) {
            file_.write(part);
            sum_.add(part);
        }
    }

    void commit() {
        header_.checksum = sum_.value();
        file_.write_at(0, detail::bytes_of(header_));
        file_.commit();
    }

private:
    output_file file_;
    snapshot_header header_;
    checksum sum_;
};

/// A snapshot in memory, checked. The sections point into the mapped file.
class snapshot {
public:
    /// Throws errc::file, errc::unsupported for another version, errc::format for anything damaged; names the file.
    explicit snapshot(const std::filesystem::path& path) : file_(path) {
        const auto all = file_.bytes();
        if (all.size() < sizeof header_) fail(errc::format, "is too short for a snapshot");
        std::memcpy(&header_, all.data(), sizeof header_);
        if (header_.magic != snapshot_header::expected_magic) fail(errc::format, "is not a snapshot of keel");
        if (header_.version != snapshot_header::expected_version) {
            fail(errc::unsupported, "is a snapshot of version " + std::to_string(header_.version) + ", only " +
                                        std::to_string(snapshot_header::expected_version) + " is supported");
        }
        std::span<const std::byte> rest = all.subspan(sizeof header_);
        const auto take = [&](std::uint64_t count, std::uint64_t size) {
            if (size != 0 && count > rest.size() / size) fail(errc::format, "is truncated or damaged");
            const auto bytes = static_cast<std::size_t>(count * size);
            const std::size_t padded = bytes + detail::snapshot_padding(bytes);
            if (padded > rest.size()) fail(errc::format, "is truncated or damaged");
            const auto section = rest.first(bytes);
            rest = rest.subspan(padded);
            return section;
        };
        tokens = take(header_.tokens, 4);
        states = take(header_.states, sizeof(snapshot_state));
        logits = take(header_.logits, 4);
        for (std::uint64_t i = 0; i < header_.states; ++i) recurrent.push_back(take(header_.recurrent_bytes, 1));
        blocks = take(header_.blocks, header_.block_bytes);
        if (!rest.empty()) fail(errc::format, "has bytes behind its end");

        snapshot_header unsigned_header = header_;
        unsigned_header.checksum = 0;
        checksum sum;
        sum.add(detail::bytes_of(unsigned_header));
        sum.add(all.subspan(sizeof header_));
        if (sum.value() != header_.checksum) fail(errc::format, "is damaged: its checksum does not match");
    }

    [[nodiscard]] const snapshot_header& header() const { return header_; }

    [[noreturn]] void fail(errc code, std::string_view what) const { throw error(code, file_.path().string(), what); }

    std::span<const std::byte> tokens, states, logits, blocks;
    std::vector<std::span<const std::byte>> recurrent;  ///< one for each state

private:
    mapped_file file_;
    snapshot_header header_;
};

}  // namespace keel::inline KEEL_ABI
