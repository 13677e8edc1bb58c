// SPDX-License-Identifier: MIT
//
// agents MODEL PROMPT: reads one long prompt once, forks it into eight continuations and draws them all in one batch.
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <keel/keel.hpp>

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: agents MODEL PROMPT");
    const auto engine = keel::engine::open(argv[1]);
    auto prompt = engine.start();
    prompt.feed(engine.tokenize(argv[2]));

    struct agent {
        keel::session session;
        keel::sampler sample;
        std::string text;
        bool done = false;
    };
    std::vector<agent> agents;
    for (std::uint64_t i = 0; i < 8; ++i) {
        agents.push_back({prompt, keel::sampler({.temperature = 0.8f, .seed = i}), {}});  // costs a copy of the state
    }

    std::vector<keel::session*> together;
    for (auto& a : agents) together.push_back(&a.session);
    for (int i = 0; i < 60; ++i) {
        engine.step(together);  // one pass of the weights serves all that have a token to run
        for (auto& a : agents) {
            if (a.done) continue;
            const auto token = a.session.next(a.sample);
            if (token) a.text += engine.text(*token);
            a.done = !token;
        }
    }
    for (const auto& a : agents) std::cout << "* " << a.text << "\n\n";
} catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
}
