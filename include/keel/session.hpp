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
#include <keel/model/saved_sequence.hpp>
#include <keel/model/sequence.hpp>
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
                throw error(errc::argument, "session", "is in use already: by another thread, or twice in one step");
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
    /// so; then those of the tokens stay whose batch has run.
    void feed(std::span<const token> tokens, const feed_options& options = {}) {
        const detail::one_at_a_time::hold alone(in_use_);
        const index before = position();
        push(tokens);
        evaluate(options, before);
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
        evaluate({}, position());
        const token drawn = sequence_.logits().draw(model_->run, sample);
        if (model_->text.is_end_of_generation(drawn)) return std::nullopt;
        tokens_.push_back(drawn);  // runs through the model when its logits are asked for
        return drawn;
    }

    /// The logits of what comes after the last token: one per entry of the vocabulary, empty if no token was fed yet.
    /// Valid until the session changes.
    [[nodiscard]] std::span<const float> logits() {
        const detail::one_at_a_time::hold alone(in_use_);
        evaluate({}, position());
        return sequence_.logits().values(model_->run);
    }

    /// Whether logits() is there without running the model.
    [[nodiscard]] bool ready() const { return sequence_.length() == position() && sequence_.has_logits(); }

    /// All tokens so far, drawn ones included.
    [[nodiscard]] std::span<const token> tokens() const { return tokens_; }

    /// How many tokens there are.
    [[nodiscard]] index position() const { return static_cast<index>(tokens_.size()); }

    /// The most tokens there can be.
    [[nodiscard]] index context() const { return context_; }

    /// Keeps a copy of the state here for restore(), which stays until the next call; it counts among the copies that
    /// the session keeps by itself (session_options::checkpoint_bytes). Throws errc::capacity if there may be none.
    void checkpoint() {
        const detail::one_at_a_time::hold alone(in_use_);
        evaluate({}, position());
        sequence_.mark();
    }

    /// Goes back to the last checkpoint(), as often as wanted, to the bit in any precision and without computing
    /// anything. Throws errc::argument if there is none, or the session went back to before it since.
    void restore() {
        const detail::one_at_a_time::hold alone(in_use_);
        const std::optional<index> target = sequence_.history().marked();
        if (!target) throw error(errc::argument, "session", "has no checkpoint to restore");
        sequence_.go_back(*target);
        tokens_.resize(static_cast<std::size_t>(*target));
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
        how.computed = waiting();
        evaluate(options, common);
        return how;
    }

    /// Writes tokens, state, checkpoints and cache to a file that engine.resume() reads. The file appears under its
    /// name when it is complete. Throws errc::file.
    void save(const std::filesystem::path& path) {
        const detail::one_at_a_time::hold alone(in_use_);
        save_sequence(path, model_->fingerprint, model_->run, tokens(), sequence_);
    }

private:
    template <class>
    friend class basic_engine;

    basic_session(std::shared_ptr<const detail::loaded_model<B>> model, index context, const session_options& options)
        : model_(std::move(model)),
          context_(context),
          sequence_(model_->run, {context, options.checkpoint_bytes, options.checkpoint_every, options.replay}) {
        tokens_.reserve(static_cast<std::size_t>(context_));
    }

    /// Continues from a snapshot, see basic_engine::resume.
    basic_session(std::shared_ptr<const detail::loaded_model<B>> model, index context, const session_options& options,
                  const snapshot& from)
        : basic_session(std::move(model), context, options) {
        const auto saved = load_sequence(from, model_->fingerprint, model_->run, sequence_);
        check(saved);
        tokens_.insert(tokens_.end(), saved.begin(), saved.end());
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

    /// More than one token are a turn, in front of which the state is worth keeping, and not a token drawn elsewhere.
    void push(std::span<const token> tokens) {
        check(tokens);
        require_room(static_cast<index>(tokens.size()));
        if (tokens.size() > 1) sequence_.checkpoint();
        tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    }

    /// How many tokens the model has not seen, and the next part of them, at most `most`.
    [[nodiscard]] index waiting() const { return position() - sequence_.length(); }
    [[nodiscard]] job<B> next_job(index most) {
        return sequence_.next(tokens().subspan(static_cast<std::size_t>(sequence_.length())), most);
    }

    /// Runs the model over the tokens that it has not seen. If that ends early, those stay that have run, and the first
    /// `before` in any case.
    void evaluate(const feed_options& options, index before) {
        // A state without its logits, which takes one token to mend.
        if (waiting() == 0 && !sequence_.has_logits() && position() > 0) sequence_.go_back(position());
        const index first = sequence_.length();
        const auto total = static_cast<std::uint64_t>(position() - first);
        const auto tell = [&] {
            report(options.tell, "prefill", static_cast<std::uint64_t>(sequence_.length() - first), total);
        };
        try {
            while (waiting() > 0) {
                tell();
                const index done = sequence_.length();
                job<B> next = next_job(model_->run.batch_rows());
                if (options.each) next.logits = want::all;
                std::vector<float> seen;
                model_->run.run({&next, 1}, context_, [&](B& b, std::size_t, index row, view<const float, 1> from) {
                    if (!options.each) return;
                    read_row(b, from, seen);
                    options.each(done + row, seen);
                });
                sequence_.finish(next);
            }
        } catch (...) {
            tokens_.resize(static_cast<std::size_t>(std::max(sequence_.length(), before)));
            throw;
        }
        if (total > 0) tell();
    }

    rewound go_back(index target) {
        if (target < 0 || target > position()) {
            throw error(errc::argument, "position " + std::to_string(target),
                        "outside the " + std::to_string(position()) + " tokens of the session");
        }
        const index replayed = target < sequence_.length() ? sequence_.go_back(target) : 0;
        tokens_.resize(static_cast<std::size_t>(target));
        return {sequence_.length() - replayed, replayed, waiting()};
    }

    std::shared_ptr<const detail::loaded_model<B>> model_;
    index context_;
    std::vector<token> tokens_;  // the sequence holds all but perhaps the last ones
    sequence<B> sequence_;
    detail::one_at_a_time in_use_;
};

}  // namespace keel::inline KEEL_ABI
