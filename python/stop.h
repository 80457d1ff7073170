// Ends a call early: on Ctrl-C, or an exception in one of its threads.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>

namespace lgd {

// threading.main_thread().ident, set when the module is loaded: the thread that runs Python's signal handlers.
inline unsigned long main_thread = 0;

// The stop request of one call. An exception that leaves a parallel region would end the process, so this class stores
// it until the region has ended.
class Stop {
 public:
  bool requested() const { return requested_.load(std::memory_order_acquire); }
  void fail(std::exception_ptr error) {
    if (claimed_.exchange(true)) return;
    error_ = error;
    requested_.store(true, std::memory_order_release);
  }
  void rethrow() const {
    if (requested()) std::rethrow_exception(error_);
  }
  // Called by the main thread only.
  void run_signal_handlers() {
    pybind11::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) fail(std::make_exception_ptr(pybind11::error_already_set()));
  }

  // The call that this thread works for, or null.
  static Stop*& current() {
    static thread_local Stop* stop = nullptr;
    return stop;
  }

 private:
  std::atomic<bool> claimed_{false}, requested_{false};
  std::exception_ptr error_;
};

// During its lifetime, this thread works for that call.
class Working {
 public:
  explicit Working(Stop& stop) : before_(Stop::current()) { Stop::current() = &stop; }
  ~Working() { Stop::current() = before_; }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  Stop* before_;
};

// A loop calls stops() between two pieces, and ends if it returns true. On the main thread it runs signal handlers ten
// times a second. It reads the clock after 1, 2, 4, ... pieces, as long as these take less than 5 ms, so that a call of
// few pieces costs nothing.
class Watch {
  using Clock = std::chrono::steady_clock;

 public:
  bool stops() {
    if (--left_ == 0) look();
    return stop_.requested();
  }

 private:
  void look() {
    if (PyThread_get_thread_ident() != main_thread) {
      left_ = kMost;
      return;
    }
    const auto now = Clock::now();
    if (!started_) due_ = now + kPeriod, started_ = true;
    stride_ = now - before_ < std::chrono::milliseconds(5) ? std::min(2 * stride_, kMost) : int64_t(1);
    before_ = now;
    left_ = stride_;
    if (now < due_) return;
    due_ = now + kPeriod;
    stop_.run_signal_handlers();
  }

  static constexpr int64_t kMost = 1024;
  static constexpr std::chrono::milliseconds kPeriod{100};
  Stop& stop_ = *Stop::current();
  int64_t left_ = 1, stride_ = 1;
  bool started_ = false;
  Clock::time_point before_{}, due_{};
};

}  // namespace lgd
