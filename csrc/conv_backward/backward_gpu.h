// What the GPU's kernels for gradients of a convolution are given, and how their work is cut, from shapes alone. The
// gradient in the input is a convolution itself (conv_gpu.h) over a weight that `Transpose` turned round.
#pragma once

#include <cstdint>

#include "../common/cuda/columns.h"
#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"
#include "../conv/conv_gpu.h"

namespace effkern::conv::gpu {

// gz = gy where the activation's slope, seen in y, is 1, and sums of it by channel.
template <class T>
struct ActGrad {
  device::Rows<const T> gy, y;  // y.at null: slopes are 1
  device::Rows<T> gz;           // .at null: sums alone
  Global<float> sums;           // [slices][channels]; null: none
  device::Slices slices;
  int32_t channels;
  bool relu6, wide;  // 16-byte access to all three
};

// [group][output][tap][input] of the running part to [group][input][tap][output] with taps turned round. For steps
// above 1 the taps that meet one residue of the input's position lie together: see tap_place.
template <class T>
struct Transpose {
  Global<const T> weight;
  int64_t so, si, sh, sw;
  Global<T> to;  // [groups][c_in][taps][pitch]
  int32_t groups, group_rows, c_out, c_in, pitch;
  Size2 kernel, step;
};

// Taps k with k % step == r: how many there are, and how many taps have a lower residue.
EFFKERN_BOTH int32_t taps_of(int32_t kernel, int32_t step, int32_t r) { return (kernel - r + step - 1) / step; }
EFFKERN_BOTH int32_t taps_before(int32_t kernel, int32_t step, int32_t r) {
  return kernel / step * r + (r < kernel % step ? r : kernel % step);
}
// Where the taps of residue r begin, by residues of rows, then of columns.
EFFKERN_BOTH int32_t class_place(Size2 kernel, Size2 step, Size2 r) {
  return taps_before(kernel.h, step.h, r.h) * kernel.w +
         taps_of(kernel.h, step.h, r.h) * taps_before(kernel.w, step.w, r.w);
}
// Where one tap lies: in its class by row, then by column, both from the last to the first.
EFFKERN_BOTH int32_t tap_place(Size2 kernel, Size2 step, Size2 tap) {
  const Size2 r{tap.h % step.h, tap.w % step.w};
  const int32_t down = taps_of(kernel.h, step.h, r.h) - 1 - tap.h / step.h,
                across = taps_of(kernel.w, step.w, r.w) - 1 - tap.w / step.w;
  return class_place(kernel, step, r) + down * taps_of(kernel.w, step.w, r.w) + across;
}

// Sums over the output's pixels of gz times x, by slices of them.
template <class T>
struct Wgrad {
  Global<const T> x, gz;
  Strides xs, gs;
  Global<float> parts;  // [slices][groups][c_out][columns]; depthwise: [slices][groups][taps]
  Size2 in, out, kernel, stride, pad, dilation;
  int32_t groups, c_in, c_out;  // channels a group
  int32_t tap_columns;          // of one tap: c_in in whole chunks
  int32_t columns;              // of all taps
  device::Slices slices;        // of the pixels of all samples
  bool wide;                    // depthwise: 16-byte access to both

  // Not for depthwise: entry i is sample rows[i] of x and gz; null: no list.
  Global<const int32_t> rows;
  Global<const int32_t> count;  // of entries; null: `classes` tell
  // With widths by sample: entries in classes of which the first have the most outputs. A block takes those that reach
  // its tile.
  Global<const Part> classes;
  Global<const int32_t> class_count;
  device::Indices in_of, out_of;  // channels of a sample, c_in and c_out at most; without words: these
};

// The slices added up in order, as the gradient of the whole weight: zeros where nothing ran.
template <class T>
struct Fold {
  Global<const float> parts;
  int64_t part;  // elements of a slice
  int32_t slices;
  Global<T> gw;
  int64_t so, si, sh, sw;
  int64_t elements;              // of gw
  int32_t whole_in, whole_rows;  // of the whole weight, a group
  int32_t groups, c_in, c_out;   // that ran, a group
  int32_t tap_columns, columns, kernel_w, taps;
};

// Sums of [slices][size] in order.
struct FoldSums {
  Global<const float> parts;
  Global<float> to;
  int32_t slices, size;
};

// All of them launch one kernel, allocate nothing and wait for nothing.
template <class T>
void run(const ActGrad<T>& p, device::Stream stream);
template <class T>
void run(const Transpose<T>& p, device::Stream stream);
template <class T>
void run(const Fold<T>& p, device::Stream stream);
void run(const FoldSums& p, device::Stream stream);

template <class T>
void run_depthwise(const Wgrad<T>& p, device::Stream stream);
void run(const Wgrad<device::F16>& p, device::Stream stream);
void run(const Wgrad<device::BF16>& p, device::Stream stream);
void run(const Wgrad<float>& p, Math math, device::Stream stream);  // TF32 or F32

}  // namespace effkern::conv::gpu
