// Packed weights: the layouts the engine reads, and the self-describing handle that carries one between calls.
#pragma once

#include <cstdint>

#include "problem.h"

namespace effkern::conv {

// A weight [out][in_per_group][kh][kw] as it lies in memory; strides in elements.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::F32;
  int64_t groups = 1, out_per_group = 0, in_per_group = 0, kh = 1, kw = 1;  // the part to pack
  int64_t group_stride = 0;  // from one group's first output to the next's
  int64_t so = 0, si = 0, sh = 0, sw = 0;
};

// One filter a channel: packed as [tap][groups], and run by the depthwise kernel.
inline bool is_depthwise(int64_t out_channels, int64_t in_per_group, int64_t groups) {
  return groups > 1 && in_per_group == 1 && out_channels == groups;
}

// False if the size of a pack would wrap around: a header, or a weight of stride 0, can claim dimensions that no memory
// could hold. Every dimension must be below 2^31.
bool is_countable(const WeightView& weight);

// Floats of a pack: panels [group][out/16][tap][in][16], or depthwise [tap][groups].
int64_t panels_floats(const WeightView& weight);
int64_t depthwise_floats(const WeightView& weight);

// Floats of the transforms for Winograd's F(4,3) beside panels of 3x3 taps, 4 times as many: [group][out/16][row of G
// g G^T][column][in][16], the rows in the order of WinogradKernels::weight_row.
int64_t winograd_floats(const WeightView& weight);

void pack_panels(const WeightView& weight, float* out);
// From the panels of the same weight, by the arithmetic of the instruction set that runs: the bits a convolution would
// transform them to. Those of sets without FMA differ in the last place.
void pack_winograd(const WeightView& weight, const float* panels, float* out);
void pack_depthwise(const WeightView& weight, float* out);

// Winograd: panels of 3x3 taps, then their transforms.
enum class PackKind : uint16_t { Panels = 0, Depthwise = 1, Winograd = 2 };

// The first 64 bytes of a handle; bias (if any, padded to a multiple of 16 floats) and pack follow. Little endian. The
// layout does not depend on the instruction set, so a handle may move between processors.
struct PackHeader {
  char magic[8];  // "EFFKPACK"
  uint16_t version;
  PackKind kind;
  uint32_t has_bias;
  int32_t out_channels, in_per_group, kh, kw, groups;
  uint32_t reserved[5];
  uint64_t checksum;  // FNV-1a of the bytes before it
};
static_assert(sizeof(PackHeader) == 64, "handles begin with one cache line");

constexpr uint16_t kPackVersion = 1;

PackHeader make_header(PackKind kind, bool has_bias, int64_t out_channels, int64_t in_per_group, int64_t kh, int64_t kw,
                       int64_t groups);

// Null if the bytes are a sound handle, else what is wrong with them.
const char* check_header(const void* bytes, int64_t size);

// Whole size in bytes of the handle a header describes, and where its parts begin.
int64_t handle_bytes(const PackHeader& header);
int64_t handle_weight_offset(const PackHeader& header);
int64_t handle_transforms_offset(const PackHeader& header);

}  // namespace effkern::conv
