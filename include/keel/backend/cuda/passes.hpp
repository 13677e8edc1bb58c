// SPDX-License-Identifier: MIT
//
// What a pass through the model needs on the device besides weights and activations: the batch (uploaded once), and a
// recording of the kernels where the next pass will be the same.
#pragma once

#include <algorithm>
#include <any>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <keel/backend/batch.hpp>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/memory.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// The arrays of a batch on the device. They lie in one block of memory that is written in one copy; where in it
/// depends on the numbers of rows, wanted rows and segments only, so that recorded kernels find the next batch there.
class cuda_batch_table {
public:
    explicit cuda_batch_table(std::shared_ptr<const cuda_device> on) : on_(std::move(on)) {}

    /// Returns false if the table had to move, so that recordings are void.
    bool upload(const batch& b) {
        index block_count = 0;
        for (const segment& s : b.segments) block_count += blocks_of(s);
        wanted_at_ = aligned(static_cast<index>(b.tokens.size_bytes()));
        segments_at_ = wanted_at_ + aligned(static_cast<index>(b.wanted.size_bytes()));
        const index blocks_at =
            segments_at_ + aligned(static_cast<index>(b.segments.size() * sizeof(cuda_launch::segment)));
        const index bytes = blocks_at + block_count * static_cast<index>(sizeof(std::byte*));
        const bool stays = bytes <= host_.size();
        if (stays) {
            copied_.wait();
        } else {
            host_ = pinned_memory(2 * bytes);
            device_ = cuda_buffer(on_, 2 * bytes);
        }
        batch_ = b;
        copy_to(0, b.tokens);
        copy_to(wanted_at_, b.wanted);
        index next = blocks_at;
        segments_.clear();
        for (const segment& s : b.segments) {
            segments_.push_back({s.position, reinterpret_cast<unsigned char*>(s.recurrent),
                                 reinterpret_cast<unsigned char* const*>(device_.data() + next),
                                 static_cast<int>(s.first_row), static_cast<int>(s.rows), s.kept,
                                 static_cast<int>(s.kept_capacity)});
            copy_to(next, std::span(s.blocks, static_cast<std::size_t>(blocks_of(s))));
            next += blocks_of(s) * static_cast<index>(sizeof(std::byte*));
        }
        copy_to(segments_at_, std::span<const cuda_launch::segment>(segments_));
        detail::check(cudaMemcpyAsync(device_.data(), host_.data(), static_cast<std::size_t>(bytes),
                                      cudaMemcpyHostToDevice, on_->stream()),
                      "batch");
        copied_.record(on_->stream());
        return stays;
    }

    /// Where a part of the batch lies on the device; uploads it if it is no part of it.
    const int* tokens(std::span<const token> part) {
        const std::ptrdiff_t first = locate(part, batch_.tokens, {part, {}, {}, nullptr});
        return reinterpret_cast<const int*>(device_.data()) + first;
    }
    const long long* wanted(std::span<const index> part) {
        const std::ptrdiff_t first = locate(part, batch_.wanted, {{}, {}, part, nullptr});
        return reinterpret_cast<const long long*>(device_.data() + wanted_at_) + first;
    }
    const cuda_launch::segment* segments(std::span<const segment> part) {
        const std::ptrdiff_t first = locate(part, batch_.segments, {{}, part, {}, nullptr});
        return reinterpret_cast<const cuda_launch::segment*>(device_.data() + segments_at_) + first;
    }

    /// The same segments in host memory, with their block tables on the device.
    const cuda_launch::segment* host_segments(std::span<const segment> part) {
        return segments_.data() + locate(part, batch_.segments, {{}, part, {}, nullptr});
    }

    /// The batch's arrays are the caller's again.
    void forget() { batch_ = {}; }

private:
    static index aligned(index bytes) { return (bytes + 255) / 256 * 256; }

    static index blocks_of(const segment& s) {
        if (s.blocks == nullptr) return 0;
        return (s.position + s.rows + memory_layout::block_rows - 1) / memory_layout::block_rows;
    }

    /// Index of `part` in the uploaded `whole`; uploads `alone` if it lies elsewhere.
    template <class T>
    std::ptrdiff_t locate(std::span<const T> part, std::span<const T> whole, const batch& alone) {
        if (part.empty()) return 0;
        const T* const end = whole.data() + whole.size();
        if (!whole.empty() && part.data() >= whole.data() && part.data() + part.size() <= end) {
            return part.data() - whole.data();
        }
        upload(alone);
        forget();
        return 0;
    }

    template <class T>
    void copy_to(index offset, std::span<T> from) {
        if (!from.empty()) std::memcpy(host_.data() + offset, from.data(), from.size_bytes());
    }

    std::shared_ptr<const cuda_device> on_;
    pinned_memory host_;
    cuda_buffer device_;
    cuda_event copied_;
    batch batch_;
    std::vector<cuda_launch::segment> segments_;
    index wanted_at_ = 0, segments_at_ = 0;
};

/// Recordings of passes that decode: one row per sequence, every row wanted or none.
class cuda_recordings {
public:
    explicit cuda_recordings(std::shared_ptr<const cuda_device> on) : on_(std::move(on)) {
        const detail::device_guard here(on_->ordinal());
        detail::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CUDA stream");
    }
    ~cuda_recordings() {
        clear();
        cudaStreamDestroy(stream_);
    }
    cuda_recordings(const cuda_recordings&) = delete;
    cuda_recordings& operator=(const cuda_recordings&) = delete;

    /// Where operations go now: to the recording that is being made, or to the device.
    [[nodiscard]] cudaStream_t stream() const { return recording_ ? stream_ : on_->stream(); }

    void clear() {
        for (const recording& r : recordings_) {
            if (r.replay != nullptr) cudaGraphExecDestroy(r.replay);
        }
        recordings_.clear();
    }

    /// Runs the pass, or what an earlier one of the same shape and form enqueued; `form` is whatever else a pass
    /// depends on. The first time it runs plainly (kernels are loaded then), the second time it is recorded.
    template <class Pass>
    auto run(const batch& b, bool form, Pass&& pass) {
        using result = decltype(pass());
        const index rows = b.rows(), wanted = static_cast<index>(b.wanted.size());
        const bool decoding = static_cast<index>(b.segments.size()) == rows;
        if (!decoding) return pass();
        const bool keeps = std::ranges::any_of(b.segments, [](const segment& s) { return s.kept != nullptr; });
        const auto known = std::ranges::find_if(recordings_, [&](const recording& r) {
            return r.rows == rows && r.wanted == wanted && r.keeps == keeps && r.form == form;
        });
        if (known == recordings_.end()) {
            if (recordings_.size() == most) return pass();
            recordings_.push_back({rows, wanted, keeps, form, nullptr, {}});
            return pass();
        }
        if (known->replay == nullptr) record<result>(*known, pass);
        detail::check(cudaGraphLaunch(known->replay, on_->stream()), "decoding step");
        return std::any_cast<result>(known->result);
    }

private:
    static constexpr std::size_t most = 64;

    struct recording {
        index rows, wanted;
        bool keeps, form;
        cudaGraphExec_t replay;
        std::any result;  ///< of the pass: where its results lie
    };

    template <class Result, class Pass>
    void record(recording& into, Pass& pass) {
        detail::check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "recording");
        recording_ = true;
        try {
            into.result = pass();
        } catch (...) {
            recording_ = false;
            cudaGraph_t broken = nullptr;
            cudaStreamEndCapture(stream_, &broken);
            if (broken != nullptr) cudaGraphDestroy(broken);
            throw;
        }
        recording_ = false;
        cudaGraph_t graph = nullptr;
        detail::check(cudaStreamEndCapture(stream_, &graph), "recording");
        const cudaError_t e = cudaGraphInstantiate(&into.replay, graph, 0);
        cudaGraphDestroy(graph);
        detail::check(e, "recording");
    }

    std::shared_ptr<const cuda_device> on_;
    cudaStream_t stream_ = nullptr;
    bool recording_ = false;
    std::vector<recording> recordings_;
};

}  // namespace keel::inline KEEL_ABI
