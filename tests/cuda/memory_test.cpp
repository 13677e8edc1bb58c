// SPDX-License-Identifier: MIT
//
// What the GPU's memory says of a memory plan. Needs a model that is large beside what CUDA itself takes: its path is
// in KEEL_BIG_MODEL, see tools/test-cuda.sh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include <keel/backend/cuda.hpp>
#include <keel/engine.hpp>
#include <keel/session.hpp>

#include "catch.hpp"

using namespace keel;

TEST_CASE("a model takes the GPU memory that was planned, within one percent", "[.][memory]") {
    const char* const path = std::getenv("KEEL_BIG_MODEL");
    if (path == nullptr) {
        SUCCEED("not asked for");
        return;
    }
    const auto run = [](const basic_engine<cuda>& engine, const session_options& options) {
        auto session = engine.start(options);
        session.feed(std::vector<token>(600, 7));
        session.next([](std::span<const float>) { return token{3}; });
        return session;
    };
    const cuda_device here{backend_options{}};
    {
        const auto engine = basic_engine<cuda>::open(KEEL_DEMO_MODEL);  // CUDA takes what it takes
        run(engine, {.context = 1024});
    }
    const keel::index before = here.free_memory();
    const auto engine = basic_engine<cuda>::open(path, {.batch_rows = 2048});
    const session_options options{.context = 8192, .checkpoint_bytes = 0};
    std::vector<basic_session<cuda>> sessions;
    for (int i = 0; i < 3; ++i) sessions.push_back(run(engine, options));
    const auto taken = static_cast<double>(before - here.free_memory());
    const memory_plan plan = engine.plan(options);
    // A session's cache grows by blocks: 601 tokens take three of them.
    const keel::index cache = 3 * memory_layout::block_rows * plan.cache_per_token;
    const auto planned = static_cast<double>(plan.weights + plan.workspace + 3 * (plan.state + cache));
    std::printf(
        "planned %.1f MB (weights %.1f, workspace %.1f, three sessions of %.1f + %.1f), taken %.1f MB, %+.2f %%\n",
        planned * 1e-6, static_cast<double>(plan.weights) * 1e-6, static_cast<double>(plan.workspace) * 1e-6,
        static_cast<double>(plan.state) * 1e-6, static_cast<double>(cache) * 1e-6, taken * 1e-6,
        (taken / planned - 1) * 100);
    CHECK(std::abs(taken / planned - 1) <= 0.01);
}
