// SPDX-License-Identifier: MIT
//
// One program, two translation units with all of keel in each. Asks whether they share keel's functions and types.
#include <keel/keel.hpp>

#include <cstring>
#include <typeinfo>

const char* engine_in_two();

int main(int count, char** arguments) {
    if (count != 2) return 2;
    const bool same = std::strcmp(typeid(keel::engine).name(), engine_in_two()) == 0;
    return same == (std::strcmp(arguments[1], "same") == 0) ? 0 : 1;
}
