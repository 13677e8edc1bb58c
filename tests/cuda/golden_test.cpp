// SPDX-License-Identifier: MIT
//
// The whole model on the GPU against the oracle.
#include <keel/backend/cuda.hpp>

#include "catch.hpp"
#include "model/golden.hpp"

using namespace keel;

TEST_CASE("on the GPU the model agrees with the float64 oracle", "[golden]") {
    for (const char* name : {"tiny-f32", "tiny-legacy", "mid-f16", "mid-bf16", "small-q8"}) {
        for (const precision p : {precision::exact, precision::fast}) {
            CAPTURE(name, p == precision::fast);
            golden::check_logits<cuda>(name, p);
            golden::check_greedy<cuda>(name, p);
            golden::check_batch<cuda>(name, p);
        }
    }
}

TEST_CASE("on the GPU the states after a prompt agree with the oracle", "[golden]") {
    for (const char* name : {"tiny-f32", "small-q8"}) {
        for (const std::size_t split : {65, 1, 16}) golden::check_states<cuda>(name, split);
    }
}

TEST_CASE("on the GPU the demonstration model agrees with the oracle", "[golden]") {
    golden::check_demo<cuda>(precision::exact);
    golden::check_demo<cuda>(precision::fast);
}
