// SPDX-License-Identifier: MIT
#include "golden.hpp"

#include <keel/backend/cpu.hpp>
#include <keel/backend/observed.hpp>
#include <keel/backend/reference.hpp>

#include <memory>
#include <utility>

#include "catch.hpp"

using namespace keel;

namespace {
const char* const models[] = {"tiny-f32", "tiny-legacy", "mid-f16", "mid-bf16", "small-q8"};

/// A cpu that interleaves weights whatever its options say.
struct interleaving_cpu : cpu {
    struct device : cpu::device {
        explicit device(const backend_options& asked)
            : cpu::device({asked.precision, asked.threads, asked.device, true}) {}
    };
    interleaving_cpu(std::shared_ptr<device> shared, keel::index workspace_bytes)
        : cpu(std::move(shared), workspace_bytes) {}
};
}  // namespace

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

TEST_CASE("models with interleaved weights agree with the oracle", "[golden]") {
    golden::check_logits<interleaving_cpu>("small-q8", precision::fast);
    golden::check_greedy<interleaving_cpu>("small-q8", precision::fast);
    golden::check_batch<interleaving_cpu>("small-q8", precision::fast);
    golden::check_demo<interleaving_cpu>(precision::fast);
}
