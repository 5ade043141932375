// Steady state: once the scratch of a thread has grown to what its problems need, running them allocates nothing.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../common/arena.h"
#include "../conv/dw_pw.h"
#include "../conv/pack.h"
#include "../conv/plan.h"
#include "check.h"
#include "isas.h"
#include "oracle.h"

namespace effkern::test {
namespace {

std::atomic<int64_t> allocations{0};

void* counted(size_t bytes, size_t align) {
  ++allocations;
  void* memory = nullptr;
  if (posix_memalign(&memory, align, bytes) != 0) throw std::bad_alloc();
  return memory;
}

}  // namespace
}  // namespace effkern::test

// GCC sees free() after new where it inlines delete alone, and takes the pair for a mistake.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

// The engine's scratch comes from here; in a program its own definition wins over the C library's.
extern "C" void* aligned_alloc(size_t align, size_t bytes) { return effkern::test::counted(bytes, align); }
void* operator new(size_t bytes) { return effkern::test::counted(bytes, alignof(std::max_align_t)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace effkern::test {
namespace {

using conv::Problem;

// A convolution of n maps of the given side with all its memory.
struct Layer {
  Layer(conv::Algo algo, DType dtype, Layout layout, int64_t n, int64_t in, int64_t out, int64_t side, int64_t kernel,
        int64_t stride)
      : x(dtype, layout, n, in, side, side),
        y(dtype, layout, n, out, conv::out_size(side, kernel, stride, kernel / 2, 1),
          conv::out_size(side, kernel, stride, kernel / 2, 1)),
        weight(out, in, kernel, kernel, DType::F32),
        view{weight.memory.data(), DType::F32,      1,      out, in, kernel, kernel, 0,
             in * kernel * kernel, kernel * kernel, kernel, 1},
        pack(static_cast<size_t>(conv::panels_floats(view)) * sizeof(float)) {
    x.randomize(in);
    conv::pack_panels(view, pack.floats());
    panels = std::make_unique<conv::ResidentPanels>(pack.floats(), out, in, kernel * kernel);
    p.algo = algo;
    p.x = x.view(), p.y = y.view(), p.weight = panels.get();
    p.count = n, p.c_in = in, p.c_out = out, p.kh = p.kw = kernel;
    for (int i = 0; i < 2; ++i) p.stride[i] = stride, p.pad[i] = kernel / 2;
  }

  Buffer x, y;
  Weight weight;
  conv::WeightView view;
  Guarded pack;
  std::unique_ptr<conv::ResidentPanels> panels;
  Problem p;
};

// One filter a channel, and a pointwise convolution behind it.
struct Pair {
  Pair(int64_t n, int64_t c, int64_t out, int64_t side)
      : x(DType::F32, Layout::Nhwc, n, c, side, side),
        filters(static_cast<size_t>(9 * c) * sizeof(float)),
        pointwise(conv::Algo::Auto, DType::F32, Layout::Nhwc, n, c, out, side, 1, 1) {
    x.randomize(c);
    for (int64_t i = 0; i < 9 * c; ++i) filters.floats()[i] = normal();
    p.x = x.view(), p.y = pointwise.p.x;
    p.count = n, p.c_in = p.c_out = p.groups = c, p.kh = p.kw = 3, p.pad[0] = p.pad[1] = 1;
    p.depthwise = filters.floats(), p.depthwise_stride = c;
  }

  Buffer x;
  Guarded filters;
  Layer pointwise;
  Problem p;
};

}  // namespace

TEST(steady_state_allocates_nothing) {
  using conv::Algo;
  std::vector<std::unique_ptr<Layer>> layers;
  for (const Algo algo : {Algo::Auto, Algo::Direct, Algo::Winograd23, Algo::Winograd43})
    for (const DType dtype : {DType::F32, DType::F16})
      for (const Layout layout : {Layout::Nhwc, Layout::Nchw})
        for (const int64_t side : {28, 7})
          layers.push_back(std::make_unique<Layer>(algo, dtype, layout, 3, 40, 24, side, 3, 1));
  layers.push_back(std::make_unique<Layer>(Algo::Winograd33, DType::F32, Layout::Nhwc, 2, 24, 40, 29, 3, 2));
  layers.push_back(std::make_unique<Layer>(Algo::Auto, DType::F32, Layout::Nchw, 1, 3, 32, 64, 7, 2));
  layers.push_back(std::make_unique<Layer>(Algo::Auto, DType::F32, Layout::Nhwc, 4, 512, 32, 7, 1, 1));
  const std::unique_ptr<Pair> pair = std::make_unique<Pair>(2, 48, 32, 28);
  EXPECT(conv::winograd_form(layers.front()->p) != nullptr, "the choice is Winograd where it pays");
  EXPECT(conv::can_fuse(pair->p, pair->pointwise.p));
  const auto run_all = [&] {
    for (const auto& layer : layers) conv::run(layer->p, 1);
    conv::run(pair->p, 1);
    conv::run_fused(pair->p, pair->pointwise.p);
  };
  for (const Isa isa : available()) {
    set_isa(isa);
    run_all();
    const int64_t before = allocations;
    run_all();
    EXPECT(allocations == before, allocations - before, " allocations on ", isa_name(isa));
  }
  const int64_t before = allocations;
  Arena().reset(64);
  delete new int(1);
  EXPECT(allocations == before + 2, "the count counts");
}

}  // namespace effkern::test
