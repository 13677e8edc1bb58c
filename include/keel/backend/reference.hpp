// SPDX-License-Identifier: MIT
//
// Plain loops for every operation: the definition that faster code is tested against, and the base it starts from.
// No SIMD, no threads, no cleverness; sums are accumulated in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/host_memory.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

inline float sigmoid(float x) {
    const float e = std::exp(-std::abs(x));  // never overflows
    return x >= 0 ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

inline float silu(float x) { return x * sigmoid(x); }

/// log(1 + exp(x)) for any x.
inline float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x))); }

inline double dot(const float* a, const float* b, index n) {
    double sum = 0;
    for (index i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
}

/// scores[i] <- softmax(scores)[i]
inline void softmax(view<float, 1> scores) {
    const float largest = *std::max_element(scores.data, scores.data + scores.extent[0]);
    double sum = 0;
    for (index i = 0; i < scores.extent[0]; ++i) sum += scores[i] = std::exp(scores[i] - largest);
    for (index i = 0; i < scores.extent[0]; ++i) scores[i] = static_cast<float>(scores[i] / sum);
}

/// Row `position` of the latent cache as floats.
inline void read_latent(const memory_layout& layout, const segment& s, index layer, index position, float* to) {
    decode_row(layout.cache, layout.latent_row(s.blocks, layer, position), to, layout.latent_width);
}

/// Writes a row of the latent cache in the cache's type.
inline void write_latent(const memory_layout& layout, const segment& s, index layer, index position,
                         const float* from) {
    std::byte* const row = layout.latent_row(s.blocks, layer, position);
    if (layout.cache == dtype::f32) {
        std::memcpy(row, from, static_cast<std::size_t>(layout.latent_row_bytes()));
    } else {
        f16* const to = reinterpret_cast<f16*>(row);
        for (index i = 0; i < layout.latent_width; ++i) to[i] = to_f16(from[i]);
    }
}

}  // namespace detail

/// The backend of plain loops. precision::fast takes the chunked and expanded forms (so that these have a definition
/// too); nothing is ever rounded below f32 but the latent cache, as its layout says.
class reference : public host_memory {
public:
    using matrix = host_matrix;

    struct device {
        keel::precision precision = precision::exact;

        explicit device(const backend_options& options) : precision(options.precision) {}
    };

    reference(std::shared_ptr<device> shared, index workspace_bytes)
        : host_memory(workspace_bytes), device_(std::move(shared)) {}

    /// One decoded row, or the keys, values and scores of one head over a whole sequence.
    static index scratch_bytes(const workspace_limits& limits, const backend_options&) {
        const index row = std::max(limits.columns, limits.expert_ff);
        const index head = limits.context * (limits.mla_key + limits.mla_value + limits.latent_width + 1);
        const index ffn = limits.rows * 3 * row;
        return static_cast<index>(sizeof(float)) * (row + head + ffn) + 16 * arena::alignment;
    }

    [[nodiscard]] matrix bind(const matrix_view& source, std::shared_ptr<const void> owner) const {
        return {source, std::move(owner)};
    }
    [[nodiscard]] vector bind(std::vector<float> values) const { return {std::move(values)}; }

    [[nodiscard]] index prefill_from() const {
        return device_->precision == precision::exact ? std::numeric_limits<index>::max() : 2;
    }

    void embed(const embed_args<matrix>& a) {
        for (index r = 0; r < a.out.extent[0]; ++r) {
            decode_row(a.table.type, a.table.row(a.tokens[static_cast<std::size_t>(r)]), a.out[r].data,
                       a.table.columns);
        }
    }

    void rms_norm(const rms_norm_args& a) {
        for (index r = 0; r < a.x.extent[0]; ++r) normalise(a.x[r], a.weight, a.epsilon, a.out[r]);
    }

    void matmul(view<const float, 2> x, std::initializer_list<linear<matrix>> products) {
        for (const auto& p : products) multiply(p.weight, x, p.out, p.accumulate);
    }

    void matmul_heads(const matmul_heads_args<matrix>& a) {
        for (index h = 0; h < a.weight.count; ++h) multiply(a.weight.matrix(h), a.x.slice(h), a.out.slice(h), false);
    }

    void short_conv(const short_conv_args& a) {
        const index taps = a.layout.taps;
        for (const segment& s : a.segments) {
            const view<float, 2> history = a.layout.history(s.recurrent, a.layer)[a.which];
            for (index r = s.first_row; r < s.first_row + s.rows; ++r) {
                for (index c = 0; c < a.x.extent[1]; ++c) {
                    const float now = a.x(r, c);
                    double sum = static_cast<double>(a.taps(c, taps)) * static_cast<double>(now);
                    for (index j = 0; j < taps; ++j) {
                        sum += static_cast<double>(a.taps(c, j)) * static_cast<double>(history(j, c));
                    }
                    for (index j = 0; j + 1 < taps; ++j) history(j, c) = history(j + 1, c);
                    if (taps > 0) history(taps - 1, c) = now;
                    a.x(r, c) = detail::silu(static_cast<float>(sum));
                }
            }
        }
    }

    void l2_norm(const l2_norm_args& a) {
        for_each_head(a.x, [&](view<float, 1> x) {
            const index n = x.extent[0];
            const float length = static_cast<float>(std::sqrt(detail::dot(x.data, x.data, n)));
            for (index i = 0; i < n; ++i) x[i] /= std::max(length, a.epsilon);
        });
    }

    void kda_gates(const kda_gates_args& a) {
        for (index r = 0; r < a.beta.extent[0]; ++r) {
            for (index h = 0; h < a.beta.extent[1]; ++h) {
                a.beta(r, h) = detail::sigmoid(a.beta(r, h));
                const view<float, 1> g = a.log_decay[r][h];
                for (index d = 0; d < g.extent[0]; ++d) {
                    g[d] = a.a[h] * detail::softplus(g[d] + a.dt_bias[h * g.extent[0] + d]);
                }
            }
        }
    }

    void kda_step(const kda_args& a) {
        const index dim = a.layout.head_dim;
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        const arena::scope scope(workspace());
        const auto delta = workspace().take<float>(dim);
        for_each_state(a, [&](const segment& s, index h, view<float, 2> state) {
            for (index t = s.first_row; t < s.first_row + s.rows; ++t) {
                for (index i = 0; i < dim; ++i) {
                    const float decay = std::exp(a.log_decay(t, h, i));
                    for (index j = 0; j < dim; ++j) state(i, j) *= decay;
                }
                for (index j = 0; j < dim; ++j) {
                    double read = 0;
                    for (index i = 0; i < dim; ++i)
                        read += static_cast<double>(state(i, j)) * static_cast<double>(a.k(t, h, i));
                    delta[j] = a.beta(t, h) * (a.v(t, h, j) - static_cast<float>(read));
                }
                for (index i = 0; i < dim; ++i) {
                    for (index j = 0; j < dim; ++j) state(i, j) += a.k(t, h, i) * delta[j];
                }
                for (index j = 0; j < dim; ++j) {
                    double read = 0;
                    for (index i = 0; i < dim; ++i)
                        read += static_cast<double>(state(i, j)) * static_cast<double>(a.q(t, h, i));
                    a.out(t, h, j) = scale * static_cast<float>(read);
                }
            }
        });
    }

    /// With G the running sum of g in a chunk of C tokens and S the state at its start ([KL] eq. 6-9):
    ///   u_t = beta_t (v_t - S^T (e^{G_t} k_t) - sum_{i<t} a_ti u_i),      a_ti = sum_d k_t k_i e^{G_t - G_i}
    ///   o_t sqrt(D) = S^T (e^{G_t} q_t) + sum_{i<=t} b_ti u_i,              b_ti = sum_d q_t k_i e^{G_t - G_i}
    ///   S <- diag(e^{G_C}) S + sum_i (e^{G_C - G_i} k_i) u_i^T
    void kda_chunk(const kda_args& a) {
        constexpr index chunk = 16;
        const index dim = a.layout.head_dim;
        const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
        const arena::scope scope(workspace());
        const auto sum = workspace().take<float>(chunk, dim);  // G
        const auto u = workspace().take<float>(chunk, dim);
        for_each_state(a, [&](const segment& s, index h, view<float, 2> state) {
            for (index start = s.first_row; start < s.first_row + s.rows; start += chunk) {
                const index length = std::min(chunk, s.first_row + s.rows - start);
                const auto decayed = [&](const view<const float, 3>& x, index t, index i, index d) {
                    return static_cast<double>(x(start + t, h, d)) *
                           static_cast<double>(std::exp(i < 0 ? sum(t, d) : sum(t, d) - sum(i, d)));
                };
                const auto against_key = [&](const view<const float, 3>& x, index t, index i) {
                    double product = 0;
                    for (index d = 0; d < dim; ++d) {
                        product += decayed(x, t, i, d) * static_cast<double>(a.k(start + i, h, d));
                    }
                    return product;
                };
                const auto against_state = [&](const view<const float, 3>& x, index t, index j) {
                    double product = 0;
                    for (index d = 0; d < dim; ++d) product += decayed(x, t, -1, d) * static_cast<double>(state(d, j));
                    return product;
                };
                for (index t = 0; t < length; ++t) {
                    for (index d = 0; d < dim; ++d) {
                        sum(t, d) = a.log_decay(start + t, h, d) + (t > 0 ? sum(t - 1, d) : 0.0f);
                    }
                    for (index j = 0; j < dim; ++j)
                        u(t, j) = a.v(start + t, h, j) - static_cast<float>(against_state(a.k, t, j));
                    for (index i = 0; i < t; ++i) {
                        const float product = static_cast<float>(against_key(a.k, t, i));
                        for (index j = 0; j < dim; ++j) u(t, j) -= product * u(i, j);
                    }
                    for (index j = 0; j < dim; ++j) u(t, j) *= a.beta(start + t, h);
                    for (index j = 0; j < dim; ++j)
                        a.out(start + t, h, j) = static_cast<float>(scale * against_state(a.q, t, j));
                    for (index i = 0; i <= t; ++i) {
                        const float product = static_cast<float>(scale * against_key(a.q, t, i));
                        for (index j = 0; j < dim; ++j) a.out(start + t, h, j) += product * u(i, j);
                    }
                }
                for (index d = 0; d < dim; ++d) {
                    const float last = sum(length - 1, d);
                    for (index j = 0; j < dim; ++j) state(d, j) *= std::exp(last);
                    for (index i = 0; i < length; ++i) {
                        const float k = a.k(start + i, h, d) * std::exp(last - sum(i, d));
                        for (index j = 0; j < dim; ++j) state(d, j) += k * u(i, j);
                    }
                }
            }
        });
    }

    void gated_norm(const gated_norm_args& a) {
        for (index r = 0; r < a.x.extent[0]; ++r) {
            for (index h = 0; h < a.x.extent[1]; ++h) {
                const view<float, 1> x = a.x[r][h];
                normalise(x, a.weight, a.epsilon, x);
                for (index d = 0; d < x.extent[0]; ++d) x[d] *= detail::sigmoid(a.gate(r, h, d));
            }
        }
    }

    void latent_append(const latent_append_args& a) {
        for (const segment& s : a.segments) {
            for (index i = 0; i < s.rows; ++i) {
                const view<float, 1> row = a.rows[s.first_row + i];
                const view<float, 1> latent = row.columns(0, a.weight.extent[0]);
                normalise(latent, a.weight, a.epsilon, latent);
                detail::write_latent(a.layout, s, a.layer, s.position + i, row.data);
            }
        }
    }

    void latent_attend(const latent_attend_args& a) {
        const index rank = a.q_latent.extent[2];
        const index width = a.layout.latent_width;
        for (const segment& s : a.segments) {
            const arena::scope scope(workspace());
            const index length = s.position + s.rows;
            const auto cache = workspace().take<float>(length, width);
            const auto scores = workspace().take<float>(length);
            for (index i = 0; i < length; ++i) detail::read_latent(a.layout, s, a.layer, i, cache[i].data);
            for (index r = 0; r < s.rows; ++r) {
                for (index h = 0; h < a.q_latent.extent[1]; ++h) {
                    const index t = s.first_row + r;
                    const view<float, 1> visible = scores.rows(0, s.position + r + 1);
                    for (index i = 0; i < visible.extent[0]; ++i) {
                        const double score = detail::dot(a.q_latent[t][h].data, cache[i].data, rank) +
                                             detail::dot(a.q_position[t][h].data, cache[i].data + rank, width - rank);
                        visible[i] = a.scale * static_cast<float>(score);
                    }
                    detail::softmax(visible);
                    weighted_sum(visible, cache.columns(0, rank), a.out[t][h]);
                }
            }
        }
    }

    void expanded_attend(const expanded_attend_args<matrix>& a) {
        const index rank = a.value_up.columns;
        const index own = a.key_up.columns;  // N, the part of a key that each head has for itself
        const index width = a.layout.latent_width;
        for (const segment& s : a.segments) {
            const arena::scope scope(workspace());
            const index length = s.position + s.rows;
            const auto cache = workspace().take<float>(length, width);
            const auto keys = workspace().take<float>(length, own);
            const auto values = workspace().take<float>(length, a.value_up.rows);
            const auto scores = workspace().take<float>(length);
            const auto row = workspace().take<float>(own);
            for (index i = 0; i < length; ++i) detail::read_latent(a.layout, s, a.layer, i, cache[i].data);
            for (index h = 0; h < a.q.extent[1]; ++h) {
                std::fill_n(keys.data, keys.size(), 0.0f);
                for (index c = 0; c < rank; ++c) {
                    decode_row(a.key_up.type, a.key_up.row(c, h), row.data, own);
                    for (index i = 0; i < length; ++i) {
                        for (index d = 0; d < own; ++d) keys(i, d) += row[d] * cache(i, c);
                    }
                }
                multiply(a.value_up.matrix(h), cache.columns(0, rank), values, false);
                for (index r = 0; r < s.rows; ++r) {
                    const view<const float, 1> q = a.q[s.first_row + r][h];
                    const view<float, 1> visible = scores.rows(0, s.position + r + 1);
                    for (index i = 0; i < visible.extent[0]; ++i) {
                        const double score = detail::dot(q.data, keys[i].data, own) +
                                             detail::dot(q.data + own, cache[i].data + rank, width - rank);
                        visible[i] = a.scale * static_cast<float>(score);
                    }
                    detail::softmax(visible);
                    weighted_sum(visible, values, a.out[s.first_row + r][h]);
                }
            }
        }
    }

    void swiglu(const swiglu_args<matrix>& a) { swiglu(a.x, a.gate, a.up, a.down, a.out, a.accumulate); }

    void route(const route_args& a) {
        const index experts = a.logits.extent[1];
        const index k = a.chosen.extent[1];
        for (index r = 0; r < a.logits.extent[0]; ++r) {
            std::int32_t* const chosen = a.chosen[r].data;
            float sum = 0;
            for (index slot = 0; slot < k; ++slot) {
                index best = -1;
                float best_score = 0;
                for (index e = 0; e < experts; ++e) {
                    const float score = detail::sigmoid(a.logits(r, e)) + a.bias[e];
                    const bool taken = std::find(chosen, chosen + slot, e) != chosen + slot;
                    if (!taken && (best < 0 || score > best_score)) {
                        best = e;
                        best_score = score;
                    }
                }
                chosen[slot] = static_cast<std::int32_t>(best);
                a.weights(r, slot) = detail::sigmoid(a.logits(r, best));
                sum += a.weights(r, slot);
            }
            for (index slot = 0; slot < k; ++slot) a.weights(r, slot) *= a.scale / std::max(sum, 0x1p-14f);
        }
    }

    void experts(const experts_args<matrix>& a) {
        const index hidden = a.x.extent[1];
        const arena::scope scope(workspace());
        const auto y = workspace().take<float>(1, hidden);
        for (index r = 0; r < a.x.extent[0]; ++r) {
            std::fill_n(a.out[r].data, hidden, 0.0f);
            for (index slot = 0; slot < a.chosen.extent[1]; ++slot) {
                const index e = a.chosen(r, slot);
                swiglu(a.x.rows(r, 1), a.gate.matrix(e), a.up.matrix(e), a.down.matrix(e), y, false);
                for (index c = 0; c < hidden; ++c) a.out(r, c) += a.weights(r, slot) * y(0, c);
            }
        }
    }

    void add(const add_args& a) {
        for (index r = 0; r < a.x.extent[0]; ++r) {
            for (index c = 0; c < a.x.extent[1]; ++c) a.x(r, c) += a.y(r, c);
        }
    }

    void gather(const gather_args& a) {
        for (index r = 0; r < a.out.extent[0]; ++r) {
            std::copy_n(a.x[a.rows[static_cast<std::size_t>(r)]].data, a.x.extent[1], a.out[r].data);
        }
    }

private:
    static void normalise(view<const float, 1> x, view<const float, 1> weight, float epsilon, view<float, 1> out) {
        const index n = x.extent[0];
        const double mean = detail::dot(x.data, x.data, n) / static_cast<double>(n);
        const float inverse = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(epsilon)));
        for (index i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
    }

    void multiply(const matrix_view& w, view<const float, 2> x, view<float, 2> out, bool accumulate) {
        const arena::scope scope(workspace());
        const auto row = workspace().take<float>(w.columns);
        for (index o = 0; o < w.rows; ++o) {
            decode_row(w.type, w.row(o), row.data, w.columns);
            for (index r = 0; r < x.extent[0]; ++r) {
                const float y = static_cast<float>(detail::dot(row.data, x[r].data, w.columns));
                out(r, o) = accumulate ? out(r, o) + y : y;
            }
        }
    }

    void swiglu(view<const float, 2> x, const matrix_view& gate, const matrix_view& up, const matrix_view& down,
                view<float, 2> out, bool accumulate) {
        const arena::scope scope(workspace());
        const auto g = workspace().take<float>(x.extent[0], gate.rows);
        const auto u = workspace().take<float>(x.extent[0], gate.rows);
        multiply(gate, x, g, false);
        multiply(up, x, u, false);
        for (index i = 0; i < g.size(); ++i) g.data[i] = detail::silu(g.data[i]) * u.data[i];
        multiply(down, g, out, accumulate);
    }

    static void weighted_sum(view<const float, 1> weights, view<const float, 2> rows, view<float, 1> out) {
        for (index j = 0; j < out.extent[0]; ++j) {
            double sum = 0;
            for (index i = 0; i < weights.extent[0]; ++i) {
                sum += static_cast<double>(weights[i]) * static_cast<double>(rows(i, j));
            }
            out[j] = static_cast<float>(sum);
        }
    }

    template <class F>
    static void for_each_head(view<float, 3> x, F&& f) {
        for (index r = 0; r < x.extent[0]; ++r) {
            for (index h = 0; h < x.extent[1]; ++h) f(x[r][h]);
        }
    }

    template <class F>
    static void for_each_state(const kda_args& a, F&& f) {
        for (const segment& s : a.segments) {
            const view<float, 3> states = a.layout.state(s.recurrent, a.layer);
            for (index h = 0; h < a.layout.heads; ++h) f(s, h, states[h]);
        }
    }

    std::shared_ptr<device> device_;
};

static_assert(backend<reference>);

}  // namespace keel::inline KEEL_ABI
