// SPDX-License-Identifier: MIT
#include "runner.hpp"

#include <cstdlib>
#include <stdexcept>

#include <keel/backend/cpu/instruction_set.hpp>

#ifndef KEEL_INSTRUCTION_SETS
#define KEEL_INSTRUCTION_SETS X(KEEL_ISA)
#endif

namespace bench {

#define X(isa)                                          \
    namespace isa {                                     \
    std::unique_ptr<runner> make_cpu(const options& o); \
    }
KEEL_INSTRUCTION_SETS
#undef X
std::unique_ptr<runner> make_reference(const options& o);
std::unique_ptr<runner> make_cuda(const options& o);

namespace {

struct entry {
    std::string_view name;
    decltype(make_reference)* make;
};

std::unique_ptr<runner> make_cpu(const options& o) {
#define X(isa) {KEEL_TEXT(isa), isa::make_cpu},
    static constexpr entry carried[] = {KEEL_INSTRUCTION_SETS};
#undef X
    const char* const wanted = std::getenv("KEEL_ISA");
    return keel::choose_instruction_set(carried, wanted != nullptr ? wanted : "").make(o);
}

}  // namespace

std::unique_ptr<runner> make_runner(const options& o) {
    if (o.backend == "cpu") return make_cpu(o);
    if (o.backend == "reference") return make_reference(o);
#ifdef KEEL_WITH_CUDA
    return make_cuda(o);
#else
    throw std::runtime_error("--backend cuda: this keel-bench was built without CUDA (see the preset cuda)");
#endif
}

}  // namespace bench
