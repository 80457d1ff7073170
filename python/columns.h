// The structs of lgd_kernels/runtime/columns.py as those of csrc/.
#pragma once
#include <stdexcept>

#include "../csrc/common/columns.h"
#include "arguments.h"

namespace lgd {

// A flat list of integers, two for each Column or Product.
template <class Two>
int twos_of(pybind11::handle list, Two* out, int most) {
  const int count = int(PySequence_Size(list.ptr())) / 2;
  if (count > most) throw std::length_error("more columns or products than the kernels have room for");
  for (int k = 0; k < count; ++k)
    out[k] = {int(PyLong_AsLong(item(list, 2 * k).ptr())), int(PyLong_AsLong(item(list, 2 * k + 1).ptr()))};
  return count;
}

inline Columns columns_of(const Fields& from, Call& call) {
  const Tensors tensors = from[0];
  Columns read{};
  read.tensor_count = int(PySequence_Size(tensors.ptr()));
  if (read.tensor_count > kMostTensors) throw std::length_error("more tensors than the kernels have room for");
  for (int n = 0; n < read.tensor_count; ++n) read.tensors[n] = call.rows(item(tensors, n));
  read.count = twos_of(from[1], read.columns, kMostTensors);
  read.source = static_cast<const int64_t*>(address(call.contiguous(from[2])));
  read.gathered = int(from.integer(3));
  read.samples = size(item(tensors, 0), 0);
  return read;
}

}  // namespace lgd
