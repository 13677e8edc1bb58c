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

void add_interleave(CLI::App& command, bool& interleave) {
    command.add_flag("--interleave", interleave, "CPU: copy weights into an order that is faster to read");
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
    add_interleave(command, run.model.interleave);
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

/// For the commands that write GGUF files.
template <class Options>
void add_encoding(CLI::App& command, Options& options) {
    command.add_option("--tensor-type", options.overrides,
                       "PATTERN=TYPE for tensors whose names match; * stands for anything; may be repeated");
    command.add_option("--split-size", options.split_size, "split into files of at most this many bytes")
        ->transform(CLI::AsSizeValue(false));
    command.add_option("-t,--threads", options.threads, "CPU threads (default: one per core)")
        ->check(CLI::NonNegativeNumber);
    command.add_flag("--force", options.force, "replace an existing file");
}

}  // namespace

// NOLINTNEXTLINE(bugprone-exception-escape): an option that cannot be declared is a mistake in this function
int main(int argc, char** argv) {
    CLI::App app{"keel: Kimi-Linear models on this machine"};
    app.set_version_flag("--version", KEEL_VERSION);
    app.footer("KEEL_ISA in the environment chooses an instruction set: portable, avx2, avx512bf16 or amx.");
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
    add_interleave(*command, inspect.interleave);
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

    tool::convert_options convert;
    command = app.add_subcommand("convert", "a Hugging Face checkpoint to a GGUF file");
    command->add_option("folder", convert.folder, "folder of the checkpoint")->required();
    command->add_option("out", convert.out, "GGUF file to write")->required();
    command->add_option("--type", convert.type, "type of the matrices, or a mixture")->capture_default_str();
    add_encoding(*command, convert);
    command->callback([&] {
        convert.tell = tool::progress_bar();
        tool::convert(convert);
    });

    tool::quantize_options quantize;
    command = app.add_subcommand("quantize", "a GGUF file to one with other types");
    command->add_option("in", quantize.in, "GGUF file, best of bf16 or f16")->required();
    command->add_option("out", quantize.out, "GGUF file to write")->required();
    command->add_option("type", quantize.type, "q4_k_m, q5_k_m, q6_k, q8_0, ...: type of the matrices, or a mixture")
        ->required();
    command->add_option("--imatrix", quantize.importance, "importance matrix, from keel imatrix or llama-imatrix");
    add_encoding(*command, quantize);
    command->callback([&] {
        quantize.tell = tool::progress_bar();
        tool::quantize(quantize);
    });

    tool::imatrix_options imatrix;
    command = app.add_subcommand("imatrix", "how much each column of a model's matrices matters, from a text");
    add_model(*command, imatrix.model.path);
    command->add_option("-f,--file", imatrix.file, "file with the text; - for standard input")->required();
    command->add_option("out", imatrix.out, "file to write")->required();
    command->add_option("--ctx", imatrix.context, "tokens of a chunk")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command->add_option("-t,--threads", imatrix.model.threads, "CPU threads (default: one per core)")
        ->check(CLI::NonNegativeNumber);
    command->add_flag("--force", imatrix.force, "replace an existing file");
    command->callback([&] {
        imatrix.model.tell = tool::progress_bar();
        tool::imatrix(imatrix);
    });

    tool::perplexity_options perplexity;
    command = app.add_subcommand("perplexity", "how well a model predicts a text, and how close it is to another");
    add_run(*command, perplexity.run);
    auto* const text = command->add_option_group("what to predict");
    text->add_option("-f,--file", perplexity.file, "file with the text; - for standard input");
    text->add_option("--kld-base", perplexity.base, "compare with these logits, for the text that they are of");
    text->require_option(1, 2);
    command->add_option("--save-logits", perplexity.save, "write the logits there, to compare other models with");
    command
        ->add_flag("--whole", perplexity.whole,
                   "one session over the whole text, however long, instead of chunks; perplexity of each tenth")
        ->excludes("--kld-base", "--save-logits", "--ctx");
    command->add_flag("--force", perplexity.force, "replace an existing file of logits");
    command->add_flag("--json", perplexity.json, "print one JSON object");
    command->callback([&] {
        if (!perplexity.json) perplexity.run.model.tell = tool::progress_bar();
        tool::perplexity(perplexity);
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
