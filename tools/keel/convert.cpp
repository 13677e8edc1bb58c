// SPDX-License-Identifier: MIT
#include <filesystem>

#include <keel/io/mapped_file.hpp>
#include <keel/model/convert.hpp>
#include <keel/text/tiktoken.hpp>

#include "commands.hpp"
#include "encoding.hpp"

namespace tool {

void convert(const convert_options& options) {
    const std::filesystem::path folder = options.folder;
    const keel::mapped_file ranks(folder / "tiktoken.model");
    const auto vocabulary = keel::read_tiktoken(
        {reinterpret_cast<const char*>(ranks.bytes().data()), ranks.bytes().size()}, ranks.path().string());
    print_written(
        keel::convert_checkpoint(folder, vocabulary.tokens, vocabulary.merges, options.out,
                                 {.type = options.type,
                                  .overrides = parse_overrides(options.overrides),
                                  .policy = options.force ? keel::existing_file::replace : keel::existing_file::keep,
                                  .split_size = options.split_size,
                                  .run = on_threads(options.threads),
                                  .tell = adapt(options.tell)}));
}

}  // namespace tool
