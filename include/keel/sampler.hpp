// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>

namespace keel::inline KEEL_ABI {

/// How the next token is drawn. The filters apply in the order of the members; each keeps at least one token.
struct sampler_options {
    float temperature = 1.0f;  ///< 0: the most likely token (the lowest id on a tie), and nothing below matters
    int top_k = 0;             ///< keep the k most likely; 0: all
    float top_p = 1.0f;        ///< keep the most likely ones that together reach this probability
    float min_p = 0.0f;        ///< drop tokens less likely than this share of the most likely one
    std::uint64_t seed = 0;
};

/// Logits to a token. The same seed and logits give the same tokens on every machine with the same exp. A value:
/// copying it copies the state of its random numbers. One sampler serves one thread at a time.
class sampler {
public:
    /// Throws errc::argument, naming the option, for values that make no sense.
    explicit sampler(const sampler_options& options = {}) : options_(options), random_(options.seed) {
        const auto require = [](bool good, const char* name, const char* range) {
            if (!good) throw error(errc::argument, name, range);
        };
        require(options.temperature >= 0 && std::isfinite(options.temperature), "temperature", "must not be negative");
        require(options.top_k >= 0, "top_k", "must not be negative");
        require(options.top_p > 0 && options.top_p <= 1, "top_p", "must be above 0 and at most 1");
        require(options.min_p >= 0 && options.min_p <= 1, "min_p", "must be from 0 to 1");
    }

    [[nodiscard]] const sampler_options& options() const { return options_; }

    /// Draws a token. Throws errc::numeric if the largest logit is not finite, errc::argument if there are none.
    token operator()(std::span<const float> logits) {
        if (logits.empty()) throw error(errc::argument, "sampler", "there are no logits yet: feed some tokens first");
        const auto best =
            std::max_element(logits.begin(), logits.end(), [](float a, float b) { return a < b || a != a; });
        if (!std::isfinite(*best)) throw error(errc::numeric, "sampler", "the largest logit is not finite");
        if (options_.temperature == 0) return static_cast<token>(best - logits.begin());

        gather(logits, *best);
        keep_top_k();
        for (candidate& c : kept_) c.weight = std::exp((c.weight - *best) / options_.temperature);
        keep_top_p();
        std::erase_if(kept_, [&](const candidate& c) { return c.weight < options_.min_p; });  // the best one weighs 1
        return draw();
    }

private:
    struct candidate {
        token id;
        float weight;  // a logit at first, then proportional to the probability
    };

    static bool likelier(const candidate& a, const candidate& b) {
        return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
    }

    /// All tokens with a chance above that of rounding errors: e^-30 of the best one's.
    void gather(std::span<const float> logits, float best) {
        kept_.clear();
        const float least = best - 30.0f * options_.temperature;
        for (std::size_t i = 0; i < logits.size(); ++i) {
            if (logits[i] >= least) kept_.push_back({static_cast<token>(i), logits[i]});
        }
    }

    void keep_top_k() {
        const auto k = static_cast<std::size_t>(options_.top_k);
        if (k == 0 || k >= kept_.size()) return;
        std::nth_element(kept_.begin(), kept_.begin() + options_.top_k, kept_.end(), likelier);
        kept_.resize(k);
    }

    void keep_top_p() {
        if (options_.top_p >= 1) return;
        std::sort(kept_.begin(), kept_.end(), likelier);
        const double enough = static_cast<double>(options_.top_p) * total();
        double sum = 0;
        const auto last = std::find_if(kept_.begin(), kept_.end(), [&](const candidate& c) {
            sum += static_cast<double>(c.weight);
            return sum >= enough;
        });
        if (last != kept_.end()) kept_.erase(last + 1, kept_.end());
    }

    token draw() {
        double left = uniform() * total();
        for (const candidate& c : kept_) {
            left -= static_cast<double>(c.weight);
            if (left < 0) return c.id;
        }
        return kept_.back().id;
    }

    [[nodiscard]] double total() const {
        double sum = 0;
        for (const candidate& c : kept_) sum += static_cast<double>(c.weight);
        return sum;
    }

    /// In [0, 1), 53 bits, by splitmix64 (Steele, Lea, Flood 2014).
    double uniform() {
        std::uint64_t z = random_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
    }

    sampler_options options_;
    std::uint64_t random_;
    std::vector<candidate> kept_;
};

}  // namespace keel::inline KEEL_ABI
