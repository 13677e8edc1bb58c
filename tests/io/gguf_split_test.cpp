// SPDX-License-Identifier: MIT
#include <cstdint>
#include <string>
#include <vector>

#include "gguf_bytes.hpp"

#include <keel/io/gguf_writer.hpp>

using namespace keel;
using namespace keel_test;

namespace {

std::string shard_name(int i, int n) {
    return "model-0000" + std::to_string(i) + "-of-0000" + std::to_string(n) + ".gguf";
}

/// Three files: metadata only, one tensor, two tensors. Tests break one of them and write it again.
struct split_set {
    scratch_folder folder;
    gguf_bytes shards[3];

    split_set() {
        for (std::uint16_t i = 0; i < 3; ++i) shards[i].keys = {number(i), count(3), tensors(3)};
        shards[0].keys.push_back(gguf_entry("general.alignment", 4, le<std::uint32_t>(64)));
        shards[0].keys.push_back(gguf_entry("general.name", 8, gguf_string("split")));
        shards[0].tensors.clear();
        shards[0].data.clear();
        shards[1].tensors = {{"third", {8}, 0, 0}};
        shards[1].data = std::string(32, '3');
    }

    static std::string number(std::uint16_t n) { return gguf_entry("split.no", 2, le(n)); }
    static std::string count(std::uint16_t n) { return gguf_entry("split.count", 2, le(n)); }
    static std::string tensors(std::int32_t n) { return gguf_entry("split.tensors.count", 5, le(n)); }

    void write() const {
        for (int i = 0; i < 3; ++i) write_file(folder / shard_name(i + 1, 3), shards[i].build());
    }
    gguf open() const {
        write();
        return gguf::open(folder / shard_name(1, 3));
    }
    void expect_refused(errc code, std::initializer_list<std::string_view> words) const {
        write();
        expect_error(code, words, [&] { (void)gguf::open(folder / shard_name(1, 3)); });
    }
};

}  // namespace

TEST_CASE("a split set opens as one model") {
    const split_set set;
    const auto g = set.open();
    CHECK(g.shards() == 3);
    CHECK(g.require_string("general.name") == "split");
    REQUIRE(g.tensors().size() == 3);
    CHECK(g.tensors()[0].name == "third");
    CHECK(g.require("third").shard == 1);
    CHECK(g.require("first").shard == 2);
    CHECK(text_of(g.require("third").data) == std::string(32, '3'));
    CHECK(text_of(g.require("second.weight").data) == std::string(34, 'q'));
}

TEST_CASE("a set of one is a plain file, whatever its name") {
    const scratch_folder folder;
    for (const std::uint16_t n : {std::uint16_t{0}, std::uint16_t{1}}) {
        gguf_bytes file;
        file.keys = {split_set::count(n)};
        write_file(folder / "any.gguf", file.build());
        CHECK(gguf::open(folder / "any.gguf").tensors().size() == 2);
    }
}

TEST_CASE("a damaged set is refused, and the file at fault is named") {
    split_set set;
    const auto second = shard_name(2, 3), third = shard_name(3, 3);
    SECTION("a file is missing") {
        set.write();
        std::filesystem::remove(set.folder / third);
        expect_error(errc::file, {third, "missing"}, [&] { (void)gguf::open(set.folder / shard_name(1, 3)); });
    }
    SECTION("a file is damaged") {
        set.shards[2].version = 7;
        set.expect_refused(errc::unsupported, {third, "version 7"});
    }
    SECTION("opened at a later file") {
        set.write();
        expect_error(errc::argument, {second, "file 2 of a set of 3", "-00001-of-00003.gguf"},
                     [&] { (void)gguf::open(set.folder / second); });
    }
    SECTION("renamed") {
        set.write();
        std::filesystem::rename(set.folder / shard_name(1, 3), set.folder / "model.gguf");
        expect_error(errc::format, {"model.gguf", "-00001-of-00003.gguf"},
                     [&] { (void)gguf::open(set.folder / "model.gguf"); });
    }
    SECTION("another number") {
        set.shards[1].keys[0] = split_set::number(2);
        set.expect_refused(errc::format, {second, "split.no is 2"});
    }
    SECTION("another count") {
        set.shards[2].keys[1] = split_set::count(4);
        set.expect_refused(errc::format, {third, "split.count is 4"});
        set.shards[0].keys[1] = split_set::count(4);
        set.expect_refused(errc::format, {shard_name(1, 3), "-00001-of-00004.gguf"});
        set.shards[0].keys[1] = gguf_entry("split.count", 10, le<std::uint64_t>(1ull << 40));
        set.expect_refused(errc::format, {shard_name(1, 3), "split.count is 1099511627776"});
        set.shards[0].keys[1] = gguf_entry("split.count", 5, le<std::int32_t>(-3));
        set.expect_refused(errc::format, {shard_name(1, 3), "split.count holds -3"});
    }
    SECTION("another number of tensors") {
        set.shards[1].keys[2] = split_set::tensors(4);
        set.expect_refused(errc::format, {second, "split.tensors.count is 4"});
        for (auto& shard : set.shards) shard.keys[2] = split_set::tensors(4);
        set.expect_refused(errc::format, {shard_name(1, 3), "4 tensors", "hold 3"});
    }
    SECTION("keys missing") {
        const std::string_view names[] = {"split.no", "split.count", "split.tensors.count"};
        for (std::ptrdiff_t i = 0; i < 3; ++i) {
            split_set broken;
            broken.shards[1].keys.erase(broken.shards[1].keys.begin() + i);
            broken.expect_refused(errc::format, {second, names[i], "missing"});
        }
        set.shards[0].keys.erase(set.shards[0].keys.begin());
        set.expect_refused(errc::format, {shard_name(1, 3), "split.no is missing"});
    }
    SECTION("no tensor in a later file") {
        set.shards[1].tensors.clear();
        set.shards[1].data.clear();
        for (auto& shard : set.shards) shard.keys[2] = split_set::tensors(2);
        set.expect_refused(errc::format, {second, "no tensor"});
    }
    SECTION("a tensor in two files") {
        set.shards[1].tensors[0].name = "first";
        set.expect_refused(errc::format, {"first occurs twice"});
    }
}

TEST_CASE("the writer splits between tensors and the reader joins them again") {
    const scratch_folder folder;
    const auto original = gguf::open(KEEL_TEST_DATA "/models/tiny-f32.gguf");
    constexpr keel::index limit = 400'000;
    std::vector<std::filesystem::path> paths;
    {
        gguf_writer out(folder / "model.gguf", existing_file::keep, limit);
        out.copy_metadata(original);
        for (const auto& t : original.tensors()) out.declare(t.name, *t.type, t.shape());
        for (const auto& t : original.tensors()) {
            CHECK_FALSE(std::filesystem::exists(folder / shard_name(1, 4)));
            out.write(t.name, t.data);
        }
        paths = out.finish();
    }
    REQUIRE(paths.size() == 4);
    CHECK(folder.files() == 4);
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK(paths[i] == folder / shard_name(static_cast<int>(i) + 1, 4));
        CHECK(std::filesystem::file_size(paths[i]) <= static_cast<std::uintmax_t>(limit));
    }

    const auto joined = gguf::open(paths[0]);
    CHECK(joined.shards() == 4);
    CHECK(joined.find_value("split.count")->type() == gguf_type::u16);
    CHECK(joined.find_value("split.no")->type() == gguf_type::u16);
    CHECK(joined.find_value("split.tensors.count")->type() == gguf_type::i32);
    CHECK(joined.values().size() == original.values().size() + 3);
    REQUIRE(joined.tensors().size() == original.tensors().size());
    for (std::size_t i = 0; i < original.tensors().size(); ++i) {
        CHECK(joined.tensors()[i].name == original.tensors()[i].name);
        CHECK((text_of(joined.tensors()[i].data) == text_of(original.tensors()[i].data)));
    }

    gguf_writer out(folder / "model.gguf");
    out.copy_metadata(joined);
    for (const auto& t : joined.tensors()) out.declare(t.name, *t.type, t.shape());
    for (const auto& t : joined.tensors()) out.write(t.name, t.data);
    out.finish();
    CHECK((read_file(folder / "model.gguf") == read_file(KEEL_TEST_DATA "/models/tiny-f32.gguf")));
}

TEST_CASE("corners of splitting") {
    const scratch_folder folder;
    const keel::index dims[] = {64};
    const std::string data(256, 'x');
    const auto write = [&](keel::index split_size) {
        gguf_writer out(folder / "model.gguf", existing_file::keep, split_size);
        out.set("general.alignment", std::uint32_t{128});
        for (const auto name : {"a", "b"}) out.declare(name, dtype::f32, dims);
        for (const auto name : {"a", "b"}) out.write(name, bytes_of(data));
        return out.finish();
    };
    SECTION("what fits into one file is no set") {
        const auto paths = write(10'000);
        CHECK(paths == std::vector{folder / "model.gguf"});
        CHECK(gguf::open(paths[0]).find_value("split.count") == nullptr);
    }
    SECTION("a tensor is never divided, and the alignment holds in every file") {
        const auto paths = write(1);
        REQUIRE(paths.size() == 2);
        const auto g = gguf::open(paths[0]);
        CHECK(text_of(g.require("b").data) == data);
        CHECK(reinterpret_cast<std::uintptr_t>(g.require("b").data.data()) % 128 == 0);
    }
    SECTION("no file of the set may exist before") {
        write_file(folder / shard_name(2, 2), "precious");
        expect_error(errc::file, {shard_name(2, 2), "exists already"}, [&] { write(1); });
        CHECK(read_file(folder / shard_name(2, 2)) == "precious");
        CHECK(folder.files() == 1);
    }
}
