// What every instance of the GPU's convolution is put through.
#pragma once

#include "conv_case.h"

namespace effkern::test::simt {

using device::BF16;
using device::F16;
template <Math kMath, class T>
using Large = conv::gpu::Large<kMath, T>;
template <Math kMath, class T>
using Narrow = conv::gpu::Narrow<kMath, T>;
template <Math kMath, class T>
using Small = conv::gpu::Small<kMath, T>;
template <Math kMath, class T>
using Tiny = conv::gpu::Tiny<kMath, T>;
template <Math kMath, class T>
using Unaligned = conv::gpu::Unaligned<kMath, T>;

// One chunk of 16 bytes as the unit of channels: 8 or 4.
template <class C>
constexpr int kUnit = 16 / static_cast<int>(sizeof(typename C::T));

// Tails on every side: rows, columns, channels within a chunk, more steps than stages and fewer.
template <class C>
void tails() {
  constexpr int u = kUnit<C>;
  holds<C>({.n = 2, .h = 7, .w = 5, .c_in = 3 * u, .c_out = 2 * u, .ci = 5 * u, .co = 3 * u, .residual = true});
  holds<C>({.n = 3,
            .h = 9,
            .w = 6,
            .c_in = 11 * u,
            .c_out = 5 * u + 3,
            .kernel = 1,
            .pad = 0,
            .co = 6 * u,
            .extra_x = u,
            .act = Act::Relu,
            .residual = true});
  holds<C>({.h = 6, .w = 6, .c_in = u + 1, .c_out = 1, .stride = 2, .ci = 2 * u, .co = 7, .scale = true});
}

template <class C>
void epilogues() {
  for (const Act act : {Act::None, Act::Relu, Act::Relu6, Act::Hardswish, Act::Silu})
    for (const bool residual : {false, true})
      holds<C>({.n = 3,
                .h = 4,
                .w = 4,
                .c_in = 8,
                .c_out = 24,
                .kernel = 1,
                .pad = 0,
                .act = act,
                .scale = true,
                .residual = residual,
                .tables = 4},
               2);
}

template <class C>
void lists() {
  constexpr int u = kUnit<C>;
  const Case base{.n = 6, .h = 4, .w = 5, .c_in = 2 * u, .c_out = 3 * u, .residual = true};
  Case c = base;
  c.x_rows = {4, 0, 3}, c.y_rows = {1, 5, 0}, c.count = 3;
  holds<C>(c);
  c.count = 1;  // the list is longer than the count
  holds<C>(c);
  c.count = 0;
  holds<C>(c);
  c = base, c.extra_y = 0, c.bias = c.scale = c.gate = c.copies = true, c.act = Act::Relu;
  c.x_rows = {5, 1, 0, 2, 4, 3}, c.y_rows = {5, 1, 4, 3, 2, 0}, c.count = 2;  // block skipping's last convolution
  holds<C>(c);
  c.count = 0;
  holds<C>(c);
  c.count = 6;
  holds<C>(c);
  c = base, c.c_out = 3 * u + 1, c.gate = c.copies = true;  // samples that are no whole chunks
  c.x_rows = {5, 1, 0}, c.y_rows = {5, 1, 4}, c.count = 1;
  holds<C>(c);
  c = base, c.x_rows = {2, 2, 1}, c.y_rows = {0, 1, 2}, c.count = 3;  // a sample read twice
  holds<C>(c);
}

template <class C>
void ragged() {
  constexpr int u = kUnit<C>;
  Case c{.n = 7, .h = 5, .w = 4, .c_in = 0, .c_out = 0, .scale = true, .tables = 3};
  c.x_rows = c.y_rows = {3, 1, 6, 0, 2, 5, 4};
  c.parts = {{6 * u, 70, 0, 2}, {2 * u, 33, 2, 3}, {2 * u, 0, 5, 1}, {3, 8, 6, 1}};
  c.zero_to = 70;
  holds<C>(c);
  c.zero_to = 80;
  holds<C>(c);
  c.zero_to = 0;
  holds<C>(c);
  c.parts = {{u, 8, 0, 0}, {2 * u, 16, 0, 7}, {u, 8, 7, 0}};  // empty classes around a full one
  holds<C>(c);
  c.parts = {{u, 8, 0, 0}};
  holds<C>(c);
}

// The launch's counters: no bank conflict anywhere, whole sectors, bytes and products as the model says.
template <class C>
void measure(const Case& c) {
  Run<C> run(c, 5);
  const Report report = run.run(3, true);
  EXPECT(report.ok() && run.compare().empty(), report.what);
  const auto cost = [&](Op op) { return report.cost.count(op) != 0 ? report.cost.at(op) : Cost{}; };
  for (const Op op : {Op::LoadMatrix, Op::AsyncCopyShared, Op::AsyncCopy})
    EXPECT(cost(op).passes == cost(op).least, "operation ", static_cast<int>(op), ": ", cost(op).passes, " passes for ",
           cost(op).least);
  EXPECT(cost(Op::LoadShared).passes == cost(Op::LoadShared).least, cost(Op::LoadShared).passes, " for ",
         cost(Op::LoadShared).least);
  EXPECT(cost(Op::StoreShared).passes == cost(Op::StoreShared).least, cost(Op::StoreShared).passes, " for ",
         cost(Op::StoreShared).least);
  EXPECT(cost(Op::StoreGlobal).passes == cost(Op::StoreGlobal).least && cost(Op::StoreGlobal).bytes_per_lane == 16);
  const auto model = conv::gpu::work<C>(run.problem());
  EXPECT(cost(Op::AsyncCopy).bytes == model.bytes_a + model.bytes_b, cost(Op::AsyncCopy).bytes, " bytes read, model ",
         model.bytes_a + model.bytes_b);
  EXPECT(cost(Op::StoreGlobal).bytes == model.bytes_y, cost(Op::StoreGlobal).bytes, " bytes written, model ",
         model.bytes_y);
  EXPECT(report.mma == model.mma, report.mma, " products, model ", model.mma);
}

// Bits of the same problem under another tile, or of one sample alone.
template <class C>
std::vector<typename C::T> bits(const Case& c, uint32_t seed = 3) {
  Run<C> run(c, 7);
  const Report report = run.run(seed);
  EXPECT(report.ok(), report.what);
  return run.result();
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace effkern::test::simt
