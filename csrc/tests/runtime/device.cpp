// Torch's CUDA device in a torch that was built without CUDA, as far as host code of ops touches it: the accelerator's
// hooks, device guards and streams, memory, and the operators that make, view, copy and fill tensors. Everything else
// of torch is done on the CPU in its place. The memory is the host's.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/library.h>

#include <set>

#include "runtime.h"

namespace runtime = effkern::test::runtime;

namespace {

c10::Device device(int index) { return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)}; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device getDevice() const override { return device(runtime::current_device()); }
  void setDevice(c10::Device d) const override { runtime::set_device(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { runtime::set_device(d.index()); }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    setDevice(d);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return runtime::kDevices; }

  static c10::Stream stream(c10::Device d, int id) { return c10::Stream(c10::Stream::UNSAFE, d, id); }
  c10::Stream getStream(c10::Device d) const override { return stream(d, runtime::current_stream(d.index())); }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(d, 0); }
  c10::Stream getNewStream(c10::Device d, int) const override { return stream(d, runtime::new_stream()); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const c10::Stream before = getStream(s.device());
    runtime::set_stream(s.device_index(), static_cast<int>(s.id()));
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override {
    return runtime::handle(s.device_index(), static_cast<int>(s.id()));
  }
  // All work is done when it is asked for, so an event has always happened.
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    static int happened;
    *event = &happened;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { runtime::wait("synchronize a stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { runtime::wait("synchronize the device"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = runtime::handle(index, runtime::current_stream(index));
  return AOTI_TORCH_SUCCESS;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = runtime::allocate(bytes);
    return {data, data, &runtime::give_back, device(runtime::current_device())};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &runtime::give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &allocator)

// The registry knows it by the name of its class.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return runtime::kDevices; }
  c10::DeviceIndex deviceCount() const override { return runtime::kDevices; }
  c10::DeviceIndex current_device() const override { return getCurrentDevice(); }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(runtime::current_device());
  }
  void setCurrentDevice(c10::DeviceIndex index) const override { runtime::set_device(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const c10::DeviceIndex before = getCurrentDevice();
    runtime::set_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  void deviceSynchronize(c10::DeviceIndex) const override { runtime::wait("synchronize the device"); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> where, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(where));
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> where, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(where));
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::dtype(t.dtype()));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  if (to.device().type() != from.device().type()) runtime::wait("copy between host and device");
  runtime::note("copy_");
  runtime::work([to = on_host(to), from = on_host(from)] {
    const at::NoGradGuard no_grad;
    to.copy_(from);
  });
  return to;
}
at::Tensor& fill(at::Tensor& to, const at::Scalar& value) {
  runtime::note("fill_");
  runtime::work([to = on_host(to), value] { to.fill_(value); });
  return to;
}
at::Tensor& zero(at::Tensor& to) { return fill(to, 0); }

// How the results of operators done on the CPU come back.
at::Tensor copy_back(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) {  // made empty, for the operator to give it a size
    TORCH_CHECK(to.numel() == 0, "a result of another size cannot come back to the device");
    const at::Tensor sized = empty_strided(from.sizes(), from.strides(), to.scalar_type(), {}, to.device(), {});
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(sized.storage());
    to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides());
  }
  at::Tensor result = to;
  return copy(result, from, false);
}

// Those whose results, or whose results' shapes, the host reads.
const std::set<std::string> kWaits = {"aten::_local_scalar_dense", "aten::nonzero",       "aten::equal",
                                      "aten::is_nonzero",          "aten::masked_select", "aten::_unique2",
                                      "aten::repeat_interleave",   "aten::bincount"};

void elsewhere(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  if (kWaits.contains(name)) runtime::wait(name);
  runtime::note(name);
  const runtime::Elsewhere here(name);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("copy_", TORCH_FN(copy));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_back));
  m.impl("fill_.Scalar", TORCH_FN(fill));
  m.impl("zero_", TORCH_FN(zero));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&elsewhere>()); }
