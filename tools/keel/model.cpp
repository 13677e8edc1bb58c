// SPDX-License-Identifier: MIT
#include "model.hpp"

#include <stdexcept>

extern "C" const std::byte keel_demo_model[];
extern "C" const std::byte keel_demo_model_end[];

namespace tool {

std::unique_ptr<model> load_cpu(const model_options& options);
std::unique_ptr<model> load_reference(const model_options& options);
std::unique_ptr<model> load_cuda(const model_options& options);

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
