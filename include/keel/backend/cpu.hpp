// SPDX-License-Identifier: MIT
//
// The backend that computes on the host's processors, in host memory.
#pragma once

#include <limits>
#include <memory>
#include <utility>

#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/simd.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/host_memory.hpp>
#include <keel/backend/reference.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

class cpu : public reference {
public:
    /// What instances share: their threads. Jobs of several instances run one after another, each on all threads.
    struct device : reference::device {
        thread_pool pool;

        explicit device(const backend_options& options) : reference::device(options), pool(options.threads) {}
    };

    cpu(std::shared_ptr<device> shared, index workspace_bytes)
        : reference(shared, workspace_bytes), device_(std::move(shared)) {}

    static index scratch_bytes(const workspace_limits& limits, const backend_options& options) {
        return reference::scratch_bytes(limits, options);
    }

    [[nodiscard]] index prefill_from() const {
        return device_->precision == precision::exact ? std::numeric_limits<index>::max() : 16;
    }

private:
    std::shared_ptr<device> device_;
};

static_assert(backend<cpu>);

}  // namespace keel::inline KEEL_ABI
