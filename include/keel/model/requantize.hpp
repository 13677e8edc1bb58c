// SPDX-License-Identifier: MIT
//
// From one GGUF file to another whose tensors are of other types.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/progress.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf.hpp>
#include <keel/io/gguf_writer.hpp>
#include <keel/model/encode_tensor.hpp>
#include <keel/model/importance.hpp>
#include <keel/model/mixture.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

struct requantize_options {
    std::string type = "q4_k_m";  ///< what type_choice takes
    std::vector<tensor_type_override> overrides = {};
    const importance_matrix* importance = nullptr;  ///< what errors weigh; for encodings that search
    existing_file policy = existing_file::keep;
    index split_size = 0;           ///< bytes per file; 0: one file
    parallel_for run = serial_for;  ///< where the encoding happens
    progress tell = {};             ///< stage "quantize", counted in elements
};

/// Writes the model of `from`, of any architecture, to `target`, or to a split set, with all metadata. Tensors that
/// have their type already are copied as they are. Answers the paths written.
///
/// Memory does not grow with the model. Files appear under their names complete or not at all.
/// Throws errc::file; errc::unsupported for a tensor that keel cannot decode; errc::format for an importance matrix
/// that does not fit; errc::numeric for values that are not finite; errc::argument for options that cannot be;
/// errc::cancelled.
inline std::vector<std::filesystem::path> requantize(const gguf& from, const std::filesystem::path& target,
                                                     const requantize_options& options = {}) {
    type_choice types(options.type, options.overrides);
    gguf_writer writer(target, options.policy, options.split_size);
    writer.copy_metadata(from);
    writer.set("general.file_type", types.file_type());
    writer.set("general.quantization_version", std::uint32_t{2});

    std::vector<dtype> chosen;
    index elements = 0, bytes = 0;
    for (const tensor_info& t : from.tensors()) {
        const dtype type = types(t.name, t.shape());
        if (!t.type->supported) {
            throw error(errc::unsupported, from.path().string(),
                        "tensor " + std::string(t.name) + " has type " + std::string(t.type->name) +
                            ", which keel does not decode");
        }
        chosen.push_back(type);
        writer.declare(t.name, type, t.shape());
        elements += tensor_shape(t.dims).size();
        bytes += row_bytes(type, tensor_shape(t.dims).size());
    }
    types.check_all_used();
    detail::check_free_space(target, bytes);

    from.advise(access_hint::sequential);
    tensor_encoder encoder(writer, options.run, options.tell, "quantize", elements);
    for (std::size_t i = 0; i < chosen.size(); ++i) {
        const tensor_info& t = from.tensors()[i];
        const tensor_shape shape(t.dims);
        const dtype stored = static_cast<dtype>(t.type->id);
        if (stored == chosen[i]) {
            encoder.copy(t.name, t.data, shape.size());
        } else {
            const std::vector<float> weights =
                options.importance != nullptr ? options.importance->of(t) : std::vector<float>();
            const index columns = shape.extent[0], rows = shape.extent[1];
            encoder.encode(t.name, chosen[i], shape, weights, [&](index matrix, index first, index count, float* to) {
                const index row = matrix * rows + first;
                decode_row(stored, t.data.data() + row * row_bytes(stored, columns), to, count * columns);
            });
        }
        from.release(t);
    }
    report(options.tell, "quantize", static_cast<std::uint64_t>(elements), static_cast<std::uint64_t>(elements));
    return writer.finish();
}

}  // namespace keel::inline KEEL_ABI
