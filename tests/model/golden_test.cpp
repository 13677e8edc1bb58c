// SPDX-License-Identifier: MIT
#include "golden.hpp"

#include <keel/backend/cpu.hpp>
#include <keel/backend/observed.hpp>
#include <keel/backend/reference.hpp>

#include "catch.hpp"

using namespace keel;

namespace {
const char* const models[] = {"tiny-f32", "tiny-legacy", "mid-f16", "mid-bf16", "small-q8"};
}

TEMPLATE_TEST_CASE("the model agrees with the float64 oracle", "[golden]", reference, cpu) {
    for (const char* name : models) {
        for (const precision p : {precision::exact, precision::fast}) {
            golden::check_logits<TestType>(name, p);
            golden::check_greedy<TestType>(name, p);
            golden::check_batch<TestType>(name, p);
        }
    }
}

TEMPLATE_TEST_CASE("every intermediate result agrees with the oracle", "[golden]", reference, cpu) {
    for (const char* name : {"tiny-f32", "small-q8"}) golden::check_intermediates<TestType>(name);
}

TEMPLATE_TEST_CASE("the states after a prompt agree with the oracle", "[golden]", reference, cpu) {
    for (const char* name : {"tiny-f32", "small-q8"}) {
        for (const std::size_t split : {65u, 1u, 16u}) golden::check_states<TestType>(name, split);
    }
}

TEMPLATE_TEST_CASE("the demonstration model agrees with the oracle", "[golden]", reference, cpu) {
    golden::check_demo<TestType>(precision::exact);
    golden::check_demo<TestType>(precision::fast);
}
