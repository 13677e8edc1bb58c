// SPDX-License-Identifier: MIT
//
// What commands share: reading input, drawing progress, the model's file and tokenizer.
#pragma once

#include <string>

#include <keel/engine.hpp>
#include <keel/io/gguf.hpp>

#include "model.hpp"

namespace tool {

/// All of a file, or of standard input for "-".
std::string read_text(const std::string& path);

/// A bar on standard error if that is a terminal; otherwise nothing. Ctrl-C answers "do not go on" while it shows.
progress progress_bar();

/// The GGUF file at `path`, or the demonstration model for an empty one.
keel::gguf open_file(const std::string& path);

}  // namespace tool
