// What Python hands over, as the structs of csrc/. A tensor is an object with `data_ptr`, `dtype`, `stride` and
// `shape`: these are asked for by name, so that nothing here is built against torch or linked to it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "../csrc/common/levels.h"
#include "../csrc/common/philox.h"
#include "../csrc/common/rows.h"

namespace lgd {

using Tensor = pybind11::handle;   // or None: absent
using Tensors = pybind11::handle;  // a list or tuple of them
using Address = uintptr_t;

// Made once, when the module is loaded, and never freed: names to ask for, and torch's dtypes in the order of DType.
struct Python {
  PyObject *data_ptr, *dtype, *stride, *shape, *numel, *contiguous;
  PyObject* dtypes[4];

  static const Python& instance() {
    static const Python python;
    return python;
  }

 private:
  Python()
      : data_ptr(PyUnicode_InternFromString("data_ptr")),
        dtype(PyUnicode_InternFromString("dtype")),
        stride(PyUnicode_InternFromString("stride")),
        shape(PyUnicode_InternFromString("shape")),
        numel(PyUnicode_InternFromString("numel")),
        contiguous(PyUnicode_InternFromString("contiguous")) {
    const auto torch = pybind11::module_::import("torch");
    const char* names[] = {"float32", "bfloat16", "float16", "float64"};
    for (int i = 0; i < 4; ++i) dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
  }
};

inline int64_t integer(PyObject* result) {
  const auto owned = pybind11::reinterpret_steal<pybind11::object>(result);
  const int64_t value = owned ? PyLong_AsLongLong(owned.ptr()) : -1;
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

// Null only if the tensor is absent or empty. Refuses a tensor with elements but no memory (a zero of forward AD, a
// freed storage).
inline void* address(Tensor tensor) {
  if (tensor.is_none()) return nullptr;
  const auto& python = Python::instance();
  void* found = reinterpret_cast<void*>(integer(PyObject_CallMethodNoArgs(tensor.ptr(), python.data_ptr)));
  if (!found && integer(PyObject_CallMethodNoArgs(tensor.ptr(), python.numel)))
    throw pybind11::value_error("a tensor has elements but no memory: its storage was freed, or it never had one");
  return found;
}

inline DType dtype(Tensor tensor) {
  const auto& python = Python::instance();
  const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(tensor.ptr(), python.dtype));
  if (!found) throw pybind11::error_already_set();
  for (int code = 0; code < 4; ++code)
    if (found.ptr() == python.dtypes[code]) return DType(code);
  throw pybind11::type_error("the kernels take float32, bfloat16, float16 and float64");
}

// (All strides at once take half the time that one of them takes.)
inline int64_t stride(Tensor tensor, int dimension = 0) {
  const auto strides =
      pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(tensor.ptr(), Python::instance().stride));
  if (!strides) throw pybind11::error_already_set();
  return integer(PySequence_GetItem(strides.ptr(), dimension));
}

inline int64_t size(Tensor tensor, int dimension) {
  const auto& python = Python::instance();
  const auto shape = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(tensor.ptr(), python.shape));
  if (!shape) throw pybind11::error_already_set();
  return integer(PySequence_GetItem(shape.ptr(), dimension));
}

inline Tensor item(Tensors tensors, int index) {
  return PyTuple_Check(tensors.ptr()) ? PyTuple_GetItem(tensors.ptr(), index) : PyList_GetItem(tensors.ptr(), index);
}

// B samples of `row` elements, B not 0.
struct Sizes {
  int64_t batch, row;

  explicit Sizes(Tensor like)
      : batch(size(like, 0)), row(integer(PyObject_CallMethodNoArgs(like.ptr(), Python::instance().numel)) / batch) {}
};

inline Rows rows(Tensor tensor) {
  if (tensor.is_none()) return {nullptr, DType::f32, 0};
  return {address(tensor), dtype(tensor), stride(tensor)};
}

// Arithmetic is float64: one of them is.
template <class... R>
bool wide(const R&... tensors) {
  return ((tensors.data && tensors.dtype == DType::f64) || ...);
}

inline PerSample per_sample(Tensor tensor, double value) {
  if (tensor.is_none()) return {nullptr, DType::f32, 0, value};
  return {address(tensor), dtype(tensor), stride(tensor), 0};
}

// Five tensors [B] of one dtype.
inline Levels levels(Tensors tensors) {
  Levels levels{{}, {}, dtype(item(tensors, 0))};
  for (int i = 0; i < 5; ++i) {
    levels.data[i] = address(item(tensors, i));
    levels.stride[i] = stride(item(tensors, i));
  }
  return levels;
}

// A NamedTuple of lgd_kernels/, with the fields of a struct of csrc/ in their order.
class Fields {
 public:
  explicit Fields(pybind11::handle tuple) : tuple_(tuple.ptr()) {
    if (!PyTuple_Check(tuple_)) throw pybind11::type_error("expected a struct of arguments, a NamedTuple");
  }
  Tensor operator[](int place) const {
    PyObject* found = PyTuple_GetItem(tuple_, place);  // borrowed
    if (!found) throw pybind11::error_already_set();
    return found;
  }
  Fields fields(int place) const { return Fields((*this)[place]); }
  int64_t integer(int place) const { return (*this)[place].cast<int64_t>(); }
  double real(int place) const { return (*this)[place].cast<double>(); }
  bool flag(int place) const { return (*this)[place].cast<bool>(); }

 private:
  PyObject* tuple_;
};

// Reads the tensors of one call, and keeps the copies of those that a kernel cannot walk until the call ends.
class Call {
 public:
  // Rows of [B, ...]: the samples may lie anywhere, the elements of a sample next to each other.
  Rows rows(Tensor tensor) {
    if (tensor.is_none()) return {nullptr, DType::f32, 0};
    const auto strides = get(tensor, Python::instance().stride, true);
    const Py_ssize_t dimensions = PyTuple_GET_SIZE(strides.ptr());
    if (dimensions > 1) {
      const auto shape = get(tensor, Python::instance().shape, false);
      int64_t expected = 1;
      for (Py_ssize_t d = dimensions - 1; d > 0; --d) {
        const int64_t count = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
        if (count != 1 && PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), d)) != expected)
          return lgd::rows(copied(tensor));
        expected *= count;
      }
    }
    return {address(tensor), dtype(tensor), PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), 0))};
  }

  // The tensor, or a copy whose elements lie one after the other.
  Tensor contiguous(Tensor tensor) { return tensor.is_none() ? tensor : copied(tensor); }

 private:
  static pybind11::object get(Tensor tensor, PyObject* name, bool method) {
    PyObject* found = method ? PyObject_CallMethodNoArgs(tensor.ptr(), name) : PyObject_GetAttr(tensor.ptr(), name);
    if (!found) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(found);
  }
  Tensor copied(Tensor tensor) {
    copies_.push_back(get(tensor, Python::instance().contiguous, true));
    return copies_.back();
  }

  std::vector<pybind11::object> copies_;
};

// A Number of arguments.py.
inline PerSample per_sample(const Fields& number) { return per_sample(number[0], number.real(1)); }

// A Seed of arguments.py: absent, one for the batch (a number or a 0-dim tensor), or one for each sample.
inline bool draws(const Fields& seed) { return !seed[0].is_none() || !seed[1].is_none(); }
inline Seed seed(const Fields& from) {
  const Tensor tensor = from[0];
  const auto first_sample = uint32_t(from.integer(2));
  if (tensor.is_none()) return {nullptr, 0, from[1].is_none() ? 0 : from.integer(1), first_sample, false};
  const bool own = integer(PyObject_CallMethod(tensor.ptr(), "dim", nullptr)) == 1;
  return {static_cast<const int64_t*>(address(tensor)), own ? stride(tensor) : 0, 0, first_sample, own};
}

// An Omega of arguments.py; its table holds the fields of an OmegaLookup, or nothing.
inline Omega omega(const Fields& from, Call& call) {
  Omega omega{per_sample(from), {}};
  if (PySequence_Size(from[2].ptr()) == 0) return omega;
  Tensor lookup[6];
  for (int i = 0; i < 6; ++i) lookup[i] = call.contiguous(item(from[2], i));
  const auto [values, s_knots, t_knots, c, s, t] = lookup;
  omega.table = {address(values),  dtype(values),   size(values, 0),
                 size(values, 1),  size(values, 2), address(s_knots),
                 address(t_knots), dtype(s_knots),  static_cast<const int64_t*>(address(c)),
                 address(s),       address(t),      dtype(s)};
  return omega;
}

inline Prediction prediction(Tensor name) {
  const char* names[] = {"x0", "eps", "v", "flow"};
  for (int code = 0; code < 4; ++code)
    if (PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), names[code]) == 0)
      return Prediction(code);
  throw pybind11::value_error("unknown prediction");
}

inline StepScalars step_scalars(const Fields& from, Call& call) {
  return {omega(from.fields(0), call), levels(from[1]), prediction(from[2]), per_sample(from.fields(3))};
}

}  // namespace lgd
