// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "support.hpp"

#include <keel/io/safetensors.hpp>

using namespace keel;
using namespace keel_test;

namespace {

std::string file_of(std::string_view header, std::string_view data) {
    return le<std::uint64_t>(header.size()) + std::string(header) + std::string(data);
}

/// One entry of a header.
std::string entry(std::string_view name, std::string_view dtype, std::string_view shape, std::string_view offsets) {
    const auto quoted = [](std::string_view text) { return "\"" + std::string(text) + "\""; };
    return quoted(name) + ":{\"dtype\":" + quoted(dtype) + ",\"shape\":" + std::string(shape) +
           ",\"data_offsets\":" + std::string(offsets) + "}";
}

const std::string small =
    file_of("{\"__metadata__\":{\"format\":\"pt\"}," + entry("b", "BF16", "[2,3]", "[4,16]") + "," +
                entry("a", "U8", "[4]", "[0,4]") + "," + entry("c", "F32", "[]", "[16,20]") + "," +
                entry("none", "I64", "[3,0]", "[20,20]") + "}  ",
            "aaaabbbbbbbbbbbbcccc");

void expect_refused(std::string_view bytes, errc code, std::initializer_list<std::string_view> words) {
    const scratch_folder folder;
    write_file(folder / "model.safetensors", bytes);
    expect_error(code, {"model.safetensors"}, [&] { (void)safetensors::open(folder / "model.safetensors"); });
    expect_error(code, words, [&] { (void)safetensors::open(folder / "model.safetensors"); });
}

/// A file with the single tensor "t" and four bytes of data.
void expect_entry_refused(std::string_view dtype, std::string_view shape, std::string_view offsets, errc code,
                          std::initializer_list<std::string_view> words) {
    expect_refused(file_of("{" + entry("t", dtype, shape, offsets) + "}", "...."), code, words);
}

/// A checkpoint of two files, written anew with what a test changed.
struct checkpoint {
    scratch_folder folder;
    std::string index = R"({"metadata": {"total_size": 12},
        "weight_map": {"x": "one.safetensors", "y": "two.safetensors", "z": "one.safetensors"}})";
    std::string one =
        file_of("{" + entry("x", "F32", "[1]", "[0,4]") + "," + entry("z", "F16", "[2]", "[4,8]") + "}", "xxxxzzzz");
    std::string two = file_of("{" + entry("y", "I32", "[1]", "[0,4]") + "}", "yyyy");

    void write() const {
        write_file(folder / "model.safetensors.index.json", index);
        write_file(folder / "one.safetensors", one);
        write_file(folder / "two.safetensors", two);
    }
    void expect_refused(errc code, std::initializer_list<std::string_view> words) const {
        write();
        expect_error(code, words, [&] { (void)safetensors::open(folder / "model.safetensors.index.json"); });
    }
};

}  // namespace

TEST_CASE("a safetensors file is read") {
    const scratch_folder folder;
    write_file(folder / "model.safetensors", small);
    const auto check = [](const safetensors& file) {
        REQUIRE(file.tensors().size() == 4);
        CHECK(file.tensors()[0].name == "b");
        const auto& b = file.require("b");
        CHECK(b.type->id == safetensors_dtype::bf16);
        CHECK(b.shape == std::vector<keel::index>{2, 3});
        CHECK(text_of(b.data) == "bbbbbbbbbbbb");
        CHECK(text_of(file.require("a").data) == "aaaa");
        CHECK(file.require("c").shape.empty());
        CHECK(text_of(file.require("c").data) == "cccc");
        CHECK(file.require("none").data.empty());
        CHECK(file.find("d") == nullptr);
        expect_error(errc::format, {"model.safetensors", "tensor d is missing"}, [&] { (void)file.require("d"); });
        REQUIRE(file.metadata().size() == 1);
        CHECK(file.metadata()[0].first == "format");
        CHECK(file.metadata()[0].second == "pt");
    };
    check(safetensors::open(folder / "model.safetensors"));
    check(safetensors::open(folder.path()));

    std::shared_ptr<const void> storage;
    std::span<const std::byte> data;
    {
        const auto file = safetensors::open(folder / "model.safetensors");
        storage = file.storage();
        data = file.require("b").data;
    }
    CHECK(text_of(data) == "bbbbbbbbbbbb");
}

TEST_CASE("element types are known by name and size") {
    const scratch_folder folder;
    const std::pair<std::string, int> types[] = {
        {"BOOL", 1}, {"U8", 1},   {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"U16", 2}, {"I16", 2},
        {"F16", 2},  {"BF16", 2}, {"U32", 4}, {"I32", 4},     {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8}};
    for (const auto& [name, bytes] : types) {
        CAPTURE(name);
        const auto path = folder / (name + ".safetensors");
        const auto size = std::to_string(3 * bytes);
        write_file(path, file_of("{" + entry("t", name, "[3]", "[0," + size + "]") + "}",
                                 std::string(static_cast<std::size_t>(3 * bytes), 'd')));
        CHECK(safetensors::open(path).require("t").type->name == name);
    }
}

TEST_CASE("a safetensors file that ends anywhere too early is refused") {
    const scratch_folder folder;
    for (std::size_t size = 0; size < small.size(); ++size) {
        CAPTURE(size);
        write_file(folder / "model.safetensors", small.substr(0, size));
        expect_error(size == 0 ? errc::file : errc::format, {"model.safetensors"},
                     [&] { (void)safetensors::open(folder / "model.safetensors"); });
    }
}

TEST_CASE("each damaged part of a safetensors file is refused") {
    SECTION("the length of the header") {
        expect_refused(le(std::numeric_limits<std::uint64_t>::max()) + "{}", errc::format, {"18446744073709551615"});
        expect_refused(le<std::uint64_t>(3) + "{}", errc::format, {"a header of 3 bytes"});
        expect_refused(le<std::uint64_t>(0) + "{}", errc::format, {"(header)", "at byte 0"});
    }
    SECTION("a header above the limit, although the file holds it") {
        const std::uint64_t size = 100'000'001;
        const scratch_folder folder;
        write_file(folder / "model.safetensors", le(size));
        std::filesystem::resize_file(folder / "model.safetensors", size + 8);
        expect_error(errc::format, {"100000001"}, [&] { (void)safetensors::open(folder / "model.safetensors"); });
    }
    SECTION("the header") {
        expect_refused(file_of("[]", ""), errc::format, {"is not an object"});
        expect_refused(file_of("{\"t\":1}", ""), errc::format, {"is not an object"});
        expect_refused(file_of("{\"t\":{}}", ""), errc::format, {"no key dtype"});
        expect_refused(file_of(R"({"t":{"dtype":"U8"}})", ""), errc::format, {"no key shape"});
        expect_refused(file_of(R"({"t":{"dtype":"U8","shape":[0]}})", ""), errc::format, {"no key data_offsets"});
        expect_refused(file_of(R"({"t":{"dtype":7,"shape":[0],"data_offsets":[0,0]}})", ""), errc::format,
                       {"not a string"});
        expect_refused(file_of("{\"__metadata__\":{\"k\":1}}", ""), errc::format, {"not a string"});
        for (const std::string_view name : {"", "a\\u0000b"}) {
            expect_refused(file_of("{" + entry(name, "U8", "[0]", "[0,0]") + "}", ""), errc::format, {"name"});
        }
        const auto t = entry("t", "U8", "[0]", "[0,0]");
        expect_refused(file_of("{" + t + "," + t + "}", ""), errc::format, {"t occurs twice"});
        expect_refused(file_of("{}", "x"), errc::format, {"belongs to no tensor"});
    }
    SECTION("types") {
        for (const std::string_view type : {"F4", "C64", "bf16", ""}) {
            expect_entry_refused(type, "[1]", "[0,4]", errc::unsupported,
                                 {"tensor t", "unknown type " + std::string(type)});
        }
    }
    SECTION("shapes") {
        expect_entry_refused("F32", "[2]", "[0,4]", errc::format, {"tensor t needs 8 bytes", "span 4"});
        expect_entry_refused("F32", "[0]", "[0,4]", errc::format, {"tensor t needs 0 bytes"});
        expect_entry_refused("F32", "[-1]", "[0,4]", errc::format, {"tensor t", "negative"});
        expect_entry_refused("F32", "[1.0]", "[0,4]", errc::format, {"not an integer"});
        expect_entry_refused("F32", "[18446744073709551617]", "[0,4]", errc::format, {"not an integer"});
        expect_entry_refused("F32", "[4294967296,4294967296]", "[0,4]", errc::format, {"tensor t", "63 bits"});
        expect_entry_refused("F32", "[4611686018427387905]", "[0,4]", errc::format, {"tensor t", "63 bits"});
        expect_entry_refused("F32", "1", "[0,4]", errc::format, {"not an array"});
    }
    SECTION("offsets") {
        for (const std::string_view offsets : {"[0,5]", "[4,0]", "[-4,0]", "[5,9]", "[0,9223372036854775807]"}) {
            expect_entry_refused("F32", "[1]", offsets, errc::format, {"tensor t has the data offsets"});
        }
        for (const std::string_view offsets : {"[]", "[0]", "[0,4,4]"}) {
            expect_entry_refused("F32", "[1]", offsets, errc::format, {"tensor t needs two data offsets"});
        }
        expect_entry_refused("F32", "[1]", "[0,4.0]", errc::format, {"not an integer"});
    }
    SECTION("cover") {
        const auto pair = [](std::string_view a, std::string_view b) {
            return file_of("{" + entry("t", "U8", "[4]", a) + "," + entry("u", "U8", "[4]", b) + "}", "........");
        };
        expect_refused(pair("[0,4]", "[0,4]"), errc::format, {"overlaps"});
        expect_refused(pair("[0,4]", "[2,6]"), errc::format, {"tensor u overlaps"});
        expect_refused(pair("[0,4]", "[5,9]"), errc::format, {"tensor u"});
        expect_entry_refused("U8", "[2]", "[2,4]", errc::format, {"tensor t leaves a gap"});
        expect_entry_refused("U8", "[2]", "[0,2]", errc::format, {"belongs to no tensor"});
    }
}

TEST_CASE("a sharded checkpoint opens as one") {
    checkpoint set;
    set.write();
    for (const auto& path : {set.folder / "model.safetensors.index.json", set.folder.path()}) {
        const auto all = safetensors::open(path);
        CHECK(all.tensors().size() == 3);
        CHECK(text_of(all.require("x").data) == "xxxx");
        CHECK(text_of(all.require("y").data) == "yyyy");
        CHECK(text_of(all.require("z").data) == "zzzz");
        CHECK(all.require("y").shard == 1);
    }
}

TEST_CASE("a damaged checkpoint is refused, and what is at fault is named") {
    checkpoint set;
    const auto replace = [](std::string& text, std::string_view what, std::string_view by) {
        text.replace(text.find(what), what.size(), by);
    };
    SECTION("a file is missing") {
        set.write();
        std::filesystem::remove(set.folder / "two.safetensors");
        expect_error(errc::file, {"two.safetensors", "missing"}, [&] { (void)safetensors::open(set.folder.path()); });
    }
    SECTION("everything is missing") {
        const scratch_folder empty;
        expect_error(errc::file, {"model.safetensors"}, [&] { (void)safetensors::open(empty.path()); });
    }
    SECTION("a file is damaged") {
        set.two.resize(20);
        set.expect_refused(errc::format, {"two.safetensors"});
    }
    SECTION("a tensor is in no file") {
        replace(set.index, "\"x\"", "\"w\": \"two.safetensors\", \"x\"");
        set.expect_refused(errc::format, {"index.json", "tensor w is not in two.safetensors"});
    }
    SECTION("a tensor is in another file") {
        replace(set.index, "\"y\": \"two", "\"y\": \"one");
        replace(set.index, "\"z\": \"one", "\"z\": \"two");
        set.expect_refused(errc::format, {"index.json", "is not in"});
    }
    SECTION("a tensor is in two files") {
        set.two = set.one;
        set.expect_refused(errc::format, {"in two files"});
    }
    SECTION("a tensor is listed twice") {
        replace(set.index, "\"x\"", "\"y\": \"two.safetensors\", \"x\"");
        set.expect_refused(errc::format, {"index.json", "y occurs twice"});
    }
    SECTION("names of files that leave the folder") {
        for (const std::string_view name : {"../two.safetensors", "/two.safetensors", "a/two.safetensors", "..", ".",
                                            "", "c:two", "a\\\\two.safetensors", "two\\u0000.safetensors"}) {
            checkpoint evil;
            replace(evil.index, "two.safetensors", name);
            evil.expect_refused(errc::format, {"index.json", "plain name"});
        }
    }
    SECTION("an index of another form") {
        for (const std::string_view text :
             {"{}", "[]", R"({"weight_map": []})", R"({"weight_map": {}})", R"({"weight_map": {"x": 1}})"}) {
            set.index = text;
            set.expect_refused(errc::format, {"index.json"});
        }
    }
}

TEST_CASE("random damage to safetensors is survived or refused") {
    const scratch_folder folder;
    std::mt19937 random(20253);
    int accepted = 0;
    for (int i = 0; i < 3000; ++i) {
        write_file(folder / "model.safetensors", mutated(small, random));
        try {
            const auto file = safetensors::open(folder / "model.safetensors");
            std::size_t sum = 0;
            for (const auto& t : file.tensors()) {
                for (const auto b : t.data) sum += static_cast<std::size_t>(b);
            }
            CHECK(sum > 0);
            ++accepted;
        } catch (const keel::error&) {
        }
    }
    CHECK(accepted > 30);
    CHECK(accepted < 2900);
}
