// SPDX-License-Identifier: MIT
//
// What the tests of sessions need, on any backend.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/engine.hpp>
#include <keel/fwd.hpp>

namespace keel::testing {

inline const std::string tiny = KEEL_TEST_DATA "/models/tiny-f32.gguf";

/// The smallest model, exact.
template <class Engine = engine>
Engine exact_engine(index batch_rows = 64) {
    return Engine::open(tiny, {.precision = precision::exact, .threads = 2, .batch_rows = batch_rows});
}

/// Tokens of the smallest models' vocabulary, others for another start.
inline std::vector<token> some_tokens(int n, int start = 0) {
    std::vector<token> tokens;
    for (int i = 0; i < n; ++i) tokens.push_back((start + i * 37) % 480);
    return tokens;
}

/// Whether the session gives the logits of a fresh one that is fed the same tokens, to the bit.
template <class Engine, class Session>
bool agrees_with_fresh(const Engine& engine, Session& session) {
    auto fresh = engine.start({.context = session.context(), .checkpoint_bytes = 0});
    fresh.feed(session.tokens());
    return std::ranges::equal(session.logits(), fresh.logits());
}

}  // namespace keel::testing
