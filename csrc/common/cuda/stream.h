// A CUDA stream by the name the runtime's header gives it, without the header.
#pragma once

struct CUstream_st;

namespace effkern::device {

using Stream = CUstream_st*;

}  // namespace effkern::device
