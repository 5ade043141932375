// Gradient of a codebook: numbers behind codes are added up by code. A block holds a table of some entries in shared
// memory and looks at every code of its slice of rows, 32 at a time; each warp owns a range of the entries and adds
// what names them, in the order of the codes, so that no two threads write one place and sums are the same bits in
// every run. Where entries are short, groups of lanes fetch the numbers of several codes at once and add them one after
// the other.
//
// Traffic: codes once a warp and table, numbers once, a table of floats a slice.
#pragma once

#include "../common/cuda/indices.cuh"
#include "book_grad.h"
#include "codes.cuh"

namespace effkern::pq {

using device::Shared;

// The coded row behind row i; -1 for padding.
template <class T>
__device__ __forceinline__ int32_t coded_row(const CodedRows<T>& of, int32_t i) {
  const int32_t row = of.picked.words ? device::entry_of(of.picked, i, of.coded - 1) : i;
  return row == of.padding ? -1 : row;
}
template <class T>
__device__ __forceinline__ int32_t value_row(const CodedRows<T>& of, int32_t i) {
  return of.bags.words ? device::entry_of(of.bags, i, of.value_rows - 1) : i;
}

template <class T>
__global__ void __launch_bounds__(kBookGradThreads, 4) book_grad(const __grid_constant__ BookGrad<T> p) {
  const CodedRows<T>& of = p.of;
  const int lane = device::lane(), warp = device::thread() / 32;
  const int32_t across = (of.d + p.width - 1) / p.width, tables = book_tables(p);
  const int32_t id = static_cast<int32_t>(device::block());
  const int32_t table = id % tables, book = id / tables % p.books, slice = id / tables / p.books;
  const int32_t element = table % across * p.width, width = of.d - element < p.width ? of.d - element : p.width;
  // The warp's entries.
  const int32_t per = (p.chunk + kBookGradWarps - 1) / kBookGradWarps;
  const int32_t start = table / across * p.chunk, first = start + warp * per;
  const int32_t end = start + p.chunk < of.codes.entries ? start + p.chunk : of.codes.entries;
  const int32_t count = end - first < 0 ? 0 : end - first < per ? end - first : per;
  const Shared<float> sums = device::shared_memory().template as<float>() + warp * per * p.width;
  for (int32_t i = lane; i < count * width; i += 32) device::store(sums + i, 0.0f);
  device::sync_warp();

  // Groups of lanes, a code each.
  const int groups = width < 32 ? 32 / width : 1, group = width < 32 ? lane / width : 0,
            part = width < 32 ? lane % width : lane;
  const int32_t begin = slice * p.slice, rows = of.rows - begin < p.slice ? of.rows - begin : p.slice;
  const int32_t a_row = of.book_per_position ? of.stages : of.book_per_stage ? of.positions : of.positions * of.stages;
  const int32_t items = rows * a_row;
  for (int32_t base = 0; base < items; base += 32) {
    int32_t entry = -1, column = 0, row = 0;
    float factor = 1.0f;
    if (base + lane < items) {
      const int32_t i = begin + (base + lane) / a_row, in_row = (base + lane) % a_row, coded = coded_row(of, i);
      const int32_t position = of.book_per_position ? book
                               : of.book_per_stage  ? in_row
                                                    : in_row / of.stages,
                    stage = of.book_per_position ? in_row
                            : of.book_per_stage  ? book
                                                 : in_row % of.stages;
      if (coded >= 0) {
        const int64_t at = (static_cast<int64_t>(coded) * of.positions + position) * of.stages + stage;
        const int32_t code = code_at(of.codes, at) - first;
        if (code >= 0 && code < count) {
          entry = code, column = position * of.d + element, row = value_row(of, i);
          if (of.scale) factor = device::load<float>(of.scale + coded);
          if (of.weights) factor *= device::load<float>(of.weights + i);
        }
      }
    }
    uint32_t votes = device::ballot(entry >= 0);
    while (votes != 0) {
      uint32_t mine = votes;
      for (int g = 0; g < group; ++g) mine &= mine - 1u;
      const bool have = mine != 0 && group < groups;
      const int from = have ? device::popcount((mine & (0u - mine)) - 1u) : 0;
      const int32_t to = device::shuffle(entry, from), at = device::shuffle(column, from);
      const int64_t of_row = device::shuffle(row, from) * p.of.pitch;
      const float times = device::shuffle(factor, from);
      for (int32_t k = 0; k < width; k += 32) {
        const bool adds = have && k + part < width && at + k + part < of.columns;
        float value = 0.0f;
        if (adds) value = device::to_float(device::load<T>(of.values + (of_row + at + k + part)));
        for (int g = 0; g < groups; ++g) {
          const Shared<float> sum = sums + (to * width + k + part);
          if (adds && group == g) device::store(sum, device::fma(times, value, device::load<float>(sum)));
          device::sync_warp();  // codes may name one entry
        }
      }
      for (int g = 0; g < groups; ++g) votes &= votes - 1u;
    }
  }
  const int64_t to = (static_cast<int64_t>(slice) * p.books + book) * of.codes.entries + first;
  for (int32_t i = lane; i < count * width; i += 32)
    device::store(p.parts + ((to + i / width) * of.d + element + i % width), device::load<float>(sums + i));
}

constexpr int kBookFoldThreads = 256;

template <class U>
__global__ void __launch_bounds__(kBookFoldThreads, 4) book_fold(const __grid_constant__ BookFold<U> p) {
  const int64_t step = static_cast<int64_t>(device::blocks()) * kBookFoldThreads;
  for (int64_t i = static_cast<int64_t>(device::block()) * kBookFoldThreads + device::thread(); i < p.size; i += step) {
    double sum = 0.0;
    for (int32_t s = 0; s < p.slices; ++s) sum += static_cast<double>(device::load<float>(p.parts + (s * p.size + i)));
    device::store(p.to + i, device::from_float<U>(static_cast<float>(sum)));
  }
}

constexpr int kRowDotsThreads = 256, kRowDotsWarps = kRowDotsThreads / 32;

template <class T>
__global__ void __launch_bounds__(kRowDotsThreads, 4) row_dots(const __grid_constant__ RowDots<T> p) {
  const CodedRows<T>& of = p.of;
  const int lane = device::lane();
  int32_t i = static_cast<int32_t>(device::block()) * kRowDotsWarps + device::thread() / 32;
  for (; i < of.rows; i += static_cast<int32_t>(device::blocks()) * kRowDotsWarps) {
    const int32_t coded = coded_row(of, i);
    const int64_t values = value_row(of, i) * of.pitch;
    float dot = 0.0f;
    for (int32_t column = lane; coded >= 0 && column < of.columns; column += 32) {
      const int32_t position = column / of.d, element = column % of.d;
      float number = 0.0f;
      for (int32_t stage = 0; stage < of.stages; ++stage) {
        const int32_t code =
            code_at(of.codes, (static_cast<int64_t>(coded) * of.positions + position) * of.stages + stage);
        const int64_t book = of.book_per_position ? position : of.book_per_stage ? stage : 0;
        number += device::load<float>(p.book + ((book * of.codes.entries + code) * of.d + element));
      }
      dot = device::fma(device::to_float(device::load<T>(of.values + (values + column))), number, dot);
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) dot += device::shuffle_xor(dot, bits);
    if (lane != 0) continue;
    if (p.by_scale) device::store(p.by_scale + i, of.weights ? dot * device::load<float>(of.weights + i) : dot);
    if (p.by_weight)
      device::store(p.by_weight + i, of.scale && coded >= 0 ? dot * device::load<float>(of.scale + coded) : dot);
  }
}

}  // namespace effkern::pq
