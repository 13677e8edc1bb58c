// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <keel/backend/cuda/memory.hpp>
#include <keel/backend/cuda/upload.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// A small weight on the device, f32.
struct cuda_vector {
    std::shared_ptr<const cuda_buffer> memory;
    index size = 0;

    operator view<const float, 1>() const {
        return {memory == nullptr ? nullptr : reinterpret_cast<const float*>(memory->data()), size};
    }
};

/// The memory side of the backend concept, on a GPU.
class cuda_device_memory {
public:
    using device = cuda_device;
    using buffer = cuda_buffer;
    using matrix = cuda_matrix;
    using vector = cuda_vector;

    /// Throws errc::capacity if the device has no room for the workspace.
    cuda_device_memory(std::shared_ptr<device> shared, index workspace_bytes)
        : device_(std::move(shared)), memory_(device_, workspace_bytes), workspace_(memory_.data(), memory_.size()) {}

    [[nodiscard]] buffer allocate(index bytes) const { return {device_, bytes}; }
    void upload(std::byte* to, const std::byte* from, index bytes) const {
        copy(to, from, bytes, cudaMemcpyHostToDevice);
    }
    void download(std::byte* to, const std::byte* from, index bytes) const {
        copy(to, from, bytes, cudaMemcpyDeviceToHost);
    }
    [[nodiscard]] arena& workspace() { return workspace_; }

    /// What a row of a quantised matrix takes here.
    static index record_bytes(dtype type, index columns) {
        return detail::record_bytes(detail::layout_for(type), columns);
    }
    [[nodiscard]] matrix bind(const matrix_view& source, const std::shared_ptr<const void>&) {
        const detail::device_guard here(device_->ordinal());
        if (!uploader_) uploader_.emplace(device_);
        return uploader_->upload(source);
    }
    [[nodiscard]] vector bind(const std::vector<float>& values) {
        const auto bytes = static_cast<index>(values.size() * sizeof(float));
        auto memory = std::make_shared<cuda_buffer>(device_, bytes);
        upload(memory->data(), reinterpret_cast<const std::byte*>(values.data()), bytes);
        return {std::move(memory), static_cast<index>(values.size())};
    }

protected:
    [[nodiscard]] const std::shared_ptr<device>& on() const { return device_; }

private:
    void copy(std::byte* to, const std::byte* from, index bytes, cudaMemcpyKind kind) const {
        if (bytes == 0) return;
        const detail::device_guard here(device_->ordinal());
        detail::check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, device_->stream()), "GPU");
        detail::check(cudaStreamSynchronize(device_->stream()), "GPU");
    }

    std::shared_ptr<device> device_;
    buffer memory_;
    arena workspace_;
    std::optional<cuda_uploader> uploader_;
};

}  // namespace keel::inline KEEL_ABI
