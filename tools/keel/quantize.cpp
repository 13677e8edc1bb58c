// SPDX-License-Identifier: MIT
#include <optional>

#include <keel/io/gguf.hpp>
#include <keel/model/importance.hpp>
#include <keel/model/requantize.hpp>

#include "commands.hpp"
#include "encoding.hpp"

namespace tool {

void quantize(const quantize_options& options) {
    std::optional<keel::importance_matrix> importance;
    if (!options.importance.empty()) importance = keel::importance_matrix::open(options.importance);
    print_written(keel::requantize(keel::gguf::open(options.in), options.out,
                                   {.type = options.type,
                                    .overrides = parse_overrides(options.overrides),
                                    .importance = importance ? &*importance : nullptr,
                                    .policy = options.force ? keel::existing_file::replace : keel::existing_file::keep,
                                    .split_size = options.split_size,
                                    .run = on_threads(options.threads),
                                    .tell = adapt(options.tell)}));
}

}  // namespace tool
