// SPDX-License-Identifier: MIT
#include <atomic>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <vector>

#include "commands.hpp"
#include "console.hpp"

namespace tool {

namespace {

// A signal handler reaches only what is global.
std::atomic<bool> interrupted = false;

}  // namespace

void chat(const chat_options& options) {
    const auto loaded = load(options.run.model);
    auto session = loaded->start(options.run.context, options.sample);
    std::vector<std::unique_ptr<tool::session>> turns;  // the session before each turn: going back is a copy
    std::signal(SIGINT, [](int) { interrupted = true; });
    std::fprintf(stderr, "Ctrl-C stops an answer, /undo takes the last turn back, Ctrl-D ends.\n");

    std::string line;
    while (std::fprintf(stderr, "> "), std::getline(std::cin, line)) {
        if (line.empty()) continue;
        if (line == "/undo") {
            if (turns.empty()) {
                std::fprintf(stderr, "there is no turn to take back\n");
            } else {
                session = std::move(turns.back());
                turns.pop_back();
            }
            continue;
        }
        if (line.front() == '/') {
            std::fprintf(stderr, "%s: unknown; there is /undo\n", line.c_str());
            continue;
        }
        turns.push_back(session->fork());
        interrupted = false;
        try {
            std::vector<message> messages;
            const bool first = session->position() == 0;
            if (first && !options.system.empty()) messages.push_back({message::author::system, options.system});
            messages.push_back({message::author::user, line});
            session->feed(
                loaded->turn(messages, !first), [&](std::string_view stage, std::uint64_t done, std::uint64_t total) {
                    return !interrupted && (!options.run.model.tell || options.run.model.tell(stage, done, total));
                });
            while (!interrupted) {
                const auto next = session->next();
                if (!next) break;
                std::cout << session->show(*next) << std::flush;
            }
            std::cout << session->show_rest() << std::endl;
        } catch (
            const std::exception& e) {  // the context is full, or the prompt was interrupted: the turn did not happen
            std::fprintf(stderr, "%s\n", e.what());
            session = std::move(turns.back());
            turns.pop_back();
        }
    }
    std::fprintf(stderr, "\n");
}

}  // namespace tool
