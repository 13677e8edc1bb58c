// SPDX-License-Identifier: MIT
#include <utility>

#if !defined(_WIN32)
#include <csignal>

#include <sys/resource.h>
#endif

#include "support.hpp"

#include <keel/io/output_file.hpp>

using namespace keel;
using namespace keel_test;

TEST_CASE("a file appears when it is committed, not before") {
    const scratch_folder folder;
    const auto path = folder / "out.bin";
    {
        output_file out(path);
        CHECK(out.path() == path);
        CHECK(out.position() == 0);
        out.write(bytes_of("hello "));
        out.write(bytes_of("world"));
        CHECK(out.position() == 11);
        CHECK_FALSE(std::filesystem::exists(path));
        CHECK(folder.files() == 1);  // the temporary is in the same folder
        out.commit();
        CHECK(read_file(path) == "hello world");
    }
    CHECK(read_file(path) == "hello world");
    CHECK(folder.files() == 1);
}

TEST_CASE("an uncommitted file leaves nothing behind") {
    const scratch_folder folder;
    {
        output_file out(folder / "out.bin");
        out.write(bytes_of("text"));
    }
    CHECK(folder.files() == 0);
    {
        output_file out(folder / "out.bin");
        out.write(bytes_of("text"));
        out.finish();
        CHECK(folder.files() == 1);
    }
    CHECK(folder.files() == 0);
}

TEST_CASE("written bytes can be rewritten") {
    const scratch_folder folder;
    const auto path = folder / "out.bin";
    output_file out(path);
    out.write(bytes_of("0123456789"));
    out.write_at(2, bytes_of("AB"));
    out.write(bytes_of("xyz"));
    out.write_at(12, bytes_of("Z"));
    out.write_at(13, {});
    CHECK(out.position() == 13);
    expect_error(errc::argument, {"out.bin"}, [&] { out.write_at(13, bytes_of("?")); });
    expect_error(errc::argument, {"out.bin"}, [&] { out.write_at(12, bytes_of("??")); });
    expect_error(errc::argument, {"out.bin"}, [&] { out.write_at(-1, bytes_of("?")); });
    out.finish();
    expect_error(errc::argument, {"out.bin"}, [&] { out.write(bytes_of("late")); });
    expect_error(errc::argument, {"out.bin"}, [&] { out.write_at(0, bytes_of("late")); });
    out.commit();
    CHECK(read_file(path) == "01AB456789xyZ");
    expect_error(errc::argument, {"out.bin", "committed already"}, [&] { out.commit(); });
}

TEST_CASE("an existing file is kept unless told otherwise") {
    const scratch_folder folder;
    const auto path = folder / "out.bin";
    write_file(path, "old");
    expect_error(errc::file, {"out.bin", "exists already"}, [&] { output_file out(path); });
    CHECK(folder.files() == 1);
    {
        output_file out(path, existing_file::replace);
        out.write(bytes_of("new"));
        CHECK(read_file(path) == "old");
        out.commit();
    }
    CHECK(read_file(path) == "new");
    CHECK(folder.files() == 1);

    output_file late(folder / "late.bin");
    write_file(folder / "late.bin", "somebody else's");
    expect_error(errc::file, {"late.bin", "exists already"}, [&] { late.commit(); });
    CHECK(read_file(folder / "late.bin") == "somebody else's");
}

TEST_CASE("two writers of one target do not share a temporary") {
    const scratch_folder folder;
    const auto path = folder / "out.bin";
    output_file one(path, existing_file::replace);
    output_file two(path, existing_file::replace);
    one.write(bytes_of("one"));
    two.write(bytes_of("two"));
    two.commit();
    CHECK(read_file(path) == "two");
    one.commit();
    CHECK(read_file(path) == "one");
    CHECK(folder.files() == 1);
}

TEST_CASE("an output file can be moved") {
    const scratch_folder folder;
    output_file a(folder / "a.bin");
    a.write(bytes_of("first "));
    output_file b(std::move(a));
    b.write(bytes_of("second"));
    CHECK(b.position() == 12);
    output_file c(folder / "c.bin");
    c = std::move(b);  // c.bin is given up
    CHECK(folder.files() == 1);
    c.commit();
    CHECK(read_file(folder / "a.bin") == "first second");
}

TEST_CASE("targets that cannot be are refused by name") {
    const scratch_folder folder;
    expect_error(errc::file, {"out.bin", "cannot be created"}, [&] { output_file(folder / "absent/out.bin"); });
    expect_error(errc::file, {folder.path().string(), "regular"},
                 [&] { output_file(folder.path(), existing_file::replace); });
#if !defined(_WIN32)
    expect_error(errc::file, {"/dev/null", "regular"}, [&] { output_file("/dev/null", existing_file::replace); });
#endif
}

#if !defined(_WIN32)
TEST_CASE("a disk that takes no more bytes is an error that names the path") {
    // A limit on the size of files fails the same calls in the same places as a full disk.
    struct file_size_limit {
        rlimit before{};
        explicit file_size_limit(rlim_t bytes) {
            std::signal(SIGXFSZ, SIG_IGN);
            ::getrlimit(RLIMIT_FSIZE, &before);
            const rlimit limit{bytes, before.rlim_max};
            ::setrlimit(RLIMIT_FSIZE, &limit);
        }
        ~file_size_limit() { ::setrlimit(RLIMIT_FSIZE, &before); }
    };
    const scratch_folder folder;
    {
        output_file out(folder / "out.bin");
        const file_size_limit limit(1000);
        SECTION("while writing") {
            expect_error(errc::file, {"out.bin", "cannot be written"},
                         [&] { out.write(bytes_of(std::string(100'000, 'x'))); });
        }
        SECTION("at the end, for what was buffered") {
            out.write(bytes_of(std::string(1001, 'x')));
            expect_error(errc::file, {"out.bin", "cannot be written"}, [&] { out.commit(); });
        }
        CHECK(folder.files() == 0);
        expect_error(errc::argument, {"out.bin", "failed before"}, [&] { out.commit(); });
        expect_error(errc::argument, {"out.bin"}, [&] { out.write(bytes_of("more")); });
    }
    CHECK(folder.files() == 0);
}
#endif
