// SPDX-License-Identifier: MIT
//
// The commands' view of a model, made from an engine of any backend.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <keel/engine.hpp>
#include <keel/sampler.hpp>
#include <keel/session.hpp>
#include <keel/text/chat.hpp>
#include <keel/text/text_stream.hpp>

#include "model.hpp"

namespace tool {

template <keel::backend B>
class session_of : public session {
public:
    session_of(keel::basic_session<B> started, const keel::sampler& sample, const keel::tokenizer& vocabulary)
        : session_(std::move(started)), sample_(sample), stream_(vocabulary) {}

    void feed(std::span<const std::int32_t> tokens, const progress& tell, const each_row& each) override {
        keel::feed_options options;
        if (tell) options.tell = [&](const keel::progress_report& r) { return tell(r.stage, r.done, r.total); };
        options.each = each;
        session_.feed(tokens, options);
    }
    std::span<const float> logits() override { return session_.logits(); }
    std::optional<std::int32_t> next() override { return session_.next(sample_); }
    std::int64_t position() const override { return session_.position(); }
    std::int64_t context() const override { return session_.context(); }
    std::span<const std::int32_t> tokens() const override { return session_.tokens(); }
    std::int64_t rewind(std::int64_t position) override { return session_.rewind(position).computed; }
    void save(const std::string& path) override { session_.save(path); }
    std::unique_ptr<session> fork() const override { return std::make_unique<session_of>(*this); }
    std::string_view show(std::int32_t token) override { return stream_.push(token); }
    std::string_view show_rest() override { return stream_.flush(); }

private:
    keel::basic_session<B> session_;
    keel::sampler sample_;
    keel::text_stream stream_;
};

template <keel::backend B>
class model_of : public model {
public:
    explicit model_of(const model_options& options) : engine_(open(options), engine_options(options)) {}

    static memory plan(const model_options& options, std::int64_t context) {
        const keel::gguf file = open(options);
        const keel::session_options one{.context = context};
        const keel::memory_plan p = keel::basic_engine<B>::plan(file, engine_options(options), one);
        return {keel::context_of(keel::read_config(file), one),
                p.weights,
                p.tokenizer,
                p.workspace,
                p.state,
                p.cache_per_token,
                p.cache,
                p.tokens,
                p.checkpoints,
                p.total()};
    }

    std::unique_ptr<session> start(std::int64_t context, const sampling& how, bool beyond_training) const override {
        return wrap(engine_.start({.context = context, .beyond_training = beyond_training}), how);
    }
    std::unique_ptr<session> resume(const std::string& path, std::int64_t context, const sampling& how) const override {
        return wrap(engine_.resume(path, {.context = context}), how);
    }
    std::optional<std::int32_t> find(std::string_view name) const override { return engine_.vocabulary().find(name); }
    std::vector<std::int32_t> encode(std::string_view text, bool special) const override {
        return engine_.tokenize(text, special);
    }
    std::string decode(std::span<const std::int32_t> tokens) const override { return engine_.text(tokens); }
    std::optional<std::int32_t> document_start() const override {
        return engine_.vocabulary().add_bos() ? engine_.vocabulary().bos() : std::nullopt;
    }
    std::vector<std::int32_t> turn(std::span<const message> messages, bool after_answer) const override {
        std::vector<keel::chat_message> list;
        for (const message& m : messages) {
            const bool system = m.by == message::author::system;
            list.push_back({.role = system ? keel::chat_role::system : keel::chat_role::user, .content = m.text});
        }
        return keel::chat_tokens(engine_.vocabulary(), list, {.after_answer = after_answer});
    }
    double bytes_per_token(std::int64_t position) const override {
        return static_cast<double>(engine_.bytes_per_token(position));
    }

private:
    std::unique_ptr<session> wrap(keel::basic_session<B> started, const sampling& how) const {
        const keel::sampler sample({how.temperature, how.top_k, how.top_p, how.min_p, how.seed});
        return std::make_unique<session_of<B>>(std::move(started), sample, engine_.vocabulary());
    }

    static keel::gguf open(const model_options& options) {
        return options.path.empty() ? keel::gguf::from_memory("demonstration model", demo_model())
                                    : keel::gguf::open(options.path);
    }
    static keel::engine_options engine_options(const model_options& options) {
        keel::engine_options o;
        o.precision = options.precision == "exact" ? keel::precision::exact : keel::precision::fast;
        o.threads = options.threads;
        o.interleave = options.interleave;
        if (options.tell)
            o.tell = [tell = options.tell](const keel::progress_report& r) { return tell(r.stage, r.done, r.total); };
        return o;
    }

    keel::basic_engine<B> engine_;
};

template <keel::backend B>
backend_code code_of() {
    return {
        [](const model_options& options) -> std::unique_ptr<model> { return std::make_unique<model_of<B>>(options); },
        &model_of<B>::plan};
}

}  // namespace tool
