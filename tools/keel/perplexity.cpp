// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "console.hpp"
#include "log_probabilities.hpp"

namespace tool {

namespace {

std::vector<std::int32_t> document(const model& loaded, const std::string& file) {
    std::vector<std::int32_t> tokens = loaded.encode(read_text(file), false);
    if (const auto start = loaded.document_start()) tokens.insert(tokens.begin(), *start);
    return tokens;
}

/// Whole chunks of the text; what is left over at its end is not scored.
text_chunks cut(std::vector<std::int32_t> tokens, std::int64_t context) {
    text_chunks chunks;
    chunks.context = static_cast<std::int32_t>(context);
    chunks.tokens = std::move(tokens);
    chunks.count = static_cast<std::int32_t>(chunks.tokens.size() / static_cast<std::size_t>(context));
    if (chunks.count == 0) {
        throw std::runtime_error("--file: has " + std::to_string(chunks.tokens.size()) + " tokens, at least " +
                                 std::to_string(context) + " are needed");
    }
    chunks.tokens.resize(static_cast<std::size_t>(chunks.count) * static_cast<std::size_t>(context));
    return chunks;
}

/// The mean of values and its standard error.
struct estimate {
    double mean = 0, error = 0;

    explicit estimate(std::span<const double> values) {
        const double n = static_cast<double>(values.size());
        double squares = 0;
        for (const double x : values) mean += x / n;
        for (const double x : values) squares += (x - mean) * (x - mean);
        if (values.size() > 1) error = std::sqrt(squares / n / (n - 1));
    }
};

/// Between the two values beside the place `share` of the way from the least to the largest.
double quantile(std::vector<double> values, double share) {
    std::sort(values.begin(), values.end());
    const double place = share * static_cast<double>(values.size() - 1);
    const std::size_t below = static_cast<std::size_t>(place), above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

/// Throws if what follows `position` has no finite likelihood: then something in the model is not finite.
double checked(double nll, std::int64_t position) {
    if (!std::isfinite(nll)) {
        throw std::runtime_error("position " + std::to_string(position) + ": the logits are not finite");
    }
    return nll;
}

/// The whole text in one session: perplexity of each tenth, told as soon as it is known.
void follow(const perplexity_options& options) {
    const auto loaded = load(options.run.model);
    const std::vector<std::int32_t> tokens = document(*loaded, options.file);
    if (tokens.size() < 11) throw std::runtime_error("--file: has fewer than ten tokens");
    const auto scored = std::span(tokens).first(tokens.size() - 1);
    const auto session = loaded->start(static_cast<std::int64_t>(tokens.size()), {}, true);

    std::vector<double> nll;
    const auto part = [&](std::size_t from, std::size_t to) {
        const estimate likelihood(std::span<const double>(nll).subspan(from, to - from));
        const double value = std::exp(likelihood.mean), error = value * likelihood.error;
        if (!options.json) {
            std::printf("positions %8zu to %8zu: perplexity %.4f +- %.4f\n", from, to - 1, value, error);
            std::fflush(stdout);
        }
        return nlohmann::ordered_json{{"first", from},
                                      {"tokens", to - from},
                                      {"mean_nll", likelihood.mean},
                                      {"perplexity", value},
                                      {"perplexity_error", error}};
    };
    auto tenths = nlohmann::ordered_json::array();
    const auto begin_of = [&](std::size_t tenth) { return scored.size() * tenth / 10; };
    session->feed(scored, options.run.model.tell, [&](std::int64_t position, std::span<const float> logits) {
        const std::int32_t next = tokens[static_cast<std::size_t>(position) + 1];
        nll.push_back(checked(log_sum(logits) - static_cast<double>(logits[static_cast<std::size_t>(next)]), position));
        if (nll.size() == begin_of(tenths.size() + 1)) tenths.push_back(part(begin_of(tenths.size()), nll.size()));
    });
    const auto whole = part(0, nll.size());
    if (!options.json) return;
    std::cout << nlohmann::ordered_json{{"tokens", nll.size()}, {"tenths", tenths}, {"whole", whole}}.dump() << '\n';
}

std::size_t likeliest(const std::vector<double>& log_p) {
    return static_cast<std::size_t>(std::max_element(log_p.begin(), log_p.end()) - log_p.begin());
}

}  // namespace

void perplexity(const perplexity_options& options) {
    if (options.whole) return follow(options);
    const std::int64_t context = options.run.context > 0 ? options.run.context : 512;
    const auto loaded = load(options.run.model);
    std::optional<log_probability_reader> base;
    if (!options.base.empty()) base.emplace(options.base);
    text_chunks text = base ? base->text() : cut(document(*loaded, options.file), context);
    const auto first = static_cast<std::size_t>(text.context / 2);

    std::optional<log_probability_writer> save;
    std::vector<double> nll, divergence;
    std::size_t agreed = 0;
    std::vector<double> expected;
    const auto start = loaded->document_start();
    for (std::int32_t i = 0; i < text.count; ++i) {
        const auto done = static_cast<std::uint64_t>(i), total = static_cast<std::uint64_t>(text.count);
        if (options.run.model.tell) options.run.model.tell("perplexity", done, total);
        const auto length = static_cast<std::size_t>(text.context);
        std::vector<std::int32_t> chunk(text.tokens.begin() + static_cast<std::ptrdiff_t>(done * length),
                                        text.tokens.begin() + static_cast<std::ptrdiff_t>((done + 1) * length));
        if (start) chunk.front() = *start;
        const auto session = loaded->start(text.context, {});
        session->feed(std::span(chunk).first(first));
        session->feed(std::span(chunk).subspan(first, text.scored()), {},
                      [&](std::int64_t position, std::span<const float> logits) {
                          if (!save && !options.save.empty()) {
                              text.vocabulary = static_cast<std::int32_t>(logits.size());
                              save.emplace(options.save, text,
                                           options.force ? keel::existing_file::replace : keel::existing_file::keep);
                          }
                          const std::vector<double> log_p = log_probabilities(logits);
                          const auto next = static_cast<std::size_t>(chunk[static_cast<std::size_t>(position) + 1]);
                          if (save) save->add(log_p);
                          if (base) {
                              if (log_p.size() != static_cast<std::size_t>(text.vocabulary)) {
                                  throw std::runtime_error(options.base + ": is for another vocabulary");
                              }
                              base->read(nll.size(), expected);
                              double sum = 0;
                              for (std::size_t t = 0; t < log_p.size(); ++t) {
                                  if (std::isfinite(expected[t]))
                                      sum += std::exp(expected[t]) * (expected[t] - log_p[t]);
                              }
                              divergence.push_back(sum);
                              agreed += likeliest(log_p) == likeliest(expected) ? 1 : 0;
                          }
                          nll.push_back(checked(-log_p[next], position));
                      });
    }
    if (options.run.model.tell) options.run.model.tell("perplexity", 1, 1);
    if (save) save->commit();

    const estimate likelihood(nll);
    const double value = std::exp(likelihood.mean);
    nlohmann::ordered_json result = {{"tokens", nll.size()},
                                     {"chunks", text.count},
                                     {"mean_nll", likelihood.mean},
                                     {"perplexity", value},
                                     {"perplexity_error", value * likelihood.error}};
    if (base) {
        const estimate mean(divergence);
        result["kld_mean"] = mean.mean;
        result["kld_mean_error"] = mean.error;
        result["kld_median"] = quantile(divergence, 0.5);
        result["kld_99"] = quantile(divergence, 0.99);
        result["top1_agreement"] = static_cast<double>(agreed) / static_cast<double>(nll.size());
    }
    if (options.json) {
        std::cout << result.dump() << '\n';
        return;
    }
    std::printf("perplexity %.4f +- %.4f over %zu tokens in %d chunks of %d\n", value, value * likelihood.error,
                nll.size(), text.count, text.context);
    if (base) {
        std::printf("KL divergence: mean %.6f +- %.6f, median %.6f, 99 %% %.6f; same likeliest token %.3f %%\n",
                    result["kld_mean"].get<double>(), result["kld_mean_error"].get<double>(),
                    result["kld_median"].get<double>(), result["kld_99"].get<double>(),
                    100 * result["top1_agreement"].get<double>());
    }
}

}  // namespace tool
