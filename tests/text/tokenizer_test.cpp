// SPDX-License-Identifier: MIT
#include <keel/text/tokenizer.hpp>

#include <cstdint>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include <keel/io/gguf.hpp>

#include "catch.hpp"
#include "text/vocabulary.hpp"

namespace keel::test {

namespace {

using json = nlohmann::json;
using tokens = std::vector<token>;

const tokenizer& demo() {
    static const tokenizer made = demo_vocabulary().make();
    return made;
}

struct case_of_tiktoken {
    std::string text;
    tokens ids;
};

std::vector<case_of_tiktoken> cases_of_tiktoken() {
    std::ifstream file(KEEL_TEST_DATA "/tokenizer/cases.json");
    std::vector<case_of_tiktoken> cases;
    for (const json& c : json::parse(file)) {
        case_of_tiktoken made{c.value("text", ""), c["ids"]};
        for (const json& run : c.value("runs", json::array())) {
            for (int i = 0; i < run[1].get<int>(); ++i) made.text += run[0].get<std::string>();
        }
        cases.push_back(std::move(made));
    }
    REQUIRE(cases.size() > 200);
    return cases;
}

std::string random_bytes(std::mt19937& random, std::size_t longest) {
    std::string bytes(random() % (longest + 1), '\0');
    for (char& c : bytes) c = static_cast<char>(static_cast<unsigned char>(random()));
    return bytes;
}

}  // namespace

TEST_CASE("the ids are those of tiktoken") {
    for (const auto& c : cases_of_tiktoken()) {
        CAPTURE(c.text);
        CHECK(demo().encode(c.text) == c.ids);
        CHECK(demo().decode(c.ids) == c.text);
    }
}

TEST_CASE("the merges of a file give the ids that the tokens alone give") {
    const auto file = gguf::open(KEEL_DEMO_MODEL);
    const auto texts = file.require_array("tokenizer.ggml.tokens").strings();
    const auto types = file.require_array("tokenizer.ggml.token_type");
    const auto lines = file.require_array("tokenizer.ggml.merges").strings();
    vocabulary from_file;
    from_file.tokens.assign(texts.begin(), texts.end());
    for (index i = 0; i < types.size(); ++i) from_file.types.push_back(static_cast<std::int32_t>(types.int_at(i)));
    from_file.merges.assign(lines.begin(), lines.end());
    REQUIRE(from_file.tokens == demo_vocabulary().tokens);
    REQUIRE(from_file.types == demo_vocabulary().types);
    REQUIRE(from_file.merges.size() == 4079 - 256);

    const tokenizer with_merges = from_file.make();
    for (const auto& c : cases_of_tiktoken()) {
        CAPTURE(c.text);
        CHECK(with_merges.encode(c.text) == c.ids);
    }
}

TEST_CASE("the order of the merges decides, not the ids; on ties the leftmost pair") {
    vocabulary v = small_vocabulary();
    const token bc = v.add("bc", token_type::normal);
    const token xx = v.add("xx", token_type::normal);
    v.merges = {"b c", "a b", "x x"};
    const tokenizer t = v.make();
    CHECK(t.encode("zabc") == tokens{'z', 'a', bc});
    CHECK(t.encode("abx") == tokens{256, 'x'});
    CHECK(t.encode("xxx") == tokens{xx, 'x'});
    CHECK(t.encode("xxxxx") == tokens{xx, xx, 'x'});
    CHECK(t.encode("abc") == tokens{257});  // as a whole, although no merge leads there
}

TEST_CASE("any bytes survive, valid UTF-8 or not") {
    std::mt19937 random(1);
    for (int round = 0; round < 300; ++round) {
        const std::string bytes = random_bytes(random, 200);
        CHECK(demo().decode(demo().encode(bytes)) == bytes);
        CHECK(demo().decode(demo().encode(bytes, true), true) == bytes);
    }
}

TEST_CASE("a text much longer than any token survives") {
    std::mt19937 random(2);
    std::string letters;
    for (int i = 0; i < 100'000; ++i) letters += static_cast<char>('a' + random() % 26);
    CHECK((demo().decode(demo().encode(letters)) == letters));
    const std::string equal_signs(100'000, '=');
    CHECK((demo().decode(demo().encode(equal_signs)) == equal_signs));
}

TEST_CASE("control tokens are found in text only on request") {
    const token end = *demo().find("<|im_end|>");
    const token user = *demo().find("<|im_user|>");
    CHECK(end == 4081);
    CHECK(demo().encode("<|im_user|>the<|im_end|>", true) == tokens{user, 923, end});
    CHECK(demo().encode("<|im_end|><|im_end|>", true) == tokens{end, end});

    for (const char* name : demo_control_tokens) {
        CAPTURE(name);
        for (const token id : demo().encode(name)) CHECK(demo().type(id) == token_type::normal);
        CHECK(demo().decode(demo().encode(name)) == name);
        CHECK(demo().encode(name, true) == tokens{*demo().find(name)});
    }
    const std::string almost = "<|im_end| > <|im_en <<|im_end|";
    CHECK(demo().encode(almost, true) == demo().encode(almost));
}

TEST_CASE("the pieces on both sides of a special token do not see each other") {
    // As one text the two spaces would be cut as " " and " b"; before a special token they are one piece.
    const token end = *demo().find("<|im_end|>");
    tokens expected = demo().encode("a  ");
    expected.push_back(end);
    for (const token id : demo().encode("b")) expected.push_back(id);
    CHECK(demo().encode("a  <|im_end|>b", true) == expected);
}

TEST_CASE("user-defined tokens are always found, the leftmost first, and of these the longest") {
    vocabulary v = small_vocabulary();
    const token think = v.add("<think>", token_type::user_defined);
    const token think_more = v.add("<think>more", token_type::user_defined);
    const token unknown = v.add("<unk>", token_type::unknown);
    const token high = v.add("\xE4\xB8\xAD!", token_type::user_defined);
    v.add("<gap>", token_type::unused);
    const tokenizer t = v.make();

    CHECK(t.encode("<think>") == tokens{think});
    CHECK(t.encode("ab<think>moreab") == tokens{256, think_more, 256});
    CHECK(t.encode("<think>mor") == tokens{think, 'm', 'o', 'r'});
    CHECK(t.encode("<<think>") == tokens{'<', think});
    CHECK(t.encode("\xE4\xB8\xAD!") == tokens{high});
    CHECK(t.encode("<unk>").size() == 5);
    CHECK(t.encode("<unk>", true) == tokens{unknown});
    CHECK(t.encode("<gap>", true).size() == 5);

    CHECK(t.find("<think>") == think);
    CHECK(t.find("<unk>") == unknown);
    CHECK_FALSE(t.find("<gap>"));
    CHECK_FALSE(t.find("<thin"));
    CHECK_FALSE(t.find("<think>mor"));
    CHECK_FALSE(t.find("ab"));
    CHECK_FALSE(t.find(""));
}

TEST_CASE("what tokens stand for depends on their type") {
    vocabulary v = small_vocabulary();
    v.add("<think>", token_type::user_defined);  // 259
    v.add("<unk>", token_type::unknown);
    v.add("[PAD261]", token_type::unused);
    const tokenizer t = v.make();
    CHECK(t.bytes(0).size() == 1);
    CHECK(t.bytes(0xFF) == "\xFF");
    CHECK(t.bytes(257) == "abc");
    CHECK(t.bytes(258).empty());
    CHECK(t.bytes(258, true) == "[EOS]");
    CHECK(t.bytes(259) == "<think>");
    CHECK(t.bytes(260).empty());
    CHECK(t.bytes(260, true) == "<unk>");
    CHECK(t.bytes(261, true).empty());
    CHECK(t.decode(tokens{258, 256, 259, 260, 261}) == "ab<think>");
    CHECK(t.decode(tokens{258, 256, 259, 260, 261}, true) == "[EOS]ab<think><unk>");
    CHECK(t.size() == 262);
    CHECK(t.type(258) == token_type::control);

    check_error(errc::argument, {"token -1", "262"}, [&] { (void)t.bytes(-1); });
    check_error(errc::argument, {"token 262", "262"}, [&] { (void)t.bytes(262); });
    check_error(errc::argument, {"token 262", "262"}, [&] { (void)t.type(262); });
    check_error(errc::argument, {"token 300", "262"}, [&] { (void)t.decode(tokens{1, 300}); });
}

TEST_CASE("the tokens that end an answer are known by name and by the file's ids") {
    vocabulary v = demo_vocabulary();
    v.rest.bos = 4079;
    v.rest.eos = 4080;
    const tokenizer t = v.make();
    CHECK(t.end_of_generation() == tokens{4080, 4081, 4086, 4095});  // [EOS], <|im_end|>, [EOT], [PAD]
    CHECK(t.is_end_of_generation(4081));
    CHECK_FALSE(t.is_end_of_generation(4079));
    CHECK_FALSE(t.is_end_of_generation(11));

    vocabulary named = small_vocabulary();
    named.rest.eos = 5;
    named.rest.eot = 7;
    named.rest.eom = 6;
    CHECK(named.make().end_of_generation() == tokens{5, 6, 7, 258});
}

TEST_CASE("ids that the file does not give are missing, not zero or eleven") {
    const tokenizer none = small_vocabulary().make();
    CHECK_FALSE(none.bos());
    CHECK_FALSE(none.eos());
    CHECK_FALSE(none.padding());
    CHECK_FALSE(none.unknown());
    CHECK_FALSE(none.add_bos());
    CHECK(none.chat_template().empty());
    CHECK_FALSE(none.is_end_of_generation(11));

    vocabulary v = small_vocabulary();
    v.rest.bos = 1;
    v.rest.eos = 2;
    v.rest.padding = 3;
    v.rest.unknown = 4;
    v.rest.add_bos = true;
    v.rest.chat_template = "{{ x }}";
    const tokenizer all = v.make();
    CHECK(all.bos() == 1);
    CHECK(all.eos() == 2);
    CHECK(all.padding() == 3);
    CHECK(all.unknown() == 4);
    CHECK(all.add_bos());
    CHECK(all.chat_template() == "{{ x }}");
}

TEST_CASE("a tokenizer may be copied and moved") {
    tokenizer first = small_vocabulary().make();
    const tokenizer copy = first;
    const tokenizer moved = std::move(first);
    for (const tokenizer* t : {&copy, &moved}) {
        CHECK(t->encode("abc[EOS]x", true) == tokens{257, 258, 'x'});
        CHECK(t->decode(tokens{257, 'x'}) == "abcx");
    }
}

TEST_CASE("entries that are allowed to be odd") {
    vocabulary v = small_vocabulary();
    SECTION("types longer than the tokens") {
        v.types.push_back(99);
        CHECK(v.make().size() == 259);
    }
    SECTION("no types: every token is normal") {
        v.types.clear();
        CHECK(v.make().type(258) == token_type::normal);
    }
    SECTION("empty texts stand for nothing") {
        v.add("", token_type::normal);
        v.add("", token_type::normal);
        v.add("", token_type::control);
        const tokenizer t = v.make();
        CHECK(t.bytes(260).empty());
        CHECK(t.encode("ab", true) == tokens{256});
    }
    SECTION("a control token may look like the bytes of a normal one") {
        v.add(printable(" x"), token_type::normal);
        v.add(" x", token_type::control);
        CHECK(v.make().encode(" x") == tokens{259});
        CHECK(v.make().encode(" x", true) == tokens{260});
    }
    SECTION("without merges, a token that its bytes cannot merge into is still found whole") {
        v.merges.clear();
        const token odd = v.add("qrst", token_type::normal);
        CHECK(v.make().encode("qrst") == tokens{odd});
        CHECK(v.make().encode("qrstu") == tokens{'q', 'r', 's', 't', 'u'});
    }
}

TEST_CASE("damaged vocabularies are refused, naming what is wrong") {
    vocabulary v = small_vocabulary();
    const auto refused = [&](errc code, std::initializer_list<std::string_view> parts) {
        check_error(code, {"tokenizer: "}, [&] { (void)v.make(); });
        check_error(code, parts, [&] { (void)v.make(); });
    };
    SECTION("another model") {
        v.rest.model = "llama";
        refused(errc::unsupported, {"model", "\"llama\""});
    }
    SECTION("another pre-tokenizer") {
        v.rest.pre = "qwen2";
        refused(errc::unsupported, {"pre-tokenizer", "\"qwen2\""});
    }
    SECTION("no tokens") {
        v.tokens.clear();
        refused(errc::format, {"empty"});
    }
    SECTION("types shorter than the tokens") {
        v.types.pop_back();
        refused(errc::format, {"token_type", "258", "259"});
    }
    SECTION("types of other tokenizers") {
        for (const int type : {0, 6, 7, -1}) {
            v.types[100] = type;
            refused(errc::format, {"token 100", "type " + std::to_string(type)});
        }
    }
    SECTION("a character that stands for no byte") {
        for (const char* text : {"a b", "\xC5\x84", "\xC2\xA0", "\xE4\xB8\xAD", "\xFF", "\xC4", "\x01"}) {
            v.tokens[256] = text;
            refused(errc::format, {"token 256", "stands for no byte"});
        }
    }
    SECTION("a byte without a token") {
        v.types['A'] = static_cast<std::int32_t>(token_type::unused);
        refused(errc::format, {"byte 65"});
    }
    SECTION("two equal normal tokens") {
        v.add("ab", token_type::normal);
        refused(errc::format, {"tokens 256 and 259"});
    }
    SECTION("two equal control tokens") {
        v.add("[EOS]", token_type::user_defined);
        refused(errc::format, {"258", "259", "equal"});
    }
    SECTION("a control token equal to a normal one") {
        v.add("abc", token_type::control);
        refused(errc::format, {"tokens 257 and 259"});
    }
    SECTION("merges that are not two parts") {
        for (const char* line : {"", "ab", " ", " a", "a ", "a  b", "a b c", " a b", "a b "}) {
            CAPTURE(line);
            v.merges[1] = line;
            refused(errc::format, {"merge 1 ", "one space"});
        }
    }
    SECTION("merges of what are no tokens") {
        v.merges[1] = "\xE4\xB8\xAD c";
        refused(errc::format, {"merge 1 ", "stands for no byte"});
        v.merges[1] = "xy c";
        refused(errc::format, {"merge 1:", "left"});
        v.merges[1] = "a bc";
        refused(errc::format, {"merge 1:", "right"});
        v.merges[1] = "b c";
        refused(errc::format, {"merge 1:", "result"});
        v.merges[1] = "a [EOS]";
        refused(errc::format, {"merge 1:", "right"});
    }
    SECTION("a merge twice") {
        v.merges.push_back("a b");
        refused(errc::format, {"merge 2", "repeats"});
    }
    SECTION("ids outside the vocabulary") {
        for (const std::int64_t id : {std::int64_t{259}, std::int64_t{-1}, std::int64_t{0xFFFFFFFF},
                                      std::numeric_limits<std::int64_t>::max()}) {
            const std::string number = std::to_string(id);
            const auto each = [&](std::optional<std::int64_t> tokenizer_data::*member, std::string_view name) {
                v.rest.*member = id;
                refused(errc::format, {name, number, "259"});
                v.rest.*member = std::nullopt;
            };
            each(&tokenizer_data::bos, "bos");
            each(&tokenizer_data::eos, "eos");
            each(&tokenizer_data::eot, "eot");
            each(&tokenizer_data::eom, "eom");
            each(&tokenizer_data::padding, "padding");
            each(&tokenizer_data::unknown, "unknown");
        }
    }
}

}  // namespace keel::test
