// SPDX-License-Identifier: MIT
//
// What lets a sequence go back. A recurrent state has no way back by itself: either a copy of it was kept, or it is
// computed again from an earlier one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/state.hpp>

namespace keel::inline KEEL_ABI {

/// A recurrent state at some length of the sequence; the latent cache needs no copy, since it is only appended to.
template <backend B>
struct state_copy {
    index length = 0;
    std::shared_ptr<const typename B::buffer> recurrent;
    std::shared_ptr<const kept_logits<B>> logits;  // behind that length, or null
};

/// Bytes of a state: its recurrent part, and the logits behind it.
inline index state_bytes(const memory_layout& layout, index vocabulary) {
    return layout.recurrent_bytes() + vocabulary * static_cast<index>(sizeof(float));
}

/// A bounded number of copies, thinned so that they lie the denser the nearer they are to the end: to go back by n
/// tokens costs computing about n again. One of them can be marked, and stays. Copying the list shares the states.
template <backend B>
class state_history {
public:
    explicit state_history(index most) : most_(most) {}

    /// The most copies that there can be.
    [[nodiscard]] index most() const { return most_; }

    /// Adds what `copy` makes of the state, unless one of that length is there; another one makes room for it first.
    /// The lengths increase from call to call, unless forget_behind() took the later ones away.
    template <class Copy>
    void add(index length, Copy&& copy) {
        if (length == last_length()) return;
        if (static_cast<index>(copies_.size()) == most_ && !drop_one(length)) return;
        copies_.push_back(copy());
    }

    /// The copy of this length is the one that stays, and no other is.
    void mark(index length) { marked_ = length; }
    [[nodiscard]] std::optional<index> marked() const { return marked_; }

    /// The last copy at `length` or before, or null.
    [[nodiscard]] const state_copy<B>* at_most(index length) const {
        const auto behind = std::ranges::upper_bound(copies_, length, {}, &state_copy<B>::length);
        return behind == copies_.begin() ? nullptr : &*std::prev(behind);
    }

    void forget_behind(index length) {
        std::erase_if(copies_, [&](const state_copy<B>& c) { return c.length > length; });
        if (marked_ > length) marked_.reset();
    }

    [[nodiscard]] index last_length() const { return copies_.empty() ? 0 : copies_.back().length; }
    [[nodiscard]] std::span<const state_copy<B>> copies() const { return copies_; }

private:
    /// Takes out the copy whose absence widens a gap the least, measured in the gap's distance from the end; false if
    /// there is none.
    bool drop_one(index end) {
        const auto length = [&](std::size_t i) { return i == copies_.size() ? end : copies_[i].length; };
        std::size_t least = copies_.size();
        double least_cost = std::numeric_limits<double>::infinity();
        for (std::size_t i = 0; i < copies_.size(); ++i) {
            const index before = i == 0 ? 0 : length(i - 1);
            const double cost = static_cast<double>(length(i + 1) - before) / static_cast<double>(end - before + 1);
            if (length(i) != marked_ && cost < least_cost) {
                least = i;
                least_cost = cost;
            }
        }
        if (least == copies_.size()) return false;
        copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(least));
        return true;
    }

    index most_;
    std::vector<state_copy<B>> copies_;
    std::optional<index> marked_;
};

/// Bytes of the rows that a replay_window keeps.
inline index replay_window_bytes(const memory_layout& layout, index tokens) {
    return layout.kda_layers * 2 * (tokens + 1) * layout.kept_floats() * static_cast<index>(sizeof(float));
}

/// Goes back to any of the last tokens by replay: a state of some tokens ago, and since then what each KDA layer needs
/// to repeat its recurrence (about 1 MB a token for Kimi-Linear, where the state takes 43 MB).
template <backend B>
class replay_window {
public:
    /// For going back by `tokens`, and by one more: the logits of where that ends are computed from there.
    replay_window(const B& b, const memory_layout& layout, index tokens)
        : reach_(tokens + 1), rows_(b.allocate(replay_window_bytes(layout, tokens))) {}

    /// Reaches back so many tokens at least, once there are as many.
    [[nodiscard]] index reach() const { return reach_; }
    [[nodiscard]] index capacity() const { return 2 * reach_; }

    /// The state that a replay begins with, empty if there is none yet.
    [[nodiscard]] const state_copy<B>& start() const { return start_; }
    void begin_at(state_copy<B> start) { start_ = std::move(start); }

    /// (KDA layers, capacity, kept_floats): row of position p in slot p % capacity.
    [[nodiscard]] float* rows() const { return reinterpret_cast<float*>(rows_.data()); }

private:
    index reach_;
    state_copy<B> start_;
    typename B::buffer rows_;
};

}  // namespace keel::inline KEEL_ABI
