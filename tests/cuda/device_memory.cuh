// SPDX-License-Identifier: MIT
//
// What the CUDA test and bench programs share: device arrays, random numbers, error checks, timing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include <cuda_runtime.h>

inline void check(cudaError_t e, const char* what) {
    if (e == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(e));
    std::exit(3);
}

template <class T>
class device_array {
public:
    explicit device_array(std::size_t n) : size_(n) {
        check(cudaMalloc(&data_, std::max<std::size_t>(n, 1) * sizeof(T)), "cudaMalloc");
    }
    explicit device_array(const std::vector<T>& v) : device_array(v.size()) { set(v); }
    device_array(device_array&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
    ~device_array() { cudaFree(data_); }
    T* data() const { return data_; }
    std::size_t size() const { return size_; }
    void set(const std::vector<T>& v) {
        check(cudaMemcpy(data_, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
    }
    /// Fills with the byte 0xFF: NaN as a float of any width.
    void poison() { check(cudaMemset(data_, 0xFF, size_ * sizeof(T)), "poison"); }
    std::vector<T> get() const {
        std::vector<T> v(size_);
        check(cudaMemcpy(v.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
        return v;
    }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

/// splitmix64, and normal numbers from it.
struct random_source {
    std::uint64_t state;
    std::uint64_t bits() {
        std::uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
    float normal() { return std::sqrt(-2.0f * std::log(1.0f - uniform())) * std::cos(6.2831853f * uniform()); }
    std::vector<float> normals(std::size_t n, float scale = 1) {
        std::vector<float> v(n);
        for (float& x : v) x = scale * normal();
        return v;
    }
};

/// f(i) for i < n on all cores.
template <class F>
void parallel(int n, F&& f) {
    std::vector<std::thread> threads;
    const int count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    for (int t = 0; t < count; ++t) {
        threads.emplace_back([&, t] {
            for (int i = t; i < n; i += count) f(i);
        });
    }
    for (auto& t : threads) t.join();
}

/// |out - expected| / |expected|; NaN if anything is NaN.
template <class T>
double relative_error(const std::vector<float>& out, const std::vector<T>& expected) {
    double difference = 0, sum = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const double e = static_cast<double>(expected[i]), d = static_cast<double>(out[i]) - e;
        difference += d * d;
        sum += e * e;
    }
    return std::sqrt(difference / sum);
}

/// Median milliseconds of f(), which enqueues on `stream`.
template <class F>
double milliseconds(F&& f, cudaStream_t stream = nullptr, int repeats = 15) {
    for (int i = 0; i < 3; ++i) f();
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<float> times;
    for (int i = 0; i < repeats; ++i) {
        cudaEventRecord(begin, stream);
        f();
        cudaEventRecord(end, stream);
        check(cudaEventSynchronize(end), "run");
        float ms = 0;
        cudaEventElapsedTime(&ms, begin, end);
        times.push_back(ms);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return static_cast<double>(times[static_cast<std::size_t>(repeats / 2)]);
}
