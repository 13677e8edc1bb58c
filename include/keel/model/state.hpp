// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// What a sequence remembers: the recurrent state of the KDA layers, and one latent row per token of each MLA layer, in
/// blocks. A value: a copy continues on its own and to the bit like the original. The recurrent part (its size does not
/// depend on the length) is copied; blocks are shared until one of the copies appends to the last, unfinished one.
template <backend B>
class sequence_state {
public:
    /// An empty sequence.
    sequence_state(const B& b, const memory_layout& layout)
        : layout_(layout), recurrent_(b.allocate(layout.recurrent_bytes())) {}

    /// A sequence of `length` tokens whose bytes were saved. The spans have the sizes that the layout says.
    sequence_state(B& b, const memory_layout& layout, index length, std::span<const std::byte> recurrent,
                   std::span<const std::byte> blocks)
        : sequence_state(b, layout) {
        make_room(b, length);
        b.upload(recurrent_.data(), recurrent.data(), recurrent_.size());
        for (std::size_t i = 0; i < pointers_.size(); ++i) {
            b.upload(pointers_[i], blocks.data() + i * static_cast<std::size_t>(layout.block_bytes()),
                     layout.block_bytes());
        }
        length_ = length;
    }

    /// Goes back to an earlier length, whose recurrent part this is. Of the latent cache `cached` tokens stay, no fewer
    /// than `length`: a replay leads to them.
    void resume(const typename B::buffer& recurrent, index length, index cached) {
        recurrent_ = recurrent;
        length_ = length;
        const index blocks = (cached + memory_layout::block_rows - 1) / memory_layout::block_rows;
        blocks_.resize(std::min(blocks_.size(), static_cast<std::size_t>(blocks)));
        pointers_.resize(blocks_.size());
    }

    /// The next `rows` rows of a replay, which leaves the latent cache alone.
    [[nodiscard]] segment replay(index rows) const {
        return {.first_row = 0, .rows = rows, .position = length_, .recurrent = recurrent_.data()};
    }

    /// Tokens that the state holds.
    [[nodiscard]] index length() const { return length_; }

    [[nodiscard]] const memory_layout& layout() const { return layout_; }

    /// The next `rows` rows of a batch that continue this sequence, with memory for them. The state advances when the
    /// batch has run and advance() is called; until then it must not move.
    [[nodiscard]] segment extend(const B& b, index first_row, index rows) {
        make_room(b, length_ + rows);
        return {first_row, rows, length_, recurrent_.data(), pointers_.data()};
    }

    /// After a batch ran.
    void advance(index rows) { length_ += rows; }

    [[nodiscard]] const typename B::buffer& recurrent() const { return recurrent_; }
    [[nodiscard]] const std::vector<std::shared_ptr<const typename B::buffer>>& blocks() const { return blocks_; }

private:
    void make_room(const B& b, index positions) {
        if (layout_.mla_layers == 0) return;
        const bool unfinished = length_ % memory_layout::block_rows != 0;
        if (unfinished && positions > length_ && !owned(blocks_.back())) place(blocks_.size() - 1, *blocks_.back());
        while (static_cast<index>(blocks_.size()) * memory_layout::block_rows < positions) {
            blocks_.emplace_back();
            pointers_.emplace_back();
            place(blocks_.size() - 1, b.allocate(layout_.block_bytes()));
        }
    }

    /// True if no other copy refers to the block. Whoever let go of it last is done with it.
    static bool owned(const std::shared_ptr<const typename B::buffer>& block) {
        const bool alone = block.use_count() == 1;
        std::atomic_thread_fence(std::memory_order_acquire);
        return alone;
    }

    void place(std::size_t i, typename B::buffer block) {
        pointers_[i] = block.data();
        blocks_[i] = std::make_shared<const typename B::buffer>(std::move(block));
    }

    memory_layout layout_;
    typename B::buffer recurrent_;
    std::vector<std::shared_ptr<const typename B::buffer>> blocks_;
    std::vector<std::byte*> pointers_;  // of the blocks; only an owned block is written to, behind length_
    index length_ = 0;
};

}  // namespace keel::inline KEEL_ABI
