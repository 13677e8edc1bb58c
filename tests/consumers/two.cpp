// SPDX-License-Identifier: MIT
#include <keel/fwd.hpp>

const char* name_of(const keel::engine*);  // as a host's own header may declare it

#include <keel/keel.hpp>

#include <typeinfo>

const char* name_of(const keel::engine*) { return typeid(keel::engine).name(); }
const char* engine_in_two() { return name_of(nullptr); }
