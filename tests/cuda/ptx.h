// What a kernel calls that ptx.py translated from PTX to C++, and how it is launched.
//
// An access to memory whose address is no multiple of its size is an error of the launch, as is one outside the shared
// variables. A vector is one access.
#pragma once
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda_runtime.h"

namespace ptx {

using simulator::Site;

// Runs one thread. It takes the addresses of the parameters.
using Body = void (*)(char* const* parameters);

struct Entry {
  const void* kernel;  // as the C++ compiler made it: it is launched by this address and not called
  Body body;
};

// Returns the translation of a kernel. Each translated file defines it after the source that it includes.
static Body translation(const void* kernel);

template <class... P, class... Given>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int64_t threads, const Given&... given) {
  std::tuple<P...> values(given...);
  std::apply(
      [&](P&... value) {
        char* const parameters[] = {reinterpret_cast<char*>(&value)...};
        const Body body = translation(reinterpret_cast<const void*>(kernel));
        simulator::launch(name, blocks, threads, [&] { body(parameters); });
      },
      values);
}

[[noreturn, gnu::cold]] inline void misaligned(size_t bytes, Site site) {
  simulator::fail("a misaligned access of " + std::to_string(bytes) + " bytes", site);
}

template <size_t kBytes>
char* at(uint64_t address, Site site) {
  if (address % kBytes) misaligned(kBytes, site);
  return reinterpret_cast<char*>(address);
}

// The shared variables of a kernel, which one site identifies.
struct Shared {
  char* memory;
  uint32_t bytes;

  Shared(const char* site, uint32_t bytes)
      : memory(static_cast<char*>(simulator::shared(site, bytes, 16))), bytes(bytes) {}

  template <size_t kBytes>
  char* at(uint32_t offset, Site site) const {
    if (offset % kBytes) misaligned(kBytes, site);
    if (offset + uint64_t(kBytes) > bytes) simulator::fail("an access outside shared memory", site);
    return memory + offset;
  }
};

template <class T>
T load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void store(char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

enum class Shuffle { up, down, bfly, idx };

// `within` has the last lane to read, in bits 0 to 4, and in bits 8 to 12 those of a lane that name its segment.
// `inside`: whether the lane to read is in the segment; if not, it is this one.
inline uint32_t shuffle(Shuffle kind, uint32_t word, uint32_t by, uint32_t within, uint32_t mask, bool* inside,
                        Site site) {
  const int lane = simulator::lane(), step = by & 31, segment = within >> 8 & 31;
  const int first = lane & segment, last = first | (within & 31 & ~segment);
  const int from = kind == Shuffle::up     ? lane - step
                   : kind == Shuffle::down ? lane + step
                   : kind == Shuffle::bfly ? lane ^ step
                                           : first | (step & ~segment);
  *inside = kind == Shuffle::up ? from >= last : from <= last;
  return simulator::shuffle(mask, word, *inside ? from : lane, site);
}

// A shift by more than all bits gives 0, or the sign.
template <class T>
T shl(T value, uint32_t by) {
  return by < 8 * sizeof(T) ? T(value << by) : T(0);
}
template <class T>
T shr(T value, uint32_t by) {
  return by < 8 * sizeof(T) ? T(value >> by) : T(value < 0 ? -1 : 0);
}

// The nearest integer that T has; 0 for NaN.
template <class T, class F>
T to_integer(F whole) {
  using Limits = std::numeric_limits<T>;
  const F above = F(Limits::max() / 2 + 1) * 2;
  return whole != whole ? T(0) : whole >= above ? Limits::max() : whole < F(Limits::min()) ? Limits::min() : T(whole);
}

template <class T, class F>
T saturated(F value) {
  using Limits = std::numeric_limits<T>;
  const __int128 least = Limits::min(), most = Limits::max(), exact = value;
  return T(exact < least ? least : exact > most ? most : exact);
}

// The other one if one is NaN; -0 is less than 0.
template <class F>
F min(F a, F b) {
  return a != a ? b : b != b || a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class F>
F max(F a, F b) {
  return -min(-a, -b);
}

// From the upper 32 bits of a value, and with as many; subnormal numbers are 0.
inline double rough_reciprocal(double value) {
  const auto upper = [](double from) { return load<uint64_t>(reinterpret_cast<char*>(&from)) & ~0xffffffffull; };
  const auto flushed = [](uint64_t bits) {
    if (!(bits << 1 >> 53)) bits &= 1ull << 63;
    return load<double>(reinterpret_cast<char*>(&bits));
  };
  return flushed(upper(1 / flushed(upper(value))));
}

inline float from_half(uint16_t bits) { return float(load<_Float16>(reinterpret_cast<char*>(&bits))); }
inline uint16_t to_half(float value) {
  const _Float16 half = _Float16(value);
  return value == value ? load<uint16_t>(reinterpret_cast<const char*>(&half)) : 0x7fff;
}

inline float from_bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  return load<float>(reinterpret_cast<const char*>(&wide));
}
inline uint16_t to_bfloat(float value) {
  const auto bits = load<uint32_t>(reinterpret_cast<const char*>(&value));
  return value == value ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;
}

}  // namespace ptx

#undef LGD_LAUNCH
#define LGD_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), ptx::launch(#kernel, kernel, blocks, threads, __VA_ARGS__))
