// SPDX-License-Identifier: MIT
//
// The names of what a host holds, without their definitions: for headers that only pass an engine or a session on.
// Compile those for the same instruction set as the rest of the program, since that is part of the names.
#pragma once

#include <keel/core/compiler.hpp>
#include <keel/core/token.hpp>

namespace keel::inline KEEL_ABI {

class cpu;
class cuda;
class gguf;
class sampler;
class tokenizer;

template <class Backend>
class basic_engine;
template <class Backend>
class basic_session;

using engine = basic_engine<cpu>;
using session = basic_session<cpu>;

}  // namespace keel::inline KEEL_ABI
