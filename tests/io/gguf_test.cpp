// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gguf_bytes.hpp"

#include <keel/io/gguf.hpp>

using namespace keel;
using namespace keel_test;

namespace {

gguf open_bytes(const scratch_folder& folder, std::string_view bytes) {
    const auto path = folder / "model.gguf";
    write_file(path, bytes);
    return gguf::open(path);
}

/// Checks that this file is refused, with a message that names the file and each of `words`.
void expect_refused(const gguf_bytes& file, errc code, std::initializer_list<std::string_view> words) {
    const scratch_folder folder;
    expect_error(code, {"model.gguf"}, [&] { (void)open_bytes(folder, file.build()); });
    expect_error(code, words, [&] { (void)gguf::open(folder / "model.gguf"); });
}

/// A file with one more key in front.
gguf_bytes with_key(std::string_view key, std::uint32_t type, std::string_view value) {
    gguf_bytes file;
    file.keys.insert(file.keys.begin(), gguf_entry(key, type, value));
    return file;
}

/// Reads everything there is, so that a sanitizer sees a bad pointer.
std::size_t touch(const gguf& g) {
    std::size_t sum = 0;
    const auto add = [&](std::span<const std::byte> bytes) {
        for (const auto b : bytes) sum += static_cast<std::size_t>(b);
    };
    for (const auto& value : g.values()) {
        add(bytes_of(value.key()));
        add(value.raw());
        if (value.type() == gguf_type::string) add(bytes_of(value.as_string()));
        if (value.type() != gguf_type::array) continue;
        const auto array = value.as_array();
        if (array.element_type() == gguf_type::string) {
            for (const auto text : array.strings()) add(bytes_of(text));
        } else if (array.element_type() == gguf_type::boolean) {
            for (keel::index i = 0; i < array.size(); ++i) sum += array.bool_at(i) ? 1 : 0;
        }
    }
    for (const auto& tensor : g.tensors()) {
        add(bytes_of(tensor.name));
        add(tensor.data);
    }
    return sum;
}

std::uint32_t crc32(std::string_view bytes, std::uint32_t crc = 0) {
    crc = ~crc;
    for (const char c : bytes) {
        crc ^= static_cast<unsigned char>(c);
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xEDB88320u & (0u - (crc & 1u)));
    }
    return ~crc;
}

}  // namespace

TEST_CASE("a model written by the reference is read as the reference reads it") {
    const auto g = gguf::open(KEEL_TEST_DATA "/models/tiny-f32.gguf");
    CHECK(g.version() == 3);
    CHECK(g.alignment() == 32);
    CHECK(g.shards() == 1);
    CHECK(g.values().size() == 42);
    CHECK(g.values().front().key() == "general.architecture");
    CHECK(g.values().back().key() == "tokenizer.chat_template");
    CHECK(g.require_string("general.architecture") == "kimi-linear");
    CHECK(g.require_uint("kimi-linear.vocab_size") == 512);
    CHECK(g.require_float("kimi-linear.expert_weights_scale") == static_cast<double>(2.446f));
    CHECK_FALSE(g.require_bool("tokenizer.ggml.add_bos_token"));
    CHECK(g.require_string("tokenizer.chat_template").size() == 263);

    const auto heads = g.require_array("kimi-linear.attention.head_count_kv");
    REQUIRE(heads.size() == 4);
    CHECK(heads.uint_at(2) == 0);
    CHECK(heads.uint_at(3) == 1);
    const auto merges = g.require_array("tokenizer.ggml.merges").strings();
    REQUIRE(merges.size() == 224);
    CHECK(merges[1] == "h e");

    REQUIRE(g.tensors().size() == 89);
    CHECK(g.tensors().front().name == "token_embd.weight");
    CHECK(g.tensors().back().name == "blk.3.ffn_down_shexp.weight");
    const auto& convolution = g.require("blk.0.ssm_conv1d_q.weight");
    CHECK(std::vector<keel::index>(convolution.shape().begin(), convolution.shape().end()) ==
          std::vector<keel::index>{4, 1, 64, 1});
    CHECK(convolution.type->name == "F32");

    std::uint32_t crc = 0;  // of all names and data in file order; the expected one comes from the Python reader
    for (const auto& t : g.tensors()) {
        crc = crc32(t.name, crc);
        crc = crc32(text_of(t.data), crc);
        CHECK(reinterpret_cast<std::uintptr_t>(t.data.data()) % 32 == 0);
        CHECK(g.find(t.name) == &t);
    }
    CHECK(crc == 0x3b9cb35bu);
    CHECK(g.find("blk.4.attn_norm.weight") == nullptr);
}

TEST_CASE("the smallest building blocks are read") {
    const scratch_folder folder;
    const auto g = open_bytes(folder, gguf_bytes{}.build());
    CHECK(g.require_uint("a.count") == 7);
    CHECK(g.require_array("a.flags").bool_at(0));
    CHECK_FALSE(g.require_array("a.flags").bool_at(1));
    const auto words = g.require_array("a.words").strings();
    REQUIRE(words.size() == 3);
    CHECK(words[0] == "one");
    CHECK(words[1].empty());
    CHECK(words[2] == "three");
    const auto& second = g.require("second.weight");
    CHECK(second.type_id == 8);
    CHECK(second.n_dims == 3);
    CHECK(second.dims[0] == 32);
    CHECK(second.dims[3] == 1);
    CHECK(text_of(second.data) == std::string(34, 'q'));
    CHECK(text_of(g.require("first").data) == std::string(32, 'f'));
}

TEST_CASE("what a file allows beyond the usual is accepted") {
    const scratch_folder folder;
    gguf_bytes file;
    SECTION("version 2") {
        file.version = 2;
        CHECK(open_bytes(folder, file.build()).version() == 2);
    }
    SECTION("no tensors, and nothing after the keys") {
        file.tensors.clear();
        file.data.clear();
        CHECK(open_bytes(folder, file.build()).tensors().empty());
    }
    SECTION("no keys") {
        file.keys.clear();
        CHECK(open_bytes(folder, file.build()).values().empty());
    }
    SECTION("a scalar tensor without dimensions") {
        file.tensors[0].dims.clear();
        const auto g = open_bytes(folder, file.build());
        CHECK(g.require("first").n_dims == 0);
        CHECK(g.require("first").dims[0] == 1);
        CHECK(g.require("first").data.size() == 4);
    }
    SECTION("another alignment") {
        file.keys.push_back(gguf_entry("general.alignment", 4, le<std::uint32_t>(8)));
        file.alignment = 8;
        CHECK(text_of(open_bytes(folder, file.build()).require("second.weight").data) == std::string(34, 'q'));
    }
    SECTION("gaps, another order, padding at the end") {
        file.tensors[0].offset = 128;
        file.tensors[1].offset = 64;
        file.data =
            std::string(64, '.') + std::string(34, 'q') + std::string(30, '.') + std::string(32, 'f') + "padding";
        const auto g = open_bytes(folder, file.build());
        CHECK(text_of(g.require("first").data) == std::string(32, 'f'));
        CHECK(text_of(g.require("second.weight").data) == std::string(34, 'q'));
    }
    SECTION("a tensor type that keel only lists") {
        file.tensors[0].type = 27;  // I64
        file.tensors[0].dims = {4};
        CHECK_FALSE(open_bytes(folder, file.build()).require("first").type->supported);
    }
    SECTION("a text with any bytes in it") {
        file.keys.push_back(gguf_entry("a.text", 8, gguf_string(std::string_view("\0\xFF", 2))));
        CHECK(open_bytes(folder, file.build()).require_string("a.text") == std::string_view("\0\xFF", 2));
    }
    SECTION("empty arrays") {
        file.keys.push_back(gguf_entry("a.none", 9, gguf_array_of(8, 0, "")));
        file.keys.push_back(gguf_entry("a.nil", 9, gguf_array_of(5, 0, "")));
        const auto g = open_bytes(folder, file.build());
        CHECK(g.require_array("a.none").strings().empty());
        CHECK(g.require_array("a.nil").size() == 0);
    }
}

TEST_CASE("typed access takes any width and checks the range") {
    const scratch_folder folder;
    gguf_bytes file;
    file.keys = {
        gguf_entry("u8", 0, le<std::uint8_t>(200)),
        gguf_entry("i8", 1, le<std::int8_t>(-100)),
        gguf_entry("u16", 2, le<std::uint16_t>(60'000)),
        gguf_entry("i16", 3, le<std::int16_t>(-30'000)),
        gguf_entry("u32", 4, le<std::uint32_t>(4'000'000'000)),
        gguf_entry("i32", 5, le<std::int32_t>(-2'000'000'000)),
        gguf_entry("f32", 6, le(0.1f)),
        gguf_entry("bool", 7, std::string_view("\1", 1)),
        gguf_entry("string", 8, gguf_string("text")),
        gguf_entry("u64", 10, le(std::numeric_limits<std::uint64_t>::max())),
        gguf_entry("i64", 11, le(std::numeric_limits<std::int64_t>::min())),
        gguf_entry("f64", 12, le(0.1)),
        gguf_entry("ints", 9, gguf_array_of(5, 2, le<std::int32_t>(-1) + le<std::int32_t>(5))),
        gguf_entry("floats", 9, gguf_array_of(6, 2, le(0.5f) + le(-2.0f))),
    };
    const auto g = open_bytes(folder, file.build());

    CHECK(g.find_uint("u8") == 200u);
    CHECK(g.find_int("i8") == -100);
    CHECK(g.find_uint("u16") == 60'000u);
    CHECK(g.find_int("u16") == 60'000);
    CHECK(g.find_int("i16") == -30'000);
    CHECK(g.find_uint("u32") == 4'000'000'000u);
    CHECK(g.find_int("i32") == -2'000'000'000);
    CHECK(g.find_float("f32") == static_cast<double>(0.1f));
    CHECK(g.find_float("f64") == 0.1);
    CHECK(g.find_bool("bool") == true);
    CHECK(g.find_string("string") == std::string_view("text"));
    CHECK(g.find_uint("u64") == std::numeric_limits<std::uint64_t>::max());
    CHECK(g.find_int("i64") == std::numeric_limits<std::int64_t>::min());
    CHECK(g.require_array("ints").int_at(0) == -1);
    CHECK(g.require_array("ints").uint_at(1) == 5);
    CHECK(g.require_array("floats").float_at(1) == -2.0);

    const auto absent = "kimi-linear.block_count";
    CHECK_FALSE(g.find_uint(absent).has_value());
    CHECK_FALSE(g.find_int(absent).has_value());
    CHECK_FALSE(g.find_float(absent).has_value());
    CHECK_FALSE(g.find_bool(absent).has_value());
    CHECK_FALSE(g.find_string(absent).has_value());
    CHECK_FALSE(g.find_array(absent).has_value());

    const auto refused = [&](std::string_view key, auto access) {
        expect_error(errc::format, {"model.gguf: key ", key}, [&] { (void)access(); });
    };
    refused("kimi-linear.block_count is missing", [&] { return g.require_uint(absent); });
    refused(absent, [&] { return g.require_int(absent); });
    refused(absent, [&] { return g.require_float(absent); });
    refused(absent, [&] { return g.require_bool(absent); });
    refused(absent, [&] { return g.require_string(absent); });
    refused(absent, [&] { return g.require_array(absent); });
    refused("i8 holds -100", [&] { return g.find_uint("i8"); });
    refused("i64 holds -9223372036854775808", [&] { return g.find_uint("i64"); });
    refused("u64 holds 18446744073709551615", [&] { return g.find_int("u64"); });
    refused("u16 is 60000, more than the allowed 59999", [&] { return g.find_uint("u16", 59'999); });
    CHECK(g.find_uint("u16", 60'000) == 60'000u);
    refused("string is of type string", [&] { return g.find_uint("string"); });
    refused("bool is of type bool", [&] { return g.find_uint("bool"); });
    refused("f32", [&] { return g.find_int("f32"); });
    refused("u8", [&] { return g.find_float("u8"); });
    refused("u8", [&] { return g.find_bool("u8"); });
    refused("u8", [&] { return g.find_string("u8"); });
    refused("u8", [&] { return g.find_array("u8"); });
    refused("ints is an array of i32", [&] { return g.find_int("ints"); });
    refused("ints", [&] { return g.require_array("ints").uint_at(0); });
    refused("ints", [&] { return g.require_array("ints").float_at(0); });
    refused("ints", [&] { return g.require_array("ints").strings(); });
    expect_error(errc::argument, {"ints"}, [&] { (void)g.require_array("ints").int_at(2); });
    expect_error(errc::argument, {"ints"}, [&] { (void)g.require_array("ints").int_at(-1); });
    expect_error(errc::format, {"model.gguf", "tensor third is missing"}, [&] { (void)g.require("third"); });
}

TEST_CASE("views outlive the gguf that handed them out") {
    const scratch_folder folder;
    std::shared_ptr<const void> storage;
    std::span<const std::byte> data;
    std::span<const std::string_view> words;
    {
        const auto g = open_bytes(folder, gguf_bytes{}.build());
        storage = g.storage();
        data = g.require("second.weight").data;
        words = g.require_array("a.words").strings();
    }
    CHECK(text_of(data) == std::string(34, 'q'));
    CHECK(words[2] == "three");
}

TEST_CASE("a file that is in memory already is read like any other") {
    const auto bytes = gguf_bytes{}.build();
    alignas(64) std::byte memory[1024];
    REQUIRE(bytes.size() < sizeof memory);
    std::memcpy(memory, bytes.data(), bytes.size());
    const std::span<const std::byte> whole(memory, bytes.size());

    const auto g = gguf::from_memory("built-in model", whole);
    g.advise(access_hint::soon);
    CHECK(g.require("second.weight").data.data() == memory + gguf_bytes{}.data_start() + 32);
    CHECK(text_of(g.require("second.weight").data) == std::string(34, 'q'));
    expect_error(errc::format, {"built-in model: key a is missing"}, [&] { (void)g.require_uint("a"); });
    expect_error(errc::format, {"built-in model"}, [&] { (void)gguf::from_memory("built-in model", whole.first(80)); });
    expect_error(errc::format, {"built-in model"}, [&] { (void)gguf::from_memory("built-in model", {}); });
    expect_error(errc::argument, {"built-in model", "multiple of 64"},
                 [&] { (void)gguf::from_memory("built-in model", whole.subspan(8)); });
}

TEST_CASE("what is not a GGUF file is refused") {
    const scratch_folder folder;
    expect_error(errc::file, {"absent.gguf"}, [&] { (void)gguf::open(folder / "absent.gguf"); });
    expect_error(errc::file, {folder.path().string()}, [&] { (void)gguf::open(folder.path()); });
    expect_error(errc::file, {"model.gguf", "empty"}, [&] { (void)open_bytes(folder, ""); });
    expect_error(errc::format, {"model.gguf", "not a GGUF"},
                 [&] { (void)open_bytes(folder, "PK\3\4 something else"); });
    expect_error(errc::format, {"model.gguf"}, [&] { (void)open_bytes(folder, "GGU"); });

    gguf_bytes file;
    for (const std::uint32_t version : {0u, 1u, 4u, 65'537u}) {
        file.version = version;
        expect_refused(file, errc::unsupported, {"version " + std::to_string(version)});
    }
    file.version = 3u << 24;
    expect_refused(file, errc::unsupported, {"big-endian"});
}

TEST_CASE("a file that ends anywhere too early is refused") {
    const scratch_folder folder;
    const auto whole = gguf_bytes{}.build();
    for (std::size_t size = 0; size < whole.size(); ++size) {
        CAPTURE(size);
        const auto code = size == 0 ? errc::file : errc::format;
        expect_error(code, {"model.gguf"}, [&] { (void)open_bytes(folder, whole.substr(0, size)); });
    }

    // The same, with a first key that makes the rest exactly one page long, so that reading on leaves the mapping.
    constexpr std::size_t page = 4096;
    const auto filled = [](std::size_t n) { return with_key("filler", 8, gguf_string(std::string(n, 'x'))); };
    for (std::size_t n = page - 24 - 26; n > page - whole.size(); --n) {
        CAPTURE(n);
        expect_error(errc::format, {"model.gguf"},
                     [&] { (void)open_bytes(folder, filled(n).build().substr(0, page)); });
    }
}

TEST_CASE("each damaged field of the header and the metadata is refused") {
    constexpr auto huge = std::numeric_limits<std::uint64_t>::max();
    gguf_bytes file;
    SECTION("too many tensors") {
        for (const std::uint64_t n : {huge, huge / 24 + 1, std::uint64_t{1} << 32, std::uint64_t{3}}) {
            file.n_tensors = n;
            file.data.clear();
            expect_refused(file, errc::format, {"tensor"});
        }
    }
    SECTION("too many keys") {
        for (const std::uint64_t n : {huge, huge / 13 + 1, std::uint64_t{1} << 32, std::uint64_t{100}}) {
            file.n_keys = n;
            expect_refused(file, errc::format, {"number of keys is " + std::to_string(n)});
        }
    }
    SECTION("keys") {
        file.keys[0] = le(huge) + "key";
        expect_refused(file, errc::format, {"a key has 18446744073709551615 bytes"});
        file.keys[0] = gguf_entry(std::string(65'536, 'k'), 4, le<std::uint32_t>(0));
        expect_refused(file, errc::format, {"a key has 65536 bytes"});
        file.keys[0] = le<std::uint64_t>(65'535) + "key";
        expect_refused(file, errc::format, {"ends within a key"});
        expect_refused(with_key("", 4, le<std::uint32_t>(0)), errc::format, {"key is empty"});
        expect_refused(with_key(std::string_view("a\0b", 3), 4, le<std::uint32_t>(0)), errc::format, {"NUL"});
        expect_refused(with_key("a.count", 5, le<std::uint32_t>(0)), errc::format, {"a.count occurs twice"});
    }
    SECTION("value types") {
        for (const std::uint32_t type : {13u, 14u, 0xFFFFFFFFu}) {
            expect_refused(with_key("odd", type, "12345678"), errc::format, {"odd", std::to_string(type)});
            expect_refused(with_key("odd", 9, gguf_array_of(type, 1, "12345678")), errc::format,
                           {"odd", std::to_string(type)});
        }
        const auto inner = gguf_array_of(4, 1, le<std::uint32_t>(0));
        expect_refused(with_key("odd", 9, gguf_array_of(9, 1, inner)), errc::format, {"odd is an array of arrays"});
    }
    SECTION("strings") {
        expect_refused(with_key("text", 8, le(huge) + "abc"), errc::format, {"18446744073709551615"});
        expect_refused(with_key("text", 8, le<std::uint64_t>(1000) + "abc"), errc::format, {"a string"});
    }
    SECTION("a string above the limit, although the file holds it") {
        const auto size = (std::size_t{64} << 20) + 1;
        expect_refused(with_key("text", 8, gguf_string(std::string(size, 'x'))), errc::format, {std::to_string(size)});
    }
    SECTION("arrays") {
        for (const std::uint32_t type : {0u, 4u, 8u, 12u}) {
            for (const std::uint64_t n : {huge, huge / 8 + 1, std::uint64_t{1} << 61, std::uint64_t{1000}}) {
                expect_refused(with_key("list", 9, gguf_array_of(type, n, "abc")), errc::format,
                               {"list", std::to_string(n)});
            }
        }
        expect_refused(with_key("list", 9, gguf_array_of(8, 1, le(huge))), errc::format, {"a string"});
    }
    SECTION("bools") {
        expect_refused(with_key("flag", 7, "\2"), errc::format, {"flag", "bool"});
        expect_refused(with_key("flags", 9, gguf_array_of(7, 2, "\1\3")), errc::format, {"flags", "bool"});
    }
    SECTION("alignment") {
        for (const std::uint32_t n : {0u, 1u, 3u, 4u, 24u, 33u, 1u << 21, 1u << 31, 0xFFFFFFFFu}) {
            expect_refused(with_key("general.alignment", 4, le(n)), errc::format,
                           {"general.alignment is " + std::to_string(n) + ","});
        }
        expect_refused(with_key("general.alignment", 10, le<std::uint64_t>(32)), errc::format,
                       {"general.alignment", "u32"});
    }
}

TEST_CASE("each damaged field of the tensor directory is refused") {
    constexpr auto huge = std::numeric_limits<std::uint64_t>::max();
    gguf_bytes file;
    auto& first = file.tensors[0];
    SECTION("names") {
        first.name.clear();
        expect_refused(file, errc::format, {"name of a tensor is empty"});
        first.name = std::string(64, 'n');
        expect_refused(file, errc::format, {"name of a tensor has 64 bytes"});
        first.name = std::string(63, 'n');
        const scratch_folder folder;
        CHECK(open_bytes(folder, file.build()).find(first.name) != nullptr);
        first.name = std::string("a\0b", 3);
        expect_refused(file, errc::format, {"NUL"});
        first.name = "second.weight";
        expect_refused(file, errc::format, {"second.weight occurs twice"});
    }
    SECTION("dimensions") {
        first.n_dims = 5;
        first.dims = {1, 1, 1, 1, 1};
        expect_refused(file, errc::format, {"first has 5 dimensions"});
        first.n_dims = 0xFFFFFFFFu;
        expect_refused(file, errc::format, {"first has 4294967295 dimensions"});
        first.n_dims.reset();
        for (const auto& dims : std::vector<std::vector<std::uint64_t>>{{0}, {4, 0}, {0, 0, 0, 0}}) {
            first.dims = dims;
            expect_refused(file, errc::format, {"first has a dimension of 0"});
        }
        for (const std::uint64_t n : {huge, std::uint64_t{1} << 63}) {
            first.dims = {4, n};
            expect_refused(file, errc::format, {"first has a dimension of " + std::to_string(n)});
        }
    }
    SECTION("products that overflow") {
        first.dims = {std::uint64_t{1} << 32, std::uint64_t{1} << 32};  // wraps to 0
        expect_refused(file, errc::format, {"first has more elements"});
        first.dims = {std::uint64_t{1} << 31, std::uint64_t{1} << 31, 2};
        expect_refused(file, errc::format, {"first has more elements"});
        first.dims = {std::uint64_t{1} << 62};  // bytes wrap to 0
        expect_refused(file, errc::format, {"first has more bytes"});
        first.dims = {(std::uint64_t{1} << 62) + 8};  // bytes wrap to 32
        expect_refused(file, errc::format, {"first has more bytes"});
        first.dims = {std::uint64_t{1} << 40};
        expect_refused(file, errc::format, {"first needs 4398046511104 bytes"});
    }
    SECTION("types") {
        for (const std::uint32_t type : {4u, 5u, 31u, 33u, 36u, 38u, 43u, 66u, 0xFFFFFFFFu}) {
            first.type = type;
            expect_refused(file, errc::unsupported, {"first", "type " + std::to_string(type)});
        }
    }
    SECTION("rows that are not whole blocks") {
        first.type = 8;
        first.dims = {16, 2};
        expect_refused(file, errc::format, {"first has rows of 16 elements", "Q8_0", "32"});
        first.dims = {};
        expect_refused(file, errc::format, {"first has rows of 1 elements"});
        first.type = 12;
        first.dims = {128, 2};
        expect_refused(file, errc::format, {"first", "Q4_K", "256"});
    }
    SECTION("offsets") {
        for (const std::uint64_t offset : {1u, 8u, 31u, 33u}) {
            first.offset = offset;
            expect_refused(file, errc::format, {"first begins at offset " + std::to_string(offset)});
        }
        for (const std::uint64_t offset : {std::uint64_t{64}, std::uint64_t{96}, std::uint64_t{1} << 63, huge - 31}) {
            first.offset = offset;
            expect_refused(file, errc::format, {"first needs 32 bytes at offset " + std::to_string(offset)});
        }
    }
    SECTION("overlaps") {
        file.data += std::string(64, '.');
        first.offset = 32;
        expect_refused(file, errc::format, {"overlaps", "first", "second.weight"});
        first.offset = 64;  // the last two bytes of the other
        expect_refused(file, errc::format, {"first overlaps tensor second.weight"});
        first.offset = 0;
        first.dims = {4, 3};  // sixteen bytes too long
        expect_refused(file, errc::format, {"second.weight overlaps tensor first"});
    }
    SECTION("no data at all") {
        file.data.clear();
        expect_refused(file, errc::format, {"first needs 32 bytes at offset 0"});
    }
}

TEST_CASE("random damage is survived or refused") {
    const scratch_folder folder;
    auto file = gguf_bytes{};
    file.keys.push_back(gguf_entry("general.alignment", 4, le<std::uint32_t>(32)));
    const auto whole = file.build();
    std::mt19937 random(20251);
    int accepted = 0;
    for (int i = 0; i < 4000; ++i) {
        const auto damaged = mutated(whole, random);
        try {
            const auto g = open_bytes(folder, damaged);
            CHECK(touch(g) > 0);
            ++accepted;
        } catch (const keel::error&) {
        }
    }
    CHECK(accepted > 100);   // damage to data and texts is none to the format
    CHECK(accepted < 3900);  // and most of the rest must be noticed
}
