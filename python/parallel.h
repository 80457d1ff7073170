// Threads. Work is cut into chunks of fixed size, so that results do not depend on the number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../csrc/common/rows.h"
#include "stop.h"

namespace lgd {

// Elements below which a second thread costs more than it saves: if they are read, and if noise is drawn.
constexpr int64_t kSerial = 32768, kSerialDrawn = 8192;

// Calls work(task) for each task. A thread starts with a range of neighbouring tasks, the same in every call, because
// its core may still cache their data. Then it takes tasks that other threads, which may wake up late, have not begun.
// An exception in a task ends all tasks, and so does Ctrl-C; for_tasks throws it when no thread works any longer.
template <class Work>
void for_tasks(int64_t tasks, int threads, const Work& work, int64_t together = 1) {
  Stop own, *outer = Stop::current(), &stop = outer ? *outer : own;
  if (threads <= 1) {
    const Working working(stop);
    Watch watch;
    for (int64_t first = 0; first < tasks; first += together) {
      for (int64_t task = first; task < std::min(first + together, tasks); ++task) work(task);
      if (watch.stops()) stop.rethrow();
    }
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int thread = 0; thread < threads; ++thread) {
    shares[thread].next = tasks * thread / threads;
    shares[thread].end = tasks * (thread + 1) / threads;
  }
  const auto run = [&](int thread) {
    const Working working(stop);
    Watch watch;
    for (int turn = 0; turn < threads; ++turn) {
      Share& share = shares[(thread + turn) % threads];
      for (;;) {
        const int64_t first = share.next.fetch_add(together, std::memory_order_relaxed);
        if (first >= share.end) break;
        for (int64_t task = first; task < std::min(first + together, share.end); ++task) work(task);
        if (watch.stops()) return;
      }
    }
  };
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) try {
      run(thread);
    } catch (...) {
      stop.fail(std::current_exception());
    }
  stop.rethrow();
}

// Calls work(sample, first, last) for every chunk of every row.
template <class Work>
void for_chunks(int64_t batch, int64_t row, int threads, const Work& work, int64_t serial = kSerial) {
  const int64_t chunks = chunks_of(row), tasks = batch * chunks;
  const int64_t together = row < kChunk ? kChunk / std::max<int64_t>(row, 1) : 1;  // short rows, taken together
  const auto chunk = [&](int64_t task) {
    const int64_t sample = task / chunks, first = task % chunks * kChunk;
    work(sample, first, std::min(first + kChunk, row));
  };
  for_tasks(tasks, batch * row < serial ? 1 : threads, chunk, together);
}

// Sets sums[sample] to the sum of work(sample, first, last) over its chunks, in order.
template <class S, class Work>
void sum_chunks(int64_t batch, int64_t row, int threads, S* sums, const Work& work) {
  const int64_t chunks = chunks_of(row);
  std::vector<double> parts(sums ? batch * chunks : 0);
  for_chunks(batch, row, threads, [&](int64_t sample, int64_t first, int64_t last) {
    const double part = work(sample, first, last);
    if (sums) parts[sample * chunks + first / kChunk] = part;
  });
  if (!sums) return;
  for (int64_t sample = 0; sample < batch; ++sample) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[sample * chunks + chunk];
    sums[sample] = S(sum);
  }
}

constexpr int64_t kMostParts = 16;  // of a row of any length: a part may hold thousands of sums

// Elements in each part.
inline int64_t part_of(int64_t row) {
  const int64_t blocks = (row + kChunk - 1) / kChunk;
  return (blocks + kMostParts - 1) / kMostParts * kChunk;
}

// Sets totals[sample, i] to the sum over the row of what work(sample, first, last, sums) adds to sums[i], i < count,
// and calls done(sample) when the totals of a sample are complete.
template <class Work, class Done>
void reduce_rows(int64_t batch, int64_t row, int threads, int64_t count, double* totals, const Work& work,
                 const Done& done) {
  const int64_t length = part_of(row), chunks = (row + length - 1) / length, tasks = batch * chunks;
  std::fill(totals, totals + batch * count, 0.0);
  if (chunks == 1)
    return for_tasks(batch, threads, [&](int64_t sample) {
      work(sample, 0, row, totals + sample * count);
      done(sample);
    });
  std::vector<double> parts(tasks * count);
  for_tasks(tasks, threads, [&](int64_t task) {
    const int64_t sample = task / chunks, first = task % chunks * length;
    work(sample, first, std::min(first + length, row), parts.data() + task * count);
  });
  for_tasks(batch, batch * count > 2048 ? threads : 1, [&](int64_t sample) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < count; ++i) totals[sample * count + i] += parts[(sample * chunks + chunk) * count + i];
    done(sample);
  });
}
template <class Work>
void reduce_rows(int64_t batch, int64_t row, int threads, int64_t count, double* totals, const Work& work) {
  reduce_rows(batch, row, threads, count, totals, work, [](int64_t) {});
}

// The same for one row, on the calling thread: up to 16 sums, with the same bits.
template <class Work>
void reduce_row(int64_t sample, int64_t row, int count, double* totals, const Work& work) {
  const int64_t length = part_of(row);
  for (int64_t first = 0; first < row; first += length) {
    double part[16] = {};
    work(sample, first, std::min(first + length, row), part);
    for (int i = 0; i < count; ++i) totals[i] += part[i];
  }
}

}  // namespace lgd
