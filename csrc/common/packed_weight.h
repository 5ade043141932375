// A convolution weight ready for the engine: packed from a 4-d tensor for this call, or viewed in a handle.
#pragma once

#include <memory>

#include "../conv/pack.h"
#include "tensor.h"

namespace effkern {

// The part of a weight that runs: groups x (out_per_group x in_per_group), each a prefix of the whole.
struct RunningPart {
  int64_t groups, out_per_group, in_per_group;
};

class PackedWeight {
 public:
  // Dimensions of the whole weight: of the tensor, or as the handle's header tells them.
  struct Dims {
    int64_t out_channels, in_per_group, kh, kw, groups;
  };

  // A weight is a handle if it is a 1-d uint8 tensor.
  static bool is_handle(const View& weight);

  // Reads the dimensions of either form and checks them (a handle's header with its checksum and size; that `groups`
  // divides). Both forms must be on the CPU; a 4-d weight must have `dtype` if that is given.
  static Dims dims(const View& weight, int64_t groups, Arg arg, const ScalarType* dtype = nullptr);

  // Packs the running part of a 4-d weight, or views a handle, whose pack serves every running part.
  PackedWeight(const View& weight, const Dims& dims, const RunningPart& run);

  // Sets problem.weight or problem.depthwise, and kh, kw and groups; problem.c_in is set already. The problem must not
  // outlive this object.
  void attach(conv::Problem& problem) const;

  // The bias in a handle, or null.
  const float* bias() const { return bias_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  Dims dims_;
  RunningPart run_;
  std::unique_ptr<float, Free> own_;
  std::unique_ptr<conv::ResidentPanels> panels_;
  const float* depthwise_ = nullptr;
  int64_t depthwise_stride_ = 0;
  const float* bias_ = nullptr;
};

// Dimensions of a 4-d weight on any device, checked.
PackedWeight::Dims weight_dims(const View& weight, int64_t groups, Arg arg, const ScalarType* dtype = nullptr);
void check_groups(int64_t groups, const char* op);

// True if the whole weight is depthwise with one filter a channel: it then runs on the depthwise kernel.
bool is_depthwise(const PackedWeight::Dims& dims);

// A 4-d weight as the packer sees it, cut to its running part.
conv::WeightView weight_view(const View& weight, const PackedWeight::Dims& dims, const RunningPart& run);

// Packs a whole 4-d weight and an optional bias into a new handle; `transformed`: with Winograd's transforms where the
// kernel is 3x3 and not depthwise.
Tensor pack_handle(const Tensor& weight, const MaybeTensor& bias, int64_t groups, bool transformed, const char* op);

}  // namespace effkern
