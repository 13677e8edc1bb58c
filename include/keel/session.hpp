// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
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
#include <keel/model/executor.hpp>
#include <keel/model/state.hpp>
#include <keel/text/tokenizer.hpp>

namespace keel::inline KEEL_ABI {

struct session_options {
    index context = 0;  ///< most tokens that the session will hold; 0: what the model was trained for, at most 8192
};

/// What to do on the way through a feed.
struct feed_options {
    progress tell = {};  ///< stage "prefill", counted in tokens; answering no stops behind the last whole batch
    /// Called for every token fed, with the logits of what comes after it. Costs a product with the whole vocabulary
    /// each.
    std::function<void(index position, std::span<const float> logits)> each = {};
};

namespace detail {

/// What an engine shares with its sessions.
template <backend B>
struct loaded_model {
    tokenizer text;
    executor<B> run;
};

}  // namespace detail

/// One timeline: tokens, and the state that the model has after them. Made by an engine, which it keeps alive. A value:
/// a copy goes on independently, and to the bit as the original would. One session serves one thread at a time;
/// different sessions, also of one engine, may run on different threads.
template <backend B>
class basic_session {
public:
    /// Appends tokens and runs the model over them. Throws errc::argument for an id outside the vocabulary and
    /// errc::capacity if the context cannot hold them, both before anything happens; errc::cancelled if progress says
    /// so.
    void feed(std::span<const token> tokens, const feed_options& options = {}) {
        const index vocabulary = model_->run.shape().vocabulary;
        for (const token t : tokens) {
            if (t < 0 || t >= vocabulary) {
                throw error(errc::argument, "token " + std::to_string(t),
                            "outside the vocabulary of " + std::to_string(vocabulary) + " tokens");
            }
        }
        require_room(static_cast<index>(tokens.size()));
        tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
        evaluate(options);
    }

    /// Draws the next token and appends it, or answers nothing if it ends the generation; then nothing is appended.
    /// `sample` is a keel::sampler or any function from logits to a token. Throws errc::capacity if the context is
    /// full, and what `sample` throws.
    template <std::invocable<std::span<const float>> Sample>
    std::optional<token> next(Sample&& sample) {
        require_room(1);
        const token drawn = sample(logits());
        if (model_->text.is_end_of_generation(drawn)) return std::nullopt;
        tokens_.push_back(drawn);  // runs through the model when its logits are asked for
        return drawn;
    }

    /// The logits of what comes after the last token: one per entry of the vocabulary, empty if no token was fed yet.
    /// Valid until the session changes.
    [[nodiscard]] std::span<const float> logits() {
        evaluate({});
        return logits_;
    }

    /// All tokens so far, drawn ones included.
    [[nodiscard]] std::span<const token> tokens() const { return tokens_; }

    /// How many tokens there are.
    [[nodiscard]] index position() const { return static_cast<index>(tokens_.size()); }

    /// The most tokens there can be.
    [[nodiscard]] index context() const { return context_; }

private:
    template <backend>
    friend class basic_engine;

    basic_session(std::shared_ptr<const detail::loaded_model<B>> model, index context)
        : model_(std::move(model)), context_(context), state_(model_->run.make_state()) {
        model_->run.prepare(context_);
        tokens_.reserve(static_cast<std::size_t>(std::min(context_, index{1} << 16)));
    }

    void require_room(index more) const {
        if (more > context_ - position()) {
            throw error(errc::capacity, "context",
                        "holds " + std::to_string(context_) + " tokens, " + std::to_string(position()) +
                            " are taken and " + std::to_string(more) + " more do not fit");
        }
    }

    /// Runs the model over the tokens that it has not seen.
    void evaluate(const feed_options& options) {
        const index first = state_.length();
        const index total = position() - first;
        try {
            while (state_.length() < position()) {
                const index done = state_.length();
                report(options.tell, "prefill", static_cast<std::uint64_t>(done - first),
                       static_cast<std::uint64_t>(total));
                const index rows = std::min(model_->run.batch_rows(), position() - done);
                const want logits = options.each ? want::all : done + rows == position() ? want::last : want::none;
                const job<B> next{
                    &state_, tokens().subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(rows)), logits};
                model_->run.run({&next, 1}, context_, [&](B& b, std::size_t, index row, view<const float, 1> from) {
                    logits_.resize(static_cast<std::size_t>(from.size()));
                    b.download(reinterpret_cast<std::byte*>(logits_.data()),
                               reinterpret_cast<const std::byte*>(from.data), from.size() * index{sizeof(float)});
                    if (options.each) options.each(done + row, logits_);
                });
            }
        } catch (...) {
            tokens_.resize(static_cast<std::size_t>(state_.length()));  // behind the last whole batch
            throw;
        }
        if (total > 0)
            report(options.tell, "prefill", static_cast<std::uint64_t>(total), static_cast<std::uint64_t>(total));
    }

    std::shared_ptr<const detail::loaded_model<B>> model_;
    index context_;
    sequence_state<B> state_;
    std::vector<token> tokens_;  // the state holds all but perhaps the last one drawn
    std::vector<float> logits_;  // after the last token that the state holds
};

}  // namespace keel::inline KEEL_ABI
