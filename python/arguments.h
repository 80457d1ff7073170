// What Python hands over (lgd_kernels/native.py), as the structs of csrc/. A tensor is an address, a dtype code and
// a stride; nothing here knows torch.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../csrc/common/levels.h"
#include "../csrc/common/philox.h"
#include "../csrc/common/rows.h"

namespace lgd {

using Address = uintptr_t;
using RowsArgument = std::tuple<Address, int, int64_t>;                // address (0: absent), dtype, stride
using PerSampleArgument = std::tuple<Address, int, int64_t, double>;   // address (0: the value), dtype, stride, value
using SeedArgument = std::tuple<Address, int64_t, int64_t, uint32_t>;  // address (0: the value), stride, value, first
using LevelsArgument = std::tuple<std::array<Address, 5>, int, int64_t>;  // addresses, dtype, stride
// values, its dtype and three sizes; s_knots, t_knots, their dtype; c, s, t, the dtype of the times
using TableArgument =
    std::tuple<Address, int, std::array<int64_t, 3>, Address, Address, int, Address, Address, Address, int>;

inline Rows rows(const RowsArgument& from) {
  const auto [address, dtype, stride] = from;
  return {reinterpret_cast<void*>(address), DType(dtype), stride};
}

inline PerSample per_sample(const PerSampleArgument& from) {
  const auto [address, dtype, stride, value] = from;
  return {reinterpret_cast<const void*>(address), DType(dtype), stride, value};
}

inline Seed seed(const SeedArgument& from) {
  const auto [address, stride, value, first_sample] = from;
  return {reinterpret_cast<const int64_t*>(address), stride, value, first_sample};
}

inline Levels levels(const LevelsArgument& from) {
  const auto& [addresses, dtype, stride] = from;
  Levels levels{{}, DType(dtype), stride};
  for (int i = 0; i < 5; ++i) levels.data[i] = reinterpret_cast<const void*>(addresses[i]);
  return levels;
}

inline Omega omega(const PerSampleArgument& from, const std::optional<TableArgument>& table) {
  Omega omega{per_sample(from), {}};
  if (!table) return omega;
  const auto& [values, dtype, sizes, s_knots, t_knots, knots_dtype, c, s, t, times_dtype] = *table;
  const auto pointer = [](Address address) { return reinterpret_cast<const void*>(address); };
  omega.table = {pointer(values),  DType(dtype),       sizes[0],
                 sizes[1],         sizes[2],           pointer(s_knots),
                 pointer(t_knots), DType(knots_dtype), static_cast<const int64_t*>(pointer(c)),
                 pointer(s),       pointer(t),         DType(times_dtype)};
  return omega;
}

}  // namespace lgd
