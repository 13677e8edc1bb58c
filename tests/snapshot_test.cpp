// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <csignal>

#include <sys/wait.h>
#include <unistd.h>
#endif

#include <keel/io/snapshot.hpp>
#include <keel/keel.hpp>
#include <keel/model/saved_sequence.hpp>

#include "catch.hpp"
#include "io/support.hpp"
#include "sessions.hpp"
#include "throws.hpp"

using namespace keel::testing;
using keel::errc;
using keel::token;
using keel_test::read_file;
using keel_test::write_file;

namespace {

/// The sections of a snapshot, to be changed and written again with the checksum that goes with them.
struct forged_snapshot {
    keel::snapshot_header header;
    std::vector<token> tokens;
    std::vector<keel::snapshot_state> states;
    std::vector<float> logits;
    std::vector<std::vector<std::byte>> recurrent;
    std::vector<std::byte> blocks;

    explicit forged_snapshot(const std::filesystem::path& path) {
        const keel::snapshot file(path);
        header = file.header();
        tokens = keel::detail::values_of<token>(file.tokens);
        states = keel::detail::values_of<keel::snapshot_state>(file.states);
        logits = keel::detail::values_of<float>(file.logits);
        for (const auto part : file.recurrent) recurrent.emplace_back(part.begin(), part.end());
        blocks.assign(file.blocks.begin(), file.blocks.end());
    }

    void write(const std::filesystem::path& path) {
        header.tokens = tokens.size();
        header.states = states.size();
        header.logits = logits.size();
        header.blocks = blocks.size() / header.block_bytes;
        header.checksum = 0;
        keel::snapshot_writer file(path, header);
        file.write(std::as_bytes(std::span(tokens)));
        file.write(std::as_bytes(std::span(states)));
        file.write(std::as_bytes(std::span(logits)));
        for (const auto& part : recurrent) file.write(part);
        file.write(blocks);
        file.commit();
    }
};

/// A snapshot of twenty tokens.
void save_some(const keel::engine& engine, const std::filesystem::path& file) {
    auto session = engine.start();
    session.feed(some_tokens(20));
    session.save(file);
}

}  // namespace

TEST_CASE("a saved session goes on where it was") {
    const auto engine = exact_engine();
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    for (const int length : {0, 1, 100, 300}) {
        auto session = engine.start({.context = 1000});
        session.feed(some_tokens(length));
        if (length > 0) session.next([](std::span<const float>) { return token{7}; });  // not yet run
        session.save(file);
        auto resumed = engine.resume(file, {.context = 1000, .replay = 8});
        CHECK(std::ranges::equal(resumed.tokens(), session.tokens()));
        resumed.feed(some_tokens(30));
        session.feed(some_tokens(30));
        CHECK(std::ranges::equal(resumed.logits(), session.logits()));
    }
    throws(errc::capacity, "holds 301 tokens, more than the context of 10",
           [&] { (void)engine.resume(file, {.context = 10}); });
    throws(errc::file, "nowhere", [&] { (void)engine.resume("/nowhere/s.keel"); });
    auto session = engine.start();
    throws(errc::file, "nowhere", [&] { session.save("/nowhere/s.keel"); });
}

TEST_CASE("a resumed session goes back as the saved one would") {
    const auto engine = exact_engine();
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    auto session = engine.start({.context = 2048, .checkpoint_every = 100});
    session.feed(some_tokens(300));
    session.checkpoint();
    session.feed(some_tokens(200, 5));
    session.feed(some_tokens(100, 7));
    session.save(file);
    for (const int target : {500, 450, 300, 200}) {
        auto resumed = engine.resume(file, {.context = 2048}), copy = session;
        const auto how = resumed.rewind(target), as_saved = copy.rewind(target);
        CHECK(how.reused == as_saved.reused);
        CHECK(how.reused > 0);
        CHECK(agrees_with_fresh(engine, resumed));
    }
    const keel::index state = engine.plan().state;
    for (const keel::index bytes : {state, 3 * state}) {  // less than the saved one had
        auto resumed = engine.resume(file, {.context = 2048, .checkpoint_bytes = bytes});
        resumed.restore();
        CHECK(resumed.position() == 300);
        CHECK(resumed.ready());
        CHECK(agrees_with_fresh(engine, resumed));
    }
    auto none = engine.resume(file, {.context = 2048, .checkpoint_bytes = 0});
    throws(errc::argument, "no checkpoint", [&] { none.restore(); });
    CHECK(none.rewind(500).reused == 0);
}

TEST_CASE("a snapshot of another version is refused, and both versions are named") {
    const auto engine = exact_engine();
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    save_some(engine, file);
    auto bytes = read_file(file);
    bytes[8] = 1;
    write_file(file, bytes);
    throws(errc::unsupported, "version 1, only 3", [&] { (void)engine.resume(file); });
}

TEST_CASE("a snapshot of another model or precision is refused") {
    const auto engine = exact_engine();
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    save_some(engine, file);
    const auto fast = keel::engine::open(tiny);
    throws(errc::argument, "precision", [&] { (void)fast.resume(file); });
    const auto other =
        keel::engine::open(KEEL_TEST_DATA "/models/tiny-legacy.gguf", {.precision = keel::precision::exact});
    throws(errc::argument, "another model", [&] { (void)other.resume(file); });
}

TEST_CASE("a damaged snapshot is refused, whatever the damage") {
    const auto engine = exact_engine();
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    save_some(engine, file);
    const auto good = read_file(file);
    const auto refused = [&](const std::string& bytes) {
        write_file(file, bytes);
        try {
            (void)engine.resume(file);
        } catch (const keel::error& e) {
            CHECK(std::string(e.what()).find(file.string()) != std::string::npos);
            return true;
        }
        return false;
    };
    std::mt19937_64 random(1);
    int missed = 0;
    for (int i = 0; i < 4000; ++i) {
        auto bytes = good;
        const std::size_t bit = i < 192 * 8 ? static_cast<std::size_t>(i) : random() % (8 * good.size());
        bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
        missed += !refused(bytes);
    }
    for (int i = 0; i < 500; ++i) {
        auto bytes = good;
        bytes.resize(i < 250 ? static_cast<std::size_t>(i) : random() % good.size());
        missed += !refused(bytes);
    }
    auto longer = good;
    longer.push_back('\0');
    missed += !refused(longer);
    CHECK(missed == 0);
    CHECK(!refused(good));
}

TEST_CASE("a snapshot whose numbers cannot be is refused, though its checksum is right") {
    const auto engine = exact_engine();
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    auto session = engine.start();
    for (int turn = 0; turn < 3; ++turn) session.feed(some_tokens(100, turn));
    session.checkpoint();
    session.feed(some_tokens(100, 3));
    session.save(file);
    const forged_snapshot good(file);
    REQUIRE(good.states.size() == 4);  // at 100, 200, 300, and the last one
    const auto refused = [&](errc code, const char* what, auto&& change) {
        forged_snapshot forged = good;
        change(forged);
        forged.write(file);
        throws(code, what, [&] { (void)engine.resume(file); });
    };
    const auto contradicts = [&](auto&& change) { refused(errc::format, "contradicts itself", change); };
    contradicts([](auto& f) { f.states.clear(), f.recurrent.clear(), f.logits.clear(); });
    contradicts([](auto& f) { f.states[3].tokens = 401; });
    contradicts([](auto& f) { f.states[3].tokens = 299; });
    contradicts([](auto& f) { f.states[2].tokens = 200; });
    contradicts([](auto& f) { f.states[0].tokens = 0; });
    contradicts([](auto& f) { f.states[0].has_logits = 2; });
    contradicts([](auto& f) { f.states[0].has_logits ^= 1; });
    contradicts([](auto& f) { f.logits.pop_back(); });
    contradicts([](auto& f) { f.blocks.clear(); });
    contradicts([](auto& f) { f.header.marked = 251; });
    contradicts([](auto& f) {
        f.header.recurrent_bytes -= 64;
        for (auto& part : f.recurrent) part.resize(part.size() - 64);
    });
    contradicts([](auto& f) { f.header.block_bytes /= 2; });
    refused(errc::argument, "token 512", [](auto& f) { f.tokens[7] = 512; });
    forged_snapshot(good).write(file);
    CHECK(std::ranges::equal(engine.resume(file).tokens(), session.tokens()));
}

#if !defined(_WIN32)
TEST_CASE("a save that is killed never loses the file before it") {
    const keel_test::scratch_folder folder;
    const auto file = folder / "session";
    const auto open = [] {  // one thread: a process that has others cannot well be forked
        return keel::engine::open(tiny, {.precision = keel::precision::exact, .threads = 1});
    };
    const auto save = [&](int tokens) {
        auto session = open().start();
        session.feed(some_tokens(tokens));
        session.save(file);
        return session;
    };
    save(20);
    bool replaced = false;
    for (int i = 0; i < 30 || (!replaced && i < 300); ++i) {  // until one had the time for a save
        const auto child = ::fork();
        if (child == 0) {
            for (auto session = save(300);;) session.save(file);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(10 + 5 * i));
        ::kill(child, SIGKILL);
        ::waitpid(child, nullptr, 0);
        const auto tokens = open().resume(file).position();
        CHECK((tokens == 20 || tokens == 300));
        replaced = replaced || tokens == 300;
    }
    CHECK(replaced);
}
#endif
