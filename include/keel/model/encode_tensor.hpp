// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
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
#include <keel/core/quantize.hpp>
#include <keel/core/quantize_tile.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf_writer.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// Calls job(0) to job(count - 1), in any order and on any threads, and returns when all are done. Jobs do not throw.
using parallel_for = std::function<void(index count, const std::function<void(index)>& job)>;

/// On the calling thread alone.
inline void serial_for(index count, const std::function<void(index)>& job) {
    for (index i = 0; i < count; ++i) job(i);
}

namespace detail {

/// Throws errc::file if the disk cannot take `bytes` more, before anything is written.
inline void check_free_space(const std::filesystem::path& target, index bytes) {
    std::error_code unknown;
    const auto folder = std::filesystem::absolute(target, unknown).parent_path();
    const auto space = std::filesystem::space(folder, unknown);
    if (!unknown && space.available < static_cast<std::uintmax_t>(bytes)) {
        throw error(errc::file, target.string(),
                    "needs " + std::to_string(bytes >> 20) + " MiB, but its disk has only " +
                        std::to_string(space.available >> 20) + " MiB left");
    }
}

}  // namespace detail

/// Writes tensors into a GGUF file, encoding them on the way. Memory: about a hundred MiB, whatever the tensors' sizes.
/// The bytes written do not depend on how `run` distributes the jobs.
class tensor_encoder {
public:
    /// `tell` hears of `stage`, counted in elements, of which there are `total` in all tensors.
    tensor_encoder(gguf_writer& to, parallel_for run, progress tell, std::string_view stage, index total)
        : to_(to), run_(std::move(run)), tell_(std::move(tell)), stage_(stage), total_(total) {}

    /// Encodes the tensor whose turn it is. read(matrix, first, count, to) delivers `count` rows of one of the shape's
    /// matrices as floats; it is called from several threads and does not throw. `importance` is empty, or has one
    /// weight per column, for every matrix or for all of them together.
    /// Throws errc::numeric for values that are not finite, or that f16 cannot hold; errc::cancelled.
    template <class Read>
    void encode(std::string_view name, dtype type, const tensor_shape& shape, std::span<const float> importance,
                Read&& read) {
        const index columns = shape.extent[0], rows = shape.extent[1], matrices = shape.extent[2] * shape.extent[3];
        const index per_job = std::min(rows, std::max(index{1}, job_elements / columns));
        const index jobs_per_matrix = (rows + per_job - 1) / per_job;
        const index jobs = jobs_per_matrix * matrices;
        const index most = type == dtype::f16 ? 65504 : 0;
        std::atomic<bool> sound = true;
        std::exception_ptr failed;
        std::vector<std::byte> encoded, before;  // what is made now, and what is written meanwhile
        for (index done = 0; done < jobs; done += jobs_at_once) {
            report(tell_, stage_, static_cast<std::uint64_t>(done_), static_cast<std::uint64_t>(total_));
            const index count = std::min(jobs_at_once, jobs - done);
            const auto begin_of = [&](index job) {  // its first row, counted through all matrices
                return job / jobs_per_matrix * rows + job % jobs_per_matrix * per_job;
            };
            const index first = begin_of(done);
            const index last = done + count == jobs ? rows * matrices : begin_of(done + count);
            encoded.resize(static_cast<std::size_t>(row_bytes(type, (last - first) * columns)));
            run_(1 + count, [&](index i) {
                if (i == 0) {
                    try {
                        to_.write(name, before);
                    } catch (...) {
                        failed = std::current_exception();
                    }
                    return;
                }
                const index job = done + i - 1, begin = begin_of(job), matrix = job / jobs_per_matrix;
                const index end = begin + std::min(per_job, rows - begin % rows);
                const index strip = std::max(index{1}, strip_elements / columns);
                std::vector<float> values(static_cast<std::size_t>(std::min(strip, per_job) * columns));
                for (index row = begin; row < end; row += strip) {
                    const index n = std::min(strip, end - row);
                    read(matrix, row % rows, n, values.data());
                    if (!all_within(std::span(values).first(static_cast<std::size_t>(n * columns)), most))
                        sound = false;
                    encode_rows(type, values.data(), encoded.data() + row_bytes(type, (row - first) * columns), n,
                                columns, importance_of(importance, matrix, columns));
                }
            });
            if (failed) std::rethrow_exception(failed);
            if (!sound) {
                throw error(errc::numeric, name,
                            type == dtype::f16 ? "holds values that f16 cannot" : "holds values that are not finite");
            }
            encoded.swap(before);
            done_ += (last - first) * columns;
        }
        to_.write(name, before);
    }

    /// Writes the tensor whose turn it is from bytes that are encoded already.
    void copy(std::string_view name, std::span<const std::byte> bytes, index elements) {
        for (std::size_t done = 0; done < bytes.size(); done += copy_bytes) {
            report(tell_, stage_, static_cast<std::uint64_t>(done_), static_cast<std::uint64_t>(total_));
            const auto piece = bytes.subspan(done, std::min(copy_bytes, bytes.size() - done));
            to_.write(name, piece);
        }
        done_ += elements;
    }

private:
    static constexpr index job_elements = 1 << 18;
    static constexpr index strip_elements = 1 << 13;  // of a job that are floats at a time: they stay in the cache
    static constexpr index jobs_at_once = 64;
    static constexpr std::size_t copy_bytes = std::size_t{64} << 20;

    /// No NaN, no infinity, and nothing beyond `most` unless that is 0.
    static bool all_within(std::span<const float> values, index most) {
        const float largest = detail::largest_magnitude(values.data(), static_cast<int>(values.size()));
        return largest == largest && (most == 0 || largest <= static_cast<float>(most));
    }

    static const float* importance_of(std::span<const float> importance, index matrix, index columns) {
        if (importance.empty()) return nullptr;
        return importance.data() + (static_cast<index>(importance.size()) > columns ? matrix * columns : 0);
    }

    /// Short rows go to the encoder several at a time, for it works on a thousand elements at once.
    static void encode_rows(dtype type, const float* from, std::byte* to, index rows, index columns,
                            const float* importance) {
        if (importance == nullptr) return encode_row(type, from, to, rows * columns);
        const index together = std::min(rows, std::max(index{1}, 4096 / columns));
        std::vector<float> repeated;
        for (index i = 0; i < together; ++i) repeated.insert(repeated.end(), importance, importance + columns);
        for (index row = 0; row < rows; row += together) {
            encode_row(type, from + row * columns, to + row_bytes(type, row * columns),
                       std::min(together, rows - row) * columns, repeated.data());
        }
    }

    gguf_writer& to_;
    parallel_for run_;
    progress tell_;
    std::string_view stage_;
    index total_;
    index done_ = 0;
};

}  // namespace keel::inline KEEL_ABI
