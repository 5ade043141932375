// rep_conv2d_chain on the CPU: many convolutions that feed one another, in one call. What lies between them is no
// tensor: maps that are not returned live in scratch memory of this thread, each in the place of one that is done with.
#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "../common/arena.h"
#include "../common/packed_weight.h"
#include "../conv/dw_pw.h"
#include "../conv/mean.h"
#include "../conv/plan.h"

namespace effkern::rep_conv {
namespace {

constexpr const char* kOp = "rep_conv2d_chain";
constexpr size_t kKeptBytes =
    size_t{64} << 20;  // scratch a thread keeps; a sample's maps that are larger are given back after the call
constexpr int64_t kReturned = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxSize = int64_t{1} << 31, kMaxElements = int64_t{1} << 58;

enum class Kind { Convolution, Mean, MeanUp };

// One convolution, or average, as `steps` tells it: value numbers count x, others, then the results of the steps
// before.
struct ConvStep {
  int64_t x, residual, handle, out_channels, kh, kw;
  Geometry g;
  int64_t groups;
  Kind kind;
  conv::Act act;
};

class Reader {
 public:
  explicit Reader(const std::string& text) : at_(text.data()), end_(at_ + text.size()) {}
  bool done() const { return at_ == end_; }
  int64_t number() {
    skip();
    int64_t value = 0;
    const auto [next, error] = std::from_chars(at_, end_, value);
    EFFKERN_CHECK_VALUE(error == std::errc() && next != at_, kOp, ": steps must have a number at byte ", offset(),
                        " of ", end_ - first_);
    at_ = next;
    return value;
  }
  std::string word() {
    skip();
    const char* begin = at_;
    while (at_ != end_ && *at_ >= 'a' && *at_ <= 'z') ++at_;
    while (at_ != end_ && *at_ >= '0' && *at_ <= '9') ++at_;
    return {begin, at_};
  }
  void end_of_step() {
    EFFKERN_CHECK_VALUE(at_ != end_ && *at_ == ';', kOp, ": steps must have a ';' at byte ", offset());
    ++at_;
  }

 private:
  void skip() {
    while (at_ != end_ && *at_ == ' ') ++at_;
  }
  int64_t offset() const { return at_ - first_; }
  const char *at_, *end_, *first_ = at_;
};

std::vector<ConvStep> read_steps(const std::string& text) {
  std::vector<ConvStep> steps;
  for (Reader read(text); !read.done();) {
    ConvStep s{};
    s.x = read.number(), s.residual = read.number(), s.handle = read.number();
    s.out_channels = read.number(), s.kh = read.number(), s.kw = read.number();
    std::vector<int64_t> pairs[3];
    for (auto& pair : pairs) {
      pair.push_back(read.number());
      pair.push_back(read.number());
    }
    s.g = geometry(pairs[0], pairs[1], pairs[2], kOp);
    s.groups = read.number();
    const std::string word = read.word();
    s.kind = word == "mean" ? Kind::Mean : word == "meanup" ? Kind::MeanUp : Kind::Convolution;
    if (s.kind == Kind::Convolution) s.act = act_from_name(word, kOp);
    read.end_of_step();
    steps.push_back(s);
  }
  return steps;
}

// Bytes of scratch that are free again after their last reader, handed out first fit from the bottom.
class Places {
 public:
  size_t take(size_t bytes, int64_t last) {
    size_t offset = 0;
    auto at = live_.begin();
    for (; at != live_.end() && at->begin - offset < bytes; ++at) offset = at->end;
    live_.insert(at, {offset, offset + bytes, last});
    total_ = std::max(total_, offset + bytes);
    return offset;
  }
  void release_before(int64_t step) {
    std::erase_if(live_, [&](const Range& r) { return r.last < step; });
  }
  size_t total() const { return total_; }

 private:
  struct Range {
    size_t begin, end;
    int64_t last;
  };
  std::vector<Range> live_;  // by begin, disjoint
  size_t total_ = 0;
};

// A map of the chain: channels-last and dense.
conv::Activation dense_map(DType dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
  conv::Activation a;
  a.dtype = dtype;
  a.n = n, a.c = c, a.h = h, a.w = w;
  a.sc = 1, a.sw = c, a.sh = w * c, a.sn = h * w * c;
  return a;
}

// The result of an average; a kernel of 0 x 0 is the whole map.
conv::Activation mean_of(const ConvStep& s, size_t index, DType dtype, const conv::Activation& in) {
  const bool plain = s.residual == -1 && s.handle == -1 && s.groups == 1 && s.g.pad[0] == 0 && s.g.pad[1] == 0 &&
                     s.g.dil[0] == 1 && s.g.dil[1] == 1;
  EFFKERN_CHECK_VALUE(plain, kOp, ": step ", index, " averages, so it must have residual and handle -1, no padding, ",
                      "dilation 1 and 1 group");
  EFFKERN_CHECK_VALUE(s.kh >= 0 && s.kw >= 0 && (s.kh == 0) == (s.kw == 0), kOp, ": the kernel of step ", index,
                      " must be positive, or 0x0 for the whole map, got ", s.kh, "x", s.kw);
  EFFKERN_CHECK_VALUE(s.out_channels >= in.c && s.out_channels < kMaxSize, kOp, ": step ", index,
                      " must have as many channels as its input, ", in.c, ", or more, got ", s.out_channels);
  const bool up = s.kind == Kind::MeanUp;
  const int64_t h = s.kh == 0 ? in.h > 0 : conv::mean_size(in.h, s.kh, s.g.stride[0], up);
  const int64_t w = s.kw == 0 ? in.w > 0 : conv::mean_size(in.w, s.kw, s.g.stride[1], up);
  EFFKERN_CHECK_VALUE(h > 0 && w > 0, kOp, ": the input of step ", index, " (", in.h, "x", in.w,
                      ") is smaller than its kernel (", s.kh, "x", s.kw, ")");
  int64_t elements = 0;
  const bool fits = !__builtin_mul_overflow(h * w, std::max<int64_t>(s.out_channels, 1), &elements) &&
                    !__builtin_mul_overflow(elements, std::max<int64_t>(in.n, 1), &elements) && elements < kMaxElements;
  EFFKERN_CHECK_VALUE(fits, kOp, ": the result of step ", index, " must be smaller, got ", h, "x", w);
  return dense_map(dtype, in.n, s.out_channels, h, w);
}

conv::Activation result_of(const ConvStep& s, size_t index, DType dtype, const std::vector<conv::Activation>& values,
                           const std::vector<Tensor>& handles) {
  const auto known = static_cast<int64_t>(values.size());
  EFFKERN_CHECK_VALUE(s.x >= 0 && s.x < known && s.residual >= -1 && s.residual < known, kOp, ": step ", index,
                      " must read values below ", known, ", got ", s.x, " and ", s.residual);
  if (s.kind != Kind::Convolution) return mean_of(s, index, dtype, values[s.x]);
  EFFKERN_CHECK_VALUE(s.handle >= 0 && s.handle < static_cast<int64_t>(handles.size()), kOp, ": step ", index,
                      " must use one of ", handles.size(), " handles, got ", s.handle);
  const Tensor& handle = handles[s.handle];
  EFFKERN_CHECK_TYPE(PackedWeight::is_handle(handle), kOp,
                     ": handles must be 1-d uint8 tensors made by "
                     "pack_conv_weight, got shape ",
                     shape_text(handle), " at ", s.handle);
  const PackedWeight::Dims d = PackedWeight::dims(handle, s.groups, {kOp, "handles"});
  EFFKERN_CHECK_VALUE(d.out_channels == s.out_channels && d.kh == s.kh && d.kw == s.kw, kOp, ": the handle of step ",
                      index, " was packed for ", d.out_channels, " output channels and a ", d.kh, "x", d.kw,
                      " kernel, got ", s.out_channels, " and ", s.kh, "x", s.kw);
  const conv::Activation& in = values[s.x];
  EFFKERN_CHECK_VALUE(in.c == d.in_per_group * d.groups, kOp, ": step ", index, " must read ",
                      d.in_per_group * d.groups, " channels, got ", in.c);
  const int64_t h = conv::out_size(in.h, s.kh, s.g.stride[0], s.g.pad[0], s.g.dil[0]);
  const int64_t w = conv::out_size(in.w, s.kw, s.g.stride[1], s.g.pad[1], s.g.dil[1]);
  EFFKERN_CHECK_VALUE(h > 0 && w > 0, kOp, ": the input of step ", index, " (", in.h, "x", in.w,
                      ") is smaller than its kernel (", s.kh, "x", s.kw, ")");
  int64_t elements = 0;
  const bool fits = h < kMaxSize && w < kMaxSize && !__builtin_mul_overflow(h * w, d.out_channels, &elements) &&
                    !__builtin_mul_overflow(elements, std::max<int64_t>(in.n, 1), &elements) && elements < kMaxElements;
  EFFKERN_CHECK_VALUE(fits, kOp, ": the result of step ", index, " must be smaller, got ", h, "x", w);
  if (s.residual >= 0) {
    const conv::Activation& r = values[s.residual];
    EFFKERN_CHECK_VALUE(r.n == in.n && r.c == d.out_channels && r.h == h && r.w == w, kOp, ": the residual of step ",
                        index, " must have the shape of its result [", in.n, ", ", d.out_channels, ", ", h, ", ", w,
                        "], got [", r.n, ", ", r.c, ", ", r.h, ", ", r.w, "]");
  }
  return dense_map(dtype, in.n, d.out_channels, h, w);
}

// A step ready to run. The problem points into the handle and into `values`.
class Convolution {
 public:
  Convolution(const ConvStep& s, const Tensor& handle, const std::vector<conv::Activation>& values,
              const conv::Activation& y)
      : dims_(PackedWeight::dims(handle, s.groups, {kOp, "handles"})),
        packed_(handle, dims_, {dims_.groups, dims_.out_channels / dims_.groups, dims_.in_per_group}) {
    problem_.x = values[s.x];
    problem_.y = y;
    problem_.count = y.n;
    problem_.c_in = problem_.x.c;
    problem_.c_out = y.c;
    packed_.attach(problem_);
    set_geometry(problem_, s.g);
    problem_.epilogue.shift = packed_.bias();
    problem_.epilogue.residual = s.residual >= 0 ? &values[s.residual] : nullptr;
    problem_.epilogue.act = s.act;
  }
  const conv::Problem& problem() const { return problem_; }

 private:
  PackedWeight::Dims dims_;
  PackedWeight packed_;
  conv::Problem problem_;
};

bool is_pointwise(const ConvStep& s) {
  const Geometry& g = s.g;
  return s.kind == Kind::Convolution && s.kh == 1 && s.kw == 1 && s.groups == 1 && g.stride[0] == 1 &&
         g.stride[1] == 1 && g.pad[0] == 0 && g.pad[1] == 0;
}

// True if step i filters channel by channel and only step i + 1 reads the result, to mix the channels: such a pair may
// run in one pass. Value `given + i` is the result of step i, `last` tells which step reads it last.
bool is_pair(const std::vector<ConvStep>& chain, size_t i, int64_t given, const std::vector<int64_t>& last) {
  if (i + 1 >= chain.size() || last[i] != static_cast<int64_t>(i) + 1) return false;
  const ConvStep &filter = chain[i], &mix = chain[i + 1];
  const int64_t result = given + static_cast<int64_t>(i);
  return filter.kind == Kind::Convolution && filter.groups > 1 && filter.groups == filter.out_channels &&
         filter.residual < 0 && is_pointwise(mix) && mix.x == result && mix.residual != result;
}

// True if only the pair behind step i reads its result: the three may run in one pass.
bool is_front(const std::vector<ConvStep>& chain, size_t i, int64_t given, const std::vector<int64_t>& last,
              const std::vector<bool>& pair) {
  const int64_t result = given + static_cast<int64_t>(i);
  return chain[i].kind == Kind::Convolution && i + 1 < chain.size() && pair[i + 1] &&
         last[i] == static_cast<int64_t>(i) + 1 && chain[i + 1].x == result;
}

conv::Mean mean_between(const ConvStep& s, const conv::Activation& x, const conv::Activation& y) {
  if (s.kh == 0) return {x, y, {x.h, x.w}, {x.h, x.w}};
  return {x, y, {s.kh, s.kw}, {s.g.stride[0], s.g.stride[1]}};
}

// Runs all steps; `values` have their memory, pair[i] tells that steps i and i + 1 may run in one pass, front[i] that
// i, i + 1 and i + 2 may. One fork and one join serve them all: the maps of a small network are done sooner than a pool
// of threads is called and left.
void run_chain(const std::vector<ConvStep>& chain, const std::vector<Tensor>& handles,
               const std::vector<conv::Activation>& values, size_t given, const std::vector<bool>& pair,
               const std::vector<bool>& front) {
  const int64_t threads = num_threads();
  std::vector<std::optional<Convolution>> ready(chain.size());  // steps hold the addresses of problems
  for (size_t i = 0; i < chain.size(); ++i)
    if (chain[i].kind == Kind::Convolution)
      ready[i].emplace(chain[i], handles[chain[i].handle], values, values[given + i]);
  std::vector<Step> steps;
  steps.reserve(chain.size());
  const auto empty = [&](size_t i) { return values[given + i].n == 0 || values[given + i].c == 0; };
  const auto problem = [&](size_t i) -> const conv::Problem& { return ready[i]->problem(); };
  for (size_t i = 0; i < chain.size(); ++i) {
    if (empty(i)) continue;
    if (chain[i].kind != Kind::Convolution) {
      steps.push_back(conv::mean_step(mean_between(chain[i], values[chain[i].x], values[given + i])));
    } else if (front[i] && !empty(i + 2) && conv::can_fuse(problem(i), problem(i + 1), problem(i + 2))) {
      steps.push_back(conv::fused_step(&problem(i), problem(i + 1), problem(i + 2), threads));
      i += 2;
    } else if (pair[i] && !empty(i + 1) && conv::can_fuse(problem(i), problem(i + 1))) {
      steps.push_back(conv::fused_step(nullptr, problem(i), problem(i + 1), threads));
      i += 1;
    } else {
      steps.push_back(conv::step_of(problem(i), conv::is_tiny(problem(i)) ? 1 : threads));
    }
  }
  parallel_steps(steps, threads);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::vector<Tensor> rep_conv2d_chain(const Tensor& x, std::vector<Tensor> others, std::vector<Tensor> handles,
                                     Text steps, std::vector<int64_t> outputs) {
  const std::vector<ConvStep> chain = read_steps(steps);
  std::vector<conv::Activation> values;
  values.reserve(1 + others.size() + chain.size());
  values.push_back(activation(x, {kOp, "x"}));
  for (const Tensor& other : others) {
    EFFKERN_CHECK_TYPE(other.scalar_type() == x.scalar_type(), kOp, ": others must have x's dtype");
    values.push_back(activation(other, {kOp, "others"}));
  }
  const size_t given = values.size();
  std::vector<int64_t> last(chain.size(), -1);  // the step that reads a result last
  for (const int64_t step : outputs) {
    EFFKERN_CHECK_VALUE(step >= 0 && step < static_cast<int64_t>(chain.size()) && last[step] != kReturned, kOp,
                        ": outputs must be different steps below ", chain.size(), ", got ", step);
    last[step] = kReturned;
  }
  for (size_t i = 0; i < chain.size(); ++i) {
    // What is not returned is never rounded to 16 bits.
    const DType dtype = last[i] == kReturned ? values[0].dtype : DType::F32;
    values.push_back(result_of(chain[i], i, dtype, values, handles));
    for (const int64_t v : {chain[i].x, chain[i].residual})
      if (v >= static_cast<int64_t>(given) && last[v - given] != kReturned) last[v - given] = static_cast<int64_t>(i);
  }
  std::vector<bool> pair(chain.size(), false), front(chain.size(), false);
  for (size_t i = 0; i < chain.size(); ++i) pair[i] = is_pair(chain, i, static_cast<int64_t>(given), last);
  for (size_t i = 0; i < chain.size(); ++i) front[i] = is_front(chain, i, static_cast<int64_t>(given), last, pair);
  // The last step of a pass writes while the first still reads, so their inputs must not give their places to results.
  for (size_t i = 0; i < chain.size(); ++i)
    for (const int64_t read : {chain[i].x, chain[i].residual})
      if (const int64_t v = read - static_cast<int64_t>(given); v >= 0 && (pair[i] || front[i]))
        last[v] = std::max(last[v], static_cast<int64_t>(i) + (front[i] ? 2 : 1));
  std::vector<Tensor> results;
  results.reserve(outputs.size());
  for (const int64_t step : outputs) {
    conv::Activation& y = values[given + step];
    const int64_t size[] = {y.n, y.c, y.h, y.w};
    results.push_back(torch::stable::empty({size, 4}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                           torch::headeronly::MemoryFormat::ChannelsLast));
    y.data = results.back().mutable_data_ptr();
  }

  // Samples go through the chain in groups whose maps fit the scratch that is kept: memory that is given back comes
  // back as new pages, each of which costs a fault.
  const int64_t samples = values[0].n;
  std::vector<size_t> offsets(chain.size(), 0);
  const auto place = [&](int64_t n) {
    Places places;
    for (size_t i = 0; i < chain.size(); ++i) {
      places.release_before(static_cast<int64_t>(i));
      if (last[i] == kReturned) continue;
      const conv::Activation& y = values[given + i];
      offsets[i] = places.take(Arena::bytes(static_cast<size_t>(n * y.sn), static_cast<size_t>(dtype_size(y.dtype))),
                               std::max(last[i], static_cast<int64_t>(i)));
    }
    return places.total();
  };
  int64_t group = samples;
  if (samples > 1 && place(samples) > kKeptBytes) {
    const auto fit = std::max<int64_t>(static_cast<int64_t>(kKeptBytes / place(1)), 1);
    const int64_t groups = (samples + fit - 1) / fit;
    group = (samples + groups - 1) / groups;
  }
  const size_t bytes = place(group);
  // An arena of its own: the engine resets the thread's common one.
  static thread_local Arena kept;
  std::unique_ptr<char, Free> own;
  char* scratch = nullptr;
  if (bytes <= kKeptBytes) {
    kept.reset(bytes);
    scratch = kept.take<char>(0);
  } else {
    own.reset(static_cast<char*>(std::aligned_alloc(Arena::kAlign, bytes)));
    if (own == nullptr) throw std::bad_alloc();
    scratch = own.get();
  }
  for (int64_t first = 0; first < samples; first += group) {
    std::vector<conv::Activation> part = values;
    for (size_t v = 0; v < part.size(); ++v) {
      conv::Activation& a = part[v];
      a.n = std::min(group, samples - first);
      const bool inner = v >= given && last[v - given] != kReturned;
      a.data = inner ? scratch + offsets[v - given]
                     : static_cast<char*>(a.data) + first * a.sn * static_cast<int64_t>(dtype_size(a.dtype));
    }
    run_chain(chain, handles, part, given, pair, front);
  }
  return results;
}

}  // namespace
}  // namespace effkern::rep_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("rep_conv2d_chain", TORCH_BOX(&effkern::rep_conv::rep_conv2d_chain));
}
