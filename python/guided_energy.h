// Structs of lgd_kernels/ops/guided_energy/structs.py as those of csrc/, for the CPU and for CUDA.
#pragma once
#include "../csrc/guided_energy/guided_energy.h"
#include "arguments.h"

namespace lgd {

// [B, n, ...] as rows, n for each item, all at one stride: copied if they are not, or if the elements of a row lie
// apart.
inline Rows particles(Tensor tensor, Call& call) {
  namespace py = pybind11;
  if (tensor.is_none()) return {nullptr, DType::f32, 0};
  const auto& python = Python::instance();
  const auto strides = py::reinterpret_steal<py::tuple>(PyObject_CallMethodNoArgs(tensor.ptr(), python.stride));
  const auto shape = py::reinterpret_steal<py::tuple>(PyObject_GetAttr(tensor.ptr(), python.shape));
  if (!strides || !shape) throw py::error_already_set();
  const auto stride = [&](Py_ssize_t d) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), d)); };
  const auto size = [&](Py_ssize_t d) { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d)); };
  bool walkable = size(0) == 1 || size(1) == 1 || stride(0) == size(1) * stride(1);
  int64_t expected = 1;
  for (Py_ssize_t d = PyTuple_GET_SIZE(shape.ptr()) - 1; d > 1; --d) {
    walkable = walkable && (size(d) == 1 || stride(d) == expected);
    expected *= size(d);
  }
  const bool several = size(1) > 1;  // the dimension of a single particle may have any stride
  if (walkable) return {address(tensor), dtype(tensor), stride(several)};
  const Tensor copy = call.contiguous(tensor);
  return {address(copy), dtype(copy), lgd::stride(copy, several)};
}

inline Targets targets(Tensor kind) {
  const char* names[] = {"tensor", "renoise", "expected"};
  for (int code = 0; code < 3; ++code)
    if (PyUnicode_Check(kind.ptr()) && PyUnicode_CompareWithASCIIString(kind.ptr(), names[code]) == 0)
      return Targets(code);
  throw pybind11::value_error("unknown kind of targets");
}

inline Target target_of(const Fields& from, Call& call) {
  const Targets kind = targets(from[1]);
  return {kind == Targets::tensor ? particles(from[0], call) : call.rows(from[0]), kind, from.integer(2),
          seed(from.fields(3))};
}

inline GuidedEnergy guided_energy_of(const Fields& a, Call& call) {
  const Fields from = a.fields(5);
  return {particles(a[0], call),
          particles(a[1], call),
          particles(a[2], call),
          particles(a[3], call),
          step_scalars(a.fields(4), call),
          draws(from),
          draws(from) ? seed(from) : Seed{},
          target_of(a.fields(6), call),
          size(a[0], 1)};
}

inline EnergyOptions energy_options_of(const Fields& from) { return {from.real(0), from.real(1), from.flag(2)}; }

// Outputs: d_x, d_cond, d_uncond, d_noise and d_target.
inline GuidedEnergyBackward guided_energy_backward_of(const Fields& outputs, const Fields& b, Call& call) {
  const auto forward = guided_energy_of(b.fields(0), call);
  const bool given = forward.target.kind == Targets::tensor;
  return {particles(outputs[0], call),
          particles(outputs[1], call),
          particles(outputs[2], call),
          particles(outputs[3], call),
          given ? particles(outputs[4], call) : rows(outputs[4]),
          forward,
          static_cast<const double*>(address(call.contiguous(b[1]))),
          static_cast<const double*>(address(call.contiguous(b[2])))};
}

// Items, and the elements of a particle, of x [B, m, ...].
inline Sizes particle_sizes(const GuidedEnergy& op, Tensor x) {
  Sizes sizes(x);
  sizes.row /= op.m;
  return sizes;
}

}  // namespace lgd
