// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Hands out views of one block of memory, last in, first out; nothing is allocated and nothing is destroyed.
/// It only computes addresses, so that the memory may be a device's. Not thread-safe.
class arena {
public:
    static constexpr index alignment = 256;

    /// Without memory an arena only counts: the views it hands out are null, and peak() is what a real one would need.
    arena() = default;

    /// `memory` (aligned to `alignment`) belongs to the caller and outlives the arena.
    arena(std::byte* memory, index bytes) : memory_(memory), capacity_(bytes) {}

    /// A dense view of uninitialised elements: take<float>(rows, columns).
    template <class T, class... Extents>
    view<T, static_cast<int>(sizeof...(Extents))> take(Extents... extents) {
        const index bytes = (static_cast<index>(sizeof(T)) * ... * static_cast<index>(extents));
        const index rounded = (bytes + alignment - 1) / alignment * alignment;
        if (rounded > capacity_ - used_) throw error(errc::capacity, "workspace", "larger batch than it was made for");
        T* const data = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
        used_ += rounded;
        peak_ = std::max(peak_, used_);
        return {data, extents...};
    }

    /// The most bytes that were ever in use at once.
    [[nodiscard]] index peak() const { return peak_; }

    /// Gives back, at the end of its life, all that was taken since its beginning.
    class scope {
    public:
        explicit scope(arena& a) : arena_(a), used_(a.used_) {}
        ~scope() { arena_.used_ = used_; }
        scope(const scope&) = delete;
        scope& operator=(const scope&) = delete;

    private:
        arena& arena_;
        index used_;
    };

private:
    std::byte* memory_ = nullptr;
    index capacity_ = std::numeric_limits<index>::max();
    index used_ = 0;
    index peak_ = 0;
};

}  // namespace keel::inline KEEL_ABI
