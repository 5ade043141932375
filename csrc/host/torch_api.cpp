#include "torch_api.h"

#include <memory>

namespace effkern::host {
namespace {

// Numbers of torch's ScalarType.
enum : int32_t { kByte = 0, kHalf = 5, kFloat = 6, kBool = 11, kBFloat16 = 15 };

int32_t type_of(const DLTensor& t) {
  if (t.type_lanes != 1) return -1;
  if (t.type_code == kDLFloat && t.type_bits == 32) return kFloat;
  if (t.type_code == kDLFloat && t.type_bits == 16) return kHalf;
  if (t.type_code == kDLBfloat && t.type_bits == 16) return kBFloat16;
  if (t.type_code == kDLUInt && t.type_bits == 8) return kByte;
  if (t.type_code == kDLBool && t.type_bits == 8) return kBool;
  return -1;
}

int64_t element_size(int32_t type) { return type == kFloat ? 4 : type == kHalf || type == kBFloat16 ? 2 : 1; }

// The name in a module; null if there is no such thing.
PyObject* named(const char* module, const char* name) {
  PyObject* from = PyImport_ImportModule(module);
  PyObject* found = from == nullptr ? nullptr : PyObject_GetAttrString(from, name);
  Py_XDECREF(from);
  return found;
}

PyObject* get(PyObject* descriptor, PyObject* of) {
  return Py_TYPE(descriptor)->tp_descr_get(descriptor, of, reinterpret_cast<PyObject*>(Py_TYPE(of)));
}

}  // namespace

const TorchApi* TorchApi::connect() {
  static const TorchApi* the_api = nullptr;  // guarded by the import lock of the Python module that connects
  if (the_api == nullptr) {
    auto api = std::make_unique<TorchApi>();
    if (api->find()) the_api = api.release();
    PyErr_Clear();
  }
  return the_api;
}

bool TorchApi::find() {
  const auto set = [](PyObject*& to, const char* module, const char* name) {
    to = named(module, name);
    return to != nullptr;
  };
  if (!set(tensor_, "torch", "Tensor") || !set(parameter_, "torch.nn", "Parameter") ||
      !set(dispatch_modes_, "torch._C", "_len_torch_dispatch_stack") ||
      !set(function_modes_, "torch._C", "_len_torch_function_stack") ||
      !set(functorch_, "torch._C._functorch", "peek_interpreter_stack") ||
      !set(is_tracing_, "torch._C", "_is_tracing") || !set(is_profiling_, "torch._C._autograd", "_profiler_enabled") ||
      !set(is_autocast_, "torch", "is_autocast_enabled") || !set(is_grad_enabled_, "torch._C", "is_grad_enabled") ||
      !set(storage_data_ptr_, "torch", "UntypedStorage") || !set(float32_, "torch", "float32") ||
      !set(bfloat16_, "torch", "bfloat16") || !set(float16_, "torch", "float16"))
    return false;
  forward_ad_ = PyImport_ImportModule("torch.autograd.forward_ad");
  // Without the dispatcher: 0.4 us less.
  if (!set(empty_strided_, "torch._C._dynamo.guards", "_empty_strided_cpu")) return false;
  PyObject* storage = storage_data_ptr_;
  storage_data_ptr_ = PyObject_GetAttrString(storage, "data_ptr");
  Py_DECREF(storage);
  level_ = PyUnicode_InternFromString("_current_level");
  cdata_ = PyUnicode_InternFromString("_cdata");
  cpu_ = PyUnicode_InternFromString("cpu");
  is_neg_ = PyObject_GetAttrString(tensor_, "is_neg");
  requires_grad_ = PyObject_GetAttrString(tensor_, "requires_grad");
  version_ = PyObject_GetAttrString(tensor_, "_version");
  untyped_storage_ = PyObject_GetAttrString(tensor_, "untyped_storage");
  PyObject* capsule = PyObject_GetAttrString(tensor_, "__dlpack_c_exchange_api__");
  if (forward_ad_ == nullptr || is_neg_ == nullptr || requires_grad_ == nullptr || version_ == nullptr ||
      untyped_storage_ == nullptr || storage_data_ptr_ == nullptr || capsule == nullptr ||
      Py_TYPE(requires_grad_)->tp_descr_get == nullptr || Py_TYPE(version_)->tp_descr_get == nullptr ||
      !PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
    return false;
  dlpack_ = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // torch keeps it with the type
  return dlpack_->major == 1 && dlpack_->view_of_py_object != nullptr;
}

bool TorchApi::is_true(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  const bool yes = result != Py_False;  // an exception counts as yes: then the dispatcher is asked
  if (result == nullptr) PyErr_Clear();
  Py_XDECREF(result);
  return yes;
}

bool TorchApi::is_zero(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  const bool yes = result != nullptr && PyLong_Check(result) && PyLong_AsLong(result) == 0;
  if (result == nullptr) PyErr_Clear();
  Py_XDECREF(result);
  return yes;
}

bool TorchApi::nothing_watches() const {
  if (!is_zero(dispatch_modes_) || !is_zero(function_modes_) || is_true(is_tracing_) || is_true(is_profiling_))
    return false;
  PyObject* interpreter = PyObject_CallNoArgs(functorch_);
  PyObject* level = PyObject_GetAttr(forward_ad_, level_);
  PyObject* autocast = PyObject_CallOneArg(is_autocast_, cpu_);
  const bool free = interpreter == Py_None && level != nullptr && PyLong_Check(level) && PyLong_AsLong(level) < 0 &&
                    autocast == Py_False;
  Py_XDECREF(interpreter);
  Py_XDECREF(level);
  Py_XDECREF(autocast);
  PyErr_Clear();
  return free;
}

bool TorchApi::look(PyObject* object, bool grad, direct::TensorRef& out) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_ && type != parameter_) return false;
  const auto is_false = [](PyObject* result) {
    if (result == nullptr) PyErr_Clear();
    Py_XDECREF(result);
    return result == Py_False;
  };
  if (grad && !is_false(get(requires_grad_, object))) return false;
  if (!is_false(PyObject_CallOneArg(is_neg_, object))) return false;
  DLTensor t;
  if (dlpack_->view_of_py_object(object, &t) != 0) {  // sparse, nested, quantized: no strides to show
    PyErr_Clear();
    return false;
  }
  out = {static_cast<const char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, 0, type_of(t)};
  if (t.device_type != kDLCPU || t.data == nullptr || out.type < 0 || t.strides == nullptr) return false;
  int64_t last = 0;
  for (int64_t i = 0; i < out.dim; ++i) {
    int64_t step = 0;
    if (out.sizes[i] == 0 || __builtin_mul_overflow(out.sizes[i] - 1, out.strides[i], &step) ||
        __builtin_add_overflow(last, step, &last))
      return false;
  }
  out.capacity = capacity(object, out.data) / element_size(out.type);
  return last < out.capacity;
}

int64_t TorchApi::capacity(PyObject* tensor, const void* data) const {
  PyObject* storage = PyObject_CallOneArg(untyped_storage_, tensor);
  PyObject* begin = storage == nullptr ? nullptr : PyObject_CallOneArg(storage_data_ptr_, storage);
  const Py_ssize_t bytes = begin == nullptr ? 0 : PyObject_Size(storage);
  const char* from = begin == nullptr ? nullptr : static_cast<const char*>(PyLong_AsVoidPtr(begin));
  Py_XDECREF(storage);
  Py_XDECREF(begin);
  PyErr_Clear();
  return from == nullptr ? 0 : from + bytes - static_cast<const char*>(data);
}

const void* TorchApi::data(PyObject* object) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  DLTensor t;
  if ((type != tensor_ && type != parameter_) || dlpack_->view_of_py_object(object, &t) != 0) {
    PyErr_Clear();
    return nullptr;
  }
  return t.device_type == kDLCPU ? static_cast<const char*>(t.data) + t.byte_offset : nullptr;
}

int64_t TorchApi::version(PyObject* tensor) const {
  PyObject* number = get(version_, tensor);
  const int64_t value = number == nullptr ? -1 : PyLong_AsLongLong(number);
  Py_XDECREF(number);
  PyErr_Clear();
  return value;
}

void* TorchApi::storage(PyObject* tensor) const {
  PyObject* storage = PyObject_CallOneArg(untyped_storage_, tensor);
  PyObject* address = storage == nullptr ? nullptr : PyObject_GetAttr(storage, cdata_);
  void* value = address == nullptr ? nullptr : PyLong_AsVoidPtr(address);
  Py_XDECREF(storage);
  Py_XDECREF(address);
  PyErr_Clear();
  return value;
}

PyObject* TorchApi::empty(const int64_t size[4], const int64_t stride[4], int32_t type) const {
  PyObject* shapes[2];
  for (const int64_t* values : {size, stride}) {
    PyObject* tuple = PyTuple_New(4);
    for (int i = 0; tuple != nullptr && i < 4; ++i) PyTuple_SET_ITEM(tuple, i, PyLong_FromLongLong(values[i]));
    shapes[values == size ? 0 : 1] = tuple;
  }
  PyObject* dtype = type == kFloat ? float32_ : type == kHalf ? float16_ : bfloat16_;
  PyObject* args[] = {shapes[0], shapes[1], dtype};
  PyObject* made =
      shapes[0] != nullptr && shapes[1] != nullptr ? PyObject_Vectorcall(empty_strided_, args, 3, nullptr) : nullptr;
  Py_XDECREF(shapes[0]);
  Py_XDECREF(shapes[1]);
  return made;
}

}  // namespace effkern::host
