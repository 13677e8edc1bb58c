// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/shortlist.hpp>
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

/// Logits to a token. The same seed and logits give the same tokens on every machine with the same exp, and so do
/// shortlists of them. A value: copying it copies the state of its random numbers. One sampler serves one thread at a
/// time.
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
        const float best = largest(logits);
        require_finite(best);
        if (options_.temperature == 0) return static_cast<token>(std::ranges::find(logits, best) - logits.begin());

        candidates_.clear();
        for (std::size_t i = 0; i < logits.size(); ++i) consider(static_cast<token>(i), logits[i], best);
        keep_top_k();
        weigh(best);
        const double at = uniform();
        for (std::size_t n = 256;; n *= 8) {  // it is nearly always among the likeliest few
            const double others = order(n);
            if (const auto drawn = pick(at, others * (1 - 1e-9), others * (1 + 1e-9))) return *drawn;
        }
    }

    /// Draws the token that the list's whole row would give. Where the list cannot tell which that is, it draws nothing
    /// and uses no random number: then it takes the row. Throws errc::numeric as above.
    std::optional<token> draw(const shortlist& list) {
        require_finite(list.best);
        if (list.listed == 0) return std::nullopt;  // more tokens lie in the first bin than the list holds
        const auto listed = static_cast<std::size_t>(list.listed);
        candidates_.clear();
        for (const auto& e : std::span(list.entries).first(listed)) consider(e.id, e.logit, list.best);
        if (options_.temperature == 0) return std::ranges::min_element(candidates_, likelier)->id;

        const bool unlikely = candidates_.size() < listed;  // some of these, and so all that are not listed
        const bool counted = keep_top_k();
        if (options_.top_k > 0 && !unlikely && !counted) return std::nullopt;
        weigh(list.best);
        const weights others = unlikely || counted ? weights{} : weights_behind(list);
        const auto before = random_;
        order(listed);
        const auto drawn = pick(uniform(), others.least, others.most);
        if (!drawn) random_ = before;
        return drawn;
    }

private:
    struct candidate {
        token id;
        float logit;
        float weight;  // proportional to the probability; the likeliest one's is 1
    };

    /// Bounds of a sum of weights.
    struct weights {
        double least = 0, most = 0;
    };

    static bool likelier(const candidate& a, const candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    }

    static void require_finite(float best) {
        if (!std::isfinite(best)) throw error(errc::numeric, "sampler", "the largest logit is not finite");
    }

    /// The largest that is not NaN, or negative infinity. Lanes that have nothing to do with each other become one
    /// instruction.
    static float largest(std::span<const float> logits) {
        std::array<float, 16> lanes;
        lanes.fill(-std::numeric_limits<float>::infinity());
        const std::size_t whole = logits.size() / lanes.size() * lanes.size();
        for (std::size_t i = 0; i < whole; i += lanes.size()) {
            for (std::size_t l = 0; l < lanes.size(); ++l) lanes[l] = std::max(lanes[l], logits[i + l]);
        }
        for (const float x : logits.subspan(whole)) lanes[0] = std::max(lanes[0], x);
        return *std::ranges::max_element(lanes);
    }

    /// Tokens less likely than e^-30 times the best one have no chance.
    [[nodiscard]] float least_logit(float best) const { return best - 30.0f * options_.temperature; }

    void consider(token id, float logit, float best) {
        if (logit >= least_logit(best)) candidates_.push_back({id, logit, 0});
    }

    void weigh(float best) {
        for (candidate& c : candidates_) c.weight = std::exp((c.logit - best) / options_.temperature);
    }

    /// Answers whether k tokens are left, and not fewer.
    bool keep_top_k() {
        const auto k = static_cast<std::size_t>(options_.top_k);
        if (k == 0 || k > candidates_.size()) return false;
        std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(), likelier);
        candidates_.resize(k);
        return true;
    }

    /// What the tokens that are not on the list weigh, rounding included.
    [[nodiscard]] weights weights_behind(const shortlist& list) const {
        const double scale = 1 / static_cast<double>(options_.temperature);
        const double bin = 1.0 / shortlist::per_unit, step = std::exp(-bin * scale);
        double edge = (static_cast<double>(list.top) + 1) * bin;  // the bin's upper one
        double above = std::exp((edge - static_cast<double>(list.best)) * scale);
        weights sum;
        for (const std::uint32_t count : list.others) {
            edge -= bin;
            sum.most += count * above;
            above *= step;
            if (edge >= static_cast<double>(least_logit(list.best))) sum.least += count * above;
        }
        sum.most += list.vocabulary * above;  // what is in no bin
        return {sum.least * (1 - 1e-5), sum.most * (1 + 1e-5)};
    }

    /// Puts the n likeliest candidates in front, by falling likelihood, and sums up their weights; answers the sum of
    /// the others'.
    double order(std::size_t n) {
        const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(std::min(n, candidates_.size()));
        std::partial_sort(candidates_.begin(), end, candidates_.end(), likelier);
        sums_.clear();
        double sum = 0;
        for (auto c = candidates_.begin(); c != end; ++c) sums_.push_back(sum += static_cast<double>(c->weight));
        double others = 0;
        for (auto c = end; c != candidates_.end(); ++c) others += static_cast<double>(c->weight);
        return others;
    }

    /// The token at the share `at` of all that the filters leave, if it is among those in order, whatever the others
    /// weigh between `least` and `most`. (A place moves only one way when the weight grows.)
    [[nodiscard]] std::optional<token> pick(double at, double least, double most) const {
        const std::size_t place = place_of(at, sums_.back() + least);
        if (place == sums_.size() || place != place_of(at, sums_.back() + most)) return std::nullopt;
        return candidates_[place].id;
    }

    /// The same as a place in sums_, or behind it if it is not there, when all tokens together weigh `total`.
    [[nodiscard]] std::size_t place_of(double at, double total) const {
        std::size_t kept = sums_.size();
        bool complete = total <= sums_.back();  // what the filters leave is all in order
        const auto keep = [&](std::size_t n) {
            if (n > kept) return;
            kept = n;
            complete = true;
        };
        if (options_.top_p < 1) {
            const double enough = static_cast<double>(options_.top_p) * total;
            keep(static_cast<std::size_t>(std::ranges::lower_bound(sums_, enough) - sums_.begin()) + 1);
        }
        if (options_.min_p > 0) {
            const auto less = [&](const candidate& c) { return c.weight < options_.min_p; };
            const auto ordered = std::span(candidates_).first(sums_.size());
            const auto n = static_cast<std::size_t>(std::ranges::find_if(ordered, less) - ordered.begin());
            if (n < ordered.size()) keep(n);
        }
        if (!complete && (options_.top_p < 1 || options_.min_p > 0)) return sums_.size();
        if (complete) total = sums_[kept - 1];
        const auto found = std::ranges::upper_bound(std::span(sums_).first(kept), at * total);
        const auto place = static_cast<std::size_t>(found - std::span(sums_).begin());
        return complete ? std::min(place, kept - 1) : place;
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
    std::vector<candidate> candidates_;
    std::vector<double> sums_;  // of the weights of the first candidates, those in order
};

}  // namespace keel::inline KEEL_ABI
