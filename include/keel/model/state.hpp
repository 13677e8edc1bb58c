// SPDX-License-Identifier: MIT
#pragma once

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
/// blocks. A value: a copy continues on its own and to the bit like the original. Copying costs the recurrent part,
/// whose size does not depend on the length, and the last block if there is room left in it; full blocks never change
/// again and are shared.
template <backend B>
class sequence_state {
public:
    /// An empty sequence.
    sequence_state(const B& b, const memory_layout& layout)
        : layout_(layout), recurrent_(b.allocate(layout.recurrent_bytes())) {}

    /// The recurrent part alone of a sequence of `length` tokens, for a replay.
    sequence_state(const memory_layout& layout, index length, typename B::buffer recurrent)
        : layout_(layout), recurrent_(std::move(recurrent)), length_(length) {}

    sequence_state(const sequence_state& other)
        : layout_(other.layout_),
          recurrent_(other.recurrent_),
          blocks_(other.blocks_),
          pointers_(other.pointers_),
          length_(other.length_) {
        keep_blocks(length_);
    }
    sequence_state(sequence_state&&) noexcept = default;
    sequence_state& operator=(sequence_state other) noexcept {
        std::swap(layout_, other.layout_);
        std::swap(recurrent_, other.recurrent_);
        blocks_.swap(other.blocks_);
        pointers_.swap(other.pointers_);
        length_ = other.length_;
        return *this;
    }
    ~sequence_state() = default;

    /// Fills an empty sequence with `length` tokens whose bytes were saved. The spans have the sizes that the layout
    /// says.
    void load(B& b, index length, std::span<const std::byte> recurrent, std::span<const std::byte> blocks) {
        make_room(b, length);
        b.upload(recurrent_.data(), recurrent.data(), recurrent_.size());
        for (std::size_t i = 0; i < pointers_.size(); ++i) {
            b.upload(pointers_[i], blocks.data() + i * static_cast<std::size_t>(layout_.block_bytes()),
                     layout_.block_bytes());
        }
        length_ = length;
    }

    /// Goes back to an earlier length, whose recurrent part this is. Of the latent cache `cached` tokens stay, no fewer
    /// than `length`: a replay leads to them.
    void resume(const typename B::buffer& recurrent, index length, index cached) {
        recurrent_ = recurrent;
        length_ = length;
        keep_blocks(cached);
    }

    /// Forgets everything, and needs no memory beside its own for that.
    void clear(const B& b) {
        recurrent_ = {};  // before there is another
        recurrent_ = b.allocate(layout_.recurrent_bytes());
        length_ = 0;
        keep_blocks(0);
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

    [[nodiscard]] const typename B::buffer& recurrent() const& { return recurrent_; }
    [[nodiscard]] typename B::buffer recurrent() && { return std::move(recurrent_); }
    [[nodiscard]] const std::vector<std::shared_ptr<const typename B::buffer>>& blocks() const { return blocks_; }

private:
    void make_room(const B& b, index positions) {
        const std::size_t needed = layout_.blocks(positions);
        while (blocks_.size() < needed) {
            blocks_.emplace_back();
            pointers_.emplace_back();
            place(blocks_.size() - 1, b.allocate(layout_.block_bytes()));
        }
    }

    /// Lets go of what is behind the first `rows` rows. Rows will be appended to the last block, if it is not full
    /// then, so that it has to be this sequence's alone.
    void keep_blocks(index rows) {
        blocks_.resize(layout_.blocks(rows));
        pointers_.resize(blocks_.size());
        if (!blocks_.empty() && rows % memory_layout::block_rows != 0) place(blocks_.size() - 1, *blocks_.back());
    }

    void place(std::size_t i, typename B::buffer block) {
        pointers_[i] = block.data();
        blocks_[i] = std::make_shared<const typename B::buffer>(std::move(block));
    }

    memory_layout layout_;
    typename B::buffer recurrent_;
    std::vector<std::shared_ptr<const typename B::buffer>> blocks_;
    std::vector<std::byte*> pointers_;  // of the blocks; written to behind length_ only
    index length_ = 0;
};

}  // namespace keel::inline KEEL_ABI
