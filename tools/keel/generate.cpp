// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "commands.hpp"
#include "console.hpp"

namespace tool {

void generate(const generate_options& options) {
    using clock = std::chrono::steady_clock;
    const auto seconds_since = [](clock::time_point t) {
        return std::chrono::duration<double>(clock::now() - t).count();
    };
    const auto begun = clock::now();

    const auto loaded = load(options.run.model);
    std::vector<std::int32_t> prompt = options.ids;
    if (prompt.empty()) {
        prompt = loaded->encode(options.file.empty() ? options.prompt : read_text(options.file), true);
        if (const auto start = loaded->document_start()) prompt.insert(prompt.begin(), *start);
    }
    if (prompt.empty()) throw std::runtime_error("--prompt: there is nothing to continue");
    const auto session = loaded->start(options.run.context, options.sample);
    const double load_seconds = seconds_since(begun);

    const auto fed = clock::now();
    session->feed(prompt, options.run.model.tell);
    const double prompt_seconds = seconds_since(fed);

    std::vector<std::int32_t> drawn;
    std::string text;
    double first_seconds = 0;
    const auto show = [&](std::string_view part) {
        text += part;
        if (!options.json) std::cout << part << std::flush;
    };
    if (!options.json) std::cout << loaded->decode(prompt) << std::flush;
    const auto decoding = clock::now();
    while (static_cast<int>(drawn.size()) < options.tokens && session->position() < session->context()) {
        const auto next = session->next();
        if (!next) break;
        if (drawn.empty()) first_seconds = seconds_since(begun);
        drawn.push_back(*next);
        show(session->show(*next));
    }
    show(session->show_rest());
    const double decode_seconds = seconds_since(decoding);

    const double prompt_rate = static_cast<double>(prompt.size()) / prompt_seconds;
    const double decode_rate = drawn.empty() ? 0 : static_cast<double>(drawn.size()) / decode_seconds;
    const double gigabytes = decode_rate * loaded->bytes_per_token(session->position()) / 1e9;
    if (options.json) {
        const nlohmann::ordered_json result = {
            {"prompt_ids", prompt},
            {"ids", drawn},
            {"text", text},
            {"load_seconds", load_seconds},
            {"first_token_seconds", first_seconds},
            {"prompt_tokens_per_second", prompt_rate},
            {"decode_tokens_per_second", decode_rate},
            {"gigabytes_per_second", gigabytes},
        };
        std::cout << result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
    } else {
        std::printf(
            "\n\nprompt %zu tokens, %.0f tok/s | decode %zu tokens, %.1f tok/s, %.1f GB/s | first token after %.0f "
            "ms\n",
            prompt.size(), prompt_rate, drawn.size(), decode_rate, gigabytes, 1e3 * first_seconds);
    }
}

}  // namespace tool
