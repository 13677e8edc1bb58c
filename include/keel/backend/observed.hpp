// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// What an operation wrote, as f32 in host memory, in the order of the shape. `layer` is -1 outside of the layers.
struct observation {
    index layer;
    std::string_view operation;
    std::vector<float> values;
};
using observer = std::function<void(const observation&)>;

/// A backend that shows the result of every operation to an observer: for tests and for finding the first NaN. It hides
/// the optional fused operations of B, so that every step is seen, and it is as slow as that sounds.
template <backend B>
class observed : public B {
public:
    using matrix = typename B::matrix;

    struct device : B::device {
        observer see;

        explicit device(const backend_options& chosen, observer to = {}) : B::device(chosen), see(std::move(to)) {}
    };

    observed(std::shared_ptr<device> shared, index workspace_bytes)
        : B(shared, workspace_bytes), device_(std::move(shared)) {}

    void enter_layer(index i) { layer_ = i; }

    template <class... Anything>
    void norm_matmul(const Anything&...) = delete;
    template <class... Anything>
    void kda_inputs(const Anything&...) = delete;
    template <class... Anything>
    void kda_mix(const Anything&...) = delete;
    template <class... Anything>
    void latent_mix(const Anything&...) = delete;
    template <class... Anything>
    void moe(const Anything&...) = delete;
    template <class... Anything>
    void graph(const Anything&...) = delete;

    void embed(const embed_args<matrix>& a) {
        B::embed(a);
        show("embed", a.out);
    }
    void rms_norm(const rms_norm_args& a) {
        B::rms_norm(a);
        show("rms_norm", a.out);
    }
    void matmul(view<const float, 2> x, std::initializer_list<linear<matrix>> products) {
        B::matmul(x, products);
        for (const auto& p : products) show("matmul", p.out);
    }
    void matmul_heads(const matmul_heads_args<matrix>& a) {
        B::matmul_heads(a);
        show("matmul_heads", a.out);
    }
    void short_conv(const short_conv_args& a) {
        B::short_conv(a);
        show("short_conv", a.x);
    }
    void l2_norm(const l2_norm_args& a) {
        B::l2_norm(a);
        show("l2_norm", a.x);
    }
    void kda_gates(const kda_gates_args& a) {
        B::kda_gates(a);
        show("kda_gates", a.log_decay);
        show("kda_gates", a.beta);
    }
    void kda_step(const kda_args& a) {
        B::kda_step(a);
        show("kda_step", a.out);
    }
    void kda_chunk(const kda_args& a) {
        B::kda_chunk(a);
        show("kda_chunk", a.out);
    }
    void gated_norm(const gated_norm_args& a) {
        B::gated_norm(a);
        show("gated_norm", a.x);
    }
    void latent_append(const latent_append_args& a) {
        B::latent_append(a);
        show("latent_append", a.rows);
    }
    void latent_attend(const latent_attend_args& a) {
        B::latent_attend(a);
        show("latent_attend", a.out);
    }
    void expanded_attend(const expanded_attend_args<matrix>& a) {
        B::expanded_attend(a);
        show("expanded_attend", a.out);
    }
    void swiglu(const swiglu_args<matrix>& a) {
        B::swiglu(a);
        show("swiglu", a.out);
    }
    void route(const route_args& a) {
        B::route(a);
        show("route", a.weights);
        show("route", a.chosen);
    }
    void experts(const experts_args<matrix>& a) {
        B::experts(a);
        show("experts", a.out);
    }
    void add(const add_args& a) {
        B::add(a);
        show("add", a.x);
    }

private:
    template <class T, int Rank>
    void show(std::string_view operation, const view<T, Rank>& written) {
        if (!device_->see) return;
        std::vector<float> values;
        values.reserve(static_cast<std::size_t>(written.size()));
        read(written, values);
        device_->see({layer_, operation, std::move(values)});
    }

    template <class T, int Rank>
    void read(const view<T, Rank>& from, std::vector<float>& to) {
        if constexpr (Rank > 1) {
            for (index i = 0; i < from.extent[0]; ++i) read(from[i], to);
        } else {
            std::vector<T> row(static_cast<std::size_t>(from.size()));
            B::download(reinterpret_cast<std::byte*>(row.data()), reinterpret_cast<const std::byte*>(from.data),
                        from.size() * static_cast<index>(sizeof(T)));
            for (const T value : row) to.push_back(static_cast<float>(value));
        }
    }

    std::shared_ptr<device> device_;
    index layer_ = -1;
};

/// Throws errc::numeric for the first NaN or infinity, naming the layer and the operation that wrote it.
inline void check_finite(const observation& seen) {
    for (std::size_t i = 0; i < seen.values.size(); ++i) {
        if (std::isfinite(seen.values[i])) continue;
        const std::string where = seen.layer < 0 ? "outside of the layers" : "layer " + std::to_string(seen.layer);
        throw error(errc::numeric, where + ", " + std::string(seen.operation),
                    std::string(std::isnan(seen.values[i]) ? "NaN" : "infinity") + " in element " + std::to_string(i));
    }
}

/// A backend with the check switched on: basic_engine<checked<cpu>>. A session that it stopped must not go on.
template <backend B>
class checked : public observed<B> {
public:
    struct device : observed<B>::device {
        explicit device(const backend_options& chosen) : observed<B>::device(chosen, check_finite) {}
    };

    checked(std::shared_ptr<device> shared, index workspace_bytes) : observed<B>(std::move(shared), workspace_bytes) {}
};

}  // namespace keel::inline KEEL_ABI
