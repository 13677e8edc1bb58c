// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <keel/backend/reference.hpp>
#include <keel/keel.hpp>

#include "catch.hpp"
#include "sessions.hpp"
#include "throws.hpp"

using keel::errc;
using keel::token;
using keel::testing::exact_engine;
using keel::testing::some_tokens;
using keel::testing::throws;
using keel::testing::tiny;

namespace {

const keel::sampler_options greedy{.temperature = 0};

template <class Session>
std::vector<token> draw(Session& session, keel::sampler sample, int n) {
    std::vector<token> drawn;
    while (static_cast<int>(drawn.size()) < n) {
        const auto next = session.next(sample);
        if (!next) break;
        drawn.push_back(*next);
    }
    return drawn;
}

}  // namespace

TEST_CASE("a sampler is made of sensible options only") {
    throws(errc::argument, "temperature", [] { keel::sampler({.temperature = -1}); });
    throws(errc::argument, "top_k", [] { keel::sampler({.top_k = -1}); });
    throws(errc::argument, "top_p", [] { keel::sampler({.top_p = 0}); });
    throws(errc::argument, "min_p", [] { keel::sampler({.min_p = 2}); });
}

TEST_CASE("temperature 0 takes the most likely token, the lowest id on a tie") {
    keel::sampler sample(greedy);
    CHECK(sample(std::vector<float>{0, 3, 1, 3}) == 1);
    CHECK(sample(std::vector<float>{-5, -7}) == 0);
    throws(errc::argument, "no logits", [&] { sample({}); });
    throws(errc::numeric, "not finite", [&] { sample(std::vector<float>{NAN, NAN}); });
    throws(errc::numeric, "not finite", [&] { sample(std::vector<float>{0, INFINITY}); });
    CHECK(sample(std::vector<float>{NAN, 1}) == 1);
}

TEST_CASE("tokens are drawn as often as their probability says") {
    // Probabilities 0.5, 0.25, 0.125, 0.125.
    const std::vector<float> logits{std::log(4.0f), std::log(2.0f), 0, 0};
    const auto shares = [&](keel::sampler_options options) {
        options.seed = 7;
        keel::sampler sample(options);
        std::vector<double> count(4);
        for (int i = 0; i < 40'000; ++i) count[static_cast<std::size_t>(sample(logits))] += 1.0 / 40'000;
        return count;
    };
    const auto close = [](const std::vector<double>& a, const std::vector<double>& b) {
        for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::abs(a[i] - b[i]) < 0.012);  // 4.8 standard deviations
    };
    close(shares({}), {0.5, 0.25, 0.125, 0.125});
    close(shares({.temperature = 0.5f}), {16 / 22.0, 4 / 22.0, 1 / 22.0, 1 / 22.0});
    close(shares({.top_k = 2}), {2 / 3.0, 1 / 3.0, 0, 0});
    close(shares({.top_p = 0.7f}), {2 / 3.0, 1 / 3.0, 0, 0});
    close(shares({.top_p = 0.1f}), {1, 0, 0, 0});
    close(shares({.min_p = 0.4f}), {2 / 3.0, 1 / 3.0, 0, 0});
    close(shares({.min_p = 1}), {1, 0, 0, 0});
}

TEST_CASE("a seed decides all that is drawn") {
    std::vector<float> logits(1000);
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 17) / 4;
    const auto draws = [&](std::uint64_t seed) {
        keel::sampler sample({.seed = seed});
        std::vector<token> drawn;
        for (int i = 0; i < 50; ++i) drawn.push_back(sample(logits));
        return drawn;
    };
    CHECK(draws(1) == draws(1));
    CHECK(draws(1) != draws(2));
}

TEST_CASE("a session reports misuse before anything happens") {
    const auto engine = keel::engine::open(tiny);
    throws(errc::argument, "4096", [&] { (void)engine.start({.context = 5000}); });
    throws(errc::argument, "context", [&] { (void)engine.start({.context = -1}); });
    auto session = engine.start({.context = 10});
    keel::sampler sample(greedy);
    throws(errc::argument, "feed", [&] { session.next(sample); });
    throws(errc::argument, "token 512", [&] { session.feed(std::vector<token>{1, 512}); });
    throws(errc::argument, "token -1", [&] { session.feed(std::vector<token>{-1}); });
    throws(errc::capacity, "10 tokens", [&] { session.feed(std::vector<token>(11, 1)); });
    CHECK(session.position() == 0);
    session.feed(std::vector<token>(9, 1));
    CHECK(session.next(sample));
    throws(errc::capacity, "context", [&] { session.next(sample); });
    CHECK(session.position() == 10);
}

TEST_CASE("a session may be longer than what the model was trained for, if that is wanted") {
    const auto engine = keel::engine::open(tiny);
    auto session = engine.start({.context = 4200, .beyond_training = true});
    session.feed(std::vector<token>(4200, 7));
    CHECK(session.position() == 4200);
    CHECK(std::ranges::all_of(session.logits(), [](float x) { return std::isfinite(x); }));
}

TEMPLATE_TEST_CASE("exact sessions give the same bits however their tokens come", "", keel::reference, keel::cpu) {
    using engine = keel::basic_engine<TestType>;
    const auto model = engine::open(tiny, {.precision = keel::precision::exact, .threads = 2, .batch_rows = 64});
    std::vector<token> tokens;
    for (int i = 0; i < 150; ++i) tokens.push_back(i * 37 % 480);
    auto whole = model.start();
    whole.feed(tokens);
    const std::vector<float> expected(whole.logits().begin(), whole.logits().end());
    for (const std::size_t split : {1u, 7u, 64u, 65u}) {
        auto session = model.start();
        for (std::size_t i = 0; i < tokens.size(); i += split) {
            session.feed(std::span<const token>(tokens).subspan(i, std::min(split, tokens.size() - i)));
        }
        CHECK(std::ranges::equal(session.logits(), expected));
    }
    const auto other_threads = engine::open(tiny, {.precision = keel::precision::exact, .threads = 1});
    auto session = other_threads.start();
    session.feed(tokens);
    CHECK(std::ranges::equal(session.logits(), expected));
}

TEMPLATE_TEST_CASE("a copied session goes on as the original would", "", keel::reference, keel::cpu) {
    const auto model = keel::basic_engine<TestType>::open(tiny, {.precision = keel::precision::exact, .threads = 2});
    auto original = model.start();
    original.feed(std::vector<token>(300, 5));  // the second block of the cache is in use
    auto copy = original;
    const keel::sampler sample({.temperature = 0.9f, .seed = 3});
    auto other = copy;
    draw(other, keel::sampler({.seed = 99}), 20);  // must not disturb the others
    CHECK(draw(original, sample, 20) == draw(copy, sample, 20));
}

TEST_CASE("sessions of one engine run on several threads") {
    const auto model = keel::engine::open(tiny, {.precision = keel::precision::exact, .threads = 2});
    const auto run = [&](int i) {
        auto session = model.start();
        session.feed(std::vector<token>(static_cast<std::size_t>(20 + i), 7));
        return draw(session, keel::sampler({.seed = static_cast<std::uint64_t>(i)}), 20);
    };
    std::vector<std::vector<token>> alone, together(4);
    for (int i = 0; i < 4; ++i) alone.push_back(run(i));
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back([&, i] { together[static_cast<std::size_t>(i)] = run(i); });
    for (auto& t : threads) t.join();
    CHECK(alone == together);
}

TEST_CASE("a plan counts interleaved weights") {
    const auto mapped = keel::engine::open(KEEL_DEMO_MODEL);
    const auto interleaved = keel::engine::open(KEEL_DEMO_MODEL, {.interleave = true});
    keel::index more = 0;  // two bits for every scale and minimum of Q4_K
    for (const keel::tensor_info& t : mapped.file().tensors()) {
        if (t.type->name == "Q4_K" && t.dims[1] % 32 == 0 && t.name != "token_embd.weight") {
            more += static_cast<keel::index>(t.data.size()) / 144 * 4;
        }
    }
    CHECK(more > 0);
    CHECK(interleaved.plan().weights == mapped.plan().weights + more);
    CHECK(interleaved.plan().workspace == mapped.plan().workspace);
    const auto exact = keel::engine::open(KEEL_DEMO_MODEL, {.precision = keel::precision::exact, .interleave = true});
    CHECK(exact.plan().weights == mapped.plan().weights);
}

TEST_CASE("generation ends at an end-of-generation token, which is not appended") {
    const auto model = keel::engine::open(tiny);
    auto session = model.start();
    session.feed(std::vector<token>{1, 2, 3});
    const token end = *model.vocabulary().find("<|im_end|>");
    CHECK(!session.next([&](std::span<const float>) { return end; }));
    CHECK(session.position() == 3);
}

TEST_CASE("a feed that is cancelled stops behind the last whole batch and can go on") {
    const auto model = keel::engine::open(tiny, {.precision = keel::precision::exact, .batch_rows = 16});
    const std::vector<token> tokens(50, 9);
    auto session = model.start();
    throws(errc::cancelled, "cancelled",
           [&] { session.feed(tokens, {.tell = [](const keel::progress_report& r) { return r.done < 32; }}); });
    CHECK(session.position() == 32);
    session.feed(std::span<const token>(tokens).subspan(32));
    auto whole = model.start();
    whole.feed(tokens);
    CHECK(std::ranges::equal(session.logits(), whole.logits()));
}

TEST_CASE("the logits behind every token can be had on the way") {
    const auto model = keel::engine::open(tiny, {.precision = keel::precision::exact, .batch_rows = 50});
    std::vector<token> tokens;
    for (int i = 0; i < 120; ++i) tokens.push_back(i * 31 % 480);
    std::vector<std::vector<float>> rows;
    auto session = model.start();
    session.feed(tokens, {.each = [&](keel::index position, std::span<const float> logits) {
                     CHECK(position == static_cast<keel::index>(rows.size()));
                     rows.emplace_back(logits.begin(), logits.end());
                 }});
    REQUIRE(rows.size() == tokens.size());
    auto single = model.start();
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        single.feed(std::span<const token>(&tokens[i], 1));
        CHECK(std::ranges::equal(single.logits(), rows[i]));
    }
}

TEST_CASE("a limit of memory is kept, and the message says what would fit") {
    const auto engine = exact_engine();
    const keel::index state = engine.plan().state;
    const keel::session_options options{.context = 1024, .checkpoint_bytes = 17 * state / 2};
    const auto plan = engine.plan(options);
    CHECK(plan.checkpoints == 8 * state);
    CHECK(plan.total() == plan.weights + plan.tokenizer + plan.workspace + plan.session());
    CHECK(plan.session() == state + plan.cache + plan.tokens + plan.checkpoints);
    const auto open = [&](keel::index memory) {
        return keel::engine::open(
            tiny, {.precision = keel::precision::exact, .threads = 2, .batch_rows = 64, .memory = memory});
    };
    CHECK(keel::engine::plan(engine.file(), {.precision = keel::precision::exact, .threads = 2, .batch_rows = 64},
                             options)
              .total() == plan.total());
    CHECK(open(plan.total()).start(options).context() == 1024);
    const auto refused = [&](keel::index memory, const char* advice) {
        throws(errc::capacity, advice, [&] { (void)open(memory).start(options); });
    };
    refused(plan.total() - 1, "a context of 768 tokens would fit");
    refused(plan.total() - plan.cache - plan.tokens, "a context of 1024 tokens without checkpoints would fit");
    refused(1000, "no context would fit");
    CHECK(open(plan.total() - 1).start({.context = 768, .checkpoint_bytes = 8 * state}).context() == 768);
    throws(errc::argument, "batch_rows", [&] { (void)keel::engine::plan(engine.file(), {.batch_rows = 0}); });
    throws(errc::argument, "batch_rows", [&] { (void)keel::engine::open(tiny, {.batch_rows = 0}); });
}

namespace {

/// Counts the memory that buffers have.
class counted_buffer : public keel::host_buffer {
public:
    static inline keel::index now = 0, most = 0;

    counted_buffer() = default;
    explicit counted_buffer(keel::index bytes) : host_buffer(bytes) { count(size()); }
    counted_buffer(const counted_buffer& other) : host_buffer(other) { count(size()); }
    counted_buffer(counted_buffer&&) noexcept = default;
    counted_buffer& operator=(const counted_buffer& other) {
        const keel::index before = size();
        host_buffer::operator=(other);
        count(size() - before);
        return *this;
    }
    counted_buffer& operator=(counted_buffer&&) noexcept = default;
    ~counted_buffer() { count(-size()); }

private:
    static void count(keel::index bytes) {
        now += bytes;
        most = std::max(most, now);
    }
};

struct counting_reference : keel::reference {
    using reference::reference;
    using buffer = counted_buffer;
    [[nodiscard]] buffer allocate(keel::index bytes) const { return buffer(bytes); }
};

}  // namespace

TEST_CASE("a session takes the memory that was planned, and no more") {
    const auto engine = keel::basic_engine<counting_reference>::open(tiny, {.batch_rows = 64});
    for (const int replay : {0, 8}) {
        const keel::index row = engine.shape().vocabulary * 4, state = engine.plan().state;
        const keel::session_options options{
            .context = 600, .checkpoint_bytes = 3 * state, .checkpoint_every = 50, .replay = replay};
        const auto plan = engine.plan(options);
        const keel::index before = counted_buffer::now;
        counted_buffer::most = before;
        auto session = engine.start(options);
        session.feed(some_tokens(300));
        for (int i = 0; i < 90; ++i) session.feed(some_tokens(1, i));
        session.rewind(385);
        session.rewind(210);
        session.checkpoint();
        session.feed(some_tokens(390, 3));
        session.rewind(599);
        session.restore();
        session.rewind(0);
        session.feed(some_tokens(10));
        // Logits are in host memory, which is not counted here.
        const keel::index states = 4 + (replay > 0 ? 2 : 0);
        const keel::index planned = plan.session() - plan.tokens - states * row;
        if (replay == 0) CHECK(counted_buffer::most - before == planned);
        // With replays, a block is not copied at the time when there are most states.
        CHECK(counted_buffer::most - before <= planned);
        CHECK(counted_buffer::most - before >= planned - plan.cache_per_token * keel::memory_layout::block_rows);
    }
}
