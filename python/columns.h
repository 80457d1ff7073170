// The columns that moments and combine read, as Python hands them over.
#pragma once
#include <stdexcept>

#include "../csrc/common/columns.h"
#include "arguments.h"

namespace lgd {

// A list of integers, two for each.
inline int pairs_of(pybind11::handle list, Column* out, int most) {
  const int count = int(PySequence_Size(list.ptr())) / 2;
  if (count > most) throw std::length_error("more columns or pairs than the kernels have room for");
  for (int k = 0; k < count; ++k)
    out[k] = {int(PyLong_AsLong(item(list, 2 * k).ptr())), int(PyLong_AsLong(item(list, 2 * k + 1).ptr()))};
  return count;
}

inline Columns columns_of(Tensors tensors, pybind11::handle columns, Tensor source, int gathered) {
  Columns read{};
  read.tensor_count = int(PySequence_Size(tensors.ptr()));
  if (read.tensor_count > kMostTensors) throw std::length_error("more tensors than the kernels have room for");
  for (int n = 0; n < read.tensor_count; ++n) read.tensors[n] = rows(item(tensors, n));
  read.count = pairs_of(columns, read.columns, kMostTensors);
  read.source = static_cast<const int64_t*>(address(source));
  read.gathered = gathered;
  read.samples = size(item(tensors, 0), 0);
  return read;
}

}  // namespace lgd
