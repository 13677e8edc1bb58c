// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>

namespace keel::inline KEEL_ABI {

/// How far a long operation has come. `done` and `total` share a unit that the stage implies (bytes, tokens, tensors).
struct progress_report {
    std::string_view stage;  ///< "load", "prefill", "convert", ...; valid during the call only
    std::uint64_t done = 0;
    std::uint64_t total = 0;
};

/// Called now and then, on the thread that called keel. Answering false cancels: the operation throws
/// errc::cancelled and leaves its object in a valid state. An empty function means "do not report".
using progress = std::function<bool(const progress_report&)>;

/// Reports, and throws errc::cancelled if the answer is no.
inline void report(const progress& to, std::string_view stage, std::uint64_t done, std::uint64_t total) {
    if (to && !to({stage, done, total})) throw error(errc::cancelled, stage, "cancelled by the caller");
}

}  // namespace keel::inline KEEL_ABI
