// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <keel/io/gguf.hpp>
#include <keel/io/gguf_writer.hpp>

namespace keel::testing {

/// What to change in a copy of a GGUF file.
struct changes {
    std::vector<std::string> drop_keys = {};
    std::vector<std::string> drop_tensors = {};
    std::function<void(gguf_writer&)> set_keys = {};  // after the kept ones, so that it may replace them
    std::string reshape = {};                         // this tensor's last dimension above 1 loses one
};

/// A changed copy of `from` in the temporary folder.
inline std::filesystem::path rewrite(const std::filesystem::path& from, const changes& what) {
    const auto target = std::filesystem::temp_directory_path() / "keel-rewrite-test.gguf";
    const gguf file = gguf::open(from);
    gguf_writer writer(target, existing_file::replace);
    const auto listed = [](const std::vector<std::string>& names, std::string_view name) {
        return std::find(names.begin(), names.end(), name) != names.end();
    };
    for (const gguf_value& value : file.values()) {
        if (!listed(what.drop_keys, value.key())) writer.copy(value);
    }
    if (what.set_keys) what.set_keys(writer);

    struct kept {
        const tensor_info* info;
        std::size_t bytes;
    };
    std::vector<kept> tensors;
    for (const tensor_info& t : file.tensors()) {
        if (listed(what.drop_tensors, t.name)) continue;
        std::vector<index> dims(t.shape().begin(), t.shape().end());
        std::size_t bytes = t.data.size();
        if (t.name == what.reshape) {
            std::size_t last = dims.size() - 1;
            while (last > 0 && dims[last] == 1) --last;
            bytes -= bytes / static_cast<std::size_t>(dims[last]);
            --dims[last];
        }
        writer.declare(t.name, *t.type, dims);
        tensors.push_back({&t, bytes});
    }
    for (const kept& t : tensors) writer.write(t.info->name, t.info->data.first(t.bytes));
    writer.finish();
    return target;
}

}  // namespace keel::testing
