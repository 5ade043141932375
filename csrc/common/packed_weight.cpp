#include "packed_weight.h"

#include <cstring>
#include <limits>

namespace effkern {
namespace {

float* aligned_floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64 + 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

bool PackedWeight::is_handle(const View& weight) {
  return weight.dim() == 1 && weight.scalar_type() == ScalarType::Byte;
}

bool is_depthwise(const PackedWeight::Dims& d) { return conv::is_depthwise(d.out_channels, d.in_per_group, d.groups); }

PackedWeight::Dims PackedWeight::dims(const View& weight, int64_t groups, Arg arg, const ScalarType* dtype) {
  check_cpu(weight, arg);
  EFFKERN_CHECK_VALUE(groups >= 1, arg.op, ": groups must be at least 1, got ", groups);
  if (is_handle(weight)) {
    EFFKERN_CHECK_VALUE(weight.numel() <= 1 || weight.stride(0) == 1, arg.op, ": ", arg.name,
                        " is a handle and must be contiguous");
    const void* bytes = weight.const_data_ptr();
    const char* wrong = conv::check_header(bytes, weight.numel());
    if (wrong != nullptr) fail("ValueError", arg.op, ": ", arg.name, " ", wrong);
    EFFKERN_CHECK_VALUE(reinterpret_cast<uintptr_t>(bytes) % alignof(float) == 0, arg.op, ": ", arg.name,
                        " is a handle and must be aligned to 4 bytes; clone() it");
    conv::PackHeader h;
    std::memcpy(&h, bytes, sizeof h);
    EFFKERN_CHECK_VALUE(h.groups == groups, arg.op, ": ", arg.name, " was packed with groups = ", h.groups, ", got ",
                        groups);
    return {h.out_channels, h.in_per_group, h.kh, h.kw, h.groups};
  }
  EFFKERN_CHECK_VALUE(weight.dim() == 4, arg.op, ": ", arg.name, " must be 4-d [Co, Ci/groups, kh, kw], got shape ",
                      shape_text(weight));
  float_dtype(weight, arg);
  if (dtype != nullptr)
    EFFKERN_CHECK_TYPE(weight.scalar_type() == *dtype, arg.op, ": ", arg.name, " must have x's dtype");
  EFFKERN_CHECK_VALUE(weight.size(0) % groups == 0, arg.op, ": groups = ", groups,
                      " must divide the output channels of ", arg.name, ", got ", weight.size(0));
  EFFKERN_CHECK_VALUE(weight.size(2) >= 1 && weight.size(3) >= 1, arg.op, ": ", arg.name,
                      " must have a kernel of at least 1x1, got shape ", shape_text(weight));
  conv::WeightView view;
  view.groups = groups;
  view.out_per_group = weight.size(0) / groups;
  view.in_per_group = weight.size(1);
  view.kh = weight.size(2);
  view.kw = weight.size(3);
  for (const int64_t v : {groups, weight.size(0), view.in_per_group, view.kh, view.kw})
    EFFKERN_CHECK_VALUE(v <= std::numeric_limits<int32_t>::max(), arg.op, ": groups and the dimensions of ", arg.name,
                        " must be below 2^31, got ", v);
  EFFKERN_CHECK_VALUE(conv::is_countable(view), arg.op, ": ", arg.name, " must be smaller, got shape ",
                      shape_text(weight));
  return {weight.size(0), weight.size(1), weight.size(2), weight.size(3), groups};
}

conv::WeightView weight_view(const View& weight, const PackedWeight::Dims& dims, const RunningPart& run) {
  conv::WeightView view;
  view.data = weight.const_data_ptr();
  view.dtype = float_dtype(weight, {"pack", "weight"});
  view.groups = run.groups;
  view.out_per_group = run.out_per_group;
  view.in_per_group = run.in_per_group;
  view.kh = dims.kh;
  view.kw = dims.kw;
  view.so = weight.stride(0), view.si = weight.stride(1), view.sh = weight.stride(2), view.sw = weight.stride(3);
  view.group_stride = dims.out_channels / dims.groups * view.so;
  return view;
}

PackedWeight::PackedWeight(const View& weight, const Dims& dims, const RunningPart& run) : dims_(dims), run_(run) {
  const bool depthwise = is_depthwise(dims);
  const float *data, *transforms = nullptr;
  int64_t out_per_group = run.out_per_group, in_per_group = run.in_per_group;
  depthwise_stride_ = run.groups;
  if (is_handle(weight)) {
    conv::PackHeader h;
    std::memcpy(&h, weight.const_data_ptr(), sizeof h);
    const char* bytes = static_cast<const char*>(weight.const_data_ptr());
    data = reinterpret_cast<const float*>(bytes + conv::handle_weight_offset(h));
    if (h.kind == conv::PackKind::Winograd)
      transforms = reinterpret_cast<const float*>(bytes + conv::handle_transforms_offset(h));
    if (h.has_bias != 0) bias_ = reinterpret_cast<const float*>(bytes + sizeof h);
    out_per_group = dims.out_channels / dims.groups;
    in_per_group = dims.in_per_group;
    depthwise_stride_ = dims.groups;
  } else {
    const conv::WeightView view = weight_view(weight, dims, run);
    own_.reset(aligned_floats(depthwise ? conv::depthwise_floats(view) : conv::panels_floats(view)));
    depthwise ? conv::pack_depthwise(view, own_.get()) : conv::pack_panels(view, own_.get());
    data = own_.get();
  }
  if (depthwise)
    depthwise_ = data;
  else
    panels_ = std::make_unique<conv::ResidentPanels>(data, out_per_group, in_per_group, dims.kh * dims.kw, transforms);
}

void PackedWeight::attach(conv::Problem& problem) const {
  // Without input channels nothing is summed, but the depthwise kernel reads one channel an output.
  static const conv::ResidentPanels nothing(nullptr, 0, 0, 0);
  const bool empty = depthwise_ != nullptr && problem.c_in == 0;
  problem.weight = empty ? &nothing : panels_.get();
  problem.depthwise = empty ? nullptr : depthwise_;
  problem.depthwise_stride = depthwise_stride_;
  problem.kh = dims_.kh;
  problem.kw = dims_.kw;
  problem.groups = run_.groups;
}

Tensor pack_handle(const Tensor& weight, const MaybeTensor& bias, int64_t groups, bool transformed, const char* op) {
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), op, ": weight is a handle already");
  const PackedWeight::Dims d = PackedWeight::dims(weight, groups, {op, "weight"});
  const FloatVector b(bias, d.out_channels, weight.scalar_type(), {op, "bias"});
  const bool depthwise = is_depthwise(d);
  const conv::PackKind kind = depthwise                               ? conv::PackKind::Depthwise
                              : transformed && d.kh == 3 && d.kw == 3 ? conv::PackKind::Winograd
                                                                      : conv::PackKind::Panels;
  const conv::PackHeader h =
      conv::make_header(kind, static_cast<bool>(b), d.out_channels, d.in_per_group, d.kh, d.kw, groups);
  const int64_t size[] = {conv::handle_bytes(h)};
  Tensor handle = torch::stable::empty({size, 1}, ScalarType::Byte, std::nullopt, weight.device());
  char* bytes = static_cast<char*>(handle.mutable_data_ptr());
  std::memcpy(bytes, &h, sizeof h);
  if (b) {
    const int64_t padded = conv::handle_weight_offset(h) - static_cast<int64_t>(sizeof h);
    std::memset(bytes + sizeof h, 0, padded);
    std::memcpy(bytes + sizeof h, b.data(), d.out_channels * sizeof(float));
  }
  float* out = reinterpret_cast<float*>(bytes + conv::handle_weight_offset(h));
  const conv::WeightView view = weight_view(weight, d, {groups, d.out_channels / groups, d.in_per_group});
  depthwise ? conv::pack_depthwise(view, out) : conv::pack_panels(view, out);
  if (kind == conv::PackKind::Winograd)
    conv::pack_winograd(view, out, reinterpret_cast<float*>(bytes + conv::handle_transforms_offset(h)));
  return handle;
}

}  // namespace effkern
