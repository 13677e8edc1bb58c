// SPDX-License-Identifier: MIT
//
// The command line of keel. CLI11 is included here and nowhere else, since it costs six seconds to compile.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include <keel/version.hpp>

#include "commands.hpp"
#include "console.hpp"

namespace {

void add_model(CLI::App& command, std::string& path, bool needed = false) {
    CLI::Option* const option =
        command.add_option("-m,--model", path, "GGUF file (default: the built-in demonstration model)");
    if (needed) option->required();
}

void add_run(CLI::App& command, tool::run_options& run) {
    add_model(command, run.model.path);
    command.add_option("-t,--threads", run.model.threads, "CPU threads (default: one per core)")
        ->check(CLI::NonNegativeNumber);
    command.add_option("--ctx", run.context, "most tokens of the session (default: 8192, or what the model allows)")
        ->check(CLI::NonNegativeNumber);
    command.add_option("--backend", run.model.backend, "where to compute")
        ->check(CLI::IsMember({"cpu", "cuda", "reference"}))
        ->capture_default_str();
    command
        .add_option("--precision", run.model.precision, "exact: f32 activations, same bits however rows are batched")
        ->check(CLI::IsMember({"exact", "fast"}))
        ->capture_default_str();
}

void add_sampling(CLI::App& command, tool::sampling& sample) {
    command.add_option("--temp", sample.temperature, "temperature; 0 takes the most likely token")
        ->capture_default_str();
    command.add_option("--top-k", sample.top_k, "keep the k most likely tokens; 0: all")->capture_default_str();
    command.add_option("--top-p", sample.top_p, "keep the most likely tokens that reach this probability")
        ->capture_default_str();
    command.add_option("--min-p", sample.min_p, "drop tokens below this share of the most likely one")
        ->capture_default_str();
    command.add_option("--seed", sample.seed, "of the random numbers")->capture_default_str();
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App app{"keel: Kimi-Linear models on this machine"};
    app.set_version_flag("--version", KEEL_VERSION);
    app.require_subcommand(1);

    tool::generate_options generate;
    CLI::App* command = app.add_subcommand("generate", "continue a text");
    add_run(*command, generate.run);
    add_sampling(*command, generate.sample);
    auto* const prompt = command->add_option_group("what to continue");
    prompt->add_option("-p,--prompt", generate.prompt, "text");
    prompt->add_option("-f,--file", generate.file, "file with the text; - for standard input");
    prompt->add_option("--ids", generate.ids, "token ids")->delimiter(',');
    prompt->require_option(1);
    command->add_option("-n,--tokens", generate.tokens, "how many tokens at most")
        ->capture_default_str()
        ->check(CLI::NonNegativeNumber);
    command->add_flag("--json", generate.json, "print one JSON object");
    command->callback([&] {
        if (!generate.json) generate.run.model.tell = tool::progress_bar();
        tool::generate(generate);
    });

    tool::chat_options chat;
    command = app.add_subcommand("chat", "hold a conversation");
    add_run(*command, chat.run);
    add_sampling(*command, chat.sample);
    command->add_option("--system", chat.system, "system message; empty for none")->capture_default_str();
    command->callback([&] {
        chat.run.model.tell = tool::progress_bar();
        tool::chat(chat);
    });

    tool::eval_options eval;
    command = app.add_subcommand("eval", "logits and likelihood of given tokens");
    add_run(*command, eval.run);
    auto* const input = command->add_option_group("what to evaluate");
    input->add_option("--ids", eval.ids, "token ids")->delimiter(',');
    input->add_option("-f,--file", eval.file, "file with the text; - for standard input");
    input->require_option(1);
    command->add_option("--split", eval.split, "feed this many tokens at a time")->check(CLI::PositiveNumber);
    command->add_option("--logits", eval.logits, "write the last row there, raw little-endian f32");
    command->callback([&] { tool::eval(eval); });

    tool::tokenize_options tokenize;
    command = app.add_subcommand("tokenize", "text to a JSON array of token ids");
    add_model(*command, tokenize.model);
    command->add_option("-f,--file", tokenize.file, "file with the text (default: standard input)");
    command->add_flag("--pieces", tokenize.pieces, "the pieces of the pre-tokenizer instead");
    command->add_flag("--special", tokenize.special, "recognise control tokens in the text");
    command->callback([&] { tool::tokenize(tokenize); });

    tool::detokenize_options detokenize;
    command = app.add_subcommand("detokenize", "a JSON array of token ids on standard input to text");
    add_model(*command, detokenize.model);
    command->callback([&] { tool::detokenize(detokenize); });

    tool::inspect_options inspect;
    command = app.add_subcommand("inspect", "what a model file holds and what memory it needs");
    command->add_option("model", inspect.model, "GGUF file (default: the built-in demonstration model)");
    command->add_option("--ctx", inspect.context, "tokens of a session to plan for")->check(CLI::NonNegativeNumber);
    command->add_flag("--json", inspect.json, "print one JSON object");
    command->callback([&] { tool::inspect(inspect); });

    tool::synth_options synth;
    command = app.add_subcommand("synth", "random weights with a released model's shapes, for measuring");
    command->add_option("preset", synth.preset, "kimi-linear-48b, small or tiny")->required();
    command->add_option("out", synth.out, "GGUF file to write")->required();
    command->add_option("--layers", synth.layers, "only the first layers")->check(CLI::PositiveNumber);
    command->add_option("--type", synth.type, "type of the matrices, or q4_k_m, mixed as llama.cpp does")
        ->capture_default_str();
    command->add_option("--seed", synth.seed, "of the random numbers")->capture_default_str();
    command->callback([&] {
        synth.tell = tool::progress_bar();
        tool::synth(synth);
    });

    try {
        app.parse(argc, argv);
        return 0;
    } catch (const CLI::ParseError& e) {
        return app.exit(e) == 0 ? 0 : 2;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "keel: %s\n", e.what());
        return 1;
    }
}
