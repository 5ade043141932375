// Written on CPython's own interface: pybind11 costs a call what torch's dispatcher does not.
#include "direct.h"

#include <memory>
#include <vector>

#include "../common/direct.h"
#include "isa.h"
#include "stamp.h"
#include "torch_api.h"

namespace py = pybind11;

namespace effkern::host {
namespace {

const TorchApi* the_torch = nullptr;  // null: not connected, every call goes through the dispatcher
direct::RepConvEntry rep_conv = nullptr;
direct::SlicedConvEntry sliced_conv = nullptr;
direct::SkipBlockEntry skip_block = nullptr;
direct::SkipStageEntry skip_stage = nullptr;
direct::SkipStagePrepare prepare_stage = nullptr;
direct::SkipStageRelease release_stage = nullptr;

constexpr const char* kStamp = "effkern.stamp";

// The output of a call. The GIL is let go as soon as it is made: what follows is the kernel.
struct Result {
  PyObject* y = nullptr;
  PyThreadState* released = nullptr;

  static void* make(void* context, const int64_t size[4], const int64_t stride[4], int32_t type) {
    auto* self = static_cast<Result*>(context);
    direct::TensorRef t;
    self->y = the_torch->empty(size, stride, type);
    if (self->y == nullptr || !the_torch->look(self->y, false, t)) {
      PyErr_Clear();
      return nullptr;
    }
    self->released = PyEval_SaveThread();
    return const_cast<void*>(t.data);
  }

  template <class Entry, class... Arguments>
  PyObject* of(Entry entry, const Arguments*... arguments) {
    const direct::Output output{make, this};
    const int refused = entry(arguments..., &output);
    if (released != nullptr) PyEval_RestoreThread(released);
    if (refused == 0) return y;
    Py_XDECREF(y);
    Py_RETURN_NONE;
  }
};

bool number(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// An int for both, or two ints.
bool pair(PyObject* object, int64_t out[2]) {
  if (number(object, out[0])) {
    out[1] = out[0];
    return true;
  }
  if (PyTuple_Check(object))
    return PyTuple_GET_SIZE(object) == 2 && number(PyTuple_GET_ITEM(object, 0), out[0]) &&
           number(PyTuple_GET_ITEM(object, 1), out[1]);
  return PyList_CheckExact(object) && PyList_GET_SIZE(object) == 2 && number(PyList_GET_ITEM(object, 0), out[0]) &&
         number(PyList_GET_ITEM(object, 1), out[1]);
}

bool word(PyObject* object, const char*& out) {
  if (!PyUnicode_CheckExact(object)) return false;
  out = PyUnicode_AsUTF8(object);
  if (out == nullptr) PyErr_Clear();
  return out != nullptr;
}

bool look_or_none(PyObject* object, bool grad, direct::TensorRef& out) {
  out.data = nullptr;
  return object == Py_None || the_torch->look(object, grad, out);
}

// stride, padding, dilation, groups, act, residual, algo: the end of both forms of rep_conv2d.
constexpr Py_ssize_t kTail = 7;

bool read_tail(PyObject* const* args, bool grad, direct::RepConv& call) {
  if (!pair(args[0], call.stride) || !pair(args[1], call.padding) || !pair(args[2], call.dilation) ||
      !number(args[3], call.groups) || !word(args[4], call.act) || !word(args[6], call.algo))
    return false;
  return look_or_none(args[5], grad, call.residual);
}

// (x, weight, bias, stamp, handle), which both ops begin with: whether weight and bias are what the handle was made of.
bool read_stamped(PyObject* const* args, const Stamp& stamp, bool grad, direct::TensorRef& x, direct::TensorRef& weight,
                  direct::TensorRef& handle) {
  direct::TensorRef bias;
  return the_torch->look(args[0], grad, x) && the_torch->look(args[1], grad, weight) &&
         look_or_none(args[2], grad, bias) && weight.type == x.type && stamp.holds(*the_torch, args + 1, 2) &&
         the_torch->look(args[4], false, handle);
}

// (x, handle, out_channels, kernel_size, *tail)
PyObject* rep_conv2d_packed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::RepConv call;
  if (the_torch == nullptr || count != 4 + kTail || !the_torch->nothing_watches()) Py_RETURN_NONE;
  const bool grad = the_torch->records_gradients();
  if (!the_torch->look(args[0], grad, call.x) || !the_torch->look(args[1], grad, call.handle) ||
      !number(args[2], call.out_channels) || !pair(args[3], call.kernel) || !read_tail(args + 4, grad, call))
    Py_RETURN_NONE;
  return Result().of(rep_conv, &call);
}

// (x, weight, bias, stamp, handle, *tail): the handle is used if the stamp of (weight, bias) holds.
PyObject* rep_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::RepConv call;
  if (the_torch == nullptr || count != 5 + kTail || !the_torch->nothing_watches()) Py_RETURN_NONE;
  const bool grad = the_torch->records_gradients();
  const auto* stamp = static_cast<const Stamp*>(PyCapsule_GetPointer(args[3], kStamp));
  if (stamp == nullptr) return nullptr;
  direct::TensorRef weight;
  if (!read_stamped(args, *stamp, grad, call.x, weight, call.handle) || weight.dim != 4 ||
      !read_tail(args + 5, grad, call))
    Py_RETURN_NONE;
  call.out_channels = weight.sizes[0];
  call.kernel[0] = weight.sizes[2];
  call.kernel[1] = weight.sizes[3];
  return Result().of(rep_conv, &call);
}

// stride, padding, dilation, groups, group_mode, scale, shift, act, algo: the end of both forms of sliced_conv2d.
constexpr Py_ssize_t kSlicedTail = 9;

bool read_tail(PyObject* const* args, bool grad, direct::SlicedConv& call) {
  return pair(args[0], call.stride) && pair(args[1], call.padding) && pair(args[2], call.dilation) &&
         number(args[3], call.groups) && word(args[4], call.group_mode) && look_or_none(args[5], grad, call.scale) &&
         look_or_none(args[6], grad, call.shift) && word(args[7], call.act) && word(args[8], call.algo);
}

// (x, c_in, handle, out_channels, kernel_size, c_out, *tail): sliced_conv2d_packed on x's first c_in channels, all if
// that is below 0.
PyObject* sliced_conv2d_packed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::SlicedConv call;
  if (the_torch == nullptr || count != 6 + kSlicedTail || !the_torch->nothing_watches()) Py_RETURN_NONE;
  const bool grad = the_torch->records_gradients();
  if (!the_torch->look(args[0], grad, call.x) || !number(args[1], call.c_in) ||
      !the_torch->look(args[2], grad, call.handle) || !number(args[3], call.out_channels) ||
      !pair(args[4], call.kernel) || !number(args[5], call.c_out) || !read_tail(args + 6, grad, call))
    Py_RETURN_NONE;
  return Result().of(sliced_conv, &call);
}

// (x, weight, bias, stamp, handle, c_out, *tail of sliced_conv2d_packed): the handle is used if the stamp of (weight,
// bias) holds. Of a linear layer x and weight are 2-d, and the result is [n, c_out, 1, 1].
PyObject* sliced_conv2d(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::SlicedConv call;
  if (the_torch == nullptr || count != 6 + kSlicedTail || !the_torch->nothing_watches()) Py_RETURN_NONE;
  const bool grad = the_torch->records_gradients();
  const auto* stamp = static_cast<const Stamp*>(PyCapsule_GetPointer(args[3], kStamp));
  if (stamp == nullptr) return nullptr;
  direct::TensorRef weight;
  if (!read_stamped(args, *stamp, grad, call.x, weight, call.handle) || weight.dim != call.x.dim ||
      (weight.dim != 2 && weight.dim != 4) || !number(args[5], call.c_out) || !read_tail(args + 6, grad, call))
    Py_RETURN_NONE;
  const bool linear = weight.dim == 2;
  int64_t sizes[4] = {call.x.sizes[0], call.x.sizes[1], 1, 1};
  int64_t strides[4] = {call.x.strides[0], call.x.strides[1], 1, 1};
  if (linear) call.x.sizes = sizes, call.x.strides = strides, call.x.dim = 4;
  call.c_in = -1;
  call.out_channels = weight.sizes[0];
  call.kernel[0] = linear ? 1 : weight.sizes[2];
  call.kernel[1] = linear ? 1 : weight.sizes[3];
  return Result().of(sliced_conv, &call);
}

// (x, keep, w1, b1, w2, b2[, w3, b3], stride, res, act, algo): skip_basic_block or skip_bottleneck.
PyObject* skip_block_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::SkipBlock call;
  if (the_torch == nullptr || (count != 10 && count != 12) || !the_torch->nothing_watches()) Py_RETURN_NONE;
  const bool grad = the_torch->records_gradients();
  call.tensors = count / 2 - 3;
  bool fits = the_torch->look(args[0], grad, call.x) && the_torch->look(args[1], grad, call.keep);
  for (int64_t i = 0; fits && i < call.tensors; ++i)
    fits = the_torch->look(args[2 + 2 * i], grad, call.weights[i]) &&
           the_torch->look(args[3 + 2 * i], grad, call.biases[i]);
  PyObject* const* tail = args + count - 4;
  if (!fits || !number(tail[0], call.stride) || !word(tail[2], call.act) || !word(tail[3], call.algo) ||
      !look_or_none(tail[1], grad, call.residual))
    Py_RETURN_NONE;
  return Result().of(skip_block, &call);
}

// A stage ready to run, with the tensors it is made of.
struct Stage {
  py::object weights, biases;
  void* prepared = nullptr;
  Stage() = default;
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  ~Stage() {
    if (prepared != nullptr) release_stage(prepared);
  }
};

constexpr const char* kStage = "effkern.stage";

void free_stage(PyObject* capsule) { delete static_cast<Stage*>(PyCapsule_GetPointer(capsule, kStage)); }

// (weights: tuple, biases: tuple, blocks, x, kind, act, algo) -> stage for maps like x, or None
PyObject* stage(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::SkipStage call;
  direct::TensorRef x;
  if (the_torch == nullptr || count != 7 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1])) Py_RETURN_NONE;
  call.tensors = PyTuple_GET_SIZE(args[0]);
  if (call.tensors != PyTuple_GET_SIZE(args[1]) || !number(args[2], call.blocks) ||
      !the_torch->look(args[3], false, x) || x.dim != 4 || !word(args[4], call.kind) || !word(args[5], call.act) ||
      !word(args[6], call.algo))
    Py_RETURN_NONE;
  call.channels = x.sizes[1];
  call.type = x.type;
  std::vector<direct::TensorRef> w(call.tensors), b(call.tensors);
  for (int64_t i = 0; i < call.tensors; ++i)
    if (!the_torch->look(PyTuple_GET_ITEM(args[0], i), true, w[i]) ||
        !the_torch->look(PyTuple_GET_ITEM(args[1], i), true, b[i]))
      Py_RETURN_NONE;
  call.weights = w.data();
  call.biases = b.data();
  auto made = std::make_unique<Stage>();
  made->weights = py::reinterpret_borrow<py::object>(args[0]);
  made->biases = py::reinterpret_borrow<py::object>(args[1]);
  made->prepared = prepare_stage(&call);
  if (made->prepared == nullptr) Py_RETURN_NONE;
  PyObject* capsule = PyCapsule_New(made.get(), kStage, free_stage);
  if (capsule != nullptr) made.release();
  return capsule;
}

// (stage, x, keep): skip_stage with the prepared blocks. None also where the stage was prepared for other maps.
PyObject* skip_stage_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  direct::TensorRef x, keep;
  if (the_torch == nullptr || count != 3 || !the_torch->nothing_watches()) Py_RETURN_NONE;
  const auto* ready = static_cast<const Stage*>(PyCapsule_GetPointer(args[0], kStage));
  if (ready == nullptr) return nullptr;
  const bool grad = the_torch->records_gradients();
  if (!the_torch->look(args[1], grad, x) || !the_torch->look(args[2], grad, keep)) Py_RETURN_NONE;
  return Result().of(skip_stage, static_cast<const void*>(ready->prepared), &x, &keep);
}

void free_stamp(PyObject* capsule) { delete static_cast<Stamp*>(PyCapsule_GetPointer(capsule, kStamp)); }

// (tensors: tuple, full: bool) -> stamp, or None if they are not of the kind that packs are made of
PyObject* stamp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (the_torch == nullptr || count != 2 || !PyTuple_Check(args[0])) Py_RETURN_NONE;
  auto taken = std::make_unique<Stamp>();
  PyObject* const* items = &PyTuple_GET_ITEM(args[0], 0);
  if (!taken->take(*the_torch, items, PyTuple_GET_SIZE(args[0]), args[1] == Py_True)) Py_RETURN_NONE;
  PyObject* capsule = PyCapsule_New(taken.get(), kStamp, free_stamp);
  if (capsule != nullptr) taken.release();
  return capsule;
}

// (stamp, tensors: tuple) -> bool
PyObject* stamp_holds(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (the_torch == nullptr || count != 2 || !PyTuple_Check(args[1])) Py_RETURN_FALSE;
  const auto* taken = static_cast<const Stamp*>(PyCapsule_GetPointer(args[0], kStamp));
  if (taken == nullptr) return nullptr;
  return PyBool_FromLong(taken->holds(*the_torch, &PyTuple_GET_ITEM(args[1], 0), PyTuple_GET_SIZE(args[1])));
}

// (stores: list of dicts of tensors or None) -> bytes that change when a tensor is replaced or written to in place, or
// None if one of them is not a plain CPU tensor
PyObject* state_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (the_torch == nullptr || count != 1 || !PyList_CheckExact(args[0])) Py_RETURN_NONE;
  std::vector<int64_t> words;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); ++i) {
    PyObject *store = PyList_GET_ITEM(args[0], i), *name = nullptr, *tensor = nullptr;
    if (!PyDict_Check(store)) Py_RETURN_NONE;
    Py_ssize_t at = 0;
    while (PyDict_Next(store, &at, &name, &tensor)) {
      if (tensor == Py_None) continue;
      const void* data = the_torch->data(tensor);
      const int64_t version = data == nullptr ? -1 : the_torch->version(tensor);
      if (version < 0) Py_RETURN_NONE;
      words.push_back(reinterpret_cast<int64_t>(data));
      words.push_back(version);
    }
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   static_cast<Py_ssize_t>(words.size() * sizeof(int64_t)));
}

template <class F>
PyCFunction method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyObject* nothing_watches(PyObject*, PyObject* const*, Py_ssize_t) {
  return PyBool_FromLong(the_torch != nullptr && the_torch->nothing_watches());
}

PyMethodDef methods[] = {
    {"nothing_watches", method(nothing_watches), METH_FASTCALL,
     "Whether no mode of torch wants to see a call on plain CPU tensors."},
    {"rep_conv2d", method(rep_conv2d), METH_FASTCALL,
     "The op on (x, weight, bias, stamp, handle, stride, padding, dilation, groups, act, residual, algo), or None."},
    {"rep_conv2d_packed", method(rep_conv2d_packed), METH_FASTCALL,
     "The op on its own arguments, all positional, or None if this call has to go through the dispatcher."},
    {"sliced_conv2d", method(sliced_conv2d), METH_FASTCALL,
     "The op, or sliced_linear as a map, on (x, weight, bias, stamp, handle, c_out, stride, padding, dilation, groups, "
     "group_mode, scale, shift, act, algo); or None."},
    {"sliced_conv2d_packed", method(sliced_conv2d_packed), METH_FASTCALL,
     "The op on x's first c_in channels, which follow x, and its own arguments, all positional; or None."},
    {"skip_block", method(skip_block_call), METH_FASTCALL,
     "skip_basic_block or skip_bottleneck on its own arguments, all positional, or None; see rep_conv2d_packed."},
    {"stage", method(stage), METH_FASTCALL,
     "What skip_stage runs, made of (weights, biases, blocks, x, kind, act, algo), the first two tuples; or None."},
    {"skip_stage", method(skip_stage_call), METH_FASTCALL,
     "The op on (stage, x, keep), or None; see rep_conv2d_packed."},
    {"stamp", method(stamp), METH_FASTCALL, "What a tuple of tensors is now, or None for tensors that are not plain."},
    {"stamp_holds", method(stamp_holds), METH_FASTCALL, "Whether a tuple of tensors still is what the stamp says."},
    {"state_of", method(state_of), METH_FASTCALL,
     "Bytes that change when a tensor in a list of dicts is replaced or written to in place, or None."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_direct(py::module_& m) {
  m.def(
      "connect",
      [] {
        try {
          rep_conv = reinterpret_cast<direct::RepConvEntry>(symbol("effkern_rep_conv2d_packed"));
          sliced_conv = reinterpret_cast<direct::SlicedConvEntry>(symbol("effkern_sliced_conv2d_packed"));
          skip_block = reinterpret_cast<direct::SkipBlockEntry>(symbol("effkern_skip_block"));
          prepare_stage = reinterpret_cast<direct::SkipStagePrepare>(symbol("effkern_skip_stage_prepare"));
          release_stage = reinterpret_cast<direct::SkipStageRelease>(symbol("effkern_skip_stage_release"));
          skip_stage = reinterpret_cast<direct::SkipStageEntry>(symbol("effkern_skip_stage"));
        } catch (const std::exception&) {
          return false;  // _C.so is not loaded
        }
        the_torch = TorchApi::connect();
        return the_torch != nullptr;
      },
      "Find torch and effkern._C; until this returned True, no call takes the short way.");
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace effkern::host
