// SPDX-License-Identifier: MIT
//
// How much an error in each column of a matrix counts: the mean square of what the column is multiplied with, over the
// tokens of a text. Kept in GGUF files as llama.cpp's tools write and read them (general.type "imatrix"): for the
// tensor NAME of `columns` and n matrices,
//
//     NAME.in_sum2   f32 [columns, n]        sums of squares
//     NAME.counts    f32 [1, n] or [1, 1]    how many rows each sum is of
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf.hpp>
#include <keel/io/gguf_writer.hpp>

namespace keel::inline KEEL_ABI {

/// What was collected, by tensor.
class importance_matrix {
public:
    importance_matrix() = default;

    /// Throws errc::file; errc::format, naming file and tensor, for what is no importance matrix.
    static importance_matrix open(const std::filesystem::path& path) {
        constexpr std::string_view sums = ".in_sum2", counts = ".counts";
        const gguf file = gguf::open(path);
        if (file.find_string("general.type").value_or("") != "imatrix") {
            throw error(errc::format, path.string(), "is not an importance matrix: general.type is not \"imatrix\"");
        }
        importance_matrix made;
        made.file_ = path.string();
        for (const tensor_info& t : file.tensors()) {
            if (!t.name.ends_with(sums)) continue;
            const std::string name(t.name.substr(0, t.name.size() - sums.size()));
            entry& e = made.entries_[name];
            e.columns = t.dims[0];
            e.sums = made.numbers(t);
            e.counts = made.numbers(file.require(name + std::string(counts)));
            const index matrices = static_cast<index>(e.sums.size()) / e.columns;
            if (e.counts.size() != 1 && static_cast<index>(e.counts.size()) != matrices) {
                made.fail(name, "has " + std::to_string(e.counts.size()) + " counts for " + std::to_string(matrices) +
                                    " matrices");
            }
        }
        if (made.entries_.empty()) throw error(errc::format, made.file_, "is an importance matrix of no tensor");
        return made;
    }

    /// Adds a row that one of the `matrices` of a tensor is multiplied with.
    void add(const std::string& tensor, index matrices, index matrix, std::span<const float> row) {
        entry& e = entries_[tensor];
        if (e.sums.empty()) {
            e.columns = static_cast<index>(row.size());
            e.sums.resize(row.size() * static_cast<std::size_t>(matrices));
            e.counts.resize(static_cast<std::size_t>(matrices));
        }
        double* const to = e.sums.data() + matrix * e.columns;
        for (std::size_t i = 0; i < row.size(); ++i) to[i] += static_cast<double>(row[i]) * static_cast<double>(row[i]);
        e.counts[static_cast<std::size_t>(matrix)] += 1;
    }

    /// `text` is what the file remembers as its source, in `chunks` of `chunk_tokens`.
    void save(const std::filesystem::path& path, existing_file policy, std::string_view text, index chunks,
              index chunk_tokens) const {
        gguf_writer to(path, policy);
        to.set("general.type", "imatrix");
        to.set_array("imatrix.datasets", std::vector<std::string>{std::string(text)});
        to.set("imatrix.chunk_count", static_cast<std::uint32_t>(chunks));
        to.set("imatrix.chunk_size", static_cast<std::uint32_t>(chunk_tokens));
        for (const auto& [name, e] : entries_) {
            const index matrices = static_cast<index>(e.counts.size());
            to.declare(name + ".in_sum2", dtype::f32, std::vector<index>{e.columns, matrices});
            to.declare(name + ".counts", dtype::f32, std::vector<index>{1, matrices});
        }
        for (const auto& [name, e] : entries_) {
            const std::vector<float> sums(e.sums.begin(), e.sums.end()), counts(e.counts.begin(), e.counts.end());
            to.write(name + ".in_sum2", std::as_bytes(std::span(sums)));
            to.write(name + ".counts", std::as_bytes(std::span(counts)));
        }
        to.finish();
    }

    /// One weight per column and matrix of the tensor, or per column for all of them; nothing for a tensor that was not
    /// seen. Matrices without a count, such as experts that no token chose, weigh all columns alike. Throws
    /// errc::format if the sums are for a tensor of another shape.
    [[nodiscard]] std::vector<float> of(const tensor_info& tensor) const {
        const auto found = entries_.find(tensor.name);
        if (found == entries_.end()) return {};
        const entry& e = found->second;
        const index matrices = static_cast<index>(e.sums.size()) / e.columns;
        if (e.columns != tensor.dims[0] || (matrices != 1 && matrices != tensor.dims[2] * tensor.dims[3])) {
            fail(tensor.name, "has " + std::to_string(matrices) + " x " + std::to_string(e.columns) +
                                  " sums, which do not fit the model's tensor");
        }
        std::vector<float> weights(e.sums.size(), 1.0f);
        for (std::size_t i = 0; i < weights.size(); ++i) {
            const std::size_t matrix = i / static_cast<std::size_t>(e.columns);
            const double count = e.counts[e.counts.size() == 1 ? 0 : matrix];
            if (count > 0) weights[i] = static_cast<float>(e.sums[i] / count);
        }
        return weights;
    }

    /// How many of a model's tensors it knows.
    [[nodiscard]] index size() const { return static_cast<index>(entries_.size()); }

private:
    struct entry {
        index columns = 0;
        std::vector<double> sums, counts;
    };

    [[noreturn]] void fail(std::string_view tensor, std::string_view what) const {
        throw error(errc::format, file_, std::string("tensor ").append(tensor).append(" ").append(what));
    }

    [[nodiscard]] std::vector<double> numbers(const tensor_info& t) const {
        if (t.type_id != static_cast<std::uint32_t>(dtype::f32)) fail(t.name, "is not of type F32");
        std::vector<double> all(t.data.size() / sizeof(float));
        for (std::size_t i = 0; i < all.size(); ++i) {
            float x;
            std::memcpy(&x, t.data.data() + i * sizeof x, sizeof x);
            if (!(x >= 0 && std::isfinite(x))) fail(t.name, "holds a number that is not a sum of squares");
            all[i] = static_cast<double>(x);
        }
        return all;
    }

    std::string file_ = "importance matrix";
    std::map<std::string, entry, std::less<>> entries_;
};

}  // namespace keel::inline KEEL_ABI
