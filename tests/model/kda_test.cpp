// SPDX-License-Identifier: MIT
//
// A whole KDA layer: in one operation where a backend has that, and composed of separate ones, as every backend that is
// observed composes it.
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <vector>

#include <keel/backend/cpu.hpp>
#include <keel/backend/observed.hpp>
#include <keel/backend/reference.hpp>
#include <keel/model/kda.hpp>
#include <keel/model/plan.hpp>

#include "backend/operands.hpp"
#include "backend/products.hpp"
#include "catch.hpp"

namespace keel::testing {
namespace {

/// Random weights of a KDA layer for any backend in host memory.
class layer {
public:
    layer(const config& shape, dtype type, random_numbers& random)
        : c(shape),
          q_(type, 1, c.channels(), c.hidden, random),
          k_(type, 1, c.channels(), c.hidden, random),
          v_(type, 1, c.channels(), c.hidden, random),
          decay_down_(type, 1, c.head_dim, c.hidden, random),
          decay_up_(type, 1, c.channels(), c.head_dim, random),
          beta_(type, 1, c.heads, c.hidden, random),
          gate_down_(type, 1, c.head_dim, c.hidden, random),
          gate_up_(type, 1, c.channels(), c.head_dim, random),
          out_(type, 1, c.hidden, c.channels(), random),
          conv_q_(random.normal(c.channels() * c.conv_kernel)),
          conv_k_(random.normal(c.channels() * c.conv_kernel)),
          conv_v_(random.normal(c.channels() * c.conv_kernel)),
          a_(random.uniform(c.heads, -8.0f, -0.1f)),
          dt_bias_(random.normal(c.channels(), 40.0f)),  // decays of everything, and of less than the smallest float
          out_norm_(random.normal(c.head_dim)),
          norm_(random.uniform(c.hidden, 0.5f, 2.0f)) {}

    /// x plus what the layer makes of it, (rows of the batch, hidden); the sequences' states advance.
    template <class B>
    array run(const backend_options& options, sequences& of, array x) {
        const std::vector<token> tokens(static_cast<std::size_t>(of.rows()));
        const batch rows{tokens, of.segments(), {}, &of.layout()};
        detail::counting_backend counter;
        kda(counter, c, kda_weights<detail::counting_backend>{}, {}, 1, rows, {nullptr, of.rows(), c.hidden});
        B b(std::make_shared<typename B::device>(options),
            counter.workspace().peak() + B::scratch_bytes(c.limits(of.rows(), 64), options));
        const kda_weights<B> w{.q = q_,
                               .k = k_,
                               .v = v_,
                               .conv_q = {conv_q_.values},
                               .conv_k = {conv_k_.values},
                               .conv_v = {conv_v_.values},
                               .decay_down = decay_down_,
                               .decay_up = decay_up_,
                               .beta = beta_,
                               .gate_down = gate_down_,
                               .gate_up = gate_up_,
                               .a = {a_.values},
                               .dt_bias = {dt_bias_.values},
                               .out_norm = {out_norm_.values},
                               .out = out_};
        kda(b, c, w, norm_.as(c.hidden), 1, rows, x.as(of.rows(), c.hidden));
        return x;
    }

    config c;

private:
    weights q_, k_, v_, decay_down_, decay_up_, beta_, gate_down_, gate_up_, out_;
    array conv_q_, conv_k_, conv_v_, a_, dt_bias_, out_norm_, norm_;
};

}  // namespace

TEST_CASE("a KDA layer in one operation gives the bits of the composed one, and what the plain loops give") {
    random_numbers random(1);
    struct shape {
        dtype type;
        index heads, dim, kernel;
    };
    for (const shape& s : std::initializer_list<shape>{{dtype::f32, 3, 5, 4},
                                                       {dtype::f32, 5, 40, 3},
                                                       {dtype::f32, 2, 300, 6},
                                                       {dtype::q8_0, 4, 32, 4},
                                                       {dtype::q8_0, 3, 64, 1},
                                                       {dtype::q8_0, 5, 128, 4}}) {
        config c;
        c.hidden = 96;
        c.heads = s.heads;
        c.head_dim = s.dim;
        c.conv_kernel = s.kernel;
        c.epsilon = 1e-5f;
        layer l(c, s.type, random);
        const memory_layout layout{.kda_layers = 2, .heads = s.heads, .head_dim = s.dim, .taps = s.kernel - 1};
        for (const auto& shapes : std::initializer_list<std::initializer_list<sequences::shape>>{
                 {{1, 7}}, {{3, 0}}, {{40, 1}}, {{1, 0}, {1, 9}, {3, 3}}, {{1, 0}, {15, 9}, {17, 0}, {40, 3}}}) {
            const sequences before(layout, shapes, random);
            const array x = random.normal(before.rows() * c.hidden);
            for (const precision p : {precision::exact, precision::fast}) {
                for (const int threads : {1, 3, 7}) {
                    CAPTURE(s.heads, s.dim, s.kernel, before.rows(), p == precision::exact, threads);
                    const backend_options options{.precision = p, .threads = threads};
                    sequences mixed = before, composed = before, plain = before;
                    const array y = l.run<cpu>(options, mixed, x);
                    CHECK(same_bits(y, l.run<observed<cpu>>(options, composed, x)));
                    CHECK(mixed.recurrent() == composed.recurrent());
                    const double allowed = p == precision::exact ? 5e-6 : 2e-2;
                    CHECK(relative_error(y, l.run<reference>({precision::exact}, plain, x)) <= allowed);
                    CHECK(relative_error(mixed.recurrent(), plain.recurrent()) <= allowed);
                }
            }
        }
    }
}

}  // namespace keel::testing
