// SPDX-License-Identifier: MIT
//
// A sampler draws the same tokens from shortlists as from whole rows of logits.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include <keel/core/error.hpp>
#include <keel/core/shortlist.hpp>
#include <keel/sampler.hpp>

#include "catch.hpp"
#include "shortlist.hpp"
#include "throws.hpp"

using namespace keel;
using keel::testing::shortlist_of;
using keel::testing::throws;

namespace {

/// Like a language model's: a few tokens stand out of a wide field.
std::vector<float> some_logits(std::size_t vocabulary, float spread, std::uint32_t seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> field(-3.0f, spread);
    std::exponential_distribution<float> peak(0.3f);
    std::vector<float> logits(vocabulary);
    for (std::size_t i = 0; i < vocabulary; ++i) logits[i] = field(engine) + (i % 97 == 0 ? peak(engine) : 0.0f);
    return logits;
}

/// Draws from shortlists where they do, as a session does, and from whole rows; answers how often they did.
int draws_the_same(const std::vector<float>& logits, const sampler_options& options, int n) {
    sampler from_lists(options), from_rows(options);
    const shortlist list = shortlist_of(logits);
    int listed = 0;
    for (int i = 0; i < n; ++i) {
        const std::optional<token> drawn = from_lists.draw(list);
        listed += drawn ? 1 : 0;
        const token expected = from_rows(logits);
        CHECK((drawn ? *drawn : from_lists(logits)) == expected);
    }
    return listed;
}

}  // namespace

TEST_CASE("a sampler draws the same tokens from shortlists as from all logits") {
    const sampler_options settings[] = {{},
                                        {.temperature = 0},
                                        {.temperature = 0.7f},
                                        {.temperature = 2.5f},
                                        {.top_k = 1},
                                        {.top_k = 40},
                                        {.top_k = 255},
                                        {.top_k = 5000},
                                        {.top_p = 0.9f},
                                        {.temperature = 0.6f, .top_p = 0.95f},
                                        {.min_p = 0.05f},
                                        {.min_p = 1e-6f},
                                        {.temperature = 1.5f, .top_k = 100, .top_p = 0.8f, .min_p = 0.01f},
                                        {.temperature = 1.5f, .top_p = 0.8f, .min_p = 0.01f}};
    std::uint32_t seed = 0;
    for (sampler_options options : settings) {
        for (const float spread : {0.01f, 0.5f, 2.0f, 6.0f}) {
            for (const auto vocabulary : std::vector<std::size_t>{3, 200, 300, 20'000}) {
                options.seed = ++seed;
                CAPTURE(options.temperature, options.top_k, options.top_p, options.min_p, spread, vocabulary);
                draws_the_same(some_logits(vocabulary, spread, seed), options, 40);
            }
        }
    }
}

TEST_CASE("shortlists are enough for what is mostly asked of them") {
    const auto logits = some_logits(160'000, 1.5f, 1);
    CHECK(draws_the_same(logits, {.temperature = 0}, 10) == 10);
    CHECK(draws_the_same(logits, {.top_k = 40}, 200) == 200);
    CHECK(draws_the_same(logits, {.min_p = 0.05f}, 200) == 200);
    CHECK(draws_the_same(logits, {.temperature = 0.6f}, 200) >= 180);
    CHECK(draws_the_same(logits, {.temperature = 0.6f, .top_p = 0.9f}, 200) == 200);
}

TEST_CASE("shortlists of unusual logits draw the same, too") {
    auto logits = some_logits(2000, 2.0f, 7);
    for (std::size_t i = 0; i < logits.size(); i += 3) logits[i] = -INFINITY;
    for (std::size_t i = 1; i < logits.size(); i += 11) logits[i] = NAN;
    for (const auto i : std::vector<std::size_t>{1000, 500, 1500}) logits[i] = 20;  // ties
    for (const sampler_options& options :
         {sampler_options{}, {.temperature = 0}, {.top_k = 2}, {.top_p = 0.5f}, {.temperature = 9, .seed = 2}}) {
        draws_the_same(logits, options, 100);
    }
    const std::vector<float> equal(1000, 0.5f);
    CHECK(draws_the_same(equal, {}, 20) == 0);
    CHECK(draws_the_same(equal, {.temperature = 0}, 1) == 0);
    std::vector<float> huge(300, -3e30f);
    huge[100] = 3e30f;
    CHECK(draws_the_same(huge, {}, 20) == 20);
    for (const float worst : {INFINITY, NAN}) {
        const std::vector<float> bad(10, worst);
        throws(errc::numeric, "not finite", [&] { static_cast<void>(sampler{}.draw(shortlist_of(bad))); });
    }
}
