// Block skipping on the CPU: single blocks, whole stages and compaction. The engine walks row lists, so kept samples
// are neither gathered nor scattered, and a sample that a stage drops costs nothing after the one copy into the output.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/direct_entry.h"
#include "../common/parallel.h"
#include "block.h"

namespace effkern::block_skip {
namespace {

using conv::Activation;

// make(layout, type) gives the memory of the output.
template <class Make>
void skip_block(const char* op, Kind kind, const View& x, const View& keep, const View* weights, const View* biases,
                int64_t stride, const MaybeView& res, const std::string& act, const std::string& algo,
                const Make& make) {
  const Activation in = activation(x, {op, "x"});
  const conv::Act activate = act_from_name(act, op);
  const conv::Algo algorithm = algo_from_name(algo, op);
  const KeepMask mask(keep, 1, {op, "keep"});
  EFFKERN_CHECK_VALUE(mask.samples() == in.n, op, ": keep must be [", in.n, "], got shape ", shape_text(keep));
  const Block block(op, kind, weights, biases, in.c, x.scalar_type(), stride, activate, algorithm);
  const int64_t h = conv::out_size(in.h, 1, stride, 0, 1), w = conv::out_size(in.w, 1, stride, 0, 1);

  Activation residual = in;
  if (res.has_value()) {
    residual = activation(*res, {op, "res"});
    EFFKERN_CHECK_TYPE(res->scalar_type() == x.scalar_type(), op, ": res must have x's dtype");
    EFFKERN_CHECK_VALUE(residual.n == in.n && residual.c == block.c_out() && residual.h == h && residual.w == w, op,
                        ": res must be [", in.n, ", ", block.c_out(), ", ", h, ", ", w, "], got ", shape_text(*res));
  } else {
    EFFKERN_CHECK_VALUE(stride == 1 && block.c_out() == in.c, op, ": res must be given for stride ", stride, " and ",
                        in.c, " to ", block.c_out(), " channels; x does not fit as the shortcut");
  }
  const Layout layout = layout_like(x, in.n, block.c_out(), h, w);
  void* y = make(layout, x.scalar_type());
  if (in.n * block.c_out() * h * w == 0) return;
  const Activation out = activation(layout, y, x.scalar_type());
  const Decision decision = mask.decide(0, 0, in.n);
  copy_rows(residual, decision.dropped.data(), out, decision.dropped.data(),
            static_cast<int64_t>(decision.dropped.size()));
  run_block(block, decision, in, residual, out, 0);
}

Tensor skip_basic_block(const Tensor& x, const Tensor& keep, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                        const Tensor& b2, int64_t stride, const MaybeTensor& res, Text act, Text algo) {
  const View weights[] = {w1, w2}, biases[] = {b1, b2};
  std::optional<Tensor> y;
  skip_block("skip_basic_block", Kind::Basic, x, keep, weights, biases, stride, res, act, algo, into(y));
  return *y;
}

Tensor skip_bottleneck(const Tensor& x, const Tensor& keep, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                       const Tensor& b2, const Tensor& w3, const Tensor& b3, int64_t stride, const MaybeTensor& res,
                       Text act, Text algo) {
  const View weights[] = {w1, w2, w3}, biases[] = {b1, b2, b3};
  std::optional<Tensor> y;
  skip_block("skip_bottleneck", Kind::Bottleneck, x, keep, weights, biases, stride, res, act, algo, into(y));
  return *y;
}

Kind kind_from_name(const std::string& name, const char* op) {
  EFFKERN_CHECK_VALUE(name == "basic" || name == "bottleneck", op, ": kind must be basic or bottleneck, got '", name,
                      "'");
  return name == "basic" ? Kind::Basic : Kind::Bottleneck;
}

// The blocks of a stage, checked and ready for any x of their channels and dtype. `tensors`: how many weights there
// are, and biases.
class Stage {
 public:
  Stage(const View* weights, const View* biases, size_t tensors, size_t blocks, int64_t channels, ScalarType dtype,
        const std::string& kind, const std::string& act, const std::string& algo)
      : channels_(channels), dtype_(dtype) {
    const conv::Act activate = act_from_name(act, kOp);
    const conv::Algo algorithm = algo_from_name(algo, kOp);
    const Kind form = kind_from_name(kind, kOp);
    const size_t convs = convs_of(form);
    EFFKERN_CHECK_VALUE(tensors == convs * blocks, kOp, ": weights and biases must have ", convs * blocks,
                        " tensors for ", blocks, " ", kind, " blocks, got ", tensors);
    blocks_.reserve(blocks);
    for (size_t b = 0; b < blocks; ++b) {
      blocks_.emplace_back(kOp, form, &weights[b * convs], &biases[b * convs], channels, dtype, 1, activate, algorithm,
                           static_cast<int64_t>(b * convs) + 1);
      EFFKERN_CHECK_VALUE(blocks_.back().c_out() == channels, kOp, ": block ", b, " must keep x's ", channels,
                          " channels, got ", blocks_.back().c_out());
    }
  }

  // make(layout, type) gives the memory of the output.
  template <class Make>
  void run(const View& x, const KeepMask& mask, const Make& make) const;

  static constexpr const char* kOp = "skip_stage";

 private:
  int64_t channels_;
  ScalarType dtype_;
  std::vector<Block> blocks_;
};

template <class Make>
void Stage::run(const View& x, const KeepMask& mask, const Make& make) const {
  const Activation in = activation(x, {kOp, "x"});
  EFFKERN_CHECK_VALUE(in.c == channels_ && x.scalar_type() == dtype_ &&
                          mask.blocks() == static_cast<int64_t>(blocks_.size()) && mask.samples() == in.n,
                      kOp, ": x and keep must fit the blocks");
  const size_t blocks = blocks_.size();
  int64_t inner = 0, weights = 0;
  for (const Block& block : blocks_) {
    inner = std::max(inner, block.scratch_floats(in.h, in.w));
    weights = std::max(weights, block.weight_floats());
  }
  const Layout layout = layout_like(x, in.n, in.c, in.h, in.w);
  void* y = make(layout, x.scalar_type());
  if (in.n * in.c * in.h * in.w == 0) return;
  const Activation out = activation(layout, y, x.scalar_type());

  // Depth first: a group of samples goes through all blocks while it is in cache. Between blocks the state is fp32
  // channels-last, in the output itself where that is both. A group reads every block's weights anew, so what it runs
  // is at least as much (ResNet-50, 2048 channels: 0.82 of the time; ResNet-110, 64 channels, a quarter kept: 0.87).
  // Threads take groups; a batch of one is shared inside its convolutions.
  const int64_t floats = in.c * in.h * in.w, threads = in.n == 1 ? 0 : 1;
  const int64_t fair = (in.n + num_threads() - 1) / num_threads();
  const double run = std::max(mask.share(), 0.1) * static_cast<double>(floats + inner);
  const int64_t worthy = static_cast<int64_t>(static_cast<double>(weights) / run);
  const int64_t group = std::min(std::max(samples_at_a_time(floats + inner), worthy), fair);
  const bool in_place = out.dtype == DType::F32 && out.sc == 1, straight = in_place && in.sc == 1;
  const auto walk = [&](int64_t begin, int64_t end) {
    const Scratch scratch(in_place ? 0 : group * floats);
    for (int64_t first = begin * group; first < std::min(in.n, end * group); first += group) {
      const int64_t last = std::min(in.n, first + group);
      const Activation from = from_sample(in, first), to = from_sample(out, first);
      const Activation state = in_place ? to : nhwc(scratch.data(), last - first, in.c, in.h, in.w);
      // The first block that any sample keeps reads those from x; only the others are copied.
      bool moved = !straight;
      if (moved) copy_rows(from, nullptr, state, nullptr, last - first);
      for (size_t b = 0; b < blocks; ++b) {
        const Decision decision = mask.decide(static_cast<int64_t>(b), first, last);
        const auto dropped = static_cast<int64_t>(decision.dropped.size());
        if (dropped == last - first) continue;
        if (!moved) copy_rows(from, decision.dropped.data(), state, decision.dropped.data(), dropped);
        const Activation& source = moved ? state : from;
        run_block(blocks_[b], decision, source, source, state, threads);
        moved = true;
      }
      if (!moved) copy_rows(from, nullptr, state, nullptr, last - first);
      if (!in_place) copy_rows(state, nullptr, to, nullptr, last - first);
    }
  };
  const int64_t groups = (in.n + group - 1) / group;
  if (threads == 0)
    walk(0, groups);
  else
    parallel_for(0, groups, 1, walk);
}

Tensor skip_stage(const Tensor& x, const Tensor& keep, std::vector<Tensor> weights, std::vector<Tensor> biases,
                  Text kind, Text act, Text algo) {
  constexpr const char* op = Stage::kOp;
  const Activation in = activation(x, {op, "x"});
  const KeepMask mask(keep, 2, {op, "keep"});
  EFFKERN_CHECK_VALUE(mask.samples() == in.n, op, ": keep must be [", in.n, ", B], got shape ", shape_text(keep));
  EFFKERN_CHECK_VALUE(weights.size() == biases.size(), op, ": weights and biases must have as many tensors, got ",
                      weights.size(), " and ", biases.size());
  const std::vector<View> w(weights.begin(), weights.end()), b(biases.begin(), biases.end());
  const Stage stage(w.data(), b.data(), w.size(), static_cast<size_t>(mask.blocks()), in.c, x.scalar_type(), kind, act,
                    algo);
  std::optional<Tensor> y;
  stage.run(x, mask, into(y));
  return *y;
}

std::tuple<Tensor, Tensor> compact(const Tensor& keep) {
  constexpr const char* op = "compact";
  EFFKERN_CHECK_VALUE(keep.dim() == 1 || keep.dim() == 2, op, ": keep must be [N] or [N, B], got shape ",
                      shape_text(keep));
  const bool many = keep.dim() == 2;
  const KeepMask mask(keep, keep.dim(), {op, "keep"});
  const int64_t n = mask.samples(), blocks = mask.blocks();
  const int64_t both[] = {blocks, n};
  Tensor idx = many ? torch::stable::empty({both, 2}, ScalarType::Int, std::nullopt, keep.device())
                    : torch::stable::empty({both + 1, 1}, ScalarType::Int, std::nullopt, keep.device());
  Tensor count =
      torch::stable::empty({both, static_cast<size_t>(many ? 1 : 0)}, ScalarType::Int, std::nullopt, keep.device());
  int32_t* rows = static_cast<int32_t*>(idx.mutable_data_ptr());
  int32_t* counts = static_cast<int32_t*>(count.mutable_data_ptr());
  EFFKERN_CHECK_VALUE(n < (int64_t{1} << 31), op, ": keep must have fewer than 2^31 rows, got ", n);
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if (mask.at(i, b) != 0) rows[b * n + kept++] = static_cast<int32_t>(i);
    counts[b] = kept;
    for (int64_t i = kept; i < n; ++i) rows[b * n + i] = -1;
  }
  return {idx, count};
}

}  // namespace
}  // namespace effkern::block_skip

EFFKERN_EXPORT int effkern_skip_block(const effkern::direct::SkipBlock* call, const effkern::direct::Output* output) {
  using namespace effkern;
  return direct::entry(*output, [&](const auto& make) {
    std::vector<View> weights, biases;
    for (int64_t i = 0; i < call->tensors; ++i) {
      weights.push_back(direct::view(call->weights[i]));
      biases.push_back(direct::view(call->biases[i]));
    }
    const auto kind = call->tensors == 2 ? block_skip::Kind::Basic : block_skip::Kind::Bottleneck;
    block_skip::skip_block("skip_block", kind, direct::view(call->x), direct::view(call->keep), weights.data(),
                           biases.data(), call->stride, direct::maybe_view(call->residual), call->act, call->algo,
                           make);
  });
}

EFFKERN_EXPORT void* effkern_skip_stage_prepare(const effkern::direct::SkipStage* stage) {
  using namespace effkern;
  try {
    std::vector<View> weights, biases;
    for (int64_t i = 0; i < stage->tensors; ++i) {
      weights.push_back(direct::view(stage->weights[i]));
      biases.push_back(direct::view(stage->biases[i]));
    }
    return new block_skip::Stage(weights.data(), biases.data(), weights.size(), static_cast<size_t>(stage->blocks),
                                 stage->channels, static_cast<ScalarType>(stage->type), stage->kind, stage->act,
                                 stage->algo);
  } catch (const std::exception&) {
    return nullptr;
  }
}

EFFKERN_EXPORT void effkern_skip_stage_release(void* stage) { delete static_cast<effkern::block_skip::Stage*>(stage); }

EFFKERN_EXPORT int effkern_skip_stage(const void* stage, const effkern::direct::TensorRef* x,
                                      const effkern::direct::TensorRef* keep, const effkern::direct::Output* output) {
  using namespace effkern;
  return direct::entry(*output, [&](const auto& make) {
    const block_skip::KeepMask mask(direct::view(*keep), 2, {block_skip::Stage::kOp, "keep"});
    static_cast<const block_skip::Stage*>(stage)->run(direct::view(*x), mask, make);
  });
}

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("skip_basic_block", TORCH_BOX(&effkern::block_skip::skip_basic_block));
  m.impl("skip_bottleneck", TORCH_BOX(&effkern::block_skip::skip_bottleneck));
  m.impl("skip_stage", TORCH_BOX(&effkern::block_skip::skip_stage));
  m.impl("compact", TORCH_BOX(&effkern::block_skip::compact));
}
