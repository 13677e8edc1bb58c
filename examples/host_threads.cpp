// SPDX-License-Identifier: MIT
//
// host_threads MODEL PROMPT...: a host with threads of its own. keel gets one thread per call, the caller's, and the
// host decides how many sessions run at the same time.
#include <exception>
#include <future>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <keel/keel.hpp>

int main(int argc, char** argv) try {
    if (argc < 3) throw std::runtime_error("usage: host_threads MODEL PROMPT...");
    const auto engine =
        keel::engine::open(argv[1], {.threads = 1});  // no workers: everything runs on the calling thread
    const auto continue_text = [&engine](std::string prompt) {
        auto session = engine.start();  // a session belongs to one thread at a time; the engine is shared
        keel::sampler sample({.temperature = 0.7f});
        session.feed(engine.tokenize(prompt));
        for (int i = 0; i < 60; ++i) {
            const auto token = session.next(sample);
            if (!token) break;
            prompt += engine.text(*token);
        }
        return prompt;
    };
    std::vector<std::future<std::string>> texts;
    for (int i = 2; i < argc; ++i) texts.push_back(std::async(std::launch::async, continue_text, std::string(argv[i])));
    for (auto& text : texts) std::cout << "* " << text.get() << "\n\n";
} catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
}
