// SPDX-License-Identifier: MIT
//
// The runner of any backend.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/backend/cpu/threads.hpp>
#include <keel/engine.hpp>
#include <keel/session.hpp>

#include "limits.hpp"
#include "operations.hpp"
#include "runner.hpp"

namespace bench {

template <keel::backend B>
class session_of : public session {
public:
    explicit session_of(keel::basic_session<B> started) : session_(std::move(started)) {}

    void feed(std::span<const std::int32_t> tokens) override { session_.feed(tokens); }
    void append(std::span<const std::int32_t> tokens) override { session_.append(tokens); }
    std::int64_t sync(std::span<const std::int32_t> tokens) override { return session_.sync(tokens).computed; }
    void rewind(std::int64_t position) override { session_.rewind(position); }
    void save(const std::string& path) override { session_.save(path); }
    [[nodiscard]] std::unique_ptr<session> fork() const override { return std::make_unique<session_of>(*this); }

    keel::basic_session<B>& value() { return session_; }

private:
    keel::basic_session<B> session_;
};

template <keel::backend B>
class model_of : public model {
public:
    explicit model_of(keel::basic_engine<B> engine) : engine_(std::move(engine)) {}

    [[nodiscard]] std::unique_ptr<session> start(std::int64_t context, std::int64_t replay) const override {
        return std::make_unique<session_of<B>>(engine_.start({.context = context, .replay = replay}));
    }
    [[nodiscard]] std::unique_ptr<session> resume(const std::string& path, std::int64_t context) const override {
        return std::make_unique<session_of<B>>(engine_.resume(path, {.context = context}));
    }
    void step(std::span<const std::unique_ptr<session>> sessions) const override {
        std::vector<keel::basic_session<B>*> all;
        for (const auto& s : sessions) all.push_back(&static_cast<session_of<B>&>(*s).value());
        while (engine_.step(all) > 0) {
        }
    }
    [[nodiscard]] std::size_t tokens_of(std::string_view text) const override { return engine_.tokenize(text).size(); }
    [[nodiscard]] std::string name() const override { return engine_.shape().name; }
    [[nodiscard]] std::int64_t vocabulary() const override { return engine_.shape().vocabulary; }
    [[nodiscard]] double bytes() const override { return static_cast<double>(keel::weight_bytes(engine_.file())); }
    [[nodiscard]] double parameters() const override {
        double sum = 0;
        for (const keel::tensor_info& t : engine_.file().tensors()) sum += elements(t);
        return sum;
    }
    [[nodiscard]] double state_bytes() const override { return static_cast<double>(engine_.plan().state); }
    [[nodiscard]] double bytes_per_token(std::int64_t position) const override {
        return static_cast<double>(engine_.bytes_per_token(position));
    }
    [[nodiscard]] double operations_per_token() const override {
        double sum = 0;
        for (const keel::tensor_info& t : engine_.file().tensors()) {
            if (t.name == "token_embd.weight" || t.name == "output.weight") continue;  // a row; only wanted rows
            const bool expert = t.name.find("_exps.") != std::string_view::npos;
            const auto& shape = engine_.shape();
            sum += 2 * elements(t) *
                   (expert ? static_cast<double>(shape.chosen) / static_cast<double>(shape.experts) : 1.0);
        }
        return sum;
    }

private:
    static double elements(const keel::tensor_info& t) {
        return static_cast<double>(t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3]);
    }

    keel::basic_engine<B> engine_;
};

template <keel::backend B>
class runner_of : public runner {
public:
    explicit runner_of(options o) : options_(std::move(o)) {}

    [[nodiscard]] std::string instruction_set() const override { return KEEL_TEXT(KEEL_ISA); }
    [[nodiscard]] int threads() const override { return keel::thread_pool(options_.threads).size(); }
    [[nodiscard]] std::unique_ptr<model> load() const override {
        return std::make_unique<model_of<B>>(keel::basic_engine<B>::open(
            options_.model,
            {.precision = precision(), .threads = options_.threads, .interleave = options_.interleave}));
    }
    [[nodiscard]] limits measure_limits() const override {
        if (options_.backend == "cuda") return {};
        keel::thread_pool pool(options_.threads);
        return limits_of(pool);
    }
    [[nodiscard]] double measure_reading() const override {
        if (options_.backend == "cuda") return 0;
        keel::thread_pool pool(options_.threads);
        return bench::measure_reading(pool);
    }
    void measure_operations(const operation_sink& sink) const override {
        operations_of<B>(keel::backend_options{.precision = precision(), .threads = options_.threads}, sink);
    }

private:
    [[nodiscard]] keel::precision precision() const {
        return options_.precision == "exact" ? keel::precision::exact : keel::precision::fast;
    }

    options options_;
};

}  // namespace bench
