// The part of DLPack's C interface that this module uses (github.com/dmlc/dlpack, version 1): how to look at a tensor
// of another library without a Python call. torch offers it as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace effkern::host {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

constexpr int32_t kDLCPU = 1;
enum : uint8_t { kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocate, *from_py_object, *to_py_object;
  int (*view_of_py_object)(void* object, DLTensor* out);  // borrows; 0, or -1 with a Python exception
  void* current_work_stream;
};

}  // namespace effkern::host
