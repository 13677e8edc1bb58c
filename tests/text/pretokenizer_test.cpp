// SPDX-License-Identifier: MIT
#include <keel/text/pretokenizer.hpp>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "catch.hpp"

namespace keel::test {

namespace {

using json = nlohmann::json;

std::vector<std::string> strings(const std::vector<std::string_view>& views) { return {views.begin(), views.end()}; }

std::string from_hex(const json& hex) {
    std::string bytes;
    for (std::size_t i = 0; i < hex.get_ref<const std::string&>().size(); i += 2) {
        bytes += static_cast<char>(std::stoi(hex.get<std::string>().substr(i, 2), nullptr, 16));
    }
    return bytes;
}

/// [["ab", 3], ...] is "ababab...".
std::string from_runs(const json& runs) {
    std::string text;
    for (const json& run : runs) {
        for (int i = 0; i < run[1].get<int>(); ++i) text += run[0].get<std::string>();
    }
    return text;
}

template <class Read>
std::vector<std::string> each(const json& list, Read read) {
    std::vector<std::string> out;
    for (const json& item : list) out.push_back(read(item));
    return out;
}

std::string plain(const json& text) { return text.get<std::string>(); }

}  // namespace

TEST_CASE("texts are cut as the vendor's pattern cuts them") {
    std::ifstream file(KEEL_TEST_DATA "/pretokenizer_cases.json");
    const json cases = json::parse(file);
    REQUIRE(cases.size() > 80);
    for (const json& c : cases) {
        const std::string note = c.value("category", "") + ": " + c.value("note", "");
        CAPTURE(note);
        if (c.contains("text")) {
            CAPTURE(c["text"]);
            CHECK(strings(pieces_of(plain(c["text"]))) == each(c["pieces"], plain));
        } else if (c.contains("text_hex")) {
            CAPTURE(c["text_hex"]);
            CHECK(strings(pieces_of(from_hex(c["text_hex"]))) == each(c["pieces_hex"], from_hex));
        } else {
            const std::string text = from_runs(c.at("text_runs"));
            CHECK((strings(pieces_of(text)) == each(c["pieces_runs"], from_runs)));
        }
    }
}

TEST_CASE("the vendor's chunks give the vendor's pieces around very long runs") {
    std::ifstream file(KEEL_TEST_DATA "/pretokenizer_cases.json");
    int checked = 0;
    for (const json& c : json::parse(file)) {
        if (!c.contains("pieces_runs_with_chunking")) continue;
        const std::string text = from_runs(c["text_runs"]);
        std::vector<std::string> pieces;
        for_each_vendor_chunk(text, [&](std::string_view chunk) {
            for_each_piece(chunk, [&](std::string_view piece) { pieces.emplace_back(piece); });
        });
        CHECK((pieces == each(c["pieces_runs_with_chunking"], from_runs)));
        ++checked;
    }
    CHECK(checked > 0);
}

TEST_CASE("chunks end after 400,000 characters and 25,000 of a kind") {
    const auto chunk_sizes = [](const std::string& text) {
        std::vector<std::size_t> sizes;
        for_each_vendor_chunk(text, [&](std::string_view chunk) { sizes.push_back(chunk.size()); });
        return sizes;
    };
    CHECK(chunk_sizes("").empty());
    CHECK(chunk_sizes("short") == std::vector<std::size_t>{5});
    CHECK(chunk_sizes(std::string(60'000, 'x')) == std::vector<std::size_t>{25'000, 25'000, 10'000});
    CHECK(chunk_sizes(std::string(25'000, ' ') + "x") == std::vector<std::size_t>{25'001});
    // U+001C is white space to Python, though not to Unicode.
    CHECK(chunk_sizes(std::string(20'000, ' ') + std::string(10'000, '\x1C')) ==
          std::vector<std::size_t>{25'000, 5'000});

    std::string words;
    for (int i = 0; i < 250'000; ++i) words += "\xC3\xA9 ";  // two characters, three bytes
    CHECK(chunk_sizes(words) == std::vector<std::size_t>{600'000, 150'000});
}

TEST_CASE("pieces are never empty and join to the text, whatever the bytes") {
    std::mt19937 random(7);
    constexpr std::string_view likely[] = {" ",
                                           "\n",
                                           "\r",
                                           "\t",
                                           "a",
                                           "A",
                                           "7",
                                           "'s",
                                           "'",
                                           ".",
                                           "\xCC\x81",
                                           "\xE4\xB8\xAD",
                                           "\xE3\x80\x87",
                                           "\xC5\xBF",
                                           "\xE2\x80\xA8",
                                           "\xF0\x9F\x98\x80",
                                           "\xE4",
                                           "\xFF"};
    for (int round = 0; round < 2000; ++round) {
        std::string text;
        for (std::size_t i = random() % 30; i > 0; --i) text += likely[random() % std::size(likely)];
        std::string joined;
        for (const std::string_view piece : pieces_of(text)) {
            CHECK_FALSE(piece.empty());
            joined += piece;
        }
        CHECK(joined == text);
    }
}

}  // namespace keel::test
