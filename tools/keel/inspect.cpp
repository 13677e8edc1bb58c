// SPDX-License-Identifier: MIT
#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include <keel/engine.hpp>
#include <keel/model/plan.hpp>

#include "commands.hpp"
#include "console.hpp"
#include "model.hpp"

namespace tool {

namespace {

struct by_type {
    std::int64_t tensors = 0, elements = 0, bytes = 0;
};

nlohmann::ordered_json describe(const inspect_options& options) {
    const keel::gguf file = open_file(options.model);
    nlohmann::ordered_json about;
    about["file"] = file.path().string();
    about["version"] = file.version();
    about["shards"] = file.shards();
    about["architecture"] = file.require_string("general.architecture");
    about["name"] = file.find_string("general.name").value_or("");

    by_type all;
    std::map<std::string, by_type> types;
    for (const keel::tensor_info& t : file.tensors()) {
        const std::int64_t elements = t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3];
        for (by_type* sum : {&all, &types[std::string(t.type->name)]}) {
            ++sum->tensors;
            sum->elements += elements;
            sum->bytes += static_cast<std::int64_t>(t.data.size());
        }
    }
    about["parameters"] = all.elements;
    about["tensors"] = all.tensors;
    about["bytes"] = all.bytes;
    about["bits_per_weight"] =
        all.elements > 0 ? 8.0 * static_cast<double>(all.bytes) / static_cast<double>(all.elements) : 0;
    for (const auto& [name, sum] : types) {
        about["types"].push_back(
            {{"type", name}, {"tensors", sum.tensors}, {"parameters", sum.elements}, {"bytes", sum.bytes}});
    }

    const keel::config c = keel::read_config(file);
    std::vector<int> mla;
    for (keel::index i = 0; i < c.layers; ++i) {
        if (!c.is_kda(i)) mla.push_back(static_cast<int>(i));
    }
    about["model"] = {{"context", c.context},
                      {"vocabulary", c.vocabulary},
                      {"hidden", c.hidden},
                      {"layers", c.layers},
                      {"mla_layers", mla},
                      {"heads", c.heads},
                      {"kda_head_dim", c.head_dim},
                      {"conv_kernel", c.conv_kernel},
                      {"latent_rank", c.latent_rank},
                      {"position_dim", c.position_dim},
                      {"own_dim", c.own_dim},
                      {"value_dim", c.value_dim},
                      {"dense_layers", c.dense_layers},
                      {"dense_ff", c.dense_ff},
                      {"experts", c.experts},
                      {"experts_per_token", c.chosen},
                      {"expert_ff", c.expert_ff},
                      {"shared_experts", c.shared_experts},
                      {"routed_scale", c.routed_scale}};

    const keel::tokenizer text = keel::read_tokenizer(file);
    const auto id = [](std::optional<keel::token> t) { return t ? nlohmann::json(*t) : nlohmann::json(); };
    about["tokenizer"] = {{"tokens", text.size()},
                          {"bos", id(text.bos())},
                          {"eos", id(text.eos())},
                          {"padding", id(text.padding())},
                          {"end_of_generation", text.end_of_generation()},
                          {"chat_template_bytes", text.chat_template().size()}};

    const memory needed = plan({.path = options.model, .interleave = options.interleave}, options.context);
    about["memory"] = {{"context", needed.context},
                       {"weights", needed.weights},
                       {"tokenizer", needed.tokenizer},
                       {"workspace", needed.workspace},
                       {"state", needed.state},
                       {"cache_per_token", needed.cache_per_token},
                       {"cache", needed.cache},
                       {"tokens", needed.tokens},
                       {"checkpoints", needed.checkpoints},
                       {"total", needed.total},
                       {"bytes_per_decoded_token", keel::bytes_per_token(file, c, c.memory(keel::precision::fast), 0)}};
    return about;
}

std::string size_text(double bytes) {
    static const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    while (bytes >= 1024 && unit < 4) {
        bytes /= 1024;
        ++unit;
    }
    char text[32];
    std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.2f %s", bytes, units[unit]);
    return text;
}

void print(const nlohmann::ordered_json& about) {
    const auto row = [](const char* name, const std::string& value) { std::printf("%-18s %s\n", name, value.c_str()); };
    const auto size = [](const nlohmann::json& bytes) { return size_text(bytes.get<double>()); };
    char text[160];
    row("file", about["file"]);
    row("architecture", about["architecture"]);
    row("name", about["name"]);
    std::snprintf(text, sizeof text, "%.3f G in %d tensors, %s, %.3f bits per weight",
                  about["parameters"].get<double>() / 1e9, about["tensors"].get<int>(), size(about["bytes"]).c_str(),
                  about["bits_per_weight"].get<double>());
    row("parameters", text);
    for (const auto& t : about["types"]) {
        std::snprintf(text, sizeof text, "%4d tensors, %s", t["tensors"].get<int>(), size(t["bytes"]).c_str());
        row(("  " + t["type"].get<std::string>()).c_str(), text);
    }
    std::printf("model\n");
    for (const auto& [name, value] : about["model"].items()) row(("  " + name).c_str(), value.dump());
    std::printf("tokenizer\n");
    for (const auto& [name, value] : about["tokenizer"].items()) row(("  " + name).c_str(), value.dump());
    const auto& memory = about["memory"];
    std::printf("memory for one session of %d tokens\n", memory["context"].get<int>());
    for (const char* name : {"weights", "tokenizer", "workspace", "state", "cache_per_token", "cache", "tokens",
                             "checkpoints", "total", "bytes_per_decoded_token"}) {
        row((std::string("  ") + name).c_str(), size(memory[name]));
    }
}

}  // namespace

void inspect(const inspect_options& options) {
    const auto about = describe(options);
    if (options.json) {
        std::cout << about.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
    } else {
        print(about);
    }
}

}  // namespace tool
