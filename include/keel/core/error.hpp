// SPDX-License-Identifier: MIT
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include <keel/core/compiler.hpp>

namespace keel::inline KEEL_ABI {

/// What kind of thing went wrong; for programs. The message is for people.
enum class errc {
    file,         ///< the operating system refused: missing, unreadable, no space, mapping failed
    format,       ///< the bytes are not what the format requires: truncated, inconsistent, damaged
    unsupported,  ///< well-formed, but keel does not do it: tensor type, architecture, version
    argument,     ///< the caller passed something that cannot be: token id out of range, empty prompt
    capacity,     ///< it does not fit: context full, not enough memory
    cancelled,    ///< a progress callback answered no
    device,       ///< a GPU, its driver or its runtime failed
    numeric,      ///< a NaN or an infinity where none may be
};

/// The one exception type of keel. Thrown while loading and on misuse, never from inside a kernel.
/// The message reads "subject: what is wrong", where the subject is the file, tensor, key or argument concerned.
class error : public std::runtime_error {
public:
    error(errc code, std::string_view subject, std::string_view what)
        : std::runtime_error(std::string(subject).append(": ").append(what)), code_(code) {}

    [[nodiscard]] errc code() const noexcept { return code_; }

private:
    errc code_;
};

}  // namespace keel::inline KEEL_ABI
