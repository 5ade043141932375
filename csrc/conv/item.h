// Work items of a plan, and the copy of an item's input to fp32 channels-last scratch.
#pragma once

#include <algorithm>

#include "plan.h"
#include "problem.h"
#include "ukernel.h"

namespace effkern::conv {

struct Item {
  int64_t first, samples;  // listed samples
  int64_t row, rows;       // output rows
};

inline Item item_of(const Problem& p, const Plan& plan, int64_t index) {
  Item item;
  item.first = index / plan.bands * plan.samples;
  item.samples = std::min(plan.samples, p.count - item.first);
  item.row = index % plan.bands * plan.rows;
  item.rows = std::min(plan.rows, p.y.h - item.row);
  return item;
}

inline const char* at(const Activation& t, int64_t element) {
  return static_cast<const char*>(t.data) + element * dtype_size(t.dtype);
}

inline int64_t x_row(const Problem& p, int64_t i) { return p.x_rows != nullptr ? p.x_rows[i] : i; }
inline int64_t y_row(const Problem& p, int64_t i) { return p.y_rows != nullptr ? p.y_rows[i] : i; }
inline int64_t residual_row(const Problem& p, int64_t i) {
  return p.epilogue.residual_rows != nullptr ? p.epilogue.residual_rows[i] : i;
}

// First input row that the item's output rows can touch, clamped into the image.
inline int64_t first_in_row(const Problem& p, const Item& item) {
  return std::clamp<int64_t>(item.row * p.stride[0] - p.pad[0], 0, p.x.h);
}

// One sample of the input as the kernels read it: channels side by side in fp32, in place or staged.
struct Image {
  const float* data;  // pixel (top, 0)
  int64_t top;        // input row that `data` begins with
  int64_t row_pitch, pixel_pitch;
};

// Copies the input rows of an item to [sample][row][column][pitch] fp32.
void stage(const Problem& p, const Plan& plan, const Item& item, float* out);

inline Image image_of(const Problem& p, const Plan& plan, const Item& item, int64_t sample, const float* staged) {
  if (!plan.staged)
    return {static_cast<const float*>(p.x.data) + x_row(p, item.first + sample) * p.x.sn, 0, p.x.sh, p.x.sw};
  const int64_t line = plan.stage_width * plan.stage_pitch;
  return {staged + sample * plan.in_rows * line + plan.stage_left * plan.stage_pitch, first_in_row(p, item), line,
          plan.stage_pitch};
}

// Where panel `index` of all groups lies.
struct PanelPlace {
  int64_t group, index;   // the panel's number in its group
  int64_t channel, cols;  // its first output channel, and how many it has
};

inline PanelPlace panel_at(const Problem& p, int64_t index) {
  const int64_t out = p.c_out / p.groups, per_group = panels_of(out);
  const int64_t group = index / per_group, first = index % per_group * kPanel;
  return {group, index % per_group, group * out + first, std::min(kPanel, out - first)};
}

// Does units [begin, end) of a plan, item by item: worker.take(item) when an item begins, worker.run_panels(first, end)
// for its panels.
template <class Worker>
void walk(const Problem& p, const Plan& plan, int64_t begin, int64_t end, Worker& worker) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit / plan.panel_splits, split = unit % plan.panel_splits;
    if (unit == begin || split == 0) worker.take(item_of(p, plan, index));
    worker.run_panels(plan.panels * split / plan.panel_splits, plan.panels * (split + 1) / plan.panel_splits);
  }
}

// The part of a store that all tiles of a problem share; rows and addresses are left to fill in.
inline Store store_of(const Problem& p, int64_t cols) {
  const Epilogue& e = p.epilogue;
  Store s;
  s.rows = 0;
  s.cols = cols;
  s.one_table = true;
  s.y_dtype = p.y.dtype;
  s.y_sc = p.y.sc;
  s.has_residual = e.residual != nullptr;
  s.residual_dtype = s.has_residual ? e.residual->dtype : DType::F32;
  s.residual_sc = s.has_residual ? e.residual->sc : 1;
  s.act = e.act;
  return s;
}

}  // namespace effkern::conv
