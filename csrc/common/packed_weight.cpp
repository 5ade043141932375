#include "packed_weight.h"

#include <cstring>

namespace effkern {
namespace {

float* aligned_floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64 + 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

bool is_depthwise(const PackedWeight::Dims& d) { return conv::is_depthwise(d.out_channels, d.in_per_group, d.groups); }

PackedWeight::Dims PackedWeight::dims(const View& weight, int64_t groups, Arg arg, const ScalarType* dtype) {
  check_cpu(weight, arg);
  check_groups(groups, arg.op);
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
  const Dims dims = weight_dims(weight, groups, arg, dtype);
  EFFKERN_CHECK_VALUE(
      conv::is_countable(weight_view(weight, dims, {groups, dims.out_channels / groups, dims.in_per_group})), arg.op,
      ": ", arg.name, " must be smaller, got shape ", shape_text(weight));
  return dims;
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
