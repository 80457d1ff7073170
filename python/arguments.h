// What Python hands over, as the structs of csrc/. A tensor is an object with `data_ptr`, `dtype`, `stride` and
// `shape`: these are asked for by name, so that nothing here is built against torch or linked to it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "../csrc/common/levels.h"
#include "../csrc/common/philox.h"
#include "../csrc/common/rows.h"

namespace lgd {

using Tensor = pybind11::handle;   // or None: absent
using Tensors = pybind11::handle;  // a list or tuple of them
using Address = uintptr_t;

// Made once, when the module is loaded, and never freed: names to ask for, and torch's dtypes in the order of DType.
struct Python {
  PyObject *data_ptr, *dtype, *stride, *shape, *numel;
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
        numel(PyUnicode_InternFromString("numel")) {
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

// Absent, one seed for the batch (a number or a 0-dim tensor), or one for each sample.
inline Seed seed(Tensor tensor, std::optional<int64_t> value, int64_t first_sample) {
  if (tensor.is_none()) return {nullptr, 0, value.value_or(0), uint32_t(first_sample), false};
  const auto* data = static_cast<const int64_t*>(address(tensor));
  const bool own = integer(PyObject_CallMethod(tensor.ptr(), "dim", nullptr)) == 1;
  return {data, own ? stride(tensor) : 0, 0, uint32_t(first_sample), own};
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

// `table` holds the fields of an OmegaLookup, or nothing.
inline Omega omega(Tensor tensor, double value, Tensors table) {
  Omega omega{per_sample(tensor, value), {}};
  if (PySequence_Size(table.ptr()) == 0) return omega;
  const Tensor values = item(table, 0), s_knots = item(table, 1), s = item(table, 4);
  omega.table = {address(values),
                 dtype(values),
                 size(values, 0),
                 size(values, 1),
                 size(values, 2),
                 address(s_knots),
                 address(item(table, 2)),
                 dtype(s_knots),
                 static_cast<const int64_t*>(address(item(table, 3))),
                 address(s),
                 address(item(table, 5)),
                 dtype(s)};
  return omega;
}

inline StepScalars step_scalars(Tensor omega_, double omega_value, Tensors table, Tensors levels_, int prediction,
                                Tensor churn, double churn_value) {
  return {omega(omega_, omega_value, table), levels(levels_), Prediction(prediction), per_sample(churn, churn_value)};
}

}  // namespace lgd
