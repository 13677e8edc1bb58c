// SPDX-License-Identifier: MIT
//
// chat MODEL: a conversation on the terminal. Every turn processes only what is new; an empty line takes the last turn
// back.
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <keel/keel.hpp>
#include <keel/text/chat.hpp>

int main(int argc, char** argv) try {
    if (argc != 2) throw std::runtime_error("usage: chat MODEL");
    const auto engine = keel::engine::open(argv[1]);
    auto session = engine.start();
    keel::sampler sample({.temperature = 0.7f, .top_p = 0.95f});
    std::vector<keel::index> turns;  // where each began

    for (std::string line; std::cout << "> " << std::flush, std::getline(std::cin, line);) {
        if (line.empty()) {
            if (turns.empty()) continue;
            session.rewind(turns.back());
            turns.pop_back();
            continue;
        }
        turns.push_back(session.position());
        const keel::chat_message message{.content = line};
        session.feed(keel::chat_tokens(engine.vocabulary(), {&message, 1}, {.after_answer = turns.size() > 1}));
        keel::text_stream text(engine.vocabulary());
        while (session.position() < session.context()) {
            const auto token = session.next(sample);
            if (!token) break;
            std::cout << text.push(*token) << std::flush;
        }
        std::cout << text.flush() << '\n';
    }
} catch (const std::exception& e) {
    std::cerr << e.what() << '\n';
    return 1;
}
