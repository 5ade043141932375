// The fused pair against its two convolutions run one after the other: the same bits, whatever the bands and threads.
#include <cstring>

#include "../common/parallel.h"
#include "../conv/depthwise.h"
#include "../conv/dw_pw.h"
#include "../conv/pack.h"
#include "check.h"
#include "isas.h"
#include "oracle.h"

namespace effkern::test {
namespace {

using conv::Problem;

int64_t two() { return 2; }
int64_t one() { return 1; }
// From the last range to the first: what depends on the order shows.
void backwards(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = end; i > begin; --i) body(i - 1, i);
}
void forwards(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(begin, end);
}

}  // namespace

TEST(fused_pairs_give_the_bits_of_two_convolutions) {
  int fused = 0;
  for (int trial = 0; trial < 120; ++trial) {
    const bool large = trial % 6 == 0;  // several bands and threads
    const int64_t n = draw(1, 3), c = large ? draw(60, 140) : draw(1, 40), out = draw(1, 40);
    const int64_t h = large ? draw(20, 60) : draw(1, 15), w = large ? draw(20, 60) : draw(1, 15);
    const int64_t kernel = coin() ? 3 : draw(1, 5), stride = draw(1, 2), pad = draw(0, 2);
    const int64_t oh = conv::out_size(h, kernel, stride, pad, 1), ow = conv::out_size(w, kernel, stride, pad, 1);
    if (oh < 1 || ow < 1) continue;
    Buffer x(DType::F32, Layout::Nhwc, n, c, h, w, draw(0, 3)), between(DType::F32, Layout::Nhwc, n, c, oh, ow);
    Buffer y(DType::F32, Layout::Nhwc, n, out, oh, ow, 3), expected(DType::F32, Layout::Nhwc, n, out, oh, ow, 3);
    Buffer residual(static_cast<DType>(draw(0, 2)), static_cast<Layout>(draw(0, 2)), n, out, oh, ow);
    x.randomize(c);
    residual.randomize(out);
    y.fill(42.0f), expected.fill(42.0f);
    const Guarded filters(static_cast<size_t>(kernel * kernel * c) * sizeof(float));
    for (int64_t i = 0; i < kernel * kernel * c; ++i) filters.floats()[i] = normal();
    const Weight mix(out, c, 1, 1, DType::F32);
    const conv::WeightView view{mix.memory.data(), DType::F32, 1, out, c, 1, 1, 0, c, 1, 1, 1};
    const Guarded pack(static_cast<size_t>(conv::panels_floats(view)) * sizeof(float));
    conv::pack_panels(view, pack.floats());
    const conv::ResidentPanels panels(pack.floats(), out, c, 1);
    std::vector<float> tables(static_cast<size_t>(3 * (c + out)));
    for (float& v : tables) v = normal();
    std::vector<int32_t> rows;
    for (int64_t i = 0; i < n; ++i) rows.push_back(static_cast<int32_t>(draw(0, 1)));
    std::vector<int64_t> order;
    for (int64_t i = 0; i < n; ++i) order.push_back(n - 1 - i);

    Problem dw;
    dw.x = x.view(), dw.y = between.view();
    dw.count = n, dw.c_in = dw.c_out = dw.groups = c, dw.kh = dw.kw = kernel;
    for (int i = 0; i < 2; ++i) dw.stride[i] = stride, dw.pad[i] = pad;
    dw.depthwise = filters.floats(), dw.depthwise_stride = c;
    dw.epilogue.shift = tables.data(), dw.epilogue.table_stride = c;
    dw.epilogue.table_row = rows.data();
    dw.epilogue.act = static_cast<conv::Act>(draw(0, 4));
    Problem pw;
    pw.x = between.view(), pw.y = expected.view();
    pw.count = n, pw.c_in = c, pw.c_out = out;
    pw.weight = &panels;
    pw.epilogue.scale = tables.data() + c, pw.epilogue.table_stride = out, pw.epilogue.table_row = rows.data();
    pw.epilogue.act = static_cast<conv::Act>(draw(0, 4));
    if (coin()) pw.epilogue.residual = &residual.view(), pw.epilogue.residual_rows = order.data();
    for (const Isa isa : available()) {
      set_isa(isa);
      conv::run(dw);
      conv::run(pw);
      for (const bool threaded : {false, true}) {
        set_parallel(threaded ? backwards : forwards, threaded ? two : one);
        Problem filter = dw, mixer = pw;
        filter.y.data = nullptr, mixer.x.data = nullptr;
        mixer.y = y.view();
        y.fill(42.0f);
        if (!conv::can_fuse(filter, mixer)) continue;
        ++fused;
        conv::run_fused(filter, mixer);
        for (int64_t i = 0; i < y.size(); ++i) {
          const float a = y.get(i), b = expected.get(i);
          EXPECT(std::memcmp(&a, &b, 4) == 0, isa_name(isa), " trial ", trial, " element ", i, ": ", a, " not ", b);
        }
      }
      set_parallel(forwards, one);
    }
  }
  EXPECT(fused > 200, fused, " of the trials ran fused");
}

// A convolution, a depthwise and a pointwise one: maps large enough that they are run in one pass, several bands.
TEST(fused_triples_give_the_bits_of_three_convolutions) {
  int fused = 0;
  for (int trial = 0; trial < 30; ++trial) {
    const bool stem = trial % 3 == 0;
    const int64_t n = draw(1, 2), in = stem ? 3 : draw(1, 24), c = draw(60, 90), out = draw(1, 40);
    const int64_t front_kernel = stem ? 3 : 1, front_stride = stem ? 2 : 1, front_pad = stem ? draw(0, 1) : 0;
    const int64_t h = draw(48, 60), w = draw(48, 60), xh = (h - 1) * front_stride + front_kernel - 2 * front_pad,
                  xw = (w - 1) * front_stride + front_kernel - 2 * front_pad;
    const int64_t kernel = coin() ? 3 : draw(1, 5), stride = draw(1, 2), pad = draw(0, 2), dil = draw(1, 2);
    const int64_t oh = conv::out_size(h, kernel, stride, pad, dil), ow = conv::out_size(w, kernel, stride, pad, dil);
    Buffer x(static_cast<DType>(draw(0, 2)), static_cast<Layout>(draw(0, 2)), n, in, xh, xw, draw(0, 3));
    Buffer map(DType::F32, Layout::Nhwc, n, c, h, w), between(DType::F32, Layout::Nhwc, n, c, oh, ow);
    Buffer y(DType::F32, Layout::Nhwc, n, out, oh, ow, 3), expected(DType::F32, Layout::Nhwc, n, out, oh, ow, 3);
    Buffer residual(DType::F32, Layout::Nhwc, n, out, oh, ow);
    x.randomize(in);
    residual.randomize(out);
    const Guarded filters(static_cast<size_t>(kernel * kernel * c) * sizeof(float));
    for (int64_t i = 0; i < kernel * kernel * c; ++i) filters.floats()[i] = normal();
    const Weight widen(c, in, front_kernel, front_kernel, DType::F32), mix(out, c, 1, 1, DType::F32);
    const int64_t taps = front_kernel * front_kernel;
    const conv::WeightView views[] = {
        {widen.memory.data(), DType::F32, 1, c, in, front_kernel, front_kernel, 0, in * taps, taps, front_kernel, 1},
        {mix.memory.data(), DType::F32, 1, out, c, 1, 1, 0, c, 1, 1, 1}};
    const Guarded packs[] = {Guarded(static_cast<size_t>(conv::panels_floats(views[0])) * sizeof(float)),
                             Guarded(static_cast<size_t>(conv::panels_floats(views[1])) * sizeof(float))};
    for (int i = 0; i < 2; ++i) conv::pack_panels(views[i], packs[i].floats());
    const conv::ResidentPanels widen_panels(packs[0].floats(), c, in, taps), mix_panels(packs[1].floats(), out, c, 1);
    std::vector<float> shift(static_cast<size_t>(c + out));
    for (float& v : shift) v = normal();

    Problem front, dw, pw;
    front.x = x.view(), front.y = map.view();
    front.count = n, front.c_in = in, front.c_out = c, front.kh = front.kw = front_kernel;
    dw.x = map.view(), dw.y = between.view();
    dw.count = n, dw.c_in = dw.c_out = dw.groups = c, dw.kh = dw.kw = kernel;
    for (int i = 0; i < 2; ++i) {
      front.stride[i] = front_stride, front.pad[i] = front_pad;
      dw.stride[i] = stride, dw.pad[i] = pad, dw.dil[i] = dil;
    }
    front.weight = &widen_panels, dw.depthwise = filters.floats(), dw.depthwise_stride = c;
    pw.x = between.view(), pw.y = expected.view();
    pw.count = n, pw.c_in = c, pw.c_out = out, pw.weight = &mix_panels;
    front.epilogue.shift = dw.epilogue.shift = shift.data(), pw.epilogue.shift = shift.data() + c;
    for (Problem* p : {&front, &dw, &pw}) p->epilogue.act = static_cast<conv::Act>(draw(0, 4));
    if (coin()) pw.epilogue.residual = &residual.view();
    for (const Isa isa : available()) {
      set_isa(isa);
      for (const Problem* p : {&front, &dw, &pw}) conv::run(*p);
      for (const bool threaded : {false, true}) {
        set_parallel(threaded ? backwards : forwards, threaded ? two : one);
        Problem first = front, filter = dw, mixer = pw;
        first.y.data = filter.x.data = filter.y.data = mixer.x.data = nullptr;
        mixer.y = y.view();
        y.fill(42.0f);
        if (!conv::can_fuse(first, filter, mixer)) continue;
        ++fused;
        conv::run_fused(first, filter, mixer);
        int64_t wrong = 0;
        for (int64_t i = 0; i < n * oh * ow; ++i)
          for (int64_t o = 0; o < out; ++o) {
            const int64_t at = i / (oh * ow) * mixer.y.sn + i / ow % oh * mixer.y.sh + i % ow * mixer.y.sw + o;
            wrong += std::memcmp(static_cast<float*>(mixer.y.data) + at, static_cast<float*>(pw.y.data) + at, 4) != 0;
          }
        EXPECT(wrong == 0, isa_name(isa), " trial ", trial, ": ", wrong, " elements differ");
      }
      set_parallel(forwards, one);
    }
  }
  EXPECT(fused > 60, fused, " of the trials ran fused");
}

// What does not lie channels-last in fp32 is left to two convolutions.
TEST(only_channels_last_pairs_are_fused) {
  for (const Layout layout : {Layout::Nhwc, Layout::Nchw}) {
    for (const DType dtype : {DType::F32, DType::BF16}) {
      const Buffer x(dtype, layout, 1, 8, 6, 6), y(dtype, layout, 1, 4, 6, 6);
      const float filters[9 * 8] = {};
      Problem dw, pw;
      dw.x = x.view(), dw.y = x.view(), dw.count = 1, dw.c_in = dw.c_out = dw.groups = 8, dw.kh = dw.kw = 3;
      dw.depthwise = filters, dw.depthwise_stride = 8;
      pw.y = y.view(), pw.count = 1, pw.c_in = 8, pw.c_out = 4;
      EXPECT(conv::can_fuse(dw, pw) == (layout == Layout::Nhwc && dtype == DType::F32), "layout and type decide");
    }
  }
}

}  // namespace effkern::test
