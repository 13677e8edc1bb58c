// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <keel/core/compiler.hpp>

namespace keel::inline KEEL_ABI {

/// A token's id: a row of the embedding, an entry of the vocabulary. Negative values are never valid.
using token = std::int32_t;

}  // namespace keel::inline KEEL_ABI
