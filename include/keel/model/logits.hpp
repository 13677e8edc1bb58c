// SPDX-License-Identifier: MIT
//
// What becomes of the model's output. A backend that can make shortlists (backend/concept.hpp) keeps rows of logits in
// its own memory, for a sampler seldom needs a whole one; with any other they are in host memory from the beginning.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/shortlist.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Whether a backend makes shortlists.
template <class B>
concept makes_shortlists = requires(B& b, shortlist_args list, scatter_args rows) {
    b.shortlist(list);
    b.scatter(rows);
};

/// The model's output for some rows, in backend memory.
struct projected {
    view<float, 2> logits;     // (n, vocabulary)
    view<shortlist, 1> lists;  // (n), or empty where the backend makes none

    [[nodiscard]] projected first(index count) const {
        return {logits.rows(0, count), lists.size() == 0 ? lists : lists.rows(0, count)};
    }
};

/// Room for the output of n rows on backend B.
template <class B>
projected take_projected(arena& workspace, index n, index vocabulary) {
    return {workspace.take<float>(n, vocabulary), workspace.take<shortlist>(makes_shortlists<B> ? n : 0)};
}

/// Fetches a row of logits.
template <backend B>
void read_row(B& b, view<const float, 1> from, std::vector<float>& to) {
    to.resize(static_cast<std::size_t>(from.size()));
    b.download(reinterpret_cast<std::byte*>(to.data()), reinterpret_cast<const std::byte*>(from.data),
               from.size() * static_cast<index>(sizeof(float)));
}

/// The logits of what comes after a sequence, or none. A value: a copy holds the same bits.
template <backend B>
class kept_logits {
public:
    kept_logits() = default;
    explicit kept_logits(std::vector<float> values) : values_(std::move(values)) {}

    /// One per entry of the vocabulary, or empty. `run`, an executor, fetches them at the first call.
    template <class Executor>
    std::span<const float> values(const Executor& run) {
        if (list_ && values_.empty()) {
            const view<const float, 1> row(reinterpret_cast<const float*>(row_.data()), list_->vocabulary);
            run.with_backend([&](B& b) { read_row(b, row, values_); });
        }
        return values_;
    }

    /// Lets `sample`, a function from logits to a token, draw one; a sampler that takes shortlists seldom needs more.
    template <class Executor, class Sample>
    token draw(const Executor& run, Sample& sample) {
        if constexpr (requires(const shortlist& list) { sample.draw(list); }) {
            if (list_) {
                if (const std::optional<token> drawn = sample.draw(*list_)) return *drawn;
            }
        }
        return sample(values(run));
    }

    /// Gives each row of the output to the one that keeps it, if there is one.
    static void keep(B& b, const projected& from, std::span<kept_logits* const> by) {
        if constexpr (makes_shortlists<B>) {
            if (std::ranges::all_of(by, [](const kept_logits* k) { return k == nullptr; })) return;
            std::vector<float*> rows(by.size());
            for (std::size_t i = 0; i < by.size(); ++i) {
                if (by[i] != nullptr) rows[i] = by[i]->own_row(b, from.logits.extent[1]);
            }
            b.scatter({from.logits, rows});
            std::vector<shortlist> lists(by.size());
            b.download(reinterpret_cast<std::byte*>(lists.data()), reinterpret_cast<const std::byte*>(from.lists.data),
                       from.lists.size() * static_cast<index>(sizeof(shortlist)));
            for (std::size_t i = 0; i < by.size(); ++i) {
                if (by[i] != nullptr) by[i]->list_ = lists[i];
            }
        } else {
            for (std::size_t i = 0; i < by.size(); ++i) {
                if (by[i] != nullptr) read_row<B>(b, from.logits[static_cast<index>(i)], by[i]->values_);
            }
        }
    }

private:
    /// Where the next row will lie.
    float* own_row(B& b, index vocabulary) {
        values_.clear();
        if (row_.size() == 0) row_ = b.allocate(vocabulary * static_cast<index>(sizeof(float)));
        return reinterpret_cast<float*>(row_.data());
    }

    std::vector<float> values_;      // empty while nobody has asked for them
    std::optional<shortlist> list_;  // of row_, if there is one
    typename B::buffer row_;
};

}  // namespace keel::inline KEEL_ABI
