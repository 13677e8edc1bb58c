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

#define X(isa)                                                     \
    namespace isa {                                                \
    std::unique_ptr<model> load_cpu(const model_options& options); \
    }
KEEL_INSTRUCTION_SETS
#undef X
std::unique_ptr<model> load_reference(const model_options& options);
std::unique_ptr<model> load_cuda(const model_options& options);

namespace {

struct entry {
    std::string_view name;
    decltype(load_reference)* load;
};

/// With the best instructions that this processor has, or those that the environment asks for.
std::unique_ptr<model> load_cpu(const model_options& options) {
#define X(isa) {KEEL_TEXT(isa), isa::load_cpu},
    static constexpr entry carried[] = {KEEL_INSTRUCTION_SETS};
#undef X
    const char* const wanted = std::getenv("KEEL_ISA");
    return keel::choose_instruction_set(carried, wanted != nullptr ? wanted : "").load(options);
}

}  // namespace

std::unique_ptr<model> load(const model_options& options) {
    if (options.backend == "cpu") return load_cpu(options);
    if (options.backend == "reference") return load_reference(options);
#ifdef KEEL_WITH_CUDA
    return load_cuda(options);
#else
    throw std::runtime_error("--backend cuda: this keel was built without CUDA (see the preset cuda)");
#endif
}

std::span<const std::byte> demo_model() { return {keel_demo_model, keel_demo_model_end}; }

}  // namespace tool
