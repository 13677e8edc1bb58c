// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <keel/core/error.hpp>

#include "catch.hpp"

namespace keel::testing {

/// f() throws an error of this code, whose message holds the word.
template <class F>
void throws(errc code, const std::string& word, F&& f) {
    std::string message = "nothing was thrown";
    try {
        f();
    } catch (const error& e) {
        CHECK(e.code() == code);
        message = e.what();
    }
    CAPTURE(message, word);
    CHECK(message.find(word) != std::string::npos);
}

}  // namespace keel::testing
