// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include <keel/io/output_file.hpp>

#include "commands.hpp"
#include "console.hpp"

namespace tool {

namespace {

double negative_log_likelihood(std::span<const float> logits, std::int32_t next) {
    const double largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x) - largest);
    return largest + std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(next)]);
}

}  // namespace

void eval(const eval_options& options) {
    const auto loaded = load(options.run.model);
    const std::vector<std::int32_t> tokens =
        options.ids.empty() ? loaded->encode(read_text(options.file), true) : options.ids;
    if (tokens.empty()) throw std::runtime_error("--ids: there are no tokens to evaluate");
    const auto session =
        loaded->start(std::max<std::int64_t>(options.run.context, static_cast<std::int64_t>(tokens.size())), {});
    const std::size_t split = options.split > 0 ? static_cast<std::size_t>(options.split) : tokens.size();
    double nll = 0;
    for (std::size_t i = 0; i < tokens.size(); i += split) {
        const auto part = std::span<const std::int32_t>(tokens).subspan(i, std::min(split, tokens.size() - i));
        session->feed(part, options.run.model.tell, [&](std::int64_t position, std::span<const float> logits) {
            const std::size_t next = static_cast<std::size_t>(position) + 1;
            if (next < tokens.size()) nll += negative_log_likelihood(logits, tokens[next]);
        });
    }

    const std::span<const float> last = session->logits();
    std::vector<std::size_t> order(last.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::size_t n = std::min<std::size_t>(10, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(),
                      [&](std::size_t a, std::size_t b) { return last[a] > last[b] || (last[a] == last[b] && a < b); });
    nlohmann::ordered_json result = {{"n", tokens.size()}, {"mean_nll", nullptr}, {"top", nlohmann::json::array()}};
    if (tokens.size() > 1) result["mean_nll"] = nll / static_cast<double>(tokens.size() - 1);
    for (std::size_t i = 0; i < n; ++i) result["top"].push_back({{"id", order[i]}, {"logit", last[order[i]]}});
    if (!options.logits.empty()) {
        keel::output_file out(options.logits, keel::existing_file::replace);
        out.write(std::as_bytes(last));
        out.commit();
    }
    std::cout << result.dump() << '\n';
}

}  // namespace tool
