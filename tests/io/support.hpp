// SPDX-License-Identifier: MIT
//
// What the tests of io share: scratch files, byte strings, expected failures.
#pragma once

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>

#include "catch.hpp"

#include <keel/core/error.hpp>

namespace keel_test {

/// A folder of its own, removed at the end with all that is in it.
class scratch_folder {
public:
    scratch_folder() {
        std::random_device random;
        do {
            path_ = std::filesystem::temp_directory_path() / ("keel-test-" + std::to_string(random()));
        } while (!std::filesystem::create_directory(path_));
    }
    scratch_folder(const scratch_folder&) = delete;
    scratch_folder& operator=(const scratch_folder&) = delete;
    ~scratch_folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }

    std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
    const std::filesystem::path& path() const { return path_; }

    std::size_t files() const {
        return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
    }

private:
    std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, std::string_view bytes) {
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_file(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

inline std::span<const std::byte> bytes_of(std::string_view text) {
    return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

inline std::string text_of(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// The bytes of a number as files hold them.
template <class T>
std::string le(T value) {
    std::string out(sizeof value, '\0');
    std::memcpy(out.data(), &value, sizeof value);
    return out;
}

/// Checks that `action` throws a keel::error of this kind whose message names each of `words`.
template <class F>
void expect_error(keel::errc code, std::initializer_list<std::string_view> words, F&& action) {
    std::string message = "nothing was thrown";
    bool thrown = false;
    try {
        action();
    } catch (const keel::error& e) {
        thrown = true;
        message = e.what();
        CAPTURE(message);
        CHECK(static_cast<int>(e.code()) == static_cast<int>(code));
    }
    CAPTURE(message);
    CHECK(thrown);
    for (const auto word : words) {
        INFO("the message must name " << std::string(word));
        CHECK(message.find(word) != std::string::npos);
    }
}

/// Changes one to three bytes, half of the time to a value that likes to break arithmetic.
inline std::string mutated(std::string bytes, std::mt19937& random) {
    constexpr char awkward[] = {0, 1, '\x7F', '\x80', '\xFF'};
    for (auto left = random() % 3 + 1; left > 0; --left) {
        char& byte = bytes[random() % bytes.size()];
        byte = random() % 2 == 0 ? awkward[random() % std::size(awkward)] : static_cast<char>(random());
    }
    return bytes;
}

}  // namespace keel_test
