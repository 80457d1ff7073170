#include "../csrc/common/philox_cpu.h"
#include "arguments.h"
#include "binding.h"
#include "parallel.h"

namespace py = pybind11;

namespace lgd {

const Binding binding([](py::module_& module) {
  module.def("philox_words", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
    philox(words, key[0], key[1]);
    return std::array<uint32_t, 4>{words[0], words[1], words[2], words[3]};
  });
  // Elements [start, start + row) of each sample of out; start is a multiple of 4.
  module.def("philox_normal", [](Tensor out, int64_t start, uint32_t stream, Tensor drawn, int threads) {
    auto* z = static_cast<float*>(address(out));
    const Seed from = seed(Fields(drawn));
    const Sizes sizes(out);
    const int64_t row = sizes.row;
    py::gil_scoped_release release;
    const auto work = [&](int64_t sample, int64_t first, int64_t last) {
      philox_fill(z + sample * row + first, last - first, start + first, from.key(sample), from.index(sample), stream);
    };
    for_chunks(sizes.batch, sizes.row, threads, work, kSerialDrawn);
  });
});

}  // namespace lgd
