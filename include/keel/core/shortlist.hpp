// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <keel/core/compiler.hpp>
#include <keel/core/token.hpp>

namespace keel::inline KEEL_ABI {

/// What a sampler nearly always needs of a row of logits, in three kilobytes: the likeliest tokens, and how many others
/// lie how far below. Logits are sorted into bins: bin i holds those with floor(per_unit logit) == top - i, so that bin
/// 0 holds the largest. NaN, negative infinity and what lies below the last bin are in none.
struct shortlist {
    static constexpr int most = 256;
    static constexpr int bins = 256;
    static constexpr int per_unit = 8;

    struct entry {
        token id;
        float logit;
    };

    float best;                  ///< the largest logit that is not NaN; negative infinity if there is none
    std::int32_t top;            ///< floor(per_unit best)
    std::int32_t vocabulary;     ///< logits of the row
    std::int32_t listed;         ///< how many entries there are: all tokens of the first bins, of as many as fit
    std::uint32_t others[bins];  ///< tokens in the bins that are not listed
    entry entries[most];         ///< in no order
};

}  // namespace keel::inline KEEL_ABI
