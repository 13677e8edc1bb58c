// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/model/executor.hpp>
#include <keel/model/history.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/state.hpp>

namespace keel::inline KEEL_ABI {

/// What a sequence keeps so that it can go back; see session_options.
struct sequence_options {
    index context = 0;
    index checkpoint_bytes = 0;
    index checkpoint_every = 0;
    index replay = 0;
};

/// The state behind some tokens, the logits of what comes next, and what leads back to earlier states. A value. It does
/// not hold the tokens themselves: who has them calls next(), lets the executor run the job, and calls finish().
template <backend B>
class sequence {
public:
    /// An empty one; `run` outlives it. Throws errc::argument for options that make no sense.
    sequence(const executor<B>& run, const sequence_options& options)
        : run_(&run),
          context_(options.context),
          checkpoint_every_(options.checkpoint_every),
          state_(run.make_state()),
          history_(options.checkpoint_bytes / bytes_of_state()) {
        const auto require = [](bool good, const char* name, const char* what) {
            if (!good) throw error(errc::argument, name, what);
        };
        require(options.checkpoint_bytes >= 0, "checkpoint_bytes", "must not be negative");
        require(options.checkpoint_every > 0, "checkpoint_every", "must be at least 1");
        require(options.replay >= 0 && options.replay <= context_, "replay", "must be from 0 to the context");
        if (options.replay > 0) {
            require(executor<B>::can_replay, "replay", "is not possible on this backend");
            run.with_backend([&](B& b) { window_.emplace(b, state_.layout(), options.replay); });
            window_->begin_at(copy_state());
        }
        run.prepare(context_);
    }

    /// The most tokens that it is made for.
    [[nodiscard]] index context() const { return context_; }

    /// Tokens that the state holds.
    [[nodiscard]] index length() const { return state_.length(); }

    [[nodiscard]] const sequence_state<B>& state() const { return state_; }

    /// Whether the logits behind the state are known, and these.
    [[nodiscard]] bool has_logits() const { return logits_behind_ == length(); }
    [[nodiscard]] kept_logits<B>& logits() { return logits_; }

    /// The checkpoints.
    [[nodiscard]] const state_history<B>& history() const { return history_; }
    [[nodiscard]] state_history<B>& history() { return history_; }

    /// The first of the tokens that are left to run, at most `most`. Nothing may happen to the sequence until the job
    /// has run and finish() is called.
    [[nodiscard]] job<B> next(std::span<const token> left, index most) {
        const auto count = static_cast<index>(left.size());
        index rows = std::min(most, count);
        const replay_window<B>* keep = nullptr;
        if (window_ && count > window_->reach()) {
            rows = std::min(rows, count - window_->reach());  // behind these a new window begins
        } else if (window_) {
            rows = std::min(rows, window_->reach());
            if (length() + rows - window_->start().length > window_->capacity())
                move_window(length() - (window_->reach() - rows));
            keep = &*window_;
        }
        const auto part = left.first(static_cast<std::size_t>(rows));
        return {&state_, part, rows == count ? want::last : want::none, keep, &logits_};
    }

    /// After a job has run.
    void finish(const job<B>& ran) {
        if (ran.logits != want::none) logits_behind_ = length();
        if (window_ && ran.keep == nullptr) window_->begin_at(copy_state());
        if (length() - history_.last_length() >= checkpoint_every_) checkpoint();
    }

    /// Keeps a copy of the state, as far as there is room for it beside the marked one.
    void checkpoint() {
        history_.add(length(), [&] { return copy_state(); });
    }

    /// Keeps a copy of the state that stays until another one is marked. Throws errc::capacity if there may be none.
    void mark() {
        if (length() > 0 && history_.most() == 0) {
            throw error(errc::capacity, "checkpoint_bytes",
                        "must be " + std::to_string(bytes_of_state()) + " at least to hold a state");
        }
        history_.mark(length());
        checkpoint();
    }

    /// Goes back to `target` tokens, no more than the state holds, and the logits behind them, or to fewer tokens if
    /// those are not to be had without computing. Answers how many of the tokens that it holds then were replayed.
    index go_back(index target) {
        // Without its logits a state at the target is of no use: the last token has to run again, so one less will do.
        const auto* copy = history_.at_most(target);
        if (copy != nullptr && copy->length == target && copy->logits == nullptr) copy = history_.at_most(target - 1);
        const index kept = copy == nullptr ? 0 : copy->length;
        const index wanted = std::max<index>(target - 1, 0);
        index replayed = 0;
        if (window_ && window_->start().length <= wanted && kept < target) {
            const state_copy<B> start = window_->start();
            replayed = wanted - start.length;
            state_.resume(*start.recurrent, start.length, wanted);
            run_->replay(state_, *window_, replayed, context_);
            set_logits(start.length == wanted ? start.logits : nullptr);
        } else if (copy != nullptr) {
            state_.resume(*copy->recurrent, copy->length, copy->length);
            set_logits(copy->logits);
        } else {
            run_->with_backend([&](B& b) { state_.clear(b); });
            set_logits(nullptr);
        }
        history_.forget_behind(length());
        if (window_ && window_->start().length > length()) window_->begin_at(copy_state());
        return replayed;
    }

    /// Fills an empty sequence with a state that was saved.
    void load(B& b, index length, std::span<const std::byte> recurrent, std::span<const std::byte> blocks,
              const std::shared_ptr<const kept_logits<B>>& logits) {
        state_.load(b, length, recurrent, blocks);
        set_logits(logits);
        if (window_) window_->begin_at(copy_state());
    }

private:
    [[nodiscard]] index bytes_of_state() const { return state_bytes(state_.layout(), run_->shape().vocabulary); }

    [[nodiscard]] state_copy<B> copy_state() const {
        return {length(), std::make_shared<const typename B::buffer>(state_.recurrent()),
                has_logits() ? std::make_shared<const kept_logits<B>>(logits_) : nullptr};
    }

    /// Lets the window begin at a later state, which it finds by replay.
    void move_window(index start) {
        sequence_state<B> state(state_.layout(), window_->start().length, *window_->start().recurrent);
        run_->replay(state, *window_, start - state.length(), context_);
        window_->begin_at({start, std::make_shared<const typename B::buffer>(std::move(state).recurrent()), nullptr});
    }

    /// The logits behind the state, or null if they are not known.
    void set_logits(const std::shared_ptr<const kept_logits<B>>& logits) {
        logits_behind_ = logits == nullptr ? -1 : length();
        logits_ = logits == nullptr ? kept_logits<B>{} : *logits;
    }

    const executor<B>* run_;
    index context_;
    index checkpoint_every_;
    sequence_state<B> state_;
    kept_logits<B> logits_;
    index logits_behind_ = -1;  // the length of the state that logits_ belongs to
    state_history<B> history_;
    std::optional<replay_window<B>> window_;
};

}  // namespace keel::inline KEEL_ABI
