// What the engine is asked: for the listed samples, the listed channel prefix, from a panelled weight, with one
// epilogue act(acc * scale + shift + residual), one store per output element. Raw pointers only.
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "../common/parallel.h"

namespace effkern::conv {

enum class Act : int { None, Relu, Relu6, Hardswish, Silu };

// A 4-d tensor as it lies in memory; strides in elements. Any strides are legal, sc == 1 is the fast layout.
struct Activation {
  void* data = nullptr;
  DType dtype = DType::F32;
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t sn = 0, sc = 0, sh = 0, sw = 0;
};

constexpr int64_t kPanel = 16;  // outputs a panel holds: 2 ymm or 1 zmm, and one cache line of fp32

constexpr int64_t kWinogradValues = 36;  // transforms of a 3x3 kernel for F(4,3)

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Gives weights as panels of 16 outputs, [tap][c_in_full][16] fp32, outputs past the end zero. A prefix of the inputs
// is a prefix of the middle dimension, a prefix of the outputs is a prefix of the panels: one pack serves all widths.
class Panels {
 public:
  explicit Panels(int64_t tap_stride) : tap_stride(tap_stride) {}
  virtual ~Panels() = default;
  // Panel p of a group. Either a pointer into the pack, or `scratch` after the panel was decoded into it. Called from
  // several threads at once; must not throw.
  virtual const float* panel(int64_t group, int64_t p, float* scratch) const = 0;
  // The panel's transforms for Winograd's F(4,3) as pack_winograd lays them, or null: they are then made when used.
  virtual const float* transformed(int64_t group, int64_t p) const {
    static_cast<void>(group), static_cast<void>(p);
    return nullptr;
  }
  // Floats that panel() needs at `scratch`; 0 for a resident pack. Decoders get larger pixel blocks.
  virtual int64_t scratch_floats() const { return 0; }
  const int64_t tap_stride;  // floats from one tap to the next
};

// A pack resident in memory: panels of all groups one after the other.
class ResidentPanels final : public Panels {
 public:
  // out_per_group and in_per_group are those of the whole weight, not of the active prefix.
  ResidentPanels(const float* data, int64_t out_per_group, int64_t in_per_group, int64_t taps,
                 const float* transforms = nullptr)
      : Panels(in_per_group * kPanel),
        data_(data),
        transforms_(transforms),
        panels_(panels_of(out_per_group)),
        panel_stride_(taps * in_per_group * kPanel) {}
  const float* panel(int64_t group, int64_t p, float*) const override {
    return data_ + (group * panels_ + p) * panel_stride_;
  }
  const float* transformed(int64_t group, int64_t p) const override {
    return transforms_ != nullptr ? transforms_ + (group * panels_ + p) * kWinogradValues * tap_stride : nullptr;
  }

 private:
  const float *data_, *transforms_;
  int64_t panels_, panel_stride_;
};

struct Epilogue {
  // Tables [rows][table_stride] of per-output-channel factors and addends; null means 1 and 0. A sample n of x uses
  // row table_row[n], or row 0 where table_row is null.
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t table_stride = 0;
  const int32_t* table_row = nullptr;
  // Added before act. May be y itself: an element is read before it is written, by the thread that writes it.
  const Activation* residual = nullptr;
  const int64_t* residual_rows = nullptr;  // sample of the residual for listed sample i; null = i
  Act act = Act::None;
};

// Auto is chosen from the shape of one sample. Winograd needs a 3x3 kernel of dilation 1 and stride 1 (F(2,3), F(4,3))
// or 2 (F(3,3)); elsewhere Direct takes its place, which keeps NaN and Inf within the outputs whose receptive field
// holds them, and exact zeros exact.
enum class Algo : int { Auto, Direct, Winograd23, Winograd33, Winograd43 };

struct Problem {
  Algo algo = Algo::Auto;
  Activation x, y;  // y.h, y.w are the output's; channels past c_in of x and past c_out of y are never touched
  // Listed samples: listed sample i reads x sample x_rows[i] and writes y sample y_rows[i]; null = i.
  int64_t count = 0;
  const int64_t* x_rows = nullptr;
  const int64_t* y_rows = nullptr;
  int64_t c_in = 0, c_out = 0;  // active channels, all running groups together
  int64_t groups = 1;           // running groups; c_in and c_out are multiples
  int64_t kh = 1, kw = 1;
  int64_t stride[2] = {1, 1}, pad[2] = {0, 0}, dil[2] = {1, 1};
  // One of the two: panels, or a depthwise weight [tap][depthwise_stride] (groups == c_in == c_out).
  const Panels* weight = nullptr;
  const float* depthwise = nullptr;
  int64_t depthwise_stride = 0;
  Epilogue epilogue;
};

inline int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
  const int64_t span = in + 2 * pad - dil * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// Runs the problem on `threads` threads of the pool (0: all of them; 1: on the calling thread, also inside a parallel
// loop). The result of a sample does not depend on the other samples, on count,
// on the order of the lists or on the number of threads, bit for bit: every output element is one sum over (tap,
// input channel) in ascending order, or for Winograd over input channels in every product of its tile.
void run(const Problem& problem, int64_t threads = 0);

// The same as a step of a longer work, cut for `threads` threads. The problem must outlive it.
Step step_of(const Problem& problem, int64_t threads);

}  // namespace effkern::conv
