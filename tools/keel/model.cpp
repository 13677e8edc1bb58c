// SPDX-License-Identifier: MIT
#include "model.hpp"

#include <cstdlib>
#include <stdexcept>

#include <keel/backend/cpu/instruction_set.hpp>

#ifndef KEEL_INSTRUCTION_SETS
#define KEEL_INSTRUCTION_SETS X(KEEL_ISA)
#endif

extern "C" const std::byte keel_demo_model[];
extern "C" const std::byte keel_demo_model_end[];

namespace tool {

#define X(isa)               \
    namespace isa {          \
    backend_code cpu_code(); \
    }
KEEL_INSTRUCTION_SETS
#undef X
backend_code reference_code();
backend_code cuda_code();

namespace {

struct entry {
    std::string_view name;
    decltype(reference_code)* code;
};

/// With the best instructions that this processor has, or those that the environment asks for.
backend_code cpu_code() {
#define X(isa) {KEEL_TEXT(isa), isa::cpu_code},
    static constexpr entry carried[] = {KEEL_INSTRUCTION_SETS};
#undef X
    const char* const wanted = std::getenv("KEEL_ISA");
    return keel::choose_instruction_set(carried, wanted != nullptr ? wanted : "").code();
}

backend_code code_of(const model_options& options) {
    if (options.backend == "cpu") return cpu_code();
    if (options.backend == "reference") return reference_code();
#ifdef KEEL_WITH_CUDA
    return cuda_code();
#else
    throw std::runtime_error("--backend cuda: this keel was built without CUDA (see the preset cuda)");
#endif
}

}  // namespace

std::unique_ptr<model> load(const model_options& options) { return code_of(options).load(options); }

memory plan(const model_options& options, std::int64_t context) { return code_of(options).plan(options, context); }

std::span<const std::byte> demo_model() { return {keel_demo_model, keel_demo_model_end}; }

}  // namespace tool
