// SPDX-License-Identifier: MIT
//
// Measures how fast keel runs a model, and how close that comes to what the machine can do.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <keel/version.hpp>

#include "measure.hpp"
#include "report.hpp"
#include "runner.hpp"
#include "sessions.hpp"

namespace {

struct plan {
    std::vector<std::int64_t> prompts{512}, depths{0};
    std::int64_t generate = 128;
    int repetitions = 5;
};

/// Every test at every depth. A session is filled up to the depth once; each repetition goes on from a copy of it.
/// `reading` tells what memory gives at the moment, 0 if that is not wanted.
template <class Reading>
std::vector<bench::result> run(const bench::model& model, const bench::options& options, const plan& tests,
                               Reading&& reading) {
    const std::int64_t longest = *std::max_element(tests.prompts.begin(), tests.prompts.end());
    const std::int64_t deepest = *std::max_element(tests.depths.begin(), tests.depths.end());
    const std::int64_t needed = deepest + std::max(longest, tests.generate);
    bench::random_tokens random(model.vocabulary());
    auto filled = model.start(std::max(options.context, needed));
    std::int64_t depth_now = 0;
    // What happens once does not count: pages, threads, the processor's clock.
    if (longest > 0) filled->fork()->feed(random.draw(std::min<std::int64_t>(longest, 512)));
    if (tests.generate > 0) filled->fork()->feed(random.draw(1));

    std::vector<std::int64_t> depths = tests.depths;
    std::sort(depths.begin(), depths.end());
    std::vector<bench::result> results;
    for (const std::int64_t depth : depths) {
        if (depth > depth_now) filled->feed(random.draw(depth - depth_now));
        depth_now = depth;
        for (const std::int64_t prompt : tests.prompts) {
            if (prompt == 0) continue;
            bench::result r{.test = "prefill",
                            .tokens = prompt,
                            .depth = depth,
                            .operations_per_token = model.operations_per_token()};
            for (int i = 0; i < tests.repetitions; ++i) {
                const auto session = filled->fork();
                const auto tokens = random.draw(prompt);
                const double time = bench::seconds([&] { session->feed(tokens); });
                r.tokens_per_second.push_back(static_cast<double>(prompt) / time);
            }
            results.push_back(std::move(r));
        }
        if (tests.generate > 0) {
            bench::result r{.test = "decode",
                            .tokens = tests.generate,
                            .depth = depth,
                            .bytes_per_token = model.bytes_per_token(depth + tests.generate / 2),
                            .operations_per_token = model.operations_per_token()};
            for (int i = 0; i < tests.repetitions; ++i) {
                if (const double rate = reading(); rate > 0) r.reading.push_back(rate);
                const auto session = filled->fork();
                const auto tokens = random.draw(tests.generate);
                const double time = bench::seconds([&] {
                    for (const std::int32_t& token : tokens) session->feed({&token, 1});
                });
                r.tokens_per_second.push_back(static_cast<double>(tests.generate) / time);
            }
            results.push_back(std::move(r));
        }
    }
    return results;
}

/// Loading and tokenising as two more operations.
void measure_loading(const bench::runner& runner, std::vector<bench::operation>& operations) {
    std::unique_ptr<bench::model> model;
    const double loading = bench::seconds([&] { model = runner.load(); });
    operations.push_back({.name = "load", .seconds = loading, .bytes = model->bytes()});
    std::string text;
    while (text.size() < 1'000'000) text += "The river ran past the old mill in 1875, and nobody knew why. ";
    std::size_t tokens = 0;
    const double tokenizing = bench::seconds([&] { tokens = model->tokens_of(text); });
    operations.push_back({.name = "tokenize to " + std::to_string(tokens) + " tokens",
                          .seconds = tokenizing,
                          .bytes = static_cast<double>(text.size())});
}

void add_interleave(CLI::App& command, bench::options& options) {
    command.add_flag("--interleave", options.interleave, "CPU: copy weights into an order that is faster to read");
}

void add_common(CLI::App& command, bench::options& options, std::string& format) {
    command.add_option("-t,--threads", options.threads, "CPU threads (default: one per core)")
        ->check(CLI::NonNegativeNumber);
    command.add_option("--backend", options.backend, "where to compute")
        ->check(CLI::IsMember({"cpu", "cuda", "reference"}))
        ->capture_default_str();
    command.add_option("--precision", options.precision, "exact: f32 activations, same bits however rows are batched")
        ->check(CLI::IsMember({"exact", "fast"}))
        ->capture_default_str();
    command.add_option("-o,--output", format, "md, json or csv")
        ->check(CLI::IsMember({"md", "json", "csv"}))
        ->capture_default_str();
}

}  // namespace

// NOLINTNEXTLINE(bugprone-exception-escape): an option that cannot be declared is a mistake in this function
int main(int argc, char** argv) {
    CLI::App app{"keel-bench: how fast keel runs a model, and how close that is to the limits of the machine"};
    app.set_version_flag("--version", KEEL_VERSION);
    app.footer("KEEL_ISA in the environment chooses an instruction set: portable, avx2, avx512bf16 or amx.");

    bench::options options;
    plan tests;
    std::string format = "md";
    bool no_limits = false;
    add_common(app, options, format);
    add_interleave(app, options);
    app.add_option("-m,--model", options.model, "GGUF file");
    app.add_option("-p,--prompt", tests.prompts, "tokens to prefill, one or more lengths; 0: none")
        ->delimiter(',')
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("-n,--tokens", tests.generate, "tokens to decode; 0: none")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("-d,--depth", tests.depths, "tokens that the session holds before, one or more numbers")
        ->delimiter(',')
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("-r,--repetitions", tests.repetitions, "of each test")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    app.add_option("--ctx", options.context, "most tokens of a session (default: what the tests need)")
        ->check(CLI::NonNegativeNumber);
    app.add_flag("--no-limits", no_limits, "do not measure the machine");

    CLI::App* const ops = app.add_subcommand("ops", "measure each operation alone, with Kimi-Linear-48B's shapes");
    add_common(*ops, options, format);
    ops->add_option("-m,--model", options.model, "GGUF file, to measure loading and tokenizing too");

    std::int64_t depth = 16384;
    std::string file = (std::filesystem::temp_directory_path() / "keel-bench.session").string();
    CLI::App* const sessions = app.add_subcommand("sessions", "what going back, copying, saving and batching cost");
    add_common(*sessions, options, format);
    add_interleave(*sessions, options);
    sessions->add_option("-m,--model", options.model, "GGUF file")->required();
    sessions->add_option("-d,--depth", depth, "tokens of the conversation")
        ->check(CLI::Range(1024, 1 << 20))
        ->capture_default_str();
    sessions->add_option("-r,--repetitions", tests.repetitions, "of each measurement")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    sessions->add_option("--file", file, "where snapshots are saved")->capture_default_str();

    try {
        app.parse(argc, argv);
        if (!*ops && !*sessions && options.model.empty()) throw CLI::RequiredError("--model");
        const auto runner = bench::make_runner(options);
        if (*ops) {
            const auto machine = bench::describe_machine(*runner, true);
            std::vector<bench::operation> operations;
            runner->measure_operations([&](const bench::operation& o) { operations.push_back(o); });
            if (!options.model.empty()) measure_loading(*runner, operations);
            bench::print(format, options, machine, operations);
        } else if (*sessions) {
            const auto machine = bench::describe_machine(*runner, false);
            bench::print(format, options, machine,
                         bench::measure_sessions(*runner->load(), depth, tests.repetitions, file));
        } else {
            std::unique_ptr<bench::model> model;
            const double load_seconds = bench::seconds([&] { model = runner->load(); });
            const auto machine = bench::describe_machine(*runner, !no_limits);
            const auto results =
                run(*model, options, tests, [&] { return no_limits ? 0.0 : runner->measure_reading(); });
            bench::print(format, options, machine, *model, load_seconds, results);
        }
        return 0;
    } catch (const CLI::ParseError& e) {
        return app.exit(e) == 0 ? 0 : 2;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "keel-bench: %s\n", e.what());
        return 1;
    }
}
