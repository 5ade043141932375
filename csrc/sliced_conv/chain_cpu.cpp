// sliced_chain on the CPU: a whole slimmable network in one call, samples of one configuration at a time. What lies
// between the steps is no tensor and has no tail: maps of exactly the running channels, in scratch memory of a thread.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "../conv/dw_pw.h"
#include "chain.h"
#include "ragged.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

constexpr const char* kOp = "sliced_chain";
// While a sample's maps are larger than this it goes alone from step to step, so that they stay in L2 (half a MiB and
// more); behind, as many samples of a configuration go together as share their weights from a slower cache.
constexpr int64_t kLargeMap = 512 << 10;
constexpr int64_t kGroupBytes = 2 << 20;
constexpr size_t kKeptBytes = size_t{64} << 20;  // scratch a thread keeps; more is given back after the call

// A dense map of a chain. Rows of a multiple of 2 KiB would fall into few sets of the L1 cache.
conv::Activation dense_map(float* data, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t pitch = c % 512 == 0 && h * w > 1 ? c + conv::kPanel : c;
  conv::Activation a;
  a.data = data, a.dtype = DType::F32;
  a.n = n, a.c = c, a.h = h, a.w = w;
  a.sc = 1, a.sw = pitch, a.sh = w * pitch, a.sn = h * w * pitch;
  return a;
}

int64_t floats_of(const ChainStep& s, size_t configuration) {
  const conv::Activation a = dense_map(nullptr, 1, s.widths[configuration], s.h, s.w);
  return (a.sn + conv::kPanel - 1) / conv::kPanel * conv::kPanel;
}

// A convolution of a configuration, but for its maps and lists.
class Layer {
 public:
  Layer(const Tensor& handle, int64_t groups, int64_t c_in, int64_t c_out)
      : dims_(PackedWeight::dims(handle, groups, {kOp, "handles"})),
        part_{groups == 1 ? 1 : c_out, groups == 1 ? c_out : 1, groups == 1 ? c_in : 1},
        weight_(handle, dims_, part_) {
    problem_.c_in = c_in, problem_.c_out = c_out;
    weight_.attach(problem_);
    problem_.epilogue.shift = weight_.bias();
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;
  void set_tables(const float* scale, const float* shift) {
    problem_.epilogue.scale = scale;
    problem_.epilogue.shift = shift;
    if (weight_.bias() == nullptr) return;
    combined_.resize(static_cast<size_t>(problem_.c_out));
    add_bias(weight_.bias(), scale, shift, dims_, part_, combined_.data());
    problem_.epilogue.shift = combined_.data();
  }
  void set(const Geometry& g, conv::Act act) {
    set_geometry(problem_, g);
    problem_.epilogue.act = act;
  }
  conv::Problem problem(const conv::Activation& x, const int64_t* x_rows, const conv::Activation& y,
                        const int64_t* y_rows, int64_t count) const {
    conv::Problem p = problem_;
    p.x = x, p.y = y;
    p.x_rows = x_rows, p.y_rows = y_rows;
    p.count = count;
    return p;
  }
  double macs(int64_t outputs) const {
    return static_cast<double>(outputs) * problem_.kh * problem_.kw * (problem_.c_in / problem_.groups);
  }

 private:
  PackedWeight::Dims dims_;
  RunningPart part_;
  PackedWeight weight_;
  conv::Problem problem_;
  std::vector<float> combined_;
};

// Means over the map of every channel, [n][c]: sums of a row, then of the rows, which keeps rounding small.
void channel_means(const conv::Activation& v, float* means) {
  std::vector<float> line(static_cast<size_t>(v.c));
  for (int64_t n = 0; n < v.n; ++n) {
    float* sum = means + n * v.c;
    std::fill_n(sum, v.c, 0.0f);
    for (int64_t y = 0; y < v.h; ++y) {
      const float* p = static_cast<const float*>(v.data) + n * v.sn + y * v.sh;
      std::fill(line.begin(), line.end(), 0.0f);
      float* to = line.data();
      int64_t x = 0;
      for (; x + 4 <= v.w; x += 4, p += 4 * v.sw)
        for (int64_t c = 0; c < v.c; ++c) to[c] += (p[c] + p[v.sw + c]) + (p[2 * v.sw + c] + p[3 * v.sw + c]);
      for (; x < v.w; ++x, p += v.sw)
        for (int64_t c = 0; c < v.c; ++c) to[c] += p[c];
      for (int64_t c = 0; c < v.c; ++c) sum[c] += to[c];
    }
    const float pixels = static_cast<float>(v.h * v.w);
    for (int64_t c = 0; c < v.c; ++c) sum[c] /= pixels;
  }
}

void scale_channels(const conv::Activation& v, const float* factors) {
  for (int64_t n = 0; n < v.n; ++n) {
    float* pixel = static_cast<float*>(v.data) + n * v.sn;
    const float* factor = factors + n * v.c;
    for (int64_t i = 0; i < v.h * v.w; ++i, pixel += v.sw)
      for (int64_t c = 0; c < v.c; ++c) pixel[c] *= factor[c];
  }
}

// The chain in one configuration.
class Configuration {
 public:
  Configuration(const Chain& chain, int64_t index, int64_t x_channels, const std::vector<Tensor>& handles,
                const std::vector<FloatTable>& tables)
      : chain_(chain), at_(static_cast<size_t>(index)) {
    int64_t c = x_channels;
    for (const ChainStep& s : chain.steps) {
      const int64_t out = s.widths[at_];
      first_.push_back(nullptr), second_.push_back(nullptr);
      if (s.kind == ChainStep::kConv) {
        first_.back() = std::make_unique<Layer>(handles[s.handle], s.groups, c, out);
        first_.back()->set(s.g, s.act);
        if (s.table >= 0) {
          const auto row = [&](const FloatTable& t) { return t.data() + (t.rows() == 1 ? 0 : index) * t.columns(); };
          first_.back()->set_tables(row(tables[2 * s.table]), row(tables[2 * s.table + 1]));
        }
        macs_ += first_.back()->macs(out * s.h * s.w);
      } else if (s.kind == ChainStep::kAttention) {
        first_.back() = std::make_unique<Layer>(handles[s.handle], 1, c, s.outs);
        second_.back() = std::make_unique<Layer>(handles[s.expand], 1, s.outs, c);
        const Geometry g{{1, 1}, {0, 0}, {1, 1}};
        first_.back()->set(g, conv::Act::Relu), second_.back()->set(g, conv::Act::None);
        gates_ = std::max(gates_, 2 * c + s.outs);
      }
      c = out;
    }
    for (size_t i = 0; i < chain.steps.size(); ++i)
      if (floats_of(chain.steps[i], at_) * 4 > kLargeMap) split_ = i + 1;
    // Attention works in the place of its input, which the last step of the first part has to leave.
    while (split_ > 0 && chain.steps[split_ - 1].kind == ChainStep::kAttention) --split_;
    for (size_t i = 0; i < chain.steps.size(); ++i) {
      if (i < split_) large_ = std::max(large_, floats_of(chain.steps[i], at_));
      if (i + 1 >= split_) small_ = std::max(small_, floats_of(chain.steps[i], at_));
    }
  }

  double macs() const { return macs_; }

  // Samples that go together where all of them may.
  int64_t group() const { return std::max<int64_t>(kGroupBytes / (small_ * 4), 1); }

  void run(const conv::Activation& x, const conv::Activation& y, const int64_t* rows, int64_t count,
           int64_t threads) const {
    const size_t end = chain_.steps.size();
    const bool together = split_ < end;
    const size_t bytes = 2 * Arena::bytes(large_, sizeof(float)) + Arena::bytes(count * gates_, sizeof(float)) +
                         (together ? 2 * Arena::bytes(count * small_, sizeof(float)) : 0);
    static thread_local Arena kept;
    Arena own;
    Arena& arena = bytes <= kKeptBytes ? kept : own;
    arena.reset(bytes);
    float* const large[2] = {arena.take<float>(large_), arena.take<float>(large_)};
    float* gates = arena.take<float>(count * gates_);
    if (!together) {
      for (int64_t i = 0; i < count; ++i) steps(0, end, {x, rows + i, 1}, large, {y, rows + i, 1}, gates, threads);
      return;
    }
    float* const small[2] = {arena.take<float>(count * small_), arena.take<float>(count * small_)};
    if (split_ == 0) return steps(0, end, {x, rows, count}, small, {y, rows, count}, gates, threads);
    const ChainStep& last = chain_.steps[split_ - 1];
    conv::Activation between = dense_map(small[0], count, last.widths[at_], last.h, last.w);
    for (int64_t i = 0; i < count; ++i) {
      conv::Activation one = between;
      one.data = small[0] + i * between.sn, one.n = 1;
      steps(0, split_, {x, rows + i, 1}, large, {one, nullptr, 1}, gates, threads);
    }
    float* const turned[2] = {small[1], small[0]};
    steps(split_, end, {between, nullptr, count}, turned, {y, rows, count}, gates, threads);
  }

 private:
  struct Value {
    conv::Activation map;
    const int64_t* rows;
    int64_t count;
  };

  // A depthwise step whose successor mixes the channels of each of its pixels.
  bool is_pair(size_t i, size_t end) const {
    if (i + 1 >= end || chain_.steps[i + 1].kind != ChainStep::kConv || !chain_.steps[i].depthwise()) return false;
    const ChainStep& mix = chain_.steps[i + 1];
    const Geometry& g = mix.g;
    return mix.groups == 1 && mix.kh == 1 && mix.kw == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.pad[0] == 0 &&
           g.pad[1] == 0;
  }

  // Steps [first, end): from `in` to `out`, by turns through the two buffers, of which `in` is not the first.
  void steps(size_t first, size_t end, Value in, float* const buffers[2], const Value& out, float* gates,
             int64_t threads) const {
    int turn = 0;
    const auto result = [&](size_t i) {
      if (i + 1 == end) return out;
      const ChainStep& s = chain_.steps[i];
      return Value{dense_map(buffers[turn], in.count, s.widths[at_], s.h, s.w), nullptr, in.count};
    };
    for (size_t i = first; i < end; ++i) {
      const ChainStep& s = chain_.steps[i];
      if (s.kind == ChainStep::kAttention) {
        attend(i, in.map, gates, threads);
        continue;
      }
      Value to = result(i);
      if (s.kind == ChainStep::kMean) {
        channel_means(in.map, static_cast<float*>(to.map.data));
      } else {
        conv::Problem p = first_[i]->problem(in.map, in.rows, to.map, to.rows, in.count);
        if (is_pair(i, end)) {
          const Value after = result(i + 1);
          conv::Problem mix = first_[i + 1]->problem(to.map, nullptr, after.map, after.rows, in.count);
          if (conv::can_fuse(p, mix, threads)) {
            conv::run_fused(p, mix, threads);
            in = after;
            turn ^= 1;
            ++i;
            continue;
          }
        }
        conv::run(p, threads);
      }
      in = to;
      turn ^= 1;
    }
  }

  // v * sigmoid(expand(relu(reduce(mean of v)))), in the place of v.
  void attend(size_t i, const conv::Activation& v, float* scratch, int64_t threads) const {
    const int64_t n = v.n, between = chain_.steps[i].outs;
    float *means = scratch, *hidden = means + n * v.c, *gate = hidden + n * between;
    channel_means(v, means);
    const auto vectors = [&](float* data, int64_t c) { return dense_map(data, n, c, 1, 1); };
    conv::run(first_[i]->problem(vectors(means, v.c), nullptr, vectors(hidden, between), nullptr, n), threads);
    conv::run(second_[i]->problem(vectors(hidden, between), nullptr, vectors(gate, v.c), nullptr, n), threads);
    for (int64_t k = 0; k < n * v.c; ++k) gate[k] = 1.0f / (1.0f + std::exp(-gate[k]));
    scale_channels(v, gate);
  }

  const Chain& chain_;
  const size_t at_;  // of the configuration
  std::vector<std::unique_ptr<Layer>> first_, second_;
  double macs_ = 0;
  size_t split_ = 0;                           // the first step that several samples take together
  int64_t large_ = 0, small_ = 0, gates_ = 0;  // floats of a sample's map before and after it, and of its gates
};

struct Group {
  const Configuration* configuration;
  int64_t begin, count;  // of the sorted samples
  double macs() const { return configuration->macs() * static_cast<double>(count); }
};

// Cuts the groups into ranges of about equal work; false if a thread would have over a tenth more than its share.
bool share(const std::vector<Group>& groups, int64_t threads, std::vector<size_t>& cuts) {
  double total = 0, before = 0, most = 0, mine = 0;
  for (const Group& g : groups) total += g.macs();
  cuts.assign(1, 0);
  for (size_t i = 0; i < groups.size(); ++i) {
    const double half = before + groups[i].macs() / 2;
    while (half > total / static_cast<double>(threads) * static_cast<double>(cuts.size())) cuts.push_back(i), mine = 0;
    before += groups[i].macs();
    mine += groups[i].macs();
    most = std::max(most, mine);
  }
  cuts.push_back(groups.size());
  return most <= 1.1 * total / static_cast<double>(threads);
}

Tensor sliced_chain(const Tensor& x, std::vector<Tensor> handles, std::vector<Tensor> tables, const Tensor& width_idx,
                    std::vector<int64_t> steps) {
  const conv::Activation in = activation(x, {kOp, "x"});
  EFFKERN_CHECK_VALUE(tables.size() % 2 == 0, kOp, ": tables must be pairs of scale and shift, got ", tables.size());
  const Chain chain = read_chain(steps, in, handles, static_cast<int64_t>(tables.size() / 2), kOp);
  const std::vector<int64_t> index = read_widths(width_idx, in.n, chain.configurations - 1, {kOp, "width_idx"});
  std::vector<FloatTable> read;
  read.reserve(tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    int64_t columns = 0;
    for (const ChainStep& s : chain.steps)
      if (s.kind == ChainStep::kConv && s.table == static_cast<int64_t>(i / 2))
        columns = std::max(columns, *std::max_element(s.widths.begin(), s.widths.end()));
    read.emplace_back(tables[i], columns, x.scalar_type(), Arg{kOp, "tables"}, i % 2 == 0);
    EFFKERN_CHECK_VALUE(read.back().rows() == 1 || read.back().rows() == chain.configurations, kOp,
                        ": tables must have 1 row or ", chain.configurations, ", got ", read.back().rows());
  }
  const ChainStep& last = chain.steps.back();
  const int64_t channels = *std::max_element(last.widths.begin(), last.widths.end());
  Tensor y = like_input(x, in.n, channels, last.h, last.w);
  if (y.numel() == 0) return y;
  const conv::Activation out = activation(y, {kOp, "y"});

  const Classes classes = sort_classes(index, index);
  std::vector<std::unique_ptr<Configuration>> configurations;
  for (const WidthClass& c : classes.list)
    configurations.push_back(std::make_unique<Configuration>(chain, c.c_in, in.c, handles, read));
  const auto cut = [&](int64_t most) {
    std::vector<Group> groups;
    for (size_t i = 0; i < classes.list.size(); ++i) {
      const WidthClass& c = classes.list[i];
      const int64_t samples = c.end - c.begin, size = std::min(most, configurations[i]->group());
      const int64_t pieces = (samples + size - 1) / size;
      for (int64_t k = 0; k < pieces; ++k) {
        const int64_t begin = c.begin + samples * k / pieces, end = c.begin + samples * (k + 1) / pieces;
        groups.push_back({configurations[i].get(), begin, end - begin});
      }
    }
    return groups;
  };
  const auto run = [&](const Group& g, int64_t threads) {
    g.configuration->run(in, out, classes.order.data() + g.begin, g.count, threads);
  };
  const int64_t threads = num_threads();
  std::vector<Group> groups = cut(in.n);
  std::vector<size_t> cuts;
  bool shared = threads > 1 && share(groups, threads, cuts);
  if (threads > 1 && !shared) {
    std::vector<Group> ones = cut(1);
    shared = share(ones, threads, cuts);
    if (shared) groups = std::move(ones);
  }
  if (shared) {
    parallel_for(0, static_cast<int64_t>(cuts.size()) - 1, 1, [&](int64_t begin, int64_t end) {
      for (size_t i = cuts[begin]; i < cuts[end]; ++i) run(groups[i], 1);
    });
  } else {
    for (const Group& g : groups) run(g, threads == 1 ? 1 : 0);
  }
  std::vector<int64_t> widths;
  for (const int64_t i : index) widths.push_back(last.widths[i]);
  zero_tails(out, widths);
  return y;
}

}  // namespace
}  // namespace effkern::sliced_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("sliced_chain", TORCH_BOX(&effkern::sliced_conv::sliced_chain)); }
