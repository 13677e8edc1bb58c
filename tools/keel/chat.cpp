// SPDX-License-Identifier: MIT
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "console.hpp"

namespace tool {

namespace {

// A signal handler reaches only what is global.
std::atomic<bool> interrupted = false;

const char* const help =
    "Ctrl-C stops an answer, Ctrl-D ends. /undo takes the last turn back, /retry answers again, /edit TEXT changes "
    "what you\n"
    "said last, /fork continues in a copy, /branch N goes to another copy, /save FILE, /load FILE, /tokens counts.\n";

/// A conversation and its commands. Where turns begin is read off the tokens, so that a loaded conversation has turns,
/// too.
class conversation {
public:
    explicit conversation(const chat_options& options) : options_(options), model_(load(options.run.model)) {
        for (const char* name : {"<|im_user|>", "<|im_middle|>"}) {
            if (!model_->find(name))
                throw std::runtime_error("the model has no token " + std::string(name) + ": it is not made for chats");
        }
        branches_.push_back(model_->start(options_.run.context, options_.sample));
    }

    /// Does what a line says. Throws what goes wrong; the conversation is then as it was before.
    void take(const std::string& line) {
        const std::size_t branch = current_, branches = branches_.size();
        auto before = now().fork();
        try {
            run(line);
        } catch (const std::exception&) {
            branches_.resize(branches);
            current_ = branch;
            branches_[branch] = std::move(before);
            throw;
        }
    }

private:
    void run(const std::string& line) {
        const auto space = line.find(' ');
        const std::string command = line.substr(0, space);
        const std::string rest = space == std::string::npos ? "" : line.substr(space + 1);
        const auto need = [&](const char* what) {
            if (rest.empty()) throw std::runtime_error(command + " needs " + what);
        };
        if (line.front() != '/') {
            say(line);
        } else if (command == "/undo") {
            now().rewind(last_turn());
        } else if (command == "/retry") {
            const auto middle = last("<|im_middle|>", now().position());
            last_turn();  // there has to be one
            read_ = now().rewind(middle + 1);
            answer();
        } else if (command == "/edit") {
            need("the new text");
            now().rewind(last_turn());
            say(rest);
        } else if (command == "/fork") {
            branches_.push_back(now().fork());
            current_ = branches_.size() - 1;
            std::fprintf(stderr, "branch %zu\n", branches_.size());
        } else if (command == "/branch") {
            const std::size_t n = std::strtoul(rest.c_str(), nullptr, 10);
            if (n < 1 || n > branches_.size()) {
                throw std::runtime_error("/branch needs a number from 1 to " + std::to_string(branches_.size()));
            }
            current_ = n - 1;
        } else if (command == "/save") {
            need("a file name");
            now().save(rest);
        } else if (command == "/load") {
            need("a file name");
            branches_[current_] = model_->resume(rest, options_.run.context, options_.sample);
        } else if (command == "/tokens") {
            std::fprintf(stderr, "%s of %s tokens, %s were read for the last answer\n",
                         std::to_string(now().position()).c_str(), std::to_string(now().context()).c_str(),
                         std::to_string(read_).c_str());
        } else {
            if (command != "/help") std::fprintf(stderr, "%s is no command\n", command.c_str());
            std::fprintf(stderr, "%s", help);
        }
    }

    session& now() { return *branches_[current_]; }

    /// The last place of a control token in front of `end`, or -1.
    std::int64_t last(const char* name, std::int64_t end) {
        const auto tokens = now().tokens().first(static_cast<std::size_t>(end));
        const auto found = std::find(tokens.rbegin(), tokens.rend(), *model_->find(name));
        return tokens.rend() - found - 1;
    }

    /// Where the last turn begins: with the end marker of the answer before it, or at the very beginning.
    std::int64_t last_turn() {
        const std::int64_t user = last("<|im_user|>", now().position());
        if (user < 0) throw std::runtime_error("there is no turn yet");
        return last("<|im_user|>", user) < 0 ? 0 : user - 1;
    }

    void say(const std::string& text) {
        std::vector<message> messages;
        const std::int64_t before = now().position();
        if (before == 0 && !options_.system.empty()) messages.push_back({message::author::system, options_.system});
        messages.push_back({message::author::user, text});
        const auto turn = model_->turn(messages, before > 0);
        const std::int64_t left = now().context() - before;
        if (static_cast<std::int64_t>(turn.size()) >= left) {  // an answer wants a token, too
            throw std::runtime_error("the message takes " + std::to_string(turn.size()) + " tokens, and " +
                                     std::to_string(left) + " are left: /undo makes room, --ctx gives more");
        }
        now().feed(turn, [&](std::string_view stage, std::uint64_t done, std::uint64_t total) {
            read_ = static_cast<std::int64_t>(total);
            return !interrupted && (!options_.run.model.tell || options_.run.model.tell(stage, done, total));
        });
        answer();
    }

    /// Up to the model's end of it, to Ctrl-C, or to the end of the context.
    void answer() {
        bool ended = false;
        while (!ended && !interrupted && now().position() < now().context()) {
            const auto next = now().next();
            ended = !next;
            if (next) std::cout << now().show(*next) << std::flush;
        }
        std::cout << now().show_rest() << std::endl;
        if (!ended && !interrupted) std::fprintf(stderr, "the context is full: /undo makes room\n");
    }

    const chat_options& options_;
    std::unique_ptr<model> model_;
    std::vector<std::unique_ptr<session>> branches_;
    std::size_t current_ = 0;
    std::int64_t read_ = 0;  // tokens that ran through the model before the last answer
};

}  // namespace

void chat(const chat_options& options) {
    conversation talk(options);
    std::signal(SIGINT, [](int) { interrupted = true; });
    std::fprintf(stderr, "%s", help);
    std::string line;
    while (std::fprintf(stderr, "> "), std::getline(std::cin, line)) {
        if (line.empty()) continue;
        interrupted = false;
        try {
            talk.take(line);
        } catch (const std::exception& e) {
            std::fprintf(stderr, "%s\n", interrupted ? "stopped, the conversation is as it was" : e.what());
        }
    }
    std::fprintf(stderr, "\n");
}

}  // namespace tool
