// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/model/config.hpp>
#include <keel/model/forward.hpp>
#include <keel/model/history.hpp>
#include <keel/model/kda.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/plan.hpp>
#include <keel/model/state.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// Which rows of a sequence's share of a batch end in logits.
enum class want { none, last, all };

/// One sequence's share of a batch.
template <backend B>
struct job {
    sequence_state<B>* state;
    std::span<const token> tokens;
    want logits = want::last;
    const replay_window<B>* keep = nullptr;  ///< where the rows are kept for replays
    kept_logits<B>* last = nullptr;          ///< where the logits of the last row are kept, if they are wanted
};

/// A loaded model, ready to run batches. Threads may share it: every run borrows a backend instance of its own, of
/// which there are as many as there ever were runs at the same time.
template <backend B>
class executor {
public:
    executor(config shape, const backend_options& options, index batch_rows, std::shared_ptr<typename B::device> device,
             weights<B> loaded)
        : shape_(std::move(shape)),
          options_(options),
          batch_rows_(batch_rows),
          device_(std::move(device)),
          weights_(std::move(loaded)) {}

    [[nodiscard]] const config& shape() const { return shape_; }
    [[nodiscard]] const backend_options& options() const { return options_; }
    [[nodiscard]] index batch_rows() const { return batch_rows_; }
    [[nodiscard]] memory_layout layout() const { return shape_.memory(options_.precision); }

    /// An empty sequence.
    [[nodiscard]] sequence_state<B> make_state() const {
        return with_backend([&](B& b) { return sequence_state<B>(b, layout()); });
    }

    /// Makes sure that a run with sequences of up to `context` tokens will not have to allocate its workspace.
    void prepare(index context) const { const borrowed b(*this, context); }

    /// Advances each job's sequence by its tokens, at most batch_rows() in all. `context` bounds the length of the
    /// sequences afterwards.
    void run(std::span<const job<B>> jobs, index context) const {
        run(jobs, context, [](B&, std::size_t, index, view<const float, 1>) {});
    }

    /// The same, and calls deliver(backend, job index, row of the job, logits (vocabulary) in backend memory) for the
    /// rows that are wanted.
    template <class Deliver>
    void run(std::span<const job<B>> jobs, index context, Deliver&& deliver) const {
        borrowed borrow(*this, context);
        B& b = *borrow;
        const arena::scope scope(b.workspace());

        const joined all = join(b, jobs);
        const memory_layout layout = this->layout();
        const batch rows{all.tokens, all.segments, all.wanted, &layout};
        const index n = static_cast<index>(all.wanted.size());

        struct result {
            view<float, 2> hidden;  // (n, hidden)
            projected out;          // of the first of these, at most logits_rows
        };
        const auto pass = [&]() -> result {
            const auto hidden = forward(b, shape_, weights_, rows);
            const index count = std::min(n, logits_rows);
            const auto out = take_projected<B>(b.workspace(), count, shape_.vocabulary);
            project_logits(b, shape_, weights_, hidden.rows(0, count), out);
            return {hidden, out};
        };
        result done;
        if constexpr (requires { b.graph(rows, pass); }) {
            done = b.graph(rows, pass);
        } else {
            done = pass();
        }
        for (const job<B>& j : jobs) j.state->advance(static_cast<index>(j.tokens.size()));

        for (index r = 0; r < n; r += logits_rows) {
            const index count = std::min(n - r, logits_rows);
            const projected out = done.out.first(count);
            if (r > 0) project_logits(b, shape_, weights_, done.hidden.rows(r, count), out);
            const auto first = static_cast<std::size_t>(r);
            kept_logits<B>::keep(b, out, std::span(all.kept_by).subspan(first, static_cast<std::size_t>(count)));
            for (index i = 0; i < count; ++i) {
                const origin& from = all.origins[first + static_cast<std::size_t>(i)];
                deliver(b, from.job, from.row, view<const float, 1>(out.logits[i]));
            }
        }
    }

    /// Whether rows can be kept and replayed.
    static constexpr bool can_replay = requires(B & b, keep_args a) { b.keep(a); };

    /// Advances the recurrent state by `rows` tokens whose rows were kept; the latent cache holds them already.
    void replay(sequence_state<B>& state, const replay_window<B>& window, index rows, index context) const {
        borrowed borrow(*this, context);
        B& b = *borrow;
        const memory_layout layout = this->layout();
        const index most = std::min(batch_rows_, b.prefill_from() - 1);  // token by token, as they were computed
        while (rows > 0) {
            const arena::scope scope(b.workspace());
            const index n = std::min(rows, most);
            std::vector<index> slots(static_cast<std::size_t>(n));
            for (index i = 0; i < n; ++i) slots[static_cast<std::size_t>(i)] = (state.length() + i) % window.capacity();
            const segment whole = state.replay(n);
            const auto take = [&](index columns) { return b.workspace().template take<float>(n, columns); };
            const kda_inputs in{take(layout.channels()), take(layout.channels()), take(layout.channels()),
                                take(layout.head_dim), take(layout.heads)};
            const auto out = take(layout.channels());
            index kda_layer = 0;
            for (const layer_weights<B>& layer : weights_.layers) {
                const auto* w = std::get_if<kda_weights<B>>(&layer.mixer);
                if (w == nullptr) continue;
                const view<float, 3> kept(window.rows(), layout.kda_layers, window.capacity(), layout.kept_floats());
                index column = 0;
                for (const auto& part : {in.q, in.k, in.v, in.decay_low, in.beta}) {
                    b.gather({kept[kda_layer].columns(column, part.extent[1]), slots, part});
                    column += part.extent[1];
                }
                kda_recurrence(b, shape_, *w, in, kda_layer++, {{}, {&whole, 1}, {}, &layout}, out);
            }
            state.advance(n);
            rows -= n;
        }
    }

    /// Calls f(backend) with an instance for work on memory.
    template <class F>
    decltype(auto) with_backend(F&& f) const {
        const borrowed b(*this, 0);
        return f(*b);
    }

private:
    struct origin {
        std::size_t job;
        index row;
    };

    /// Jobs as one batch, which has its shortest segments first.
    struct joined {
        std::vector<token> tokens;
        std::vector<segment> segments;
        std::vector<index> wanted;             // rows that end in logits,
        std::vector<origin> origins;           // what they are rows of,
        std::vector<kept_logits<B>*> kept_by;  // and who keeps the logits, or null
    };

    static joined join(const B& b, std::span<const job<B>> jobs) {
        std::vector<const job<B>*> order;
        for (const job<B>& j : jobs) order.push_back(&j);
        std::ranges::stable_sort(order, {}, [](const job<B>* j) { return j->tokens.size(); });
        joined all;
        for (const job<B>* j : order) {
            const index first = static_cast<index>(all.tokens.size());
            const index rows = static_cast<index>(j->tokens.size());
            all.segments.push_back(j->state->extend(b, first, rows));
            if (j->keep != nullptr) {
                all.segments.back().kept = j->keep->rows();
                all.segments.back().kept_capacity = j->keep->capacity();
            }
            all.tokens.insert(all.tokens.end(), j->tokens.begin(), j->tokens.end());
            const index from = j->logits == want::all ? 0 : j->logits == want::last ? rows - 1 : rows;
            for (index r = from; r < rows; ++r) {
                all.wanted.push_back(first + r);
                all.origins.push_back({static_cast<std::size_t>(j - jobs.data()), r});
                all.kept_by.push_back(r == rows - 1 ? j->last : nullptr);
            }
        }
        return all;
    }

    /// A backend instance and the context that its workspace is made for.
    struct lane {
        index context;
        B instance;
    };

    /// Holds a lane for the time of a run.
    class borrowed {
    public:
        borrowed(const executor& from, index context) : from_(from), lane_(from.take(context)) {}
        ~borrowed() { from_.put_back(std::move(lane_)); }
        borrowed(const borrowed&) = delete;
        borrowed& operator=(const borrowed&) = delete;

        B& operator*() const { return lane_->instance; }

    private:
        const executor& from_;
        std::unique_ptr<lane> lane_;
    };

    std::unique_ptr<lane> take(index context) const {
        {
            const std::lock_guard lock(mutex_);
            const auto fits = std::ranges::find_if(idle_, [&](const auto& l) { return l->context >= context; });
            if (fits != idle_.end()) {
                auto taken = std::move(*fits);
                idle_.erase(fits);
                return taken;
            }
            if (!idle_.empty()) idle_.pop_back();  // outgrown: its successor takes its place
        }
        const index bytes = context == 0 ? 0 : workspace_bytes<B>(shape_, options_, batch_rows_, context);
        return std::unique_ptr<lane>(new lane{context, B(device_, bytes)});
    }

    void put_back(std::unique_ptr<lane> returned) const noexcept {
        const std::lock_guard lock(mutex_);
        if (idle_.size() == idle_.capacity()) return;  // cannot grow here; the next run makes another
        idle_.push_back(std::move(returned));
    }

    config shape_;
    backend_options options_;
    index batch_rows_;
    std::shared_ptr<typename B::device> device_;
    weights<B> weights_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<lane>> idle_ = [] {
        std::vector<std::unique_ptr<lane>> lanes;
        lanes.reserve(64);
        return lanes;
    }();
};

}  // namespace keel::inline KEEL_ABI
