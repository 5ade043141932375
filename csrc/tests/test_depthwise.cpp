// The depthwise kernels: every shape, stride, tail and layout against the oracle, all layouts with the same bits.
#include <cstring>
#include <memory>

#include "../conv/depthwise.h"
#include "../conv/pack.h"
#include "check.h"
#include "isas.h"
#include "oracle.h"

namespace effkern::test {
namespace {

using conv::Problem;

struct Shape {
  int64_t n, c, h, w, kh, kw, stride[2], pad[2], dil[2];
};

// One problem on one layout of x, y and residual; the values come from the generator, so equal seeds are equal
// problems.
struct Case {
  Buffer x, y, residual;
  Guarded weight, scale, shift;
  Problem p;

  Case(const Shape& s, Layout from, Layout to, DType dtype, conv::Act act, bool epilogue)
      : x(dtype, from, s.n, s.c, s.h, s.w, 3),
        y(dtype, to, s.n, s.c, out(s, 0), out(s, 1), 5),
        residual(dtype, to, s.n, s.c, out(s, 0), out(s, 1), 1),
        weight(static_cast<size_t>(s.kh * s.kw * s.c) * sizeof(float)),
        scale(static_cast<size_t>(s.c) * sizeof(float)),
        shift(static_cast<size_t>(s.c) * sizeof(float)) {
    x.randomize(s.c);
    residual.randomize(s.c);
    y.fill(42.0f);
    for (int64_t i = 0; i < s.kh * s.kw * s.c; ++i) weight.floats()[i] = normal();
    for (int64_t i = 0; i < s.c; ++i) scale.floats()[i] = normal(), shift.floats()[i] = normal();
    p.x = x.view(), p.y = y.view();
    p.count = s.n, p.c_in = p.c_out = p.groups = s.c;
    p.kh = s.kh, p.kw = s.kw;
    for (int i = 0; i < 2; ++i) p.stride[i] = s.stride[i], p.pad[i] = s.pad[i], p.dil[i] = s.dil[i];
    p.depthwise = weight.floats(), p.depthwise_stride = s.c;
    p.epilogue.act = act;
    if (!epilogue) return;
    p.epilogue.scale = scale.floats(), p.epilogue.shift = shift.floats();
    p.epilogue.residual = &residual.view();
  }

  static int64_t out(const Shape& s, int axis) {
    return axis == 0 ? conv::out_size(s.h, s.kh, s.stride[0], s.pad[0], s.dil[0])
                     : conv::out_size(s.w, s.kw, s.stride[1], s.pad[1], s.dil[1]);
  }

  void check(const std::string& where) const {
    for (int64_t n = 0; n < p.count; ++n)
      for (int64_t c = 0; c < p.c_out; ++c)
        for (int64_t oy = 0; oy < p.y.h; ++oy)
          for (int64_t ox = 0; ox < p.y.w; ++ox) {
            double acc = 0, size = 0;
            for (int64_t ky = 0; ky < p.kh; ++ky)
              for (int64_t kx = 0; kx < p.kw; ++kx) {
                const int64_t iy = oy * p.stride[0] - p.pad[0] + ky * p.dil[0];
                const int64_t ix = ox * p.stride[1] - p.pad[1] + kx * p.dil[1];
                if (iy < 0 || iy >= p.x.h || ix < 0 || ix >= p.x.w) continue;
                const double term =
                    static_cast<double>(x.at(n, c, iy, ix)) * weight.floats()[(ky * p.kw + kx) * p.c_out + c];
                acc += term;
                size += std::fabs(term);
              }
            const double factor = p.epilogue.scale ? scale.floats()[c] : 1.0;
            const double addend = p.epilogue.shift ? shift.floats()[c] : 0.0;
            const double extra = p.epilogue.residual ? residual.at(n, c, oy, ox) : 0.0;
            const double exact = activate(acc * factor + addend + extra, p.epilogue.act);
            const double magnitude = size * std::fabs(factor) + std::fabs(addend) + std::fabs(extra);
            const double got = y.at(n, c, oy, ox);
            EXPECT(std::fabs(got - exact) <= allowed(exact, magnitude, p.y.dtype, p.epilogue.act), where, " channel ",
                   c, " at ", oy, ",", ox, ": got ", got, " expected ", exact);
          }
  }
};

Shape any_shape() {
  Shape s{draw(1, 2), draw(1, 70), draw(1, 20), draw(1, 20), 3, 3, {1, 1}, {0, 0}, {1, 1}};
  const int64_t kind = draw(0, 5);
  s.kh = s.kw = kind < 2 ? 3 : kind < 4 ? 5 : draw(1, 7);
  if (kind == 5) s.kw = draw(1, 4), s.dil[0] = draw(1, 3), s.dil[1] = draw(1, 3);
  s.stride[0] = s.stride[1] = draw(1, kind < 4 ? 2 : 3);
  if (draw(0, 5) == 0) s.stride[0] = draw(1, 3);
  for (int64_t& pad : s.pad) pad = draw(0, 3);
  return s;
}

}  // namespace

TEST(depthwise_of_every_shape_has_the_same_bits_in_every_layout) {
  for (int trial = 0; trial < 400; ++trial) {
    const Shape s = any_shape();
    if (Case::out(s, 0) < 1 || Case::out(s, 1) < 1) continue;
    const auto act = static_cast<conv::Act>(draw(0, 4));
    const auto dtype = trial % 4 == 0 ? static_cast<DType>(draw(0, 2)) : DType::F32;
    const bool epilogue = coin();
    const std::mt19937 seed = rng();
    for (const Isa isa : available()) {
      set_isa(isa);
      std::unique_ptr<Case> first;
      for (const Layout from : {Layout::Nhwc, Layout::Nchw, Layout::Hwcn})
        for (const Layout to : {Layout::Nhwc, Layout::Nchw, Layout::Hwcn}) {
          rng() = seed;
          auto it = std::make_unique<Case>(s, from, to, dtype, act, epilogue);
          conv::run(it->p);
          const std::string where =
              text("trial ", trial, " on ", isa_name(isa), " c ", s.c, " map ", s.h, "x", s.w, " kernel ", s.kh, "x",
                   s.kw, " stride ", s.stride[0], " act ", static_cast<int>(act), " layouts ", static_cast<int>(from),
                   static_cast<int>(to));
          if (first == nullptr) {
            it->check(where);
            first = std::move(it);
            continue;
          }
          for (int64_t n = 0; n < s.n; ++n)
            for (int64_t c = 0; c < s.c; ++c)
              for (int64_t oy = 0; oy < it->p.y.h; ++oy)
                for (int64_t ox = 0; ox < it->p.y.w; ++ox) {
                  const float a = first->y.at(n, c, oy, ox), b = it->y.at(n, c, oy, ox);
                  EXPECT(std::memcmp(&a, &b, 4) == 0, where, " channel ", c, " at ", oy, ",", ox, ": ", b, " not ", a);
                }
        }
    }
  }
}

// Widths, pitches and maps of real networks, at which rows are cut into several tiles and bands.
TEST(depthwise_of_networks) {
  const Shape shapes[] = {
      {1, 24, 56, 56, 3, 3, {1, 1}, {1, 1}, {1, 1}},  {1, 32, 57, 33, 3, 3, {2, 2}, {1, 1}, {1, 1}},
      {1, 40, 28, 30, 5, 5, {1, 1}, {2, 2}, {1, 1}},  {1, 16, 45, 45, 5, 5, {2, 2}, {2, 2}, {1, 1}},
      {1, 512, 14, 14, 3, 3, {1, 1}, {1, 1}, {1, 1}}, {2, 1024, 7, 7, 3, 3, {1, 1}, {1, 1}, {1, 1}},
      {1, 1021, 7, 7, 7, 7, {1, 1}, {3, 3}, {1, 1}},
  };
  for (const Isa isa : available()) {
    set_isa(isa);
    for (const Shape& s : shapes)
      for (const Layout layout : {Layout::Nhwc, Layout::Nchw}) {
        Case it(s, layout, layout, DType::F32, conv::Act::Relu6, true);
        conv::run(it.p);
        it.check(text(isa_name(isa), " c ", s.c, " map ", s.h, " layout ", static_cast<int>(layout)));
      }
  }
}

// A dilation that steps over the whole map: nothing of the kernel's reach may be laid out in memory.
TEST(depthwise_of_a_huge_dilation) {
  const int64_t far = int64_t{1} << 30;
  const Shape s{1, 5, 4, 4, 3, 3, {1, 1}, {far, far}, {far, far}};
  for (const Layout layout : {Layout::Nhwc, Layout::Nchw}) {
    Case it(s, layout, layout, DType::F32, conv::Act::None, true);
    conv::run(it.p);
    it.check("dilation");
  }
}

TEST(depthwise_activations_keep_nan_and_saturate) {
  const float inf = std::numeric_limits<float>::infinity(), values[] = {std::nanf(""), inf, -inf, 1000.0f, -1000.0f};
  for (const Isa isa : available()) {
    set_isa(isa);
    for (int act = 0; act < 5; ++act)
      for (const Layout layout : {Layout::Nhwc, Layout::Nchw}) {
        Case it({1, 19, 1, 5, 1, 1, {1, 1}, {0, 0}, {1, 1}}, layout, layout, DType::F32, static_cast<conv::Act>(act),
                false);
        for (int64_t c = 0; c < 19; ++c) {
          it.weight.floats()[c] = 1;
          for (int64_t i = 0; i < 5; ++i) it.x.set(it.x.index(0, c, 0, i), values[i]);
        }
        conv::run(it.p);
        for (int64_t c = 0; c < 19; ++c) {
          EXPECT(std::isnan(it.y.at(0, c, 0, 0)), isa_name(isa), " activation ", act);
          const float top = act == 2 ? 6.0f : 1000.0f, bottom = act == 0 ? -1000.0f : 0.0f;
          EXPECT(it.y.at(0, c, 0, 3) == top, isa_name(isa), " activation ", act, " of 1000: ", it.y.at(0, c, 0, 3));
          EXPECT(std::fabs(it.y.at(0, c, 0, 4) - bottom) < 1e-30f, isa_name(isa), " activation ", act,
                 " of -1000: ", it.y.at(0, c, 0, 4));
        }
      }
  }
}

}  // namespace effkern::test
