// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "gguf_bytes.hpp"

#include <keel/io/gguf_writer.hpp>

using namespace keel;
using namespace keel_test;

namespace {

constexpr std::array<keel::index, 2> matrix{4, 2};

/// Copies a file through the writer, each tensor in pieces of `piece` bytes.
std::vector<std::filesystem::path> rewrite(const gguf& from, const std::filesystem::path& to, std::size_t piece,
                                           keel::index split_size = 0) {
    gguf_writer out(to, existing_file::keep, split_size);
    out.copy_metadata(from);
    for (const auto& t : from.tensors()) out.declare(t.name, *t.type, t.shape());
    for (const auto& t : from.tensors()) {
        for (auto rest = t.data; !rest.empty(); rest = rest.subspan(std::min(piece, rest.size()))) {
            out.write(t.name, rest.first(std::min(piece, rest.size())));
        }
    }
    return out.finish();
}

}  // namespace

TEST_CASE("a rewritten model is the same, byte for byte") {
    const scratch_folder folder;
    const std::string original = KEEL_TEST_DATA "/models/tiny-f32.gguf";
    for (const std::size_t piece : {std::size_t{1000}, std::size_t{1} << 30}) {
        const auto path = folder / ("copy-" + std::to_string(piece) + ".gguf");
        CHECK(rewrite(gguf::open(original), path, piece) == std::vector{path});
        CHECK((read_file(path) == read_file(original)));
    }
}

TEST_CASE("the writer's bytes are those that the format asks for") {
    const scratch_folder folder;
    gguf_bytes expected;
    expected.keys.push_back(gguf_entry("general.alignment", 4, le<std::uint32_t>(64)));
    expected.alignment = 64;
    expected.tensors[1].offset = 64;
    expected.data = std::string(32, 'f') + std::string(32, '\0') + std::string(34, 'q') + std::string(30, '\0');

    gguf_writer out(folder / "out.gguf");
    out.set("general.architecture", "kimi-linear");
    out.set("a.count", std::uint32_t{7});
    out.set_array("a.flags", std::vector{true, false, true});
    out.set_array("a.words", std::vector<std::string>{"one", "", "three"});
    out.set("general.alignment", std::uint32_t{64});
    out.declare("first", dtype::f32, matrix);
    const keel::index row[] = {32, 1, 1};
    out.declare("second.weight", dtype::q8_0, row);
    out.write("first", bytes_of(std::string(31, 'f')));
    out.write("first", {});
    out.write("first", bytes_of("f"));
    out.write("second.weight", bytes_of(std::string(34, 'q')));
    CHECK_FALSE(std::filesystem::exists(folder / "out.gguf"));
    out.finish();
    CHECK(read_file(folder / "out.gguf") == expected.build());
    CHECK(folder.files() == 1);
}

TEST_CASE("every type of value survives writing and reading") {
    const scratch_folder folder;
    gguf_writer out(folder / "out.gguf");
    out.set("u8", std::uint8_t{200});
    out.set("i8", std::int8_t{-100});
    out.set("u16", std::uint16_t{60'000});
    out.set("i16", std::int16_t{-30'000});
    out.set("u32", std::uint32_t{4'000'000'000});
    out.set("i32", std::int32_t{-2'000'000'000});
    out.set("f32", 0.1f);
    out.set("bool", true);
    out.set("string", "replaced below");
    out.set("u64", std::numeric_limits<std::uint64_t>::max());
    out.set("i64", std::numeric_limits<std::int64_t>::min());
    out.set("f64", 0.1);
    out.set("string", std::string("some text"));
    out.set_array("u8s", std::array<std::uint8_t, 2>{1, 255});
    out.set_array("i16s", std::vector<std::int16_t>{-1, 2});
    out.set_array("u64s", std::vector<std::uint64_t>{1, 1ull << 63});
    out.set_array("f32s", std::vector<float>{0.5f, -1.0f});
    out.set_array("f64s", std::vector<double>{});
    out.set_array("bools", std::vector<bool>{false, true});
    out.set_array("strings", std::vector<std::string_view>{"a", "", "ccc"});
    out.finish();

    const auto check = [](const gguf& g) {
        using enum gguf_type;
        constexpr gguf_type types[] = {u8, i8, u16, i16, u32, i32, f32, boolean, string, u64, i64, f64};
        for (std::size_t i = 0; i < std::size(types); ++i) CHECK(g.values()[i].type() == types[i]);
        CHECK(g.values()[8].key() == "string");
        CHECK(g.require_uint("u8") == 200);
        CHECK(g.require_int("i8") == -100);
        CHECK(g.require_uint("u16") == 60'000);
        CHECK(g.require_int("i16") == -30'000);
        CHECK(g.require_uint("u32") == 4'000'000'000);
        CHECK(g.require_int("i32") == -2'000'000'000);
        CHECK(g.require_float("f32") == static_cast<double>(0.1f));
        CHECK(g.require_bool("bool"));
        CHECK(g.require_string("string") == "some text");
        CHECK(g.require_uint("u64") == std::numeric_limits<std::uint64_t>::max());
        CHECK(g.require_int("i64") == std::numeric_limits<std::int64_t>::min());
        CHECK(g.require_float("f64") == 0.1);
        CHECK(g.require_array("u8s").element_type() == u8);
        CHECK(g.require_array("u8s").uint_at(1) == 255);
        CHECK(g.require_array("i16s").element_type() == i16);
        CHECK(g.require_array("i16s").int_at(0) == -1);
        CHECK(g.require_array("u64s").uint_at(1) == 1ull << 63);
        CHECK(g.require_array("f32s").float_at(1) == -1.0);
        CHECK(g.require_array("f64s").element_type() == f64);
        CHECK(g.require_array("f64s").size() == 0);
        CHECK_FALSE(g.require_array("bools").bool_at(0));
        CHECK(g.require_array("bools").bool_at(1));
        const auto strings = g.require_array("strings").strings();
        CHECK(std::vector(strings.begin(), strings.end()) == std::vector<std::string_view>{"a", "", "ccc"});
    };
    const auto written = gguf::open(folder / "out.gguf");
    check(written);
    rewrite(written, folder / "copy.gguf", 1);
    check(gguf::open(folder / "copy.gguf"));
}

TEST_CASE("misuse of the writer is refused by name") {
    const scratch_folder folder;
    gguf_writer out(folder / "out.gguf");
    const auto refused = [](std::initializer_list<std::string_view> words, auto action) {
        expect_error(errc::argument, words, action);
    };
    SECTION("keys") {
        refused({"key"}, [&] { out.set("", 1); });
        refused({"key"}, [&] { out.set(std::string(65'536, 'k'), 1); });
        refused({"NUL"}, [&] { out.set(std::string_view("a\0b", 3), 1); });
        refused({"split.count"}, [&] { out.set("split.count", std::uint16_t{2}); });
        for (const std::uint32_t n : {0u, 4u, 24u, 1u << 21}) {
            refused({"general.alignment"}, [&] { out.set("general.alignment", n); });
        }
        refused({"general.alignment"}, [&] { out.set("general.alignment", std::uint64_t{32}); });
    }
    SECTION("declarations") {
        const auto declare = [&](std::string_view name, dtype type, std::vector<keel::index> dims) {
            out.declare(name, type, dims);
        };
        refused({"name"}, [&] { declare("", dtype::f32, {4}); });
        refused({"name"}, [&] { declare(std::string(64, 'n'), dtype::f32, {4}); });
        refused({"NUL"}, [&] { declare(std::string_view("a\0b", 3), dtype::f32, {4}); });
        refused({"t", "0"}, [&] { declare("t", dtype::f32, {4, 0}); });
        refused({"t", "-1"}, [&] { declare("t", dtype::f32, {-1}); });
        refused({"t", "5 dimensions"}, [&] { declare("t", dtype::f32, {1, 1, 1, 1, 1}); });
        refused({"t", "Q8_0"}, [&] { declare("t", dtype::q8_0, {33}); });
        refused({"t", "63 bits"}, [&] { declare("t", dtype::f32, {1ll << 32, 1ll << 32}); });
        declare("s", dtype::f32, {1ll << 60});
        refused({"t", "larger than a file"}, [&] { declare("t", dtype::f32, {1}); });
    }
    SECTION("a tensor declared twice") {
        out.declare("t", dtype::f32, matrix);
        refused({"t", "twice"}, [&] { out.declare("t", dtype::f32, matrix); });
    }
    SECTION("data") {
        out.declare("first", dtype::f32, matrix);
        out.declare("second", dtype::f32, matrix);
        refused({"second", "the turn of first"}, [&] { out.write("second", bytes_of("....")); });
        refused({"third", "set", "too late"}, [&] { out.set("third set", 1); });
        refused({"third", "too late"}, [&] { out.declare("third", dtype::f32, matrix); });
        out.write("first", bytes_of(std::string(30, '.')));
        refused({"first", "more than its 32 bytes"}, [&] { out.write("first", bytes_of("...")); });
        refused({"first", "30 of its 32 bytes"}, [&] { out.finish(); });
        out.write("first", bytes_of(".."));
        refused({"first", "the turn of second"}, [&] { out.write("first", bytes_of("..")); });
        refused({"second", "0 of its 32 bytes"}, [&] { out.finish(); });
        out.write("second", bytes_of(std::string(32, '.')));
        refused({"third", "after the last"}, [&] { out.write("third", bytes_of(".")); });
        CHECK(out.finish().size() == 1);
        refused({"out.gguf", "finished"}, [&] { out.finish(); });
        CHECK(gguf::open(folder / "out.gguf").tensors().size() == 2);
        return;
    }
    CHECK_FALSE(std::filesystem::exists(folder / "out.gguf"));
}

TEST_CASE("an unfinished or refused file leaves nothing behind") {
    const scratch_folder folder;
    {
        gguf_writer out(folder / "out.gguf");
        out.declare("first", dtype::f32, matrix);
        out.write("first", bytes_of("...."));
        CHECK(folder.files() == 1);
    }
    CHECK(folder.files() == 0);
    write_file(folder / "out.gguf", "precious");
    expect_error(errc::file, {"out.gguf", "exists already"}, [&] { gguf_writer(folder / "out.gguf"); });
    CHECK(read_file(folder / "out.gguf") == "precious");
    gguf_writer out(folder / "out.gguf", existing_file::replace);
    out.finish();
    CHECK(gguf::open(folder / "out.gguf").tensors().empty());
}
