// The engine against the oracle: random problems over all layouts, types, prefixes, sample lists and epilogues, on
// every instruction set of this machine, with NaN in everything that must not be read and guard pages behind
// everything.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "../common/parallel.h"
#include "../conv/pack.h"
#include "../conv/plan.h"
#include "check.h"
#include "isas.h"
#include "oracle.h"
#include "threads.h"

namespace effkern::test {
namespace {

using conv::Problem;

DType any_dtype() { return static_cast<DType>(draw(0, 2)); }
Layout any_layout() { return static_cast<Layout>(draw(0, 2)); }

// Stands for the sum of the magnitudes of all terms in allowed(): the error of a Winograd output is at most 12 u T for
// F(4,3), 4 u T for the others, where T = sum over channels of max |x| in the input tile times sum |w|.
double winograd_size(const Buffer& x, const Weight& w, const Problem& p, int64_t n, int64_t in, int64_t out, int64_t oy,
                     int64_t ox, const conv::WinogradForm& form) {
  const int64_t tile = form.tile;
  // The shorter tiles at the end of a map see less of the input, whatever their transforms are.
  const int64_t rows = oy / tile < p.y.h / tile ? form.side : form.last[p.y.h % tile];
  const int64_t columns = ox / tile < p.y.w / tile ? form.side : form.last[p.y.w % tile];
  const int64_t top = oy / tile * tile * p.stride[0] - p.pad[0], left = ox / tile * tile * p.stride[1] - p.pad[1];
  double sum = 0;
  for (int64_t k = 0; k < p.c_in / p.groups; ++k) {
    double most = 0, weights = 0;
    for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + rows, p.x.h); ++y)
      for (int64_t c = std::max<int64_t>(left, 0); c < std::min(left + columns, p.x.w); ++c)
        most = std::max<double>(most, std::fabs(x.at(n, in + k, y, c)));
    for (int64_t t = 0; t < 9; ++t) weights += std::fabs(w.at(out, k, t / 3, t % 3));
    sum += most * weights;
  }
  return sum * (tile == 4 ? 12 : 4) / 16;
}

// One random problem with all its memory.
class Trial {
 public:
  Trial() {
    const bool winograd = draw(0, 2) == 0;
    depthwise_ = !winograd && draw(0, 3) == 0;
    const int64_t groups = depthwise_ ? draw(1, 37) : (draw(0, 2) == 0 ? draw(2, 3) : 1);
    const int64_t in = depthwise_ ? 1 : draw(draw(0, 9) == 0 ? 0 : 1, 19), out = depthwise_ ? 1 : draw(1, 35);
    // The whole weight is wider than the part that runs: the part is a prefix of every group.
    weight_ = std::make_unique<Weight>(groups * (out + draw_wider()), in + draw_wider(), winograd ? 3 : draw(1, 3),
                                       winograd ? 3 : draw(1, 3), any_dtype());
    if (depthwise_) weight_ = std::make_unique<Weight>(groups, 1, weight_->kh, weight_->kw, weight_->dtype);
    const int64_t n = draw(1, 4), h = draw(1, 15), w = draw(0, 3) == 0 ? draw(10, 40) : draw(1, 9);
    p_.c_in = groups * in;
    p_.c_out = groups * out;
    p_.groups = groups;
    p_.kh = weight_->kh;
    p_.kw = weight_->kw;
    for (int i = 0; i < 2; ++i) p_.stride[i] = draw(1, 3), p_.pad[i] = draw(0, 3), p_.dil[i] = draw(1, 2);
    if (winograd) {
      p_.algo = static_cast<conv::Algo>(draw(2, 4));
      for (int i = 0; i < 2; ++i) p_.stride[i] = p_.algo == conv::Algo::Winograd33 ? 2 : 1, p_.dil[i] = 1;
    } else if (coin()) {
      p_.algo = conv::Algo::Direct;
    }
    const int64_t oh = conv::out_size(h, p_.kh, p_.stride[0], p_.pad[0], p_.dil[0]);
    const int64_t ow = conv::out_size(w, p_.kw, p_.stride[1], p_.pad[1], p_.dil[1]);
    const DType dtype = any_dtype();
    x_ = std::make_unique<Buffer>(dtype, any_layout(), n, p_.c_in, h, w, draw_wider());
    x_->randomize(p_.c_in);
    y_ = std::make_unique<Buffer>(coin() ? dtype : DType::F32, any_layout(), n, p_.c_out, oh, ow, draw_wider());
    y_->fill(42.0f);
    list_samples(n);
    pack(out, in);
    epilogue(n, oh, ow);
    p_.x = x_->view();
    p_.y = y_->view();
    before_ = snapshot();
  }

  Problem& problem() { return p_; }
  Buffer& y() { return *y_; }

  void reset() {
    for (int64_t i = 0; i < y_->size(); ++i) y_->set(i, before_[static_cast<size_t>(i)]);
  }
  std::vector<float> snapshot() const {
    std::vector<float> all;
    for (int64_t i = 0; i < y_->size(); ++i) all.push_back(y_->get(i));
    return all;
  }

  // Every element written is right, and no other element changed.
  void check(const std::string& where) const {
    std::vector<char> written(static_cast<size_t>(y_->size()), 0);
    const int64_t out = p_.c_out / p_.groups, in = p_.c_in / p_.groups, whole = weight_->out / p_.groups;
    for (int64_t i = 0; i < p_.count; ++i) {
      const int64_t xn = p_.x_rows ? p_.x_rows[i] : i, yn = p_.y_rows ? p_.y_rows[i] : i;
      for (int64_t c = 0; c < p_.c_out; ++c)
        for (int64_t oy = 0; oy < p_.y.h; ++oy)
          for (int64_t ox = 0; ox < p_.y.w; ++ox) {
            const int64_t g = c / out;
            double acc = 0, size = 0;
            for (int64_t k = 0; k < in; ++k)
              for (int64_t ky = 0; ky < p_.kh; ++ky)
                for (int64_t kx = 0; kx < p_.kw; ++kx) {
                  const int64_t iy = oy * p_.stride[0] - p_.pad[0] + ky * p_.dil[0];
                  const int64_t ix = ox * p_.stride[1] - p_.pad[1] + kx * p_.dil[1];
                  if (iy < 0 || iy >= p_.x.h || ix < 0 || ix >= p_.x.w) continue;
                  const double term =
                      static_cast<double>(x_->at(xn, g * in + k, iy, ix)) * weight_->at(g * whole + c % out, k, ky, kx);
                  acc += term;
                  size += std::fabs(term);
                }
            if (const conv::WinogradForm* form = conv::winograd_form(p_); form != nullptr)
              size = winograd_size(*x_, *weight_, p_, xn, g * in, g * whole + c % out, oy, ox, *form);
            const int64_t at = y_->index(yn, c, oy, ox);
            const auto row = static_cast<size_t>(p_.epilogue.table_row ? p_.epilogue.table_row[xn] : 0);
            const size_t entry = row * static_cast<size_t>(p_.epilogue.table_stride) + static_cast<size_t>(c);
            const double scale = p_.epilogue.scale ? p_.epilogue.scale[entry] : 1.0;
            const double shift = p_.epilogue.shift ? p_.epilogue.shift[entry] : 0.0;
            double extra = 0;
            if (in_place_) {
              extra = before_[static_cast<size_t>(at)];
            } else if (residual_) {
              extra = residual_->at(p_.epilogue.residual_rows ? p_.epilogue.residual_rows[i] : i, c, oy, ox);
            }
            const double exact = activate(acc * scale + shift + extra, p_.epilogue.act);
            const double magnitude = size * std::fabs(scale) + std::fabs(shift) + std::fabs(extra);
            written[static_cast<size_t>(at)] = 1;
            EXPECT(std::fabs(y_->get(at) - exact) <= allowed(exact, magnitude, p_.y.dtype, p_.epilogue.act), where,
                   " sample ", i, " channel ", c, " at ", oy, ",", ox, ": got ", y_->get(at), " expected ", exact);
          }
    }
    for (int64_t i = 0; i < y_->size(); ++i)
      if (!written[static_cast<size_t>(i)]) {
        const float was = before_[static_cast<size_t>(i)], is = y_->get(i);
        EXPECT(is == was || (std::isnan(is) && std::isnan(was)), where, " touched element ", i);
      }
  }

 private:
  static int64_t draw_wider() { return coin() ? 0 : draw(1, 20); }

  void list_samples(int64_t n) {
    p_.count = n;
    if (coin()) return;
    for (int64_t i = 0; i < n; ++i) x_rows_.push_back(i), y_rows_.push_back(i);
    std::shuffle(x_rows_.begin(), x_rows_.end(), rng());
    std::shuffle(y_rows_.begin(), y_rows_.end(), rng());
    p_.count = draw(0, n);
    p_.x_rows = x_rows_.data();
    p_.y_rows = y_rows_.data();
  }

  void pack(int64_t out, int64_t in) {
    const int64_t taps = p_.kh * p_.kw;
    conv::WeightView view;
    view.data = weight_->memory.data();
    view.dtype = weight_->dtype;
    view.groups = p_.groups;
    view.kh = p_.kh, view.kw = p_.kw;
    view.si = taps, view.sh = p_.kw, view.sw = 1;
    view.so = weight_->in_per_group * taps;
    view.group_stride = weight_->out / p_.groups * view.so;
    const bool whole = coin();  // pack all of the weight and run a prefix of the pack, or pack the prefix only
    view.out_per_group = whole ? weight_->out / p_.groups : out;
    view.in_per_group = whole ? weight_->in_per_group : in;
    if (depthwise_) {
      view.out_per_group = view.in_per_group = 1;
      pack_ = std::make_unique<Guarded>(static_cast<size_t>(conv::depthwise_floats(view)) * sizeof(float));
      conv::pack_depthwise(view, pack_->floats());
      p_.depthwise = pack_->floats();
      p_.depthwise_stride = p_.groups;
      return;
    }
    pack_ = std::make_unique<Guarded>(static_cast<size_t>(conv::panels_floats(view)) * sizeof(float));
    conv::pack_panels(view, pack_->floats());
    if (taps == 9 && p_.kh == 3 && coin()) {
      transforms_ = std::make_unique<Guarded>(static_cast<size_t>(conv::winograd_floats(view)) * sizeof(float));
      conv::pack_winograd(view, pack_->floats(), transforms_->floats());
    }
    panels_ = std::make_unique<conv::ResidentPanels>(pack_->floats(), view.out_per_group, view.in_per_group, taps,
                                                     transforms_ ? transforms_->floats() : nullptr);
    p_.weight = panels_.get();
  }

  void epilogue(int64_t n, int64_t oh, int64_t ow) {
    conv::Epilogue& e = p_.epilogue;
    e.act = static_cast<Act>(draw(0, 4));
    const int64_t rows = coin() ? 1 : 3;
    e.table_stride = p_.c_out + (rows > 1 ? draw(0, 2) : 0);
    const auto size = static_cast<size_t>((rows - 1) * e.table_stride + p_.c_out);
    if (coin()) {
      scale_ = std::make_unique<Guarded>(size * sizeof(float));
      for (size_t i = 0; i < size; ++i) scale_->floats()[i] = normal();
      e.scale = scale_->floats();
    }
    if (coin()) {
      shift_ = std::make_unique<Guarded>(size * sizeof(float));
      for (size_t i = 0; i < size; ++i) shift_->floats()[i] = normal();
      e.shift = shift_->floats();
    }
    if (rows > 1) {
      for (int64_t i = 0; i < n; ++i) table_row_.push_back(static_cast<int32_t>(draw(0, rows - 1)));
      e.table_row = table_row_.data();
    }
    if (coin()) return;
    in_place_ = draw(0, 2) == 0;
    if (in_place_) {
      y_->randomize(p_.c_out);
      e.residual = &y_->view();
      if (p_.y_rows != nullptr) e.residual_rows = p_.y_rows;
      return;
    }
    residual_ = std::make_unique<Buffer>(any_dtype(), any_layout(), n, p_.c_out, oh, ow, draw_wider());
    residual_->randomize(p_.c_out);
    e.residual = &residual_->view();
    if (coin()) {
      for (int64_t i = 0; i < n; ++i) residual_rows_.push_back(n - 1 - i);
      e.residual_rows = residual_rows_.data();
    }
  }

  Problem p_;
  bool depthwise_ = false, in_place_ = false;
  std::unique_ptr<Weight> weight_;
  std::unique_ptr<Buffer> x_, y_, residual_;
  std::unique_ptr<Guarded> pack_, transforms_, scale_, shift_;
  std::unique_ptr<conv::ResidentPanels> panels_;
  std::vector<int64_t> x_rows_, y_rows_, residual_rows_;
  std::vector<int32_t> table_row_;
  std::vector<float> before_;
};

}  // namespace

TEST(random_problems_match_the_oracle) {
  for (int trial = 0; trial < 1500; ++trial) {
    Trial t;
    for (const Isa isa : available()) {
      set_isa(isa);
      t.reset();
      conv::run(t.problem());
      t.check(text("trial ", trial, " on ", isa_name(isa)));
    }
  }
}

TEST(threads_do_not_change_a_bit) {
  for (int trial = 0; trial < 100; ++trial) {
    Trial t;
    conv::run(t.problem());
    const std::vector<float> alone = t.snapshot();
    t.reset();
    set_parallel(on_threads, three);
    conv::run(t.problem(), 3);
    set_parallel(serially, one);
    EXPECT(same_bits(alone, t.snapshot()), "trial ", trial);
    t.reset();
    const Step step = conv::step_of(t.problem(), 3);
    for (int64_t i = step.units; i-- > 0;) step.run(i, i + 1);
    EXPECT(same_bits(alone, t.snapshot()), "as a step, trial ", trial);
  }
}

// Large enough to be cut: into bands and, where those are few, into blocks of channels.
TEST(depthwise_threads_do_not_change_a_bit) {
  const int64_t shapes[][2] = {{70, 45}, {1100, 11}};  // channels, side
  for (const auto& [c, side] : shapes)
    for (const Layout layout : {Layout::Nhwc, Layout::Nchw})
      for (const DType dtype : {DType::F32, DType::F16}) {
        Buffer x(dtype, layout, 1, c, side, side), y(dtype, layout, 1, c, side, side);
        x.randomize(c);
        const Guarded weight(static_cast<size_t>(9 * c) * sizeof(float));
        for (int64_t i = 0; i < 9 * c; ++i) weight.floats()[i] = normal();
        Problem p;
        p.x = x.view(), p.y = y.view();
        p.count = 1, p.c_in = p.c_out = p.groups = c, p.kh = p.kw = 3, p.pad[0] = p.pad[1] = 1;
        p.depthwise = weight.floats(), p.depthwise_stride = c;
        conv::run(p);
        std::vector<float> alone;
        for (int64_t i = 0; i < y.size(); ++i) alone.push_back(y.get(i));
        y.fill(42.0f);
        set_parallel(on_threads, three);
        conv::run(p);
        set_parallel(serially, one);
        for (int64_t i = 0; i < y.size(); ++i)
          EXPECT(y.get(i) == alone[static_cast<size_t>(i)], "channels ", c, " element ", i);
      }
}

// Every listed sample alone gives the bits it gives among the others.
TEST(neighbours_do_not_change_a_bit) {
  for (int trial = 0; trial < 100; ++trial) {
    Trial t;
    conv::run(t.problem());
    const std::vector<float> together = t.snapshot();
    t.reset();
    std::vector<int64_t> x, y, r;
    Problem p = t.problem();
    for (int64_t i = 0; i < p.count; ++i) {
      x.push_back(p.x_rows ? p.x_rows[i] : i);
      y.push_back(p.y_rows ? p.y_rows[i] : i);
      r.push_back(p.epilogue.residual_rows ? p.epilogue.residual_rows[i] : i);
    }
    const int64_t count = p.count;
    p.count = 1;
    for (int64_t i = count - 1; i >= 0; --i) {
      p.x_rows = &x[static_cast<size_t>(i)];
      p.y_rows = &y[static_cast<size_t>(i)];
      p.epilogue.residual_rows = &r[static_cast<size_t>(i)];
      conv::run(p);
    }
    EXPECT(same_bits(together, t.snapshot()), "trial ", trial);
  }
}

// Larger maps, so that an item is a band of rows and a pack has several panels.
TEST(bands_and_panels) {
  for (const Isa isa : available()) {
    set_isa(isa);
    const int64_t h = 37, w = 23, in = 17, out = 50;
    for (int trial = 0; trial < 8; ++trial) {
      const Layout layout = trial % 2 == 0 ? Layout::Nhwc : Layout::Nchw;
      Buffer x(DType::F32, layout, 1, in, h, w), y(DType::F32, layout, 1, out, trial < 6 ? h : 19, trial < 6 ? w : 12);
      x.randomize(in);
      const Weight weight(out, in, 3, 3, DType::F32);
      conv::WeightView view{weight.memory.data(), DType::F32, 1, out, in, 3, 3, 0, in * 9, 9, 3, 1};
      const Guarded pack(static_cast<size_t>(conv::panels_floats(view)) * sizeof(float));
      conv::pack_panels(view, pack.floats());
      const conv::ResidentPanels panels(pack.floats(), out, in, 9);
      Problem p;
      p.x = x.view(), p.y = y.view();
      p.count = 1, p.c_in = in, p.c_out = out, p.kh = p.kw = 3, p.pad[0] = p.pad[1] = 1;
      p.weight = &panels;
      p.algo = trial < 2   ? conv::Algo::Direct
               : trial < 4 ? conv::Algo::Winograd23
               : trial < 6 ? conv::Algo::Winograd43
                           : conv::Algo::Winograd33;
      p.stride[0] = p.stride[1] = trial < 6 ? 1 : 2;
      conv::run(p);
      for (int64_t c = 0; c < out; c += 7)
        for (int64_t oy = 0; oy < p.y.h; ++oy)
          for (int64_t ox = 0; ox < p.y.w; ++ox) {
            double exact = 0, size = 0;
            for (int64_t k = 0; k < in; ++k)
              for (int64_t ky = 0; ky < 3; ++ky)
                for (int64_t kx = 0; kx < 3; ++kx) {
                  const int64_t iy = oy * p.stride[0] - 1 + ky, ix = ox * p.stride[1] - 1 + kx;
                  if (iy < 0 || iy >= h || ix < 0 || ix >= w) continue;
                  const double term = static_cast<double>(x.at(0, k, iy, ix)) * weight.at(c, k, ky, kx);
                  exact += term;
                  size += std::fabs(term);
                }
            if (trial >= 2) size = winograd_size(x, weight, p, 0, 0, c, oy, ox, *conv::winograd_form(p));
            EXPECT(std::fabs(y.at(0, c, oy, ox) - exact) <= allowed(exact, size, DType::F32, Act::None), isa_name(isa));
          }
    }
  }
}

}  // namespace effkern::test
