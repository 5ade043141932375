// The gradients against the definition in double: random problems over all layouts, types, prefixes and sample lists,
// on every instruction set of this machine, with NaN in everything that must not be read and guard pages behind it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "../common/cpu.h"
#include "../common/parallel.h"
#include "../conv_backward/dgrad.h"
#include "../conv_backward/wgrad.h"
#include "../conv_backward/wgrad_ukernel.h"
#include "check.h"
#include "oracle.h"
#include "threads.h"

namespace effkern::test {
namespace {

using conv::WeightView;

DType any_dtype() { return static_cast<DType>(draw(0, 2)); }
Layout any_layout() { return static_cast<Layout>(draw(0, 2)); }
int64_t wider() { return coin() ? 0 : draw(1, 20); }

// One convolution, and both of its gradients with all their memory.
class Trial {
 public:
  Trial() {
    const bool depthwise = draw(0, 3) == 0;
    groups_ = depthwise ? draw(1, 90) : draw(0, 2) == 0 ? draw(2, 3) : 1;
    in_ = depthwise ? 1 : draw(0, 40), out_ = depthwise ? 1 : draw(1, 35);
    const int64_t kh = draw(1, 4), kw = draw(1, 4);
    // The whole weight is wider than the part that runs: the part is a prefix of every group.
    whole_out_ = depthwise ? 1 : out_ + wider();
    weight_ = std::make_unique<Weight>(groups_ * whole_out_, depthwise ? 1 : in_ + wider(), kh, kw, any_dtype());
    for (int i = 0; i < 2; ++i) stride_[i] = draw(1, 3), pad_[i] = draw(0, 4), dil_[i] = draw(1, 3);
    const int64_t n = draw(1, 4), h = draw(1, 19), w = draw(1, 60);
    const int64_t oh = conv::out_size(h, kh, stride_[0], pad_[0], dil_[0]);
    const int64_t ow = conv::out_size(w, kw, stride_[1], pad_[1], dil_[1]);
    const DType dtype = any_dtype();
    x_ = std::make_unique<Buffer>(dtype, any_layout(), n, groups_ * in_, h, w, wider());
    gy_ = std::make_unique<Buffer>(coin() ? dtype : DType::F32, any_layout(), n, groups_ * out_, oh, ow, wider());
    gx_ = std::make_unique<Buffer>(dtype, any_layout(), n, groups_ * in_, h, w, wider());
    x_->randomize(groups_ * in_);
    gy_->randomize(groups_ * out_);
    gw_ = std::make_unique<Weight>(groups_ * whole_out_, weight_->in_per_group, kh, kw, coin() ? dtype : DType::F32);
    gb_ = std::make_unique<Guarded>(static_cast<size_t>(groups_ * out_) * sizeof(float));
    for (int64_t i = 0; i < n; ++i) rows_.push_back(i), gy_rows_.push_back(i);
    count_ = n;
    if (listed_ = coin(); listed_) {
      std::shuffle(rows_.begin(), rows_.end(), rng());
      std::shuffle(gy_rows_.begin(), gy_rows_.end(), rng());
      count_ = draw(0, n);
    }
    accumulate_ = gw_->dtype == DType::F32 && coin();
  }

  void run() {
    gx_->fill(42.0f);
    for (int64_t i = 0; i < gw_size(); ++i) store_float(gw_->memory.data(), gw_->dtype, i, 42.0f);
    for (int64_t i = 0; i < groups_ * out_; ++i) gb_->floats()[i] = 42.0f;
    conv::DgradProblem d;
    d.gy = gy_->view(), d.gx = gx_->view();
    d.count = count_;
    d.gy_rows = listed_ ? gy_rows_.data() : nullptr, d.gx_rows = listed_ ? rows_.data() : nullptr;
    d.weight = view(*weight_);
    d.algo = conv::Algo::Direct;
    conv::WgradProblem w;
    w.x = x_->view(), w.gy = gy_->view();
    w.count = count_;
    w.gy_rows = d.gy_rows, w.x_rows = d.gx_rows;
    w.c_in = groups_ * in_, w.c_out = groups_ * out_, w.groups = groups_;
    w.kh = weight_->kh, w.kw = weight_->kw;
    const WeightView g = view(*gw_);
    w.gw = {gw_->memory.data(), g.dtype, g.group_stride, g.so, g.si, g.sh, g.sw};
    w.gb = gb_->floats();
    w.accumulate = accumulate_;
    for (int i = 0; i < 2; ++i) {
      d.stride[i] = w.stride[i] = stride_[i];
      d.pad[i] = w.pad[i] = pad_[i];
      d.dil[i] = w.dil[i] = dil_[i];
    }
    conv::dgrad(d);
    conv::wgrad(w);
  }

  void check(const std::string& where) const {
    const conv::Activation &x = x_->view(), &gy = gy_->view();
    std::vector<double> gx(static_cast<size_t>(gx_->size()), 0), gx_size = gx;
    std::vector<double> gw(static_cast<size_t>(gw_size()), accumulate_ ? 42 : 0), gw_size_ = gw;
    std::vector<double> gb(static_cast<size_t>(groups_ * out_), accumulate_ ? 42 : 0), gb_size = gb;
    std::vector<char> wrote_x(gx.size(), 0), wrote_w(gw.size(), 0);
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t c = 0; c < groups_ * in_; ++c)
        for (int64_t y = 0; y < x.h; ++y)
          for (int64_t z = 0; z < x.w; ++z) wrote_x[static_cast<size_t>(gx_->index(row(i), c, y, z))] = 1;
    for (int64_t c = 0; c < groups_ * out_; ++c)
      for (int64_t k = 0; k < in_; ++k)
        for (int64_t t = 0; t < gw_->kh * gw_->kw; ++t) wrote_w[at(c, k, t)] = 1;
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t c = 0; c < groups_ * out_; ++c)
        for (int64_t oy = 0; oy < gy.h; ++oy)
          for (int64_t ox = 0; ox < gy.w; ++ox) {
            const double g = gy_->at(gy_row(i), c, oy, ox);
            gb[static_cast<size_t>(c)] += g;
            gb_size[static_cast<size_t>(c)] += std::fabs(g);
            for (int64_t k = 0; k < in_; ++k)
              for (int64_t t = 0; t < gw_->kh * gw_->kw; ++t) {
                const int64_t iy = oy * stride_[0] - pad_[0] + t / gw_->kw * dil_[0];
                const int64_t ix = ox * stride_[1] - pad_[1] + t % gw_->kw * dil_[1];
                if (iy < 0 || iy >= x.h || ix < 0 || ix >= x.w) continue;
                const auto to = static_cast<size_t>(gx_->index(row(i), c / out_ * in_ + k, iy, ix));
                const double dx = g * weight_->at(weight_row(c), k, t / gw_->kw, t % gw_->kw);
                gx[to] += dx;
                gx_size[to] += std::fabs(dx);
                const double dw = g * x_->at(row(i), c / out_ * in_ + k, iy, ix);
                gw[at(c, k, t)] += dw;
                gw_size_[at(c, k, t)] += std::fabs(dw);
              }
          }
    for (size_t i = 0; i < gx.size(); ++i)
      compare(gx_->get(static_cast<int64_t>(i)), wrote_x[i], gx[i], gx_size[i], gx_->view().dtype, where + " gx");
    for (size_t i = 0; i < gw.size(); ++i)
      compare(load_float(gw_->memory.data(), gw_->dtype, static_cast<int64_t>(i)), wrote_w[i], gw[i], gw_size_[i],
              gw_->dtype, where + " gw");
    for (size_t i = 0; i < gb.size(); ++i)
      compare(gb_->floats()[i], true, gb[i], gb_size[i], DType::F32, where + " gb");
  }

  std::vector<float> bits() const {
    std::vector<float> all;
    for (int64_t i = 0; i < gx_->size(); ++i) all.push_back(gx_->get(i));
    for (int64_t i = 0; i < gw_size(); ++i) all.push_back(load_float(gw_->memory.data(), gw_->dtype, i));
    all.insert(all.end(), gb_->floats(), gb_->floats() + groups_ * out_);
    return all;
  }

 private:
  static void compare(float got, bool written, double exact, double size, DType dtype, const std::string& what) {
    if (written)
      EXPECT(std::fabs(got - exact) <= allowed(exact, size, dtype, Act::None), what, ": got ", got, " expected ",
             exact);
    else
      EXPECT(got == 42.0f, what, " was touched where it must not be: ", got);
  }

  WeightView view(const Weight& w) const {
    WeightView v;
    v.data = w.memory.data();
    v.dtype = w.dtype;
    v.groups = groups_, v.out_per_group = out_, v.in_per_group = in_, v.kh = w.kh, v.kw = w.kw;
    v.sw = 1, v.sh = w.kw, v.si = w.kh * w.kw, v.so = w.in_per_group * v.si;
    v.group_stride = whole_out_ * v.so;
    return v;
  }
  int64_t row(int64_t i) const { return listed_ ? rows_[static_cast<size_t>(i)] : i; }
  int64_t gy_row(int64_t i) const { return listed_ ? gy_rows_[static_cast<size_t>(i)] : i; }
  int64_t weight_row(int64_t c) const { return c / out_ * whole_out_ + c % out_; }
  size_t at(int64_t c, int64_t k, int64_t t) const {
    return static_cast<size_t>((weight_row(c) * gw_->in_per_group + k) * gw_->kh * gw_->kw + t);
  }
  int64_t gw_size() const { return gw_->out * gw_->in_per_group * gw_->kh * gw_->kw; }

  int64_t groups_, in_, out_, whole_out_, count_, stride_[2], pad_[2], dil_[2];
  bool listed_, accumulate_;
  std::unique_ptr<Weight> weight_, gw_;
  std::unique_ptr<Buffer> x_, gy_, gx_;
  std::unique_ptr<Guarded> gb_;
  std::vector<int64_t> rows_, gy_rows_;
};

}  // namespace

TEST(random_gradients_match_the_definition) {
  for (int trial = 0; trial < 600; ++trial) {
    Trial t;
    for (int i = 0; i < kIsas; ++i) {
      if (!isa_available(static_cast<Isa>(i))) continue;
      set_isa(static_cast<Isa>(i));
      t.run();
      t.check(text("trial ", trial, " on ", isa_name(static_cast<Isa>(i))));
    }
  }
}

TEST(threads_do_not_change_a_bit_of_a_gradient) {
  for (int trial = 0; trial < 150; ++trial) {
    Trial t;
    t.run();
    const std::vector<float> alone = t.bits();
    set_parallel(on_threads, three);
    t.run();
    set_parallel(serially, one);
    EXPECT(same_bits(alone, t.bits()), "trial ", trial);
  }
}

// The 16-lane loops on 8-lane registers: the sums of the narrow table, bit for bit, for every number of rows.
TEST(wide_weight_gradient_loops_give_the_narrow_ones_bits) {
  if (!isa_available(Isa::Avx2)) return;
  const conv::WgradKernels &narrow = conv::avx2::wgrad_table, &wide = conv::avx2::wgrad_table16;
  for (int64_t rows = 1; rows <= narrow.rows; ++rows) {
    const int64_t pixels = draw(1, 40), step = rows + 3;
    const Guarded x(static_cast<size_t>((pixels - 1) * step + rows) * sizeof(float));
    const Guarded gy(static_cast<size_t>(pixels * conv::kPanel) * sizeof(float));
    for (int64_t i = 0; i < (pixels - 1) * step + rows; ++i) x.floats()[i] = normal();
    for (int64_t i = 0; i < pixels * conv::kPanel; ++i) gy.floats()[i] = normal();
    const conv::Line line{x.floats(), gy.floats(), pixels};
    std::vector<float> a(static_cast<size_t>(rows * conv::kPanel), 1.0f), b = a;
    const char* ahead = reinterpret_cast<const char*>(gy.data());
    narrow.tile(rows, &line, 1, 0, step, 0, conv::kPanel, true, a.data(), ahead, 0);
    wide.tile(rows, &line, 1, 0, step, 0, conv::kPanel, true, b.data(), ahead, 0);
    EXPECT(same_bits(a, b), rows, " rows");
  }
}

}  // namespace effkern::test
