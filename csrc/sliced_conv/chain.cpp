#include "chain.h"

#include <algorithm>

namespace effkern::sliced_conv {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31, kMaxElements = int64_t{1} << 58;
constexpr int64_t kActs = 5;

class Reader {
 public:
  Reader(const std::vector<int64_t>& numbers, const char* op) : numbers_(numbers), op_(op) {}
  bool done() const { return at_ == numbers_.size(); }
  int64_t next() {
    EFFKERN_CHECK_VALUE(!done(), op_, ": steps must not end in the middle of one, got ", numbers_.size(), " numbers");
    return numbers_[at_++];
  }
  int64_t next(int64_t least, int64_t end, const char* what) {
    const int64_t value = next();
    EFFKERN_CHECK_VALUE(value >= least && value < end, op_, ": ", what, " must be in [", least, ", ", end - 1,
                        "], got ", value);
    return value;
  }

 private:
  const std::vector<int64_t>& numbers_;
  const char* op_;
  size_t at_ = 0;
};

void check_dims(const Tensor& handle, const PackedWeight::Dims& want, const char* op) {
  EFFKERN_CHECK_TYPE(PackedWeight::is_handle(handle), op,
                     ": handles must be 1-d uint8 tensors made by pack_conv_weight, got shape ", shape_text(handle));
  const PackedWeight::Dims d = PackedWeight::dims(handle, want.groups, {op, "handles"});
  EFFKERN_CHECK_VALUE(
      d.out_channels == want.out_channels && d.in_per_group == want.in_per_group && d.kh == want.kh && d.kw == want.kw,
      op, ": a handle was packed from [", d.out_channels, ", ", d.in_per_group, ", ", d.kh, ", ", d.kw,
      "], the step says [", want.out_channels, ", ", want.in_per_group, ", ", want.kh, ", ", want.kw, "]");
}

}  // namespace

Chain read_chain(const std::vector<int64_t>& numbers, const conv::Activation& x, const std::vector<Tensor>& handles,
                 int64_t tables, const char* op) {
  Reader read(numbers, op);
  const int64_t count = static_cast<int64_t>(handles.size());
  Chain chain;
  chain.configurations = read.next(1, kMaxSize, "the number of configurations");
  std::vector<int64_t> widths;  // of the value before; empty: those of x
  int64_t h = x.h, w = x.w;
  while (!read.done()) {
    ChainStep s{};
    s.kind = static_cast<ChainStep::Kind>(read.next(0, 3, "the kind of a step"));
    EFFKERN_CHECK_VALUE(s.kind == ChainStep::kConv || !chain.steps.empty(), op,
                        ": the first step must be a convolution");
    if (s.kind == ChainStep::kConv) {
      s.handle = read.next(0, count, "the handle of a step");
      s.table = read.next(-1, tables, "the tables of a step");
      s.outs = read.next(1, kMaxSize, "out_channels of a step"), s.ins = read.next(1, kMaxSize, "channels of a step");
      s.kh = read.next(1, kMaxSize, "kernel_size"), s.kw = read.next(1, kMaxSize, "kernel_size");
      int64_t pairs[3][2];
      for (auto& pair : pairs) pair[0] = read.next(), pair[1] = read.next();
      s.g = geometry(pairs[0], pairs[1], pairs[2], op);
      s.groups = read.next(1, kMaxSize, "groups of a step");
      s.act = static_cast<conv::Act>(read.next(0, kActs, "the activation of a step"));
      EFFKERN_CHECK_VALUE(s.groups == 1 || (s.groups == s.outs && s.ins == 1), op,
                          ": groups of a step must be 1, or its ", s.outs, " channels where it is depthwise, got ",
                          s.groups);
      check_dims(handles[s.handle], {s.outs, s.ins, s.kh, s.kw, s.groups}, op);
      for (int64_t i = 0; i < chain.configurations; ++i) {
        const int64_t in = widths.empty() ? x.c : widths[i], out = read.next(1, s.outs + 1, "a width");
        EFFKERN_CHECK_VALUE(in <= s.ins * s.groups, op, ": a step takes at most ", s.ins * s.groups, " channels, got ",
                            in, " in configuration ", i);
        EFFKERN_CHECK_VALUE(!s.depthwise() || in == out, op, ": a depthwise step must keep its ", in,
                            " channels of configuration ", i, ", got ", out);
        s.widths.push_back(out);
      }
      h = conv::out_size(h, s.kh, s.g.stride[0], s.g.pad[0], s.g.dil[0]);
      w = conv::out_size(w, s.kw, s.g.stride[1], s.g.pad[1], s.g.dil[1]);
      int64_t elements = 0;
      EFFKERN_CHECK_VALUE(h > 0 && w > 0, op, ": the input of step ", chain.steps.size(),
                          " is smaller than its kernel");
      const bool fits = h < kMaxSize && w < kMaxSize && !__builtin_mul_overflow(h * w, s.outs, &elements) &&
                        !__builtin_mul_overflow(elements, std::max<int64_t>(x.n, 1), &elements) &&
                        elements < kMaxElements;
      EFFKERN_CHECK_VALUE(fits, op, ": the result of step ", chain.steps.size(), " must be smaller, got ", h, "x", w);
    } else {
      s.widths = widths;
      if (s.kind == ChainStep::kMean) {
        h = w = 1;
      } else {
        s.handle = read.next(0, count, "the handle of a step"), s.expand = read.next(0, count, "the handle of a step");
        s.outs = read.next(1, kMaxSize, "the size between"), s.ins = read.next(1, kMaxSize, "channels of a step");
        check_dims(handles[s.handle], {s.outs, s.ins, 1, 1, 1}, op);
        check_dims(handles[s.expand], {s.ins, s.outs, 1, 1, 1}, op);
        const int64_t most = *std::max_element(widths.begin(), widths.end());
        EFFKERN_CHECK_VALUE(most <= s.ins, op, ": a step takes at most ", s.ins, " channels, got ", most);
      }
    }
    s.h = h, s.w = w;
    widths = s.widths;
    chain.steps.push_back(std::move(s));
  }
  EFFKERN_CHECK_VALUE(!chain.steps.empty() && chain.steps.back().kind == ChainStep::kConv, op,
                      ": the last step must be a convolution");
  return chain;
}

}  // namespace effkern::sliced_conv
