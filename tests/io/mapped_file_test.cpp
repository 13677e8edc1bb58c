// SPDX-License-Identifier: MIT
#include <cstdint>
#include <utility>

#if !defined(_WIN32)
#include <sys/stat.h>
#endif

#include "support.hpp"

#include <keel/io/mapped_file.hpp>

using namespace keel;
using namespace keel_test;

TEST_CASE("a mapped file shows the bytes of the file") {
    const scratch_folder folder;
    const auto path = folder / "some file";
    const std::string contents = std::string(5000, 'a') + std::string("\0end", 4);
    write_file(path, contents);

    mapped_file file(path);
    CHECK(text_of(file.bytes()) == contents);
    CHECK(file.path() == path);
    CHECK(reinterpret_cast<std::uintptr_t>(file.bytes().data()) % 4096 == 0);
    file.advise(access_hint::sequential);
    file.advise(access_hint::soon);
    CHECK(text_of(file.bytes()) == contents);

    SECTION("even when the name is gone") {
        std::filesystem::remove(path);
        CHECK(text_of(file.bytes()) == contents);
    }
    SECTION("and so does what it is moved to") {
        const auto* where = file.bytes().data();
        mapped_file moved(std::move(file));
        CHECK(moved.bytes().data() == where);
        write_file(folder / "other", "other");
        mapped_file other(folder / "other");
        other = std::move(moved);
        CHECK(other.bytes().data() == where);
        CHECK(other.path() == path);
        CHECK(text_of(other.bytes()) == contents);
    }
}

TEST_CASE("what cannot be mapped is refused by name") {
    const scratch_folder folder;
    expect_error(errc::file, {"absent.bin", "No such file"}, [&] { mapped_file(folder / "absent.bin"); });
    expect_error(errc::file, {folder.path().string(), "directory"}, [&] { mapped_file(folder.path()); });
    write_file(folder / "empty.bin", "");
    expect_error(errc::file, {"empty.bin", "is empty"}, [&] { mapped_file(folder / "empty.bin"); });
#if !defined(_WIN32)
    expect_error(errc::file, {"/dev/null", "not a regular file"}, [&] { mapped_file("/dev/null"); });
    REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
    expect_error(errc::file, {"pipe", "not a regular file"}, [&] { mapped_file(folder / "pipe"); });
#endif
}
