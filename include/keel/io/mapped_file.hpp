// SPDX-License-Identifier: MIT
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// How a mapping is about to be read.
enum class access_hint {
    sequential,  ///< once, front to back: read ahead generously
    soon,        ///< all of it, soon: start reading now
};

namespace detail {

#if defined(_WIN32)

struct windows_handle {
    HANDLE handle;
    explicit windows_handle(HANDLE h) : handle(h) {}
    windows_handle(const windows_handle&) = delete;
    windows_handle& operator=(const windows_handle&) = delete;
    ~windows_handle() {
        if (handle != nullptr && handle != INVALID_HANDLE_VALUE) CloseHandle(handle);
    }
};

inline std::span<const std::byte> map_file(const std::filesystem::path& path) {
    const auto refuse = [&](std::string_view what) {
        const std::error_code reason(static_cast<int>(GetLastError()), std::system_category());
        throw error(errc::file, path.string(), std::string(what).append(": ").append(reason.message()));
    };
    const windows_handle file(CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                                          FILE_ATTRIBUTE_NORMAL, nullptr));
    if (file.handle == INVALID_HANDLE_VALUE) refuse("cannot be opened");
    LARGE_INTEGER size{};
    if (!GetFileSizeEx(file.handle, &size)) refuse("cannot be examined");
    if (size.QuadPart == 0) throw error(errc::file, path.string(), "is empty");
    const windows_handle mapping(CreateFileMappingW(file.handle, nullptr, PAGE_READONLY, 0, 0, nullptr));
    if (mapping.handle == nullptr) refuse("cannot be mapped into memory");
    const void* start = MapViewOfFile(mapping.handle, FILE_MAP_READ, 0, 0, 0);
    if (start == nullptr) refuse("cannot be mapped into memory");
    return {static_cast<const std::byte*>(start), static_cast<std::size_t>(size.QuadPart)};
}

inline void unmap_file(std::span<const std::byte> bytes) noexcept { UnmapViewOfFile(bytes.data()); }

inline void advise_mapping(std::span<const std::byte>, access_hint) noexcept {}

inline void release_pages(std::span<const std::byte>) noexcept {}

#else

inline std::span<const std::byte> map_file(const std::filesystem::path& path) {
    const auto refuse = [&](std::string_view what) {
        const std::error_code reason(errno, std::generic_category());
        throw error(errc::file, path.string(), std::string(what).append(": ").append(reason.message()));
    };
    struct descriptor {
        int number;
        ~descriptor() {
            if (number >= 0) ::close(number);
        }
    };
    // O_NONBLOCK: opening a pipe must fail below, not wait for a writer. It means nothing for a regular file.
    const descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file.number < 0) refuse("cannot be opened");
    struct stat status {};
    if (::fstat(file.number, &status) != 0) refuse("cannot be examined");
    if (S_ISDIR(status.st_mode)) throw error(errc::file, path.string(), "is a directory, a file is needed");
    if (!S_ISREG(status.st_mode)) throw error(errc::file, path.string(), "is not a regular file");
    if (status.st_size == 0) throw error(errc::file, path.string(), "is empty");
    const std::size_t size = static_cast<std::size_t>(status.st_size);
    const void* start = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.number, 0);
    if (start == MAP_FAILED) refuse("cannot be mapped into memory");
    return {static_cast<const std::byte*>(start), size};
}

inline void unmap_file(std::span<const std::byte> bytes) noexcept {
    ::munmap(const_cast<std::byte*>(bytes.data()), bytes.size());
}

inline void advise_mapping(std::span<const std::byte> bytes, access_hint hint) noexcept {
    const int advice = hint == access_hint::sequential ? POSIX_MADV_SEQUENTIAL : POSIX_MADV_WILLNEED;
    ::posix_madvise(const_cast<std::byte*>(bytes.data()), bytes.size(), advice);  // a hint: refusal does not matter
}

/// The whole pages in `part`. Not posix_madvise, which ignores this wish on Linux.
inline void release_pages(std::span<const std::byte> part) noexcept {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(part.data());
    const std::uintptr_t first = (address + page - 1) / page * page, last = (address + part.size()) / page * page;
    if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

#endif

}  // namespace detail

/// A whole file, mapped read-only for as long as the object lives. The mapping starts on a page boundary; its size and
/// its bytes come from one descriptor, so that a file replaced in between cannot mix. A file that another program
/// shortens while it is mapped is out of scope: reading the lost part is a fault of the operating system.
/// Reading from several threads is safe.
class mapped_file {
public:
    /// Throws errc::file, naming the path, for what is missing, unreadable, empty or not a regular file.
    explicit mapped_file(const std::filesystem::path& path) : path_(path), bytes_(detail::map_file(path)) {}

    /// A file that is in memory already, such as one linked into the program. The bytes belong to the caller and
    /// outlive the object; `name` stands for the path in messages. Throws errc::argument unless they start at a
    /// multiple of 64.
    mapped_file(std::string name, std::span<const std::byte> bytes)
        : path_(std::move(name)), bytes_(bytes), mapped_(false) {
        if (reinterpret_cast<std::uintptr_t>(bytes.data()) % 64 != 0) {
            throw error(errc::argument, path_.string(), "must begin at a multiple of 64 in memory");
        }
    }

    mapped_file(mapped_file&& other) noexcept
        : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})), mapped_(other.mapped_) {}
    mapped_file& operator=(mapped_file&& other) noexcept {
        std::swap(path_, other.path_);
        std::swap(bytes_, other.bytes_);
        std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~mapped_file() {
        if (mapped_ && !bytes_.empty()) detail::unmap_file(bytes_);
    }

    [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }
    [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }

    void advise(access_hint hint) const noexcept {
        if (mapped_ && !bytes_.empty()) detail::advise_mapping(bytes_, hint);
    }

    /// Gives back the memory behind a part of bytes() that was read and is not needed soon. The part stays valid:
    /// reading it again fetches it again.
    void release(std::span<const std::byte> part) const noexcept {
        if (mapped_) detail::release_pages(part);
    }

private:
    std::filesystem::path path_;
    std::span<const std::byte> bytes_;
    bool mapped_ = true;
};

}  // namespace keel::inline KEEL_ABI
