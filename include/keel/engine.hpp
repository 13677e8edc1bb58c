// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/core/checksum.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/progress.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/fwd.hpp>
#include <keel/io/gguf.hpp>
#include <keel/io/snapshot.hpp>
#include <keel/model/config.hpp>
#include <keel/model/executor.hpp>
#include <keel/model/plan.hpp>
#include <keel/model/weights.hpp>
#include <keel/session.hpp>
#include <keel/text/tokenizer.hpp>

namespace keel::inline KEEL_ABI {

struct engine_options {
    keel::precision precision = precision::fast;
    int threads = 0;          ///< CPU threads; 0: one per physical core
    int device = 0;           ///< which GPU
    bool interleave = false;  ///< CPU: copy quantised weights into an order that is faster to read
    index batch_rows = 512;   ///< most tokens that go through the model at once; more is faster and takes memory
    index memory = 0;         ///< bytes that weights, workspace and one session may take together; 0: no limit
    progress tell = {};       ///< stage "load", counted in tensors
};

/// The tokenizer that a file's metadata describes. Throws errc::format or errc::unsupported, naming the file.
inline tokenizer read_tokenizer(const gguf& file) {
    tokenizer_data data;
    data.model = file.require_string("tokenizer.ggml.model");
    data.pre = file.require_string("tokenizer.ggml.pre");
    data.tokens = file.require_array("tokenizer.ggml.tokens").strings();
    std::vector<std::int32_t> types;
    if (const auto stored = file.find_array("tokenizer.ggml.token_type")) {
        for (index i = 0; i < stored->size(); ++i) types.push_back(static_cast<std::int32_t>(stored->int_at(i)));
    }
    data.types = types;
    if (const auto merges = file.find_array("tokenizer.ggml.merges")) data.merges = merges->strings();
    data.bos = file.find_int("tokenizer.ggml.bos_token_id");
    data.eos = file.find_int("tokenizer.ggml.eos_token_id");
    data.eot = file.find_int("tokenizer.ggml.eot_token_id");
    data.eom = file.find_int("tokenizer.ggml.eom_token_id");
    data.padding = file.find_int("tokenizer.ggml.padding_token_id");
    data.unknown = file.find_int("tokenizer.ggml.unknown_token_id");
    data.add_bos = file.find_bool("tokenizer.ggml.add_bos_token").value_or(false);
    data.chat_template = file.find_string("tokenizer.chat_template").value_or("");
    try {
        return tokenizer(data);
    } catch (const error& e) {
        throw error(e.code(), file.path().string(), e.what());
    }
}

/// The context that a session of a model gets. Throws errc::argument for one that the model was not trained for, unless
/// the options allow it.
inline index context_of(const config& c, const session_options& options) {
    if (options.context < 0 || (options.context > c.context && !options.beyond_training)) {
        throw error(errc::argument, "context",
                    std::to_string(options.context) + " tokens, but the model is made for at most " +
                        std::to_string(c.context));
    }
    return options.context > 0 ? options.context : std::min<index>(c.context, 8192);
}

/// A number that tells model files apart: of all metadata, of the tensors' names, types and shapes, and of the first
/// bytes of each tensor.
inline std::uint64_t fingerprint_of(const gguf& file) {
    checksum sum;
    const auto add = [&](std::string_view text) { sum.add(std::as_bytes(std::span(text))); };
    for (const gguf_value& value : file.values()) {
        add(value.key());
        sum.add(value.raw());
    }
    for (const tensor_info& t : file.tensors()) {
        add(t.name);
        sum.add(std::as_bytes(std::span(t.dims)));
        sum.add(std::as_bytes(std::span(&t.type_id, 1)));
        sum.add(t.data.first(std::min<std::size_t>(t.data.size(), 256)));
    }
    return sum.value();
}

/// A loaded model. Immutable: threads may share it, and so may any number of sessions. A handle: copies refer to the
/// same model, which lives as long as any engine or session of it.
template <class B>
class basic_engine {
    static_assert(backend<B>);

public:
    /// Opens a GGUF file or the first of a split set. Weights are used where the file is mapped, as far as the backend
    /// can. Throws errc::file, errc::format or errc::unsupported, naming the file and the key or tensor;
    /// errc::cancelled.
    static basic_engine open(const std::filesystem::path& path, const engine_options& options = {}) {
        return basic_engine(gguf::open(path), options);
    }

    /// The same for a file that is open already.
    explicit basic_engine(gguf file, const engine_options& options = {})
        : file_(std::move(file)), memory_(options.memory) {
        const backend_options chosen = backend_part(options);
        config shape = read_config(file_);
        tokenizer text = read_tokenizer(file_);
        auto device = std::make_shared<typename B::device>(chosen);
        B loader(device, 0);
        auto loaded = load_weights(loader, file_, shape, options.tell);
        model_ = std::shared_ptr<const detail::loaded_model<B>>(new detail::loaded_model<B>{
            std::move(text),
            fingerprint_of(file_),
            {std::move(shape), chosen, options.batch_rows, std::move(device), std::move(loaded)}});
    }

    /// An empty session. Throws errc::argument for a context that the model was not trained for, errc::capacity if the
    /// engine's limit of memory does not allow it; the message says what it would allow.
    [[nodiscard]] basic_session<B> start(const session_options& options = {}) const {
        require_memory(options);
        return {model_, context_of(shape(), options), options};
    }

    /// A session that goes on where the saved one was, with as many of its checkpoints as the options allow. Throws
    /// errc::file, errc::format for a damaged file, errc::unsupported for another version, errc::argument for another
    /// model's or precision's, errc::capacity if the context cannot hold it.
    [[nodiscard]] basic_session<B> resume(const std::filesystem::path& path,
                                          const session_options& options = {}) const {
        require_memory(options);
        return {model_, context_of(shape(), options), options, snapshot(path)};
    }

    /// Runs tokens of many sessions through the model together, at most `budget` (or batch_rows, if that is less) in
    /// all: first those of the sessions with the fewest, so that drawing does not wait for a long prompt. Answers how
    /// many ran. The results are those of each session alone: to the bit in precision::exact. A session that is ready()
    /// takes no part. Throws errc::argument, before anything happens, for a session of another engine, in use by
    /// another thread, or named twice.
    index step(std::span<basic_session<B>* const> sessions, index budget = std::numeric_limits<index>::max()) const {
        std::deque<detail::one_at_a_time::hold> alone;
        std::vector<basic_session<B>*> waiting;
        for (basic_session<B>* s : sessions) {
            if (s->model_ != model_) throw error(errc::argument, "session", "belongs to another engine");
            alone.emplace_back(s->in_use_);
            if (s->waiting() > 0) waiting.push_back(s);
        }
        std::ranges::stable_sort(waiting, {}, [](const auto* s) { return s->waiting(); });
        std::vector<job<B>> jobs;
        index left = std::min(budget, model_->run.batch_rows()), context = 0;
        for (basic_session<B>* s : waiting) {
            if (left <= 0) break;
            jobs.push_back(s->next_job(left));
            left -= static_cast<index>(jobs.back().tokens.size());
            context = std::max(context, s->context_);
        }
        if (jobs.empty()) return 0;
        model_->run.run(jobs, context);
        for (std::size_t i = 0; i < jobs.size(); ++i) waiting[i]->sequence_.finish(jobs[i]);
        return std::min(budget, model_->run.batch_rows()) - left;
    }

    /// Text to tokens. Control tokens in the text are recognised only if `special`: leave it off for what a user has
    /// typed.
    [[nodiscard]] std::vector<token> tokenize(std::string_view text, bool special = false) const {
        return vocabulary().encode(text, special);
    }

    /// The bytes that a token stands for; a character may be spread over several tokens (see text_stream).
    [[nodiscard]] std::string_view text(token t) const { return vocabulary().bytes(t); }
    [[nodiscard]] std::string text(std::span<const token> tokens) const { return vocabulary().decode(tokens); }

    /// What such a session and the model take, exactly.
    [[nodiscard]] memory_plan plan(const session_options& options = {}) const {
        return plan(file_, shape(), vocabulary(), model_->run.options(), model_->run.batch_rows(), options);
    }

    /// The same before anything is loaded. Throws as the constructor and start() do, but not for the limit of memory.
    [[nodiscard]] static memory_plan plan(const gguf& file, const engine_options& options,
                                          const session_options& started = {}) {
        return plan(file, read_config(file), read_tokenizer(file), backend_part(options), options.batch_rows, started);
    }

    /// Bytes that a token at this position has to read or write, at least: the weights that it uses, the state twice,
    /// the cache.
    [[nodiscard]] index bytes_per_token(index position) const {
        return keel::bytes_per_token(file_, shape(), model_->run.layout(), position);
    }

    [[nodiscard]] const tokenizer& vocabulary() const { return model_->text; }
    [[nodiscard]] const config& shape() const { return model_->run.shape(); }
    [[nodiscard]] const gguf& file() const { return file_; }

private:
    static backend_options backend_part(const engine_options& options) {
        if (options.batch_rows < 1) throw error(errc::argument, "batch_rows", "must be at least 1");
        return {options.precision, options.threads, options.device, options.interleave};
    }

    static memory_plan plan(const gguf& file, const config& shape, const tokenizer& text, const backend_options& chosen,
                            index batch_rows, const session_options& options) {
        return make_plan<B>(shape, {.backend = chosen,
                                    .weight_bytes = weight_bytes_of<B>(file, chosen),
                                    .tokenizer_bytes = text.memory_bytes() + file.memory_bytes(),
                                    .batch_rows = batch_rows,
                                    .context = context_of(shape, options),
                                    .checkpoint_bytes = options.checkpoint_bytes,
                                    .replay = options.replay});
    }

    void require_memory(const session_options& options) const {
        if (memory_ == 0) return;
        const memory_plan needed = plan(options);
        if (needed.total() <= memory_) return;
        const auto text = [](index bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; };
        // What a token takes: a little more than its row of the cache, never nothing.
        const index block = memory_layout::block_rows * (needed.cache_per_token + static_cast<index>(sizeof(token)));
        const index spare = memory_layout::block_rows * needed.cache_per_token;  // to copy a block
        const index left = memory_ - (needed.total() - needed.cache - needed.tokens) - spare;
        const auto context_in = [&](index bytes) {
            const index tokens = bytes / block * memory_layout::block_rows;
            return "a context of " + std::to_string(std::min(tokens, context_of(shape(), options))) + " tokens";
        };
        const std::string advice = left >= block ? context_in(left) + " would fit"
                                   : left + needed.checkpoints >= block
                                       ? context_in(left + needed.checkpoints) + " without checkpoints would fit"
                                       : "no context would fit";
        throw error(errc::capacity, "memory",
                    "a session needs " + text(needed.total()) + " (weights " + text(needed.weights) + ", workspace " +
                        text(needed.workspace) + ", state " + text(needed.state) + ", checkpoints " +
                        text(needed.checkpoints + needed.replay) + ", cache " + text(needed.cache) + "), allowed are " +
                        text(memory_) + "; " + advice);
    }

    gguf file_;
    index memory_ = 0;
    std::shared_ptr<const detail::loaded_model<B>> model_;
};

}  // namespace keel::inline KEEL_ABI
