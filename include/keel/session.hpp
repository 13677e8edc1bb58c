// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/progress.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/fwd.hpp>
#include <keel/io/snapshot.hpp>
#include <keel/model/executor.hpp>
#include <keel/model/history.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/saved_sequence.hpp>
#include <keel/model/state.hpp>
#include <keel/text/tokenizer.hpp>

namespace keel::inline KEEL_ABI {

struct session_options {
    index context = 0;  ///< most tokens that the session will hold; 0: what the model was trained for, at most 8192
    bool beyond_training = false;  ///< more than the model was trained for is not an error

    /// What copies of the state may take (44 MB each for Kimi-Linear, engine.plan().state) that the session keeps by
    /// itself where turns begin and every checkpoint_every tokens, so that going back does not mean starting anew.
    index checkpoint_bytes = index{192} << 20;
    index checkpoint_every = 2048;

    /// rewind() goes back by up to this many tokens by replaying their recurrence instead of running the model (about 2
    /// MB a token for Kimi-Linear). 0: no replays.
    index replay = 0;
};

/// What to do on the way through a feed.
struct feed_options {
    progress tell = {};  ///< stage "prefill", counted in tokens; answering no stops behind the last whole batch
    /// Called for every token fed, with the logits of what comes after it. Costs a product with the whole vocabulary
    /// each.
    std::function<void(index position, std::span<const float> logits)> each = {};
};

/// How a session came to hold other tokens than before.
struct rewound {
    index reused = 0;    ///< tokens of which nothing had to be computed
    index replayed = 0;  ///< tokens whose recurrence was repeated
    index computed = 0;  ///< tokens that ran, or will run with the next feed, through the model
};

namespace detail {

/// What an engine shares with its sessions.
template <backend B>
struct loaded_model {
    tokenizer text;
    std::uint64_t fingerprint;
    executor<B> run;
};

/// Notices two threads in one object. A copy is another object.
class one_at_a_time {
public:
    one_at_a_time() = default;
    one_at_a_time(const one_at_a_time&) noexcept {}
    one_at_a_time& operator=(const one_at_a_time&) noexcept { return *this; }

    class hold {
    public:
        explicit hold(one_at_a_time& of) : of_(of) {
            if (of.taken_.test_and_set(std::memory_order_acquire)) {
                throw error(errc::argument, "session", "is used by two threads at the same time");
            }
        }
        ~hold() { of_.taken_.clear(std::memory_order_release); }
        hold(const hold&) = delete;
        hold& operator=(const hold&) = delete;

    private:
        one_at_a_time& of_;
    };

private:
    std::atomic_flag taken_;
};

}  // namespace detail

/// One timeline: tokens, and the state that the model has after them. Made by an engine, which it keeps alive.
///
/// A value: a copy goes on independently, and to the bit as the original would. Copying costs the recurrent state (and
/// the rows for replays, if there are any); the full blocks of the latent cache are shared. One session serves one
/// thread at a time (a second one is errc::argument); different sessions, also of one engine, may run on different
/// threads. After errc::device or errc::numeric a session must not go on.
template <class B>
class basic_session {
    static_assert(backend<B>);

public:
    /// Appends tokens and runs the model over them. Throws errc::argument for an id outside the vocabulary and
    /// errc::capacity if the context cannot hold them, both before anything happens; errc::cancelled if progress says
    /// so.
    void feed(std::span<const token> tokens, const feed_options& options = {}) {
        const detail::one_at_a_time::hold alone(in_use_);
        push(tokens);
        evaluate(options);
    }

    /// Appends tokens that run through the model later: with the next feed, or together with other sessions' in
    /// engine.step(). Throws as feed() does.
    void append(std::span<const token> tokens) {
        const detail::one_at_a_time::hold alone(in_use_);
        push(tokens);
    }

    /// Draws the next token and appends it, or answers nothing if it ends the generation; then nothing is appended.
    /// `sample` is a keel::sampler or any function from logits to a token; on a GPU a sampler nearly always does with a
    /// few of the logits (shortlist), and the others stay there. Throws errc::capacity if the context is
    /// full, and what `sample` throws.
    template <std::invocable<std::span<const float>> Sample>
    std::optional<token> next(Sample&& sample) {
        const detail::one_at_a_time::hold alone(in_use_);
        require_room(1);
        evaluate({});
        const token drawn = logits_.draw(model_->run, sample);
        if (model_->text.is_end_of_generation(drawn)) return std::nullopt;
        tokens_.push_back(drawn);  // runs through the model when its logits are asked for
        return drawn;
    }

    /// The logits of what comes after the last token: one per entry of the vocabulary, empty if no token was fed yet.
    /// Valid until the session changes.
    [[nodiscard]] std::span<const float> logits() {
        const detail::one_at_a_time::hold alone(in_use_);
        evaluate({});
        return logits_.values(model_->run);
    }

    /// Whether logits() is there without running the model.
    [[nodiscard]] bool ready() const { return !tokens_.empty() && logits_behind_ == position(); }

    /// All tokens so far, drawn ones included.
    [[nodiscard]] std::span<const token> tokens() const { return tokens_; }

    /// How many tokens there are.
    [[nodiscard]] index position() const { return static_cast<index>(tokens_.size()); }

    /// The most tokens there can be.
    [[nodiscard]] index context() const { return context_; }

    /// Keeps a copy of the state here, to which rewind() goes back at once. Sessions do so by themselves where a feed
    /// begins (see session_options); the number of copies is bounded, and old ones make room for new ones.
    void checkpoint() {
        const detail::one_at_a_time::hold alone(in_use_);
        evaluate({});
        remember();
    }

    /// Forgets all tokens behind the first `position`. The session is then as if it had been fed those alone: exactly
    /// so in precision::exact, within rounding in fast. Goes back to a kept state, replays, or leaves tokens to be
    /// computed again by the next feed, whatever is least work; the answer says which. Throws errc::argument for a
    /// position behind the end.
    rewound rewind(index position) {
        const detail::one_at_a_time::hold alone(in_use_);
        return go_back(position);
    }

    /// Makes the session hold exactly these tokens with the least work: keeps what they have in common with its own,
    /// and runs the rest. Throws as feed() does.
    rewound sync(std::span<const token> tokens, const feed_options& options = {}) {
        const detail::one_at_a_time::hold alone(in_use_);
        check(tokens);
        if (static_cast<index>(tokens.size()) > context_) no_room(static_cast<index>(tokens.size()), 0);
        const auto common = std::ranges::mismatch(tokens, tokens_).in1 - tokens.begin();
        rewound how = go_back(common);
        push(tokens.subspan(static_cast<std::size_t>(common)));
        how.computed = position() - state_.length();
        evaluate(options);
        return how;
    }

    /// Writes tokens, state and cache to a file that engine.resume() reads. Checkpoints are not part of it. The file
    /// appears under its name when it is complete. Throws errc::file.
    void save(const std::filesystem::path& path) {
        const detail::one_at_a_time::hold alone(in_use_);
        save_sequence(path, model_->fingerprint, model_->run, tokens(), state_,
                      logits_behind_ == state_.length() ? logits_.values(model_->run) : std::span<const float>());
    }

private:
    template <class>
    friend class basic_engine;

    /// Tokens that a feed must have for a checkpoint in front of it: a turn, not a token drawn elsewhere.
    static constexpr index turn_tokens = 16;

    basic_session(std::shared_ptr<const detail::loaded_model<B>> model, index context, const session_options& options)
        : model_(std::move(model)),
          context_(context),
          checkpoint_every_(options.checkpoint_every),
          state_(model_->run.make_state()),
          history_(options.checkpoint_bytes / state_bytes(state_.layout(), model_->run.shape().vocabulary)) {
        const auto require = [](bool good, const char* name, const char* what) {
            if (!good) throw error(errc::argument, name, what);
        };
        require(options.checkpoint_bytes >= 0, "checkpoint_bytes", "must not be negative");
        require(options.checkpoint_every > 0, "checkpoint_every", "must be at least 1");
        require(options.replay >= 0 && options.replay <= context, "replay", "must be from 0 to the context");
        if (options.replay > 0) {
            require(executor<B>::can_replay, "replay", "is not possible on this backend");
            model_->run.with_backend([&](B& b) { window_.emplace(b, state_.layout(), options.replay); });
            window_->begin_at(copy_state());
        }
        model_->run.prepare(context_);
        tokens_.reserve(static_cast<std::size_t>(context_));
    }

    /// Continues from a snapshot, see basic_engine::resume.
    basic_session(std::shared_ptr<const detail::loaded_model<B>> model, index context, const session_options& options,
                  const snapshot& from)
        : basic_session(std::move(model), context, options) {
        saved_sequence<B> saved = load_sequence(from, model_->fingerprint, model_->run);
        push(saved.tokens);
        state_ = std::move(saved.state);
        if (!saved.logits.empty()) set_logits(std::make_shared<kept_logits<B>>(std::move(saved.logits)));
        if (window_) window_->begin_at(copy_state());
    }

    [[nodiscard]] std::uint64_t vocabulary() const {
        return static_cast<std::uint64_t>(model_->run.shape().vocabulary);
    }

    void check(std::span<const token> tokens) const {
        for (const token t : tokens) {
            if (t < 0 || static_cast<std::uint64_t>(t) >= vocabulary()) {
                throw error(errc::argument, "token " + std::to_string(t),
                            "outside the vocabulary of " + std::to_string(vocabulary()) + " tokens");
            }
        }
    }

    [[noreturn]] void no_room(index more, index taken) const {
        throw error(errc::capacity, "context",
                    "holds " + std::to_string(context_) + " tokens, " + std::to_string(taken) + " are taken and " +
                        std::to_string(more) + " more do not fit");
    }

    void require_room(index more) const {
        if (more > context_ - position()) no_room(more, position());
    }

    void push(std::span<const token> tokens) {
        check(tokens);
        require_room(static_cast<index>(tokens.size()));
        if (static_cast<index>(tokens.size()) >= turn_tokens) remember();
        tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    }

    [[nodiscard]] state_copy<B> copy_state() const {
        return {state_.length(), std::make_shared<const typename B::buffer>(state_.recurrent()),
                logits_behind_ == state_.length() ? std::make_shared<const kept_logits<B>>(logits_) : nullptr};
    }

    void remember() {
        if (state_.length() > 0) history_.add(copy_state());
    }

    /// The next part of the tokens that the model has not seen, at most `most` of them.
    [[nodiscard]] job<B> next_job(index most) {
        const index done = state_.length();
        const index left = position() - done;
        index rows = std::min(most, left);
        const replay_window<B>* keep = nullptr;
        if (window_ && left > window_->reach()) {
            rows = std::min(rows, left - window_->reach());  // behind these a new window begins
        } else if (window_) {
            rows = std::min(rows, window_->reach());
            if (done + rows - window_->start().length > window_->capacity())
                move_window(done - (window_->reach() - rows));
            keep = &*window_;
        }
        const auto part = tokens().subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(rows));
        return {&state_, part, rows == left ? want::last : want::none, keep, &logits_};
    }

    /// After a job has run.
    void finish(const job<B>& ran) {
        if (ran.logits != want::none) logits_behind_ = state_.length();
        if (window_ && ran.keep == nullptr) window_->begin_at(copy_state());
        if (state_.length() - history_.last_length() >= checkpoint_every_) remember();
    }

    /// Lets the window begin at a later state, which it finds by replay.
    void move_window(index start) {
        sequence_state<B> state = model_->run.make_state();
        state.resume(*window_->start().recurrent, window_->start().length, 0);
        model_->run.replay(state, *window_, start - state.length(), context_);
        window_->begin_at({start, std::make_shared<const typename B::buffer>(state.recurrent()), nullptr});
    }

    /// Runs the model over the tokens that it has not seen.
    void evaluate(const feed_options& options) {
        if (state_.length() == position() && logits_behind_ != position() && position() > 0) step_back();
        const index first = state_.length();
        const auto total = static_cast<std::uint64_t>(position() - first);
        const auto tell = [&] {
            report(options.tell, "prefill", static_cast<std::uint64_t>(state_.length() - first), total);
        };
        try {
            while (state_.length() < position()) {
                tell();
                const index done = state_.length();
                job<B> next = next_job(model_->run.batch_rows());
                if (options.each) next.logits = want::all;
                std::vector<float> seen;
                model_->run.run({&next, 1}, context_, [&](B& b, std::size_t, index row, view<const float, 1> from) {
                    if (!options.each) return;
                    read_row(b, from, seen);
                    options.each(done + row, seen);
                });
                finish(next);
            }
        } catch (...) {
            tokens_.resize(static_cast<std::size_t>(state_.length()));  // behind the last whole batch
            throw;
        }
        if (total > 0) tell();
    }

    /// The state holds all tokens, but their logits are not known: goes back by one, so that they can be computed.
    void step_back() {
        const std::vector<token> last(tokens_.end() - 1, tokens_.end());
        go_back(position() - 1);
        tokens_.insert(tokens_.end(), last.begin(), last.end());
    }

    rewound go_back(index target) {
        if (target < 0 || target > position()) {
            throw error(errc::argument, "position " + std::to_string(target),
                        "outside the " + std::to_string(position()) + " tokens of the session");
        }
        index replayed = 0;
        if (target < state_.length()) {
            // Without its logits a state at the target is of no use: the last token has to run again, so one less will
            // do.
            const auto* copy = history_.at_most(target);
            if (copy != nullptr && copy->length == target && copy->logits == nullptr)
                copy = history_.at_most(target - 1);
            const index kept = copy == nullptr ? 0 : copy->length;
            const index wanted = std::max<index>(target - 1, 0);
            if (window_ && window_->start().length <= wanted && kept < target) {
                const state_copy<B> start = window_->start();
                replayed = wanted - start.length;
                state_.resume(*start.recurrent, start.length, wanted);
                model_->run.replay(state_, *window_, replayed, context_);
                set_logits(start.length == wanted ? start.logits : nullptr);
            } else if (copy != nullptr) {
                state_.resume(*copy->recurrent, copy->length, copy->length);
                set_logits(copy->logits);
            } else {
                state_ = model_->run.make_state();
                set_logits(nullptr);
            }
            history_.forget_behind(target);
            if (window_ && window_->start().length > state_.length()) window_->begin_at(copy_state());
        }
        tokens_.resize(static_cast<std::size_t>(target));
        return {state_.length() - replayed, replayed, target - state_.length()};
    }

    /// The logits behind the state, or null if they are not known.
    void set_logits(const std::shared_ptr<const kept_logits<B>>& logits) {
        logits_behind_ = logits == nullptr ? -1 : state_.length();
        logits_ = logits == nullptr ? kept_logits<B>{} : *logits;
    }

    std::shared_ptr<const detail::loaded_model<B>> model_;
    index context_;
    index checkpoint_every_;
    std::vector<token> tokens_;  // the state holds all but perhaps the last ones
    sequence_state<B> state_;
    kept_logits<B> logits_;
    index logits_behind_ = -1;  // the length of the state that logits_ belongs to
    state_history<B> history_;
    std::optional<replay_window<B>> window_;
    detail::one_at_a_time in_use_;
};

}  // namespace keel::inline KEEL_ABI
