// SPDX-License-Identifier: MIT
#include <iostream>
#include <nlohmann/json.hpp>

#include <keel/text/pretokenizer.hpp>

#include "commands.hpp"
#include "console.hpp"

namespace tool {

void tokenize(const tokenize_options& options) {
    const std::string text = read_text(options.file.empty() ? "-" : options.file);
    nlohmann::json result = nlohmann::json::array();
    if (options.pieces) {
        keel::for_each_piece(text, [&](std::string_view piece) { result.push_back(piece); });
    } else {
        result = keel::read_tokenizer(open_file(options.model)).encode(text, options.special);
    }
    std::cout << result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
}

void detokenize(const detokenize_options& options) {
    const auto ids = nlohmann::json::parse(read_text("-")).get<std::vector<keel::token>>();
    std::cout << keel::read_tokenizer(open_file(options.model)).decode(ids, true);
}

}  // namespace tool
