// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Finds items by name in O(log n). Sorted, not hashed: the names come from files, and names chosen to collide would
/// make a hash table slow. It holds positions only, so the items may move as long as their order stays.
/// `Name` is a member of Item (data or function) that converts to std::string_view.
template <class Item, auto Name>
class name_index {
public:
    name_index() = default;

    explicit name_index(std::span<const Item> items) : order_(items.size()) {
        std::iota(order_.begin(), order_.end(), std::size_t{0});
        std::ranges::sort(order_, {}, name_in(items));
    }

    /// Null if there is none. `items` are those that the index was made of.
    [[nodiscard]] const Item* find(std::span<const Item> items, std::string_view name) const {
        const auto at = std::ranges::lower_bound(order_, name, {}, name_in(items));
        return at != order_.end() && name_in(items)(*at) == name ? &items[*at] : nullptr;
    }

    /// An item whose name another item also has, or null.
    [[nodiscard]] const Item* duplicate(std::span<const Item> items) const {
        const auto at = std::ranges::adjacent_find(order_, {}, name_in(items));
        return at != order_.end() ? &items[*at] : nullptr;
    }

private:
    static auto name_in(std::span<const Item> items) {
        return [items](std::size_t i) -> std::string_view { return std::invoke(Name, items[i]); };
    }

    std::vector<std::size_t> order_;
};

}  // namespace keel::inline KEEL_ABI
