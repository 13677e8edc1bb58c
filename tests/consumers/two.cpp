// SPDX-License-Identifier: MIT
#include <keel/keel.hpp>

#include <typeinfo>

const char* engine_in_two() { return typeid(keel::engine).name(); }
