// SPDX-License-Identifier: MIT
//
// From a Hugging Face checkpoint of Kimi-Linear to a GGUF file.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/progress.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf_writer.hpp>
#include <keel/io/json.hpp>
#include <keel/io/safetensors.hpp>
#include <keel/model/checkpoint_config.hpp>
#include <keel/model/checkpoint_tensors.hpp>
#include <keel/model/checkpoint_vocabulary.hpp>
#include <keel/model/config.hpp>
#include <keel/model/encode_tensor.hpp>
#include <keel/model/mixture.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

struct convert_options {
    std::string type = "bf16";  ///< what type_choice takes
    std::vector<tensor_type_override> overrides = {};
    existing_file policy = existing_file::keep;
    index split_size = 0;           ///< bytes per file; 0: one file
    parallel_for run = serial_for;  ///< where the encoding happens
    progress tell = {};             ///< stage "convert", counted in elements
};

namespace detail {

/// Stands in for a backend where only the list of tensors is wanted.
struct no_backend {
    struct matrix {};
    struct vector {};
};

/// Dimensions as files list them: none of 1 at the end.
inline std::vector<index> stored_dims(const tensor_shape& shape) {
    std::vector<index> dims(shape.extent.begin(), shape.extent.end());
    while (dims.size() > 1 && dims.back() == 1) dims.pop_back();
    return dims;
}

}  // namespace detail

/// Converts the checkpoint in `folder` (config.json, model.safetensors or an index with its shards, tokenizer_config
/// .json and perhaps generation_config.json and chat_template.jinja) to `target`, or to a split set. `tokens` and
/// `merges` are what read_tiktoken made of the folder's tiktoken.model. Answers the paths written.
///
/// Reads every tensor once, in the order of the model, and lets go of it: memory does not grow with the checkpoint.
/// Files appear under their names complete or not at all.
/// Throws errc::file, errc::format, errc::unsupported or errc::numeric, naming file and key or tensor; errc::argument
/// for options that cannot be; errc::cancelled.
inline std::vector<std::filesystem::path> convert_checkpoint(const std::filesystem::path& folder,
                                                             std::span<const std::string> tokens,
                                                             std::span<const std::string> merges,
                                                             const std::filesystem::path& target,
                                                             const convert_options& options = {}) {
    type_choice types(options.type, options.overrides);
    gguf_writer writer(target, options.policy, options.split_size);
    const std::string settings_file = (folder / "config.json").string();
    const json settings = json::parse_file(settings_file);
    config c = read_checkpoint_config(settings, settings_file);
    std::error_code ignored;
    const auto place = std::filesystem::weakly_canonical(folder, ignored);
    c.name = (place.has_filename() ? place : place.parent_path()).filename().string();  // "folder/" has none
    write_config(writer, c);
    writer.set("general.file_type", types.file_type());
    writer.set("general.quantization_version", std::uint32_t{2});
    write_vocabulary(writer, folder, {settings, settings_file}, c.vocabulary, tokens, merges);

    const safetensors checkpoint = safetensors::open(folder);
    checkpoint.advise(access_hint::sequential);
    const std::string name = folder.string();
    struct planned {
        std::string name;
        tensor_shape shape;
        dtype type;
        detail::converted_tensor from;
    };
    std::vector<planned> tensors;
    std::set<const safetensors_tensor*> used;
    index elements = 0, bytes = 0;
    auto list = make_layers<detail::no_backend>(c);
    for_each_tensor(c, list, [&](const std::string& tensor, const tensor_shape& shape, auto&) {
        const auto dims = detail::stored_dims(shape);
        const dtype type = types(tensor, dims);
        tensors.push_back({tensor, shape, type, {checkpoint, name, c, tensor, shape}});
        writer.declare(tensor, type, dims);
        elements += shape.size();
        bytes += row_bytes(type, shape.size());
        for (const auto& part : tensors.back().from.parts()) {
            part.for_each_source([&](const safetensors_tensor& source) { used.insert(&source); });
        }
    });
    types.check_all_used();
    for (const safetensors_tensor& t : checkpoint.tensors()) {
        if (!used.contains(&t)) {
            throw error(errc::unsupported, name, "tensor " + t.name + " has no place in a Kimi-Linear model");
        }
    }
    detail::check_free_space(target, bytes);

    tensor_encoder encoder(writer, options.run, options.tell, "convert", elements);
    for (const planned& t : tensors) {
        encoder.encode(t.name, t.type, t.shape, {}, [&](index matrix, index first, index count, float* to) {
            t.from.read(matrix, first, count, to);
        });
        for (const auto& part : t.from.parts()) {
            part.for_each_source([&](const safetensors_tensor& source) { checkpoint.release(source); });
        }
    }
    report(options.tell, "convert", static_cast<std::uint64_t>(elements), static_cast<std::uint64_t>(elements));
    return writer.finish();
}

}  // namespace keel::inline KEEL_ABI
