// SPDX-License-Identifier: MIT
//
// The whole model against the float64 oracle, for any backend: instantiate check_... in a test of that backend.
// The oracle's files and tolerances are described in tests/data/README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <keel/backend/observed.hpp>
#include <keel/core/quant.hpp>
#include <keel/io/gguf.hpp>
#include <keel/model/executor.hpp>

#include "catch.hpp"

namespace keel::golden {

inline const std::string folder = KEEL_TEST_DATA "/golden/";

inline nlohmann::json read_json(const std::string& path) {
    std::ifstream file(path);
    REQUIRE(file);
    return nlohmann::json::parse(file);
}

inline std::vector<float> read_floats(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    REQUIRE(file);
    std::vector<float> values(static_cast<std::size_t>(file.tellg()) / sizeof(float));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
    return values;
}

/// The named arrays of a .bin file, by the index in its JSON.
inline std::map<std::string, std::vector<float>> read_arrays(const nlohmann::json& about) {
    const auto all = read_floats(folder + about.at("file").get<std::string>());
    std::map<std::string, std::vector<float>> arrays;
    for (const auto& entry : about.at("arrays")) {
        std::size_t size = 1;
        for (const std::size_t n : entry.at("shape")) size *= n;
        const auto first = all.begin() + entry.at("offset").get<std::ptrdiff_t>() / 4;
        arrays[entry.at("name")] = {first, first + static_cast<std::ptrdiff_t>(size)};
    }
    return arrays;
}

/// |a - b| / |b|; infinite for NaN or different sizes, so that a comparison with it fails.
inline double relative_error(std::span<const float> a, std::span<const float> b) {
    if (a.size() != b.size() || b.empty()) return INFINITY;
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
        size += std::pow(static_cast<double>(b[i]), 2);
    }
    const double error = std::sqrt(difference / std::max(size, 1e-60));
    return std::isfinite(error) ? error : INFINITY;
}

template <backend B, class... Device>
executor<B> load(const std::string& path, precision p, int threads = 2, Device&&... extra) {
    const gguf file = gguf::open(path);
    const backend_options options{p, threads, 0};
    auto device = std::make_shared<typename B::device>(options, std::forward<Device>(extra)...);
    B loader(device, 0);
    config c = read_config(file);
    auto w = load_weights(loader, file, c);
    return {std::move(c), options, 256, std::move(device), std::move(w)};
}

inline std::string model_path(const std::string& name) { return KEEL_TEST_DATA "/models/" + name + ".gguf"; }

template <backend B>
std::vector<float> to_host(B& b, view<const float, 1> from) {
    std::vector<float> values(static_cast<std::size_t>(from.size()));
    b.download(reinterpret_cast<std::byte*>(values.data()), reinterpret_cast<const std::byte*>(from.data),
               from.size() * static_cast<index>(sizeof(float)));
    return values;
}

/// Feeds tokens `split` at a time; answers the logits behind each token, or only behind the last one.
template <backend B>
std::vector<std::vector<float>> feed(const executor<B>& model, sequence_state<B>& state, std::span<const token> tokens,
                                     std::size_t split, want logits = want::last, index context = 1024) {
    std::vector<std::vector<float>> rows;
    for (std::size_t i = 0; i < tokens.size(); i += split) {
        const std::size_t count = std::min(split, tokens.size() - i);
        const bool last = i + count == tokens.size();
        const job<B> next{&state, tokens.subspan(i, count), logits == want::last && !last ? want::none : logits};
        model.run({&next, 1}, context,
                  [&](B& b, std::size_t, index, view<const float, 1> row) { rows.push_back(to_host(b, row)); });
    }
    return rows;
}

inline double negative_log_likelihood(const std::vector<float>& logits, token next) {
    const double largest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x) - largest);
    return largest + std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(next)]);
}

/// The tolerances of the oracle's README, for a file's type of weights.
struct tolerance {
    double logits;  // relative L2 of the last row
    double mean_nll;
};

inline tolerance tolerance_of(const std::string& model, precision p) {
    if (p == precision::exact) return {1e-5, 1e-5};
    if (model == "mid-f16") return {5e-3, 5e-3};
    if (model == "mid-bf16") return {2e-2, 3e-2};
    if (model == "small-q8") return {1e-1, 5e-2};
    return {3e-3, 5e-3};  // f32 weights, f16 cache
}

/// Last logits, mean negative log-likelihood and greedy continuation: the whole prompt at once, and split.
template <backend B>
void check_logits(const std::string& name, precision p) {
    const auto about = read_json(folder + name + ".json");
    const auto model = load<B>(model_path(name), p);
    const auto allowed = tolerance_of(name, p);
    for (const auto& prompt : about.at("prompts")) {
        const auto tokens = prompt.at("tokens").get<std::vector<token>>();
        const auto expected = read_floats(folder + prompt.at("logits_file").get<std::string>());
        CAPTURE(name, tokens.size());
        std::vector<float> whole;
        for (const std::size_t split : {tokens.size(), std::size_t{1}, std::size_t{16}, std::size_t{50}}) {
            CAPTURE(split);
            auto state = model.make_state();
            const auto last =
                feed(model, state, std::span<const token>(tokens), std::min(split, std::size_t{256})).back();
            CHECK(relative_error(last, expected) <= allowed.logits);
            if (whole.empty()) whole = last;
            if (p == precision::exact) CHECK(relative_error(last, whole) <= 1e-6);
        }
        if (tokens.size() < 2 || tokens.size() > 256) continue;
        auto state = model.make_state();
        const auto rows = feed(model, state, std::span<const token>(tokens), tokens.size(), want::all);
        REQUIRE(rows.size() == tokens.size());
        double nll = 0;
        for (std::size_t i = 0; i + 1 < tokens.size(); ++i) nll += negative_log_likelihood(rows[i], tokens[i + 1]);
        nll /= static_cast<double>(tokens.size() - 1);
        CHECK(std::abs(nll - prompt.at("mean_nll").get<double>()) <= allowed.mean_nll);
        CHECK(relative_error(rows.back(), expected) <= allowed.logits);
    }
}

template <backend B>
void check_greedy(const std::string& name, precision p) {
    const auto about = read_json(folder + name + ".json").at("greedy");
    const auto model = load<B>(model_path(name), p);
    const auto prompt = about.at("tokens").get<std::vector<token>>();
    auto state = model.make_state();
    auto logits = feed(model, state, std::span<const token>(prompt), prompt.size()).back();
    std::vector<token> ids;
    for (const token expected : about.at("ids").get<std::vector<token>>()) {
        CAPTURE(name, ids.size());
        ids.push_back(static_cast<token>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
        CHECK(ids.back() == expected);
        logits = feed(model, state, std::span<const token>(ids).last(1), 1).back();
    }
}

/// A sequence gives the same alone and in a batch with others that are at other positions.
template <backend B>
void check_batch(const std::string& name, precision p) {
    const auto about = read_json(folder + name + ".json");
    const auto model = load<B>(model_path(name), p);
    const auto& prompts = about.at("prompts");
    const auto tokens = prompts.at(2).at("tokens").get<std::vector<token>>();
    const auto other = prompts.at(3).at("tokens").get<std::vector<token>>();
    const auto expected = read_floats(folder + prompts.at(2).at("logits_file").get<std::string>());
    const auto expected_other = read_floats(folder + prompts.at(3).at("logits_file").get<std::string>());
    auto mine = model.make_state();
    auto theirs = model.make_state();
    std::vector<float> last, last_other;
    for (std::size_t i = 0, j = 0; i < tokens.size() || j < other.size();) {
        std::vector<job<B>> jobs;
        const std::size_t n = std::min<std::size_t>(13, tokens.size() - i);
        const std::size_t m = std::min<std::size_t>(1 + j % 50, other.size() - j);
        if (n > 0) jobs.push_back({&mine, std::span<const token>(tokens).subspan(i, n)});
        if (m > 0) jobs.push_back({&theirs, std::span<const token>(other).subspan(j, m)});
        i += n;
        j += m;
        model.run(std::span<const job<B>>(jobs), 1024, [&](B& b, std::size_t which, index, view<const float, 1> row) {
            (jobs[which].state == &mine ? last : last_other) = to_host(b, row);
        });
    }
    CHECK(relative_error(last, expected) <= tolerance_of(name, p).logits);
    CHECK(relative_error(last_other, expected_other) <= tolerance_of(name, p).logits);
}

/// Recurrent states, convolution histories and latent rows after a prompt.
template <backend B>
void check_states(const std::string& name, std::size_t split) {
    const auto about = read_json(folder + name + ".json");
    const auto expected = read_arrays(about.at("states"));
    const auto model = load<B>(model_path(name), precision::exact);
    std::vector<token> tokens;
    for (const auto& prompt : about.at("prompts")) {
        if (prompt.at("length") == about.at("states").at("length"))
            tokens = prompt.at("tokens").get<std::vector<token>>();
    }
    auto state = model.make_state();
    feed(model, state, std::span<const token>(tokens), split);
    const memory_layout layout = model.layout();
    B b(std::make_shared<typename B::device>(model.options()), 0);
    index kda_layer = 0, mla_layer = 0;
    for (index l = 0; l < model.shape().layers; ++l) {
        const std::string prefix = "l" + std::to_string(l) + ".";
        CAPTURE(prefix);
        const auto flat = [&](auto from) { return to_host(b, view<const float, 1>(from.data, from.size())); };
        if (model.shape().is_kda(l)) {
            CHECK(relative_error(flat(layout.state(state.recurrent().data(), kda_layer)),
                                 expected.at(prefix + "state")) <= 1e-5);
            CHECK(relative_error(flat(layout.history(state.recurrent().data(), kda_layer)),
                                 expected.at(prefix + "conv_state")) <= 1e-5);
            ++kda_layer;
        } else {
            std::vector<float> latent, position;
            const index rank = model.shape().latent_rank;
            for (index i = 0; i < state.length(); ++i) {
                std::byte* const block =
                    state.blocks().at(static_cast<std::size_t>(i / memory_layout::block_rows))->data();
                const auto* row =
                    reinterpret_cast<const float*>(layout.latent_row(&block, mla_layer, i % memory_layout::block_rows));
                const auto values = to_host(b, view<const float, 1>(row, layout.latent_width));
                latent.insert(latent.end(), values.begin(), values.begin() + rank);
                position.insert(position.end(), values.begin() + rank, values.end());
            }
            CHECK(relative_error(latent, expected.at(prefix + "ckv")) <= 1e-5);
            CHECK(relative_error(position, expected.at(prefix + "kpe")) <= 1e-5);
            ++mla_layer;
        }
    }
}

/// Every intermediate result of a forward pass, as an observed backend shows them.
template <backend B>
void check_intermediates(const std::string& name) {
    const auto about = read_json(folder + name + ".json");
    const auto expected = read_arrays(about.at("acts"));
    struct step {
        std::string operation;
        std::vector<float> values;
    };
    std::vector<step> steps;
    const observer record = [&](const observation& seen) {
        steps.push_back({std::string(seen.operation), seen.values});
    };
    const auto model = load<observed<B>>(model_path(name), precision::exact, 2, record);
    steps.clear();
    auto state = model.make_state();
    const auto tokens = about.at("prompts").at(1).at("tokens").get<std::vector<token>>();
    REQUIRE(tokens.size() == about.at("acts").at("length"));
    const auto logits = feed(model, state, std::span<const token>(tokens), tokens.size(), want::all);

    std::size_t at = 0;
    const auto take = [&](std::string_view operation) {
        CAPTURE(at, operation);
        REQUIRE(at < steps.size());
        REQUIRE(steps[at].operation == operation);
        return steps[at++].values;
    };
    const auto check = [&](const std::string& array, const std::vector<float>& values) {
        CAPTURE(array);
        CHECK(relative_error(values, expected.at(array)) <= 1e-5);
    };
    const auto sigmoids = [](std::vector<float> x) {
        for (float& value : x) value = 1 / (1 + std::exp(-value));
        return x;
    };
    const auto less = [](std::vector<float> a, const std::vector<float>& b) {
        for (std::size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
        return a;
    };
    auto residual = take("embed");
    check("embd", residual);
    const auto add_to_residual = [&](const std::string& delta, const std::string& sum, const std::vector<float>& now) {
        check(delta, less(now, residual));
        check(sum, now);
        residual = now;
    };
    for (index i = 0; i < model.shape().layers; ++i) {
        const std::string l = "l" + std::to_string(i) + ".";
        check(l + "attn_norm", take("rms_norm"));
        if (model.shape().is_kda(i)) {
            for (const char* what : {"q_proj", "k_proj", "v_proj"}) check(l + what, take("matmul"));
            for (int low_rank = 0; low_rank < 3; ++low_rank)
                take("matmul");  // down projections, beta before its sigmoid
            take("matmul");      // decay before its softplus
            for (const char* what : {"q_conv", "k_conv", "v_conv"}) check(l + what, take("short_conv"));
            for (const char* what : {"q_l2", "k_l2"}) check(l + what, take("l2_norm"));
            for (const char* what : {"g", "beta"}) check(l + what, take("kda_gates"));
            check(l + "o", take("kda_step"));
            const auto gate = sigmoids(take("matmul"));
            check(l + "gate", gate);
            auto gated = take("gated_norm");
            check(l + "o_gated", gated);
            for (std::size_t j = 0; j < gated.size(); ++j) gated[j] /= gate[j];
            check(l + "o_norm", gated);
        } else {
            check(l + "q", take("matmul"));
            take("matmul");
            const auto rows = take("latent_append");
            std::vector<float> latent, position;
            const auto rank = static_cast<std::size_t>(model.shape().latent_rank);
            for (std::size_t j = 0; j < rows.size(); ++j) {
                const bool first_part = j % static_cast<std::size_t>(model.shape().latent_width()) < rank;
                (first_part ? latent : position).push_back(rows[j]);
            }
            check(l + "ckv", latent);
            check(l + "kpe", position);
            check(l + "q_abs", take("matmul_heads"));
            check(l + "ctx", take("latent_attend"));
            check(l + "attn_heads", take("matmul_heads"));
        }
        add_to_residual(l + "attn_out", l + "ffn_inp", take("matmul"));
        check(l + "ffn_norm", take("rms_norm"));
        if (model.shape().is_dense(i)) {
            add_to_residual(l + "ffn_out", l + "out", take("swiglu"));
        } else {
            const auto router = take("matmul");
            check(l + "router_logits", router);
            check(l + "router_probs", sigmoids(router));
            check(l + "topk_weights", take("route"));
            check(l + "topk_ids", take("route"));
            const auto routed = take("experts");
            check(l + "moe_out", routed);
            check(l + "shexp_out", less(take("swiglu"), routed));
            add_to_residual(l + "ffn_out", l + "out", take("add"));
        }
    }
    check("result_norm", take("rms_norm"));
    check("logits", take("matmul"));
    CHECK(at == steps.size());
}

/// The trained demonstration model: what the oracle recorded of its last row, and its greedy continuation up to the
/// first step that is nearly a tie.
template <backend B>
void check_demo(precision p) {
    const auto about = read_json(KEEL_TEST_DATA "/demo/golden.json");
    const auto model = load<B>(KEEL_DEMO_MODEL, p);
    const double allowed = p == precision::exact ? 1e-5 : 2e-2;
    for (const auto& [name, expected] : about.at("models").at("Q4_K_M").items()) {
        const auto tokens = about.at("tokens").at(name).template get<std::vector<token>>();
        CAPTURE(name, tokens.size());
        auto state = model.make_state();
        double nll = 0;
        std::vector<float> logits;
        for (std::size_t i = 0; i < tokens.size(); i += 256) {
            const auto part = std::span<const token>(tokens).subspan(i, std::min<std::size_t>(256, tokens.size() - i));
            const auto rows = feed(model, state, part, part.size(), want::all);
            for (std::size_t j = 0; j < rows.size(); ++j) {
                if (i + j + 1 < tokens.size()) nll += negative_log_likelihood(rows[j], tokens[i + j + 1]);
            }
            logits = rows.back();
        }
        nll /= static_cast<double>(tokens.size() - 1);
        CHECK(std::abs(nll - expected.at("mean_nll").template get<double>()) <= allowed);
        double square = 0;
        for (const float x : logits) square += static_cast<double>(x) * static_cast<double>(x);
        const double size = expected.at("logits_l2").template get<double>();
        CHECK(std::abs(std::sqrt(square) - size) <= allowed * size);
        for (const auto& entry : expected.at("top10")) {
            const auto id = entry.at("id").template get<std::size_t>();
            CHECK(std::abs(static_cast<double>(logits[id]) - entry.at("logit").template get<double>()) <=
                  allowed * size / 10);
        }
        if (!expected.contains("greedy")) continue;
        const auto& greedy = expected.at("greedy");
        for (std::size_t i = 0; i < greedy.at("ids").size(); ++i) {
            if (greedy.at("margins").at(i).template get<double>() < (p == precision::exact ? 0.01 : 0.2)) break;
            const token id = greedy.at("ids").at(i).template get<token>();
            CHECK(std::max_element(logits.begin(), logits.end()) - logits.begin() == id);
            logits = feed(model, state, std::span<const token>(&id, 1), 1).back();
        }
    }
}

}  // namespace keel::golden
