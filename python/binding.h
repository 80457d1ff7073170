// A file of bindings registers itself: the module calls all that were linked into it.
#pragma once
#include <pybind11/pybind11.h>

namespace lgd {

class Binding {
 public:
  using Bind = void (*)(pybind11::module_&);

  explicit Binding(Bind bind) : bind_(bind), next_(first()) { first() = this; }
  static void bind_all(pybind11::module_& module) {
    for (const Binding* binding = first(); binding; binding = binding->next_) binding->bind_(module);
  }

 private:
  static const Binding*& first() {
    static const Binding* found = nullptr;
    return found;
  }

  Bind bind_;
  const Binding* next_;
};

}  // namespace lgd
