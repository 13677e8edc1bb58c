// SPDX-License-Identifier: MIT
#include "console.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>

#if defined(_WIN32)
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#else
#include <unistd.h>
#endif

namespace tool {

std::string read_text(const std::string& path) {
    if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be opened");
    std::string text{std::istreambuf_iterator<char>(file), {}};
    if (file.bad()) throw std::runtime_error(path + ": cannot be read");
    return text;
}

progress progress_bar() {
    if (isatty(fileno(stderr)) == 0) return {};
    using clock = std::chrono::steady_clock;
    struct times {
        clock::time_point begun = clock::now(), drawn = {};
    };
    return [shared = std::make_shared<times>()](std::string_view stage, std::uint64_t done, std::uint64_t total) {
        auto& [begun, drawn] = *shared;  // copies of this function draw one bar
        const auto now = clock::now();
        if (done == 0) begun = now;
        const bool slow = now - begun > std::chrono::milliseconds(300);  // what is quick needs no bar
        if (done >= total) {
            if (drawn != clock::time_point{}) std::fprintf(stderr, "\r\33[K");
            drawn = {};
        } else if (slow && now - drawn > std::chrono::milliseconds(100)) {
            drawn = now;
            const double share = static_cast<double>(done) / static_cast<double>(total);
            const double seconds = std::chrono::duration<double>(now - begun).count();
            const int filled = static_cast<int>(share * 30);
            std::fprintf(stderr, "\r%.*s [%.*s%*s] %3.0f %%, %.0f s left\33[K", static_cast<int>(stage.size()),
                         stage.data(), filled, "##############################", 30 - filled, "", 100 * share,
                         share > 0 ? seconds / share - seconds : 0.0);
        }
        return true;
    };
}

keel::gguf open_file(const std::string& path) {
    return path.empty() ? keel::gguf::from_memory("demonstration model", demo_model()) : keel::gguf::open(path);
}

}  // namespace tool
