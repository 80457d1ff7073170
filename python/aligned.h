// Memory that begins at a cache line, so that no vector of a row spans two.
#pragma once
#include <cstddef>
#include <new>
#include <vector>

namespace lgd {

template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* data, std::size_t) { ::operator delete(data, kLine); }
  template <class U>
  bool operator==(const LineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const LineAllocator<U>&) const {
    return false;
  }

 private:
  static constexpr std::align_val_t kLine{64};
};

template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

}  // namespace lgd
