// SPDX-License-Identifier: MIT
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <keel/backend/observed.hpp>
#include <keel/backend/reference.hpp>
#include <keel/keel.hpp>

#include "catch.hpp"
#include "io/support.hpp"
#include "sessions.hpp"
#include "throws.hpp"

using keel::errc;
using keel::token;
using keel::testing::agrees_with_fresh;
using keel::testing::exact_engine;
using keel::testing::some_tokens;
using keel::testing::throws;
using keel::testing::tiny;

namespace {

/// Random operations on a handful of sessions, each of which must always agree with a fresh one. Answers how often
/// something was not as it should be; Catch2 may not be asked on several threads.
class random_operations {
public:
    random_operations(const keel::engine& engine, unsigned seed)
        : engine_(engine),
          options_{.context = 400,
                   .checkpoint_bytes = static_cast<keel::index>(1 + seed % 4) * engine.plan().state,
                   .checkpoint_every = 50,
                   .replay = static_cast<keel::index>(seed % 3 * 6)},
          random_(seed),
          sample_({.seed = seed}),
          all_{{engine.start(options_), std::nullopt}} {}

    int run(int operations, int check_every) {
        for (int i = 0; i < operations; ++i) {
            live& one = all_[static_cast<std::size_t>(below(static_cast<int>(all_.size())))];
            if (one.session.position() > 300) rewind(one, below(100));
            operate(one);
            if (i % check_every != 0) continue;
            for (auto& each : all_) {
                if (each.session.position() > 0) expect(agrees_with_fresh(engine_, each.session));
            }
        }
        return wrong_;
    }

private:
    struct live {
        keel::session session;
        std::optional<keel::index> mark;  // of its last checkpoint()
    };

    void expect(bool good) { wrong_ += good ? 0 : 1; }
    int below(int n) { return static_cast<int>(random_() % static_cast<unsigned>(n)); }
    std::vector<token> draw(int most) { return some_tokens(1 + below(most), below(480)); }

    void rewind(live& one, keel::index position) {
        const auto how = one.session.rewind(position);
        expect(how.reused + how.replayed + how.computed == position);
        if (one.mark > position) one.mark.reset();
    }

    void restore(live& one) {
        try {
            one.session.restore();
            expect(one.mark == one.session.position());
            expect(one.session.position() == 0 || one.session.ready());
        } catch (const keel::error& e) {
            expect(e.code() == errc::argument && !one.mark);
        }
    }

    void sync(live& one) {
        const std::vector<token> before(one.session.tokens().begin(), one.session.tokens().end());
        std::vector<token> other = before;
        other.resize(static_cast<std::size_t>(below(static_cast<int>(other.size()) + 1)));
        for (const token t : draw(20)) other.push_back(t);
        const auto how = one.session.sync(other);
        expect(std::ranges::equal(one.session.tokens(), other));
        expect(how.reused + how.replayed + how.computed == one.session.position());
        if (one.mark > std::ranges::mismatch(other, before).in1 - other.begin()) one.mark.reset();
    }

    void step_together() {
        std::vector<keel::session*> sessions;
        for (auto& one : all_) {
            if (below(2) == 0) one.session.append(draw(30));
            sessions.push_back(&one.session);
        }
        while (engine_.step(sessions, 1 + below(100)) > 0) {
        }
    }

    void cancel(keel::session& s) {
        const auto position = s.position();
        bool cancelled = false;
        try {
            s.feed(some_tokens(70), {.tell = [](const auto& r) { return r.done == 0; }});
        } catch (const keel::error& e) {
            cancelled = e.code() == errc::cancelled;
        }
        expect(cancelled && s.position() >= position);
    }

    void operate(live& one) {
        keel::session& s = one.session;
        switch (below(12)) {
            case 0:
                s.feed(draw(60));
                break;
            case 1:
            case 2:
                if (s.position() > 0) s.next(sample_);
                break;
            case 3:
                if (all_.size() < 4) all_.push_back(live(one));
                break;
            case 4:
                if (all_.size() > 1) all_.erase(all_.begin() + below(static_cast<int>(all_.size())));
                break;
            case 5:
                rewind(one, below(static_cast<int>(s.position()) + 1));
                break;
            case 6:
                s.checkpoint();
                one.mark = s.position();
                break;
            case 7:
                restore(one);
                break;
            case 8:
                sync(one);
                break;
            case 9:
                if (below(4) > 0) break;
                s.save(folder_ / "saved");
                s = engine_.resume(folder_ / "saved", options_);
                break;
            case 10:
                step_together();
                break;
            case 11:
                if (below(2) == 0) cancel(s);
                break;
        }
    }

    const keel::engine& engine_;
    keel::session_options options_;
    keel_test::scratch_folder folder_;
    std::mt19937 random_;
    keel::sampler sample_;
    std::vector<live> all_;
    int wrong_ = 0;
};

}  // namespace

TEST_CASE("random operations never disturb a session") {
    const auto engine = exact_engine();
    for (unsigned seed = 0; seed < 10; ++seed) CHECK(random_operations(engine, seed).run(1000, 20) == 0);
}

TEST_CASE("random operations on many threads never disturb a session") {
    const auto engine = exact_engine();
    std::vector<std::thread> threads;
    std::atomic<int> wrong = 0;
    for (unsigned seed = 100; seed < 108; ++seed) {
        threads.emplace_back([&, seed] { wrong += random_operations(engine, seed).run(1250, 50); });
    }
    for (auto& t : threads) t.join();
    CHECK(wrong == 0);
}

TEST_CASE("a session goes back by replay, to a checkpoint, or from the start, whichever is least work") {
    const auto engine = exact_engine();
    auto session = engine.start({.checkpoint_bytes = 4 * engine.plan().state, .checkpoint_every = 100, .replay = 16});
    session.feed(some_tokens(250));
    SECTION("within the window nothing but the last token is computed") {
        for (const int target : {240, 234}) {  // the last one lies exactly 16 tokens back
            auto copy = session;
            const auto how = copy.rewind(target);
            CHECK(how.computed <= 1);
            CHECK(how.replayed <= 34);
            CHECK(agrees_with_fresh(engine, copy));
        }
    }
    SECTION("behind a checkpoint only what came after it is computed") {
        const auto how = session.rewind(150);
        CHECK(how.reused > 0);
        CHECK(how.computed <= 100);
        CHECK(agrees_with_fresh(engine, session));
    }
    SECTION("positions outside of the session are refused") {
        throws(errc::argument, "position 251", [&] { session.rewind(251); });
        throws(errc::argument, "position -1", [&] { session.rewind(-1); });
    }
}

TEST_CASE("a checkpoint is restored as often as wanted, whatever came after it") {
    const auto engine = keel::engine::open(tiny);  // also where computing again would give other bits
    const keel::index state = engine.plan().state;
    auto session = engine.start({.checkpoint_bytes = 2 * state});
    throws(errc::argument, "no checkpoint", [&] { session.restore(); });
    session.feed(some_tokens(250));
    session.checkpoint();
    const std::vector<float> logits(session.logits().begin(), session.logits().end());
    for (int time = 0; time < 3; ++time) {
        for (int turn = 0; turn < 6; ++turn) session.feed(some_tokens(30 + time, turn));
        session.restore();
        CHECK(session.position() == 250);
        CHECK(session.ready());
        CHECK(std::ranges::equal(session.logits(), logits));
    }
    SECTION("the next one takes its place") {
        session.feed(some_tokens(10));
        session.checkpoint();
        session.feed(some_tokens(10));
        session.restore();
        CHECK(session.position() == 260);
    }
    SECTION("in front of it there is nothing to restore") {
        session.rewind(249);
        throws(errc::argument, "no checkpoint", [&] { session.restore(); });
    }
    SECTION("the beginning can be one, and needs no memory") {
        auto empty = engine.start({.checkpoint_bytes = 0});
        empty.checkpoint();
        empty.feed(some_tokens(5));
        throws(errc::capacity, std::to_string(state), [&] { empty.checkpoint(); });
        empty.restore();
        CHECK(empty.position() == 0);
    }
}

TEST_CASE("checkpoints lie the denser the nearer they are to the end, as far as their memory reaches") {
    const auto engine = exact_engine();
    constexpr int turns = 200, length = 10;
    auto session = engine.start({.context = 4096, .checkpoint_bytes = 16 * engine.plan().state});
    for (int turn = 0; turn < turns; ++turn) session.feed(some_tokens(length, turn));
    for (const int back : {1, 15, 40, 100, 333, 1000, 1500}) {
        auto copy = session;
        CHECK(copy.rewind(turns * length - back).computed <= 2 * back + length);
    }
}

TEST_CASE("editing the last turn of a long conversation computes little more than the turn") {
    const auto engine = exact_engine(256);
    auto session = engine.start({.context = 4096});
    for (int turn = 0; turn < 8; ++turn) {
        session.feed(some_tokens(200, turn));
        for (int i = 0; i < 40; ++i) session.next([](std::span<const float>) { return token{3}; });
    }
    std::vector<token> edited(session.tokens().begin(), session.tokens().end());
    edited.resize(edited.size() - 240);
    for (const token t : some_tokens(200, 77)) edited.push_back(t);
    const auto how = session.sync(edited);
    CHECK(how.computed <= 264);
    CHECK(agrees_with_fresh(engine, session));
}

TEST_CASE("a batch of sessions gives what each gives alone") {
    const auto engine = exact_engine();
    std::vector<keel::session> together, alone;
    std::vector<keel::session*> all;
    for (int i = 0; i < 5; ++i) {
        together.push_back(engine.start({.context = 300}));
        together.back().append(some_tokens(10 + 60 * i, i));
        alone.push_back(engine.start({.context = 300}));
        alone.back().feed(some_tokens(10 + 60 * i, i));
    }
    for (auto& s : together) all.push_back(&s);
    std::vector<keel::sampler> samplers(5, keel::sampler({.seed = 5}));
    std::vector<keel::sampler> samplers_alone = samplers;
    std::vector<int> drawn(5);
    for (bool more = true; more;) {  // decoding goes on while the long prompts are fed in parts
        engine.step(all, 48);
        more = false;
        for (std::size_t i = 0; i < 5; ++i) {
            if (drawn[i] == 20) continue;
            more = true;
            if (!together[i].ready()) continue;
            if (!together[i].next(samplers[i])) drawn[i] = 19;
            ++drawn[i];
        }
    }
    for (std::size_t i = 0; i < 5; ++i) {
        while (alone[i].position() < together[i].position()) alone[i].next(samplers_alone[i]);
        CHECK(std::ranges::equal(alone[i].tokens(), together[i].tokens()));
    }
    const auto other = exact_engine();
    auto stranger = other.start();
    std::vector<keel::session*> mixed{&together[0], &stranger};
    throws(errc::argument, "another engine", [&] { engine.step(mixed); });
    std::vector<keel::session*> twice{&together[0], &together[0]};
    throws(errc::argument, "in use already", [&] { engine.step(twice); });
}

TEST_CASE("two threads in one session are noticed") {
    const auto engine = exact_engine(1);
    auto session = engine.start();
    bool noticed = false;
    session.feed(some_tokens(3), {.tell = [&](const keel::progress_report&) {
                     std::thread([&] {
                         try {
                             session.feed(some_tokens(1));
                         } catch (const keel::error& e) {
                             noticed = e.code() == errc::argument;
                         }
                     }).join();
                     return true;
                 }});
    CHECK(noticed);
    CHECK(session.position() == 3);
}

TEST_CASE("options of a session that make no sense are named") {
    const auto engine = exact_engine();
    throws(errc::argument, "checkpoint_bytes", [&] { (void)engine.start({.checkpoint_bytes = -1}); });
    throws(errc::argument, "checkpoint_every", [&] { (void)engine.start({.checkpoint_every = 0}); });
    throws(errc::argument, "replay", [&] { (void)engine.start({.context = 10, .replay = 11}); });
}

TEST_CASE("the finite check names layer and operation") {
    using engine = keel::basic_engine<keel::checked<keel::reference>>;
    auto sound = engine::open(tiny).start();
    sound.feed(some_tokens(5));

    // A copy of the model whose second layer has a NaN among its norm's weights.
    auto bytes = keel_test::read_file(tiny);
    {
        const auto file = keel::gguf::open(tiny);
        const auto& norm = file.require("blk.1.ffn_norm.weight");
        const auto* begin = reinterpret_cast<const char*>(norm.data.data());
        const auto at = std::search(bytes.begin(), bytes.end(), begin, begin + norm.data.size());
        REQUIRE(at != bytes.end());
        std::fill(at, at + 4, '\xFF');
    }
    const keel_test::scratch_folder folder;
    const auto broken = folder / "nan.gguf";
    keel_test::write_file(broken, bytes);
    auto session = engine::open(broken).start();
    throws(errc::numeric, "layer 1, rms_norm: NaN in element 0", [&] { session.feed(some_tokens(5)); });
}
