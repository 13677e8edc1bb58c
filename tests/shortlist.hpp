// SPDX-License-Identifier: MIT
//
// The shortlist of a row of logits as its definition says, one logit after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <vector>

#include <keel/core/shortlist.hpp>
#include <keel/core/token.hpp>

namespace keel::testing {

inline shortlist shortlist_of(std::span<const float> logits) {
    shortlist list{};
    list.best = -INFINITY;
    list.vocabulary = static_cast<std::int32_t>(logits.size());
    for (const float x : logits) list.best = std::isnan(x) ? list.best : std::max(list.best, x);
    const auto bin_of = [](float x) {
        constexpr double least = std::numeric_limits<std::int32_t>::min(), most = std::numeric_limits<int>::max();
        return std::clamp(std::floor(static_cast<double>(x) * shortlist::per_unit), least, most);
    };
    list.top = static_cast<std::int32_t>(bin_of(list.best));
    std::map<int, std::vector<shortlist::entry>> bins;
    for (std::size_t i = 0; i < logits.size(); ++i) {
        if (std::isnan(logits[i]) || logits[i] == -INFINITY) continue;
        const double bin = list.top - bin_of(logits[i]);
        if (bin < shortlist::bins) bins[static_cast<int>(bin)].push_back({static_cast<token>(i), logits[i]});
    }
    bool fits = true;
    for (const auto& [bin, entries] : bins) {
        fits = fits && static_cast<std::size_t>(list.listed) + entries.size() <= shortlist::most;
        if (fits) {
            std::ranges::copy(entries, list.entries + list.listed);
            list.listed += static_cast<std::int32_t>(entries.size());
        } else {
            list.others[bin] = static_cast<std::uint32_t>(entries.size());
        }
    }
    return list;
}

}  // namespace keel::testing
