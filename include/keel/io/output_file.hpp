// SPDX-License-Identifier: MIT
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#if defined(_WIN32)
#include <io.h>
#else
#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>
#endif

#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// What to do about a file that has the wanted name already.
enum class existing_file { keep, replace };

namespace detail {

// The few calls that differ between systems. All answer as the C library does.
#if defined(_WIN32)
inline std::FILE* create_new(const std::filesystem::path& path) { return ::_wfopen(path.c_str(), L"wbx"); }
inline int seek_to(std::FILE* file, index position) { return ::_fseeki64(file, position, SEEK_SET); }
inline int sync_to_disk(std::FILE* file) { return ::_commit(::_fileno(file)); }
#else
inline std::FILE* create_new(const std::filesystem::path& path) { return std::fopen(path.c_str(), "wbx"); }
inline int seek_to(std::FILE* file, index position) { return ::fseeko(file, static_cast<off_t>(position), SEEK_SET); }
inline int sync_to_disk(std::FILE* file) { return ::fsync(::fileno(file)); }
#endif

/// Asks the system to begin with what was written so far, so that sync_to_disk() will find less to wait for.
inline void begin_sync([[maybe_unused]] std::FILE* file) {
#if defined(__linux__)
    ::sync_file_range(::fileno(file), 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
}

struct close_file {
    void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};

}  // namespace detail

/// A file that appears under its name complete or not at all: the bytes go to a temporary file in the same folder,
/// and commit() renames it. Destroying it uncommitted removes the temporary. Writing is buffered.
/// All errors of the operating system, a full disk among them, are errc::file and name the target's path.
class output_file {
public:
    /// Refuses a target that exists (unless told to replace it) or that is not a regular file.
    static void check_target(const std::filesystem::path& target, existing_file policy) {
        std::error_code ignored;
        const auto status = std::filesystem::status(target, ignored);
        if (!std::filesystem::exists(status)) return;
        if (!std::filesystem::is_regular_file(status)) {
            throw error(errc::file, target.string(), "exists and is not a regular file");
        }
        if (policy == existing_file::keep) throw error(errc::file, target.string(), "exists already");
    }

    /// Checks the target and creates the temporary.
    explicit output_file(std::filesystem::path target, existing_file policy = existing_file::keep)
        : target_(std::move(target)), policy_(policy) {
        check_target(target_, policy_);
        for (int attempt = 1; file_ == nullptr; ++attempt) {  // another writer of the same target may be at work
            temporary_ = target_;
            temporary_ += ".partial" + std::to_string(attempt);
            file_.reset(detail::create_new(temporary_));
            if (file_ == nullptr && (errno != EEXIST || attempt == most_attempts)) {
                temporary_.clear();  // not ours to remove
                refuse("cannot be created");
            }
        }
    }

    output_file(output_file&& other) noexcept { swap(other); }
    output_file& operator=(output_file&& other) noexcept {
        output_file(std::move(other)).swap(*this);
        return *this;
    }
    ~output_file() { discard(); }

    [[nodiscard]] const std::filesystem::path& path() const noexcept { return target_; }

    /// Bytes appended so far.
    [[nodiscard]] index position() const noexcept { return position_; }

    void write(std::span<const std::byte> bytes) {
        put(bytes);
        const index stretches = position_ / sync_stretch;
        position_ += static_cast<index>(bytes.size());
        if (position_ / sync_stretch != stretches) detail::begin_sync(file_.get());
    }

    /// Rewrites bytes that were appended before; the position stays at the end.
    void write_at(index offset, std::span<const std::byte> bytes) {
        const auto size = static_cast<index>(bytes.size());
        if (offset < 0 || offset > position_ || size > position_ - offset) {
            throw error(errc::argument, target_.string(), "bytes that were not written yet cannot be rewritten");
        }
        seek(offset);
        put(bytes);
        seek(position_);
    }

    /// Writes everything through to the disk and closes the temporary; commit() then only renames. For sets of files
    /// that shall appear together.
    void finish() {
        if (temporary_.empty()) throw error(errc::argument, target_.string(), "is committed already, or failed before");
        if (file_ == nullptr) return;
        if (std::fflush(file_.get()) != 0 || detail::sync_to_disk(file_.get()) != 0) refuse("cannot be written");
        if (std::fclose(file_.release()) != 0) refuse("cannot be written");
    }

    /// finish(), then gives the file its name, replacing an older one in one step.
    void commit() {
        finish();
        check_target(target_, policy_);
        std::error_code failure;
        std::filesystem::rename(temporary_, target_, failure);
        if (failure) throw error(errc::file, target_.string(), "cannot get its name: " + failure.message());
        temporary_.clear();
    }

private:
    static constexpr int most_attempts = 100;
    static constexpr index sync_stretch = 4 << 20;  // bytes

    /// Gives the file up: after a failed write nothing may commit what is left of it.
    [[noreturn]] void refuse(std::string_view what) {
        const std::error_code reason(errno, std::generic_category());
        discard();
        throw error(errc::file, target_.string(), std::string(what).append(": ").append(reason.message()));
    }

    void discard() noexcept {
        file_.reset();
        std::error_code ignored;
        if (!temporary_.empty()) std::filesystem::remove(temporary_, ignored);
        temporary_.clear();
    }

    void require_open() const {
        if (file_ == nullptr) throw error(errc::argument, target_.string(), "is closed and cannot be written");
    }

    void put(std::span<const std::byte> bytes) {
        require_open();
        if (bytes.empty()) return;
        if (std::fwrite(bytes.data(), 1, bytes.size(), file_.get()) != bytes.size()) refuse("cannot be written");
    }

    void seek(index position) {
        require_open();
        if (detail::seek_to(file_.get(), position) != 0) refuse("cannot be written");
    }

    void swap(output_file& other) noexcept {
        std::swap(target_, other.target_);
        std::swap(temporary_, other.temporary_);
        std::swap(file_, other.file_);
        std::swap(position_, other.position_);
        std::swap(policy_, other.policy_);
    }

    std::filesystem::path target_;
    std::filesystem::path temporary_;  // empty: there is none to remove
    std::unique_ptr<std::FILE, detail::close_file> file_;
    index position_ = 0;
    existing_file policy_ = existing_file::keep;
};

}  // namespace keel::inline KEEL_ABI
