// SPDX-License-Identifier: MIT
//
// The subcommands of keel: what the command line says, and one function each. They print their result on standard
// output and throw std::exception for whatever goes wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model.hpp"

namespace tool {

/// Common to all that run a model.
struct run_options {
    model_options model;
    std::int64_t context = 0;  ///< 0: the engine's default
};

struct generate_options {
    run_options run;
    std::string prompt, file;
    std::vector<std::int32_t> ids;
    int tokens = 256;
    sampling sample;
    bool json = false;
};
void generate(const generate_options& options);

struct chat_options {
    run_options run;
    std::string system = "You are a helpful assistant provided by Moonshot-AI.";
    sampling sample;
};
void chat(const chat_options& options);

struct eval_options {
    run_options run;
    std::vector<std::int32_t> ids;
    std::string file;
    std::int64_t split = 0;  ///< tokens fed at a time; 0: all at once
    std::string logits;      ///< where the last row goes
};
void eval(const eval_options& options);

struct tokenize_options {
    std::string model, file;
    bool pieces = false, special = false;
};
void tokenize(const tokenize_options& options);

struct detokenize_options {
    std::string model;
};
void detokenize(const detokenize_options& options);

struct inspect_options {
    std::string model;
    std::int64_t context = 0;
    bool interleave = false;
    bool json = false;
};
void inspect(const inspect_options& options);

struct synth_options {
    std::string preset, out;
    std::string type = "q4_k_m";
    std::int64_t layers = 0;  ///< the first ones only; 0: all
    std::uint64_t seed = 0;
    progress tell = {};
};
void synth(const synth_options& options);

struct convert_options {
    std::string folder, out;
    std::string type = "bf16";
    std::vector<std::string> overrides;  ///< PATTERN=TYPE
    std::int64_t split_size = 0;         ///< bytes; 0: one file
    int threads = 0;
    bool force = false;
    progress tell = {};
};
void convert(const convert_options& options);

struct quantize_options {
    std::string in, out, type;
    std::string importance;
    std::vector<std::string> overrides;  ///< PATTERN=TYPE
    std::int64_t split_size = 0;         ///< bytes; 0: one file
    int threads = 0;
    bool force = false;
    progress tell = {};
};
void quantize(const quantize_options& options);

struct imatrix_options {
    model_options model;
    std::string file, out;
    std::int64_t context = 512;
    bool force = false;
};
void imatrix(const imatrix_options& options);

struct perplexity_options {
    run_options run;
    std::string file;
    std::string base, save;  ///< files of log probabilities
    bool whole = false;      ///< one session over the whole text
    bool force = false, json = false;
};
void perplexity(const perplexity_options& options);

}  // namespace tool
