// SPDX-License-Identifier: MIT
#include "encoding.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <thread>

namespace tool {

keel::parallel_for on_threads(int threads) {
    const auto all = threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    return [all](keel::index count, const std::function<void(keel::index)>& job) {
        std::atomic<keel::index> next = 0;
        const auto work = [&] {
            for (keel::index i = next++; i < count; i = next++) job(i);
        };
        std::vector<std::thread> others;
        for (keel::index i = 1; i < std::min<keel::index>(all, count); ++i) others.emplace_back(work);
        work();
        for (std::thread& other : others) other.join();
    };
}

keel::progress adapt(const progress& tell) {
    if (!tell) return {};
    return [tell](const keel::progress_report& r) { return tell(r.stage, r.done, r.total); };
}

std::vector<keel::tensor_type_override> parse_overrides(const std::vector<std::string>& texts) {
    std::vector<keel::tensor_type_override> overrides;
    for (const std::string& text : texts) {
        const std::size_t equals = text.rfind('=');
        const auto type = equals == text.npos ? std::nullopt : keel::find_type(text.substr(equals + 1));
        if (equals == 0 || !type) {
            throw keel::error(keel::errc::argument, "--tensor-type " + text, "is not PATTERN=TYPE");
        }
        overrides.push_back({text.substr(0, equals), *type});
    }
    return overrides;
}

void print_written(const std::vector<std::filesystem::path>& paths) {
    for (const auto& path : paths) {
        std::printf("%s: %.1f MiB\n", path.string().c_str(),
                    static_cast<double>(std::filesystem::file_size(path)) / 0x1p20);
    }
}

}  // namespace tool
