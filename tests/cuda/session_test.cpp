// SPDX-License-Identifier: MIT
//
// Sessions on the GPU: going back, batching and saving give the bits of a fresh session; the logits are those of the
// CPU.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include <keel/backend/cpu.hpp>
#include <keel/backend/cuda.hpp>
#include <keel/engine.hpp>
#include <keel/sampler.hpp>
#include <keel/session.hpp>

#include "catch.hpp"
#include "model/golden.hpp"
#include "sessions.hpp"

using namespace keel;
using keel::testing::agrees_with_fresh;
using keel::testing::some_tokens;

namespace {

const std::string tiny = KEEL_TEST_DATA "/models/tiny-f32.gguf";

basic_engine<cuda> exact_engine() {
    return basic_engine<cuda>::open(tiny, {.precision = precision::exact, .batch_rows = 64});
}

}  // namespace

TEST_CASE("on the GPU a session goes back by replay with the bits of a fresh one") {
    const auto engine = exact_engine();
    auto session = engine.start({.checkpoint_bytes = 4 * engine.plan().state, .checkpoint_every = 100, .replay = 16});
    session.feed(some_tokens(250));
    for (int i = 0; i < 20; ++i) session.next([](std::span<const float>) { return token{3}; });
    for (const keel::index back : {1, 7, 16}) {
        const auto how = session.rewind(session.position() - back);
        if (back < 16) CHECK(how.computed <= 1);
        if (back == 7) CHECK(how.replayed > 0);
        CHECK(agrees_with_fresh(engine, session));
        session.feed(some_tokens(30, static_cast<int>(back)));
    }
    session.rewind(150);
    CHECK(agrees_with_fresh(engine, session));
}

TEST_CASE("on the GPU sessions with and without replays decode together with the bits of each alone") {
    const auto engine = exact_engine();
    auto kept = engine.start({.context = 300, .replay = 8});
    auto plain = engine.start({.context = 300});
    kept.feed(some_tokens(70));
    plain.feed(some_tokens(40, 5));
    for (int i = 0; i < 12; ++i) {
        kept.append(some_tokens(1, i));
        plain.append(some_tokens(1, 100 + i));
        std::vector<basic_session<cuda>*> both{&kept, &plain};
        engine.step(both);
        if (i % 4 == 3) {
            kept.rewind(kept.position() - 2);
            CHECK(agrees_with_fresh(engine, kept));
            CHECK(agrees_with_fresh(engine, plain));
        }
    }
}

TEST_CASE("on the GPU a sampler draws from shortlists what it draws from all logits, alone, forked and in a batch") {
    const auto engine = basic_engine<cuda>::open(KEEL_DEMO_MODEL, {.batch_rows = 64});
    auto first = engine.start({.context = 300});
    first.feed(engine.tokenize("Once upon a time there was"));
    const sampler_options settings[] = {{.temperature = 0},
                                        {.seed = 1},
                                        {.temperature = 0.7f, .top_k = 40},
                                        {.top_p = 0.9f, .seed = 3},
                                        {.min_p = 0.1f}};
    std::vector<basic_session<cuda>> listed(std::size(settings), first), whole(std::size(settings), first);
    std::vector<sampler> from_lists(std::begin(settings), std::end(settings)), from_rows = from_lists;
    for (int i = 0; i < 40; ++i) {
        std::vector<basic_session<cuda>*> all;
        for (std::size_t s = 0; s < listed.size(); ++s) {
            const auto drawn = listed[s].next(from_lists[s]);
            CHECK(drawn == whole[s].next([&](std::span<const float> logits) { return from_rows[s](logits); }));
            all.insert(all.end(), {&listed[s], &whole[s]});
        }
        engine.step(all);
        CHECK(std::ranges::equal(listed[1].logits(), whole[1].logits()));
    }
    // Copies, and going back to a checkpoint, keep the logits: other tokens come from the same ones.
    auto& session = listed[2];
    session.checkpoint();
    const std::vector<float> logits(session.logits().begin(), session.logits().end());
    const auto position = session.position();
    auto fork = session;
    const sampler again({.temperature = 1.2f, .seed = 9});
    auto a = again, b = again, c = again;
    const auto token_of_fork = fork.next(a);
    CHECK(session.next(b) == token_of_fork);
    session.feed(some_tokens(20));
    session.rewind(position);
    CHECK(session.ready());
    CHECK(session.next(c) == token_of_fork);
    CHECK(fork.rewind(position).computed == 0);
    CHECK(std::ranges::equal(fork.logits(), logits));
}

TEST_CASE("the GPU and the CPU agree over 2000 tokens of the demonstration model", "[long]") {
    std::vector<token> text;
    {
        const auto engine = basic_engine<cpu>::open(KEEL_DEMO_MODEL, {.threads = 2});
        auto session = engine.start({.context = 2048});
        sampler sample({.temperature = 0.8f, .seed = 11});
        session.feed(engine.tokenize("Once upon a time there was"));
        while (session.position() < 2000) session.next(sample);
        text.assign(session.tokens().begin(), session.tokens().end());
    }
    for (const precision p : {precision::exact, precision::fast}) {
        CAPTURE(p == precision::fast);
        const auto on_cpu = golden::load<cpu>(KEEL_DEMO_MODEL, p);
        const auto on_gpu = golden::load<cuda>(KEEL_DEMO_MODEL, p);
        auto cpu_state = on_cpu.make_state();
        auto gpu_state = on_gpu.make_state();
        std::vector<double> errors;
        double cpu_nll = 0, gpu_nll = 0;
        for (std::size_t i = 0; i + 1 < text.size(); i += 250) {
            const auto part = std::span<const token>(text).subspan(i, std::min<std::size_t>(250, text.size() - 1 - i));
            // Half of them in one go, half of them token by token.
            const std::size_t split = i % 500 == 0 ? part.size() : 1;
            const auto a = golden::feed(on_cpu, cpu_state, part, split, want::all, 2048);
            const auto b = golden::feed(on_gpu, gpu_state, part, split, want::all, 2048);
            REQUIRE(a.size() == part.size());
            REQUIRE(b.size() == part.size());
            for (std::size_t j = 0; j < part.size(); ++j) {
                errors.push_back(golden::relative_error(b[j], a[j]));
                cpu_nll += golden::negative_log_likelihood(a[j], text[i + j + 1]);
                gpu_nll += golden::negative_log_likelihood(b[j], text[i + j + 1]);
            }
        }
        std::ranges::sort(errors);
        // The oracle's README: near-ties of the router may flip in single rows where activations are rounded.
        const double typical = errors[errors.size() / 2];
        CAPTURE(typical, errors.back());
        CHECK(typical <= (p == precision::exact ? 1e-5 : 1e-1));
        if (p == precision::exact) CHECK(errors.back() <= 1e-5);
        const auto count = static_cast<double>(errors.size());
        CHECK(std::abs(cpu_nll - gpu_nll) / count <= (p == precision::exact ? 1e-5 : 5e-2));
    }
}
