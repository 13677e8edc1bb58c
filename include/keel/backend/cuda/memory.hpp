// SPDX-License-Identifier: MIT
//
// A GPU that is fit for use, its memory, and errors of the CUDA runtime as keel::error. For the host compiler.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <keel/backend/concept.hpp>
#include <keel/backend/cuda/launch.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

/// Throws errc::capacity if the device's memory is used up, errc::device for any other failure of `what`.
inline void check(cudaError_t result, std::string_view what) {
    if (result == cudaSuccess) return;
    cudaGetLastError();  // an error that is reported is not the next call's
    if (result == cudaErrorMemoryAllocation) throw error(errc::capacity, what, "not enough memory on the GPU");
    throw error(errc::device, what, cudaGetErrorString(result));
}

/// Makes a device the calling thread's own, for as long as this lives.
class device_guard {
public:
    explicit device_guard(int device) {
        check(cudaGetDevice(&before_), "CUDA");
        if (before_ != device) check(cudaSetDevice(device), "CUDA");
    }
    ~device_guard() { cudaSetDevice(before_); }
    device_guard(const device_guard&) = delete;
    device_guard& operator=(const device_guard&) = delete;

private:
    int before_ = 0;
};

}  // namespace detail

/// A GPU, and the one stream on which everything that keel does there happens in order. Shared by backend instances
/// and by the memory that they hand out. Thread-safe.
class cuda_device {
public:
    /// Throws errc::device if there is no such GPU, its driver is too old, or the program holds no kernels for it.
    explicit cuda_device(const backend_options& options) : precision_(options.precision), ordinal_(options.device) {
        const std::string name = "GPU " + std::to_string(ordinal_);
        int driver = 0, runtime = 0, count = 0;
        detail::check(cudaRuntimeGetVersion(&runtime), "CUDA");
        if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
            throw error(errc::device, name, "no CUDA driver is installed");
        }
        if (driver / 1000 < runtime / 1000) {
            throw error(errc::device, name,
                        "the driver knows CUDA " + std::to_string(driver / 1000) + ", but the program needs CUDA " +
                            std::to_string(runtime / 1000) + "; install a newer driver");
        }
        const cudaError_t found = cudaGetDeviceCount(&count);
        if (found != cudaSuccess || count == 0) {
            cudaGetLastError();
            throw error(errc::device, name, "there is no CUDA device in this machine");
        }
        if (ordinal_ < 0 || ordinal_ >= count) {
            throw error(errc::device, name, "there are only " + std::to_string(count) + ", counted from 0");
        }
        const detail::device_guard here(ordinal_);
        int major = 0, minor = 0;
        detail::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal_), name);
        detail::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal_), name);
        detail::check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, ordinal_), name);
        if (const cudaError_t e = cuda_launch::probe(); e != cudaSuccess) {
            cudaGetLastError();
            throw error(errc::device, name,
                        "the program holds no kernels for compute capability " + std::to_string(major) + "." +
                            std::to_string(minor) + " (" + cudaGetErrorString(e) + ")");
        }
        detail::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), name);
        cudaMemPool_t pool = nullptr;
        detail::check(cudaDeviceGetDefaultMemPool(&pool, ordinal_), name);
        unsigned long long keep = ~0ull;  // memory given back is taken again without asking the driver
        detail::check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), name);
    }

    ~cuda_device() {
        cudaSetDevice(ordinal_);
        cudaStreamSynchronize(stream_);
        cudaStreamDestroy(stream_);
    }
    cuda_device(const cuda_device&) = delete;
    cuda_device& operator=(const cuda_device&) = delete;

    [[nodiscard]] keel::precision precision() const { return precision_; }
    [[nodiscard]] int ordinal() const { return ordinal_; }
    [[nodiscard]] int multiprocessors() const { return multiprocessors_; }
    [[nodiscard]] cudaStream_t stream() const { return stream_; }

    /// Bytes that can be allocated now: what no program holds, and what this one gave back, which its pool keeps.
    [[nodiscard]] index free_memory() const {
        const detail::device_guard here(ordinal_);
        std::size_t free = 0, total = 0;
        detail::check(cudaMemGetInfo(&free, &total), "GPU memory");
        cudaMemPool_t pool = nullptr;
        detail::check(cudaDeviceGetDefaultMemPool(&pool, ordinal_), "GPU memory");
        unsigned long long reserved = 0, used = 0;
        detail::check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &reserved), "GPU memory");
        detail::check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &used), "GPU memory");
        return static_cast<index>(free + reserved - used);
    }

    /// What a user may want to know about how weights are kept, one sentence each.
    [[nodiscard]] std::vector<std::string> notes() const {
        const std::lock_guard lock(mutex_);
        return notes_;
    }
    void note(std::string sentence) {
        const std::lock_guard lock(mutex_);
        for (const std::string& known : notes_) {
            if (known == sentence) return;
        }
        notes_.push_back(std::move(sentence));
    }

private:
    keel::precision precision_;
    int ordinal_;
    int multiprocessors_ = 0;
    cudaStream_t stream_ = nullptr;
    mutable std::mutex mutex_;
    std::vector<std::string> notes_;
};

/// Owned memory of a GPU, zero when made. A value: copying copies the bytes, in order with everything else on the
/// device. Throws errc::capacity.
class cuda_buffer {
public:
    cuda_buffer() = default;

    cuda_buffer(std::shared_ptr<const cuda_device> on, index bytes) : on_(std::move(on)), bytes_(bytes) {
        take();
        if (bytes_ != 0) {
            detail::check(cudaMemsetAsync(data_, 0, static_cast<std::size_t>(bytes_), on_->stream()), "GPU memory");
        }
    }

    cuda_buffer(const cuda_buffer& other) : on_(other.on_), bytes_(other.bytes_) {
        take();
        if (bytes_ != 0) {
            detail::check(cudaMemcpyAsync(data_, other.data_, static_cast<std::size_t>(bytes_),
                                          cudaMemcpyDeviceToDevice, on_->stream()),
                          "GPU memory");
        }
    }
    cuda_buffer(cuda_buffer&& other) noexcept
        : on_(std::move(other.on_)),
          data_(std::exchange(other.data_, nullptr)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    cuda_buffer& operator=(cuda_buffer other) noexcept {
        std::swap(on_, other.on_);
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~cuda_buffer() {
        if (data_ != nullptr) cudaFreeAsync(data_, on_->stream());
    }

    [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(data_); }
    [[nodiscard]] index size() const { return bytes_; }

private:
    void take() {
        if (bytes_ == 0) return;
        const detail::device_guard here(on_->ordinal());
        const cudaError_t e = cudaMallocAsync(&data_, static_cast<std::size_t>(bytes_), on_->stream());
        if (e == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            throw error(errc::capacity, "GPU memory", std::to_string(bytes_) + " bytes are not to be had");
        }
        detail::check(e, "GPU memory");
    }

    std::shared_ptr<const cuda_device> on_;
    void* data_ = nullptr;
    index bytes_ = 0;
};

/// Host memory that a GPU reads without a detour.
class pinned_memory {
public:
    pinned_memory() = default;
    explicit pinned_memory(index bytes) : bytes_(bytes) {
        void* p = nullptr;
        detail::check(cudaMallocHost(&p, static_cast<std::size_t>(bytes)), "pinned host memory");
        data_.reset(static_cast<std::byte*>(p));
    }

    [[nodiscard]] std::byte* data() const { return data_.get(); }
    [[nodiscard]] index size() const { return bytes_; }

private:
    struct release {
        void operator()(std::byte* p) const { cudaFreeHost(p); }
    };
    std::unique_ptr<std::byte, release> data_;
    index bytes_ = 0;
};

/// Marks a place in a stream's work.
class cuda_event {
public:
    cuda_event() { detail::check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "CUDA event"); }
    ~cuda_event() { cudaEventDestroy(event_); }
    cuda_event(const cuda_event&) = delete;
    cuda_event& operator=(const cuda_event&) = delete;

    void record(cudaStream_t stream) { detail::check(cudaEventRecord(event_, stream), "CUDA event"); }
    /// Until the work before record() is done; at once if nothing was recorded.
    void wait() { detail::check(cudaEventSynchronize(event_), "CUDA event"); }

private:
    cudaEvent_t event_ = nullptr;
};

}  // namespace keel::inline KEEL_ABI
