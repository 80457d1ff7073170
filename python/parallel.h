// Threads. Work is cut into chunks of fixed size, so that results do not depend on how many threads there are.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../csrc/common/rows.h"
#include "stop.h"

namespace lgd {

// Elements below which waking a second thread costs more than it saves: where they are read, and where noise is drawn.
constexpr int64_t kSerial = 32768, kSerialDrawn = 8192;

// work(task), for each. A thread's share is a stretch of neighbours, the same ones in every call, for its core may
// still have what it read and wrote there the last time. Then it takes over what others, who may wake up late, have not
// begun. An exception in a task ends all tasks, and so does Ctrl-C. for_tasks throws it once no thread works any
// longer.
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

// work(sample, first, last) for every chunk of every row.
template <class Work>
void for_chunks(int64_t batch, int64_t row, int threads, const Work& work, int64_t serial = kSerial) {
  const int64_t chunks = chunks_of(row), tasks = batch * chunks;
  const int64_t together = row < kChunk ? kChunk / std::max<int64_t>(row, 1) : 1;  // short rows, taken at a time
  const auto chunk = [&](int64_t task) {
    const int64_t sample = task / chunks, first = task % chunks * kChunk;
    work(sample, first, std::min(first + kChunk, row));
  };
  for_tasks(tasks, batch * row < serial ? 1 : threads, chunk, together);
}

// sums[sample] = the sum of work(sample, first, last) over its chunks, in order.
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

constexpr int64_t kMostParts = 16;  // of a row, however long: a part may be thousands of sums

// Elements in each part.
inline int64_t part_of(int64_t row) {
  const int64_t blocks = (row + kChunk - 1) / kChunk;
  return (blocks + kMostParts - 1) / kMostParts * kChunk;
}

// totals[sample, i] = the sum over the row of what work(sample, first, last, sums) adds to sums[i], i < count; and
// done(sample) once a sample has them.
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

// The same of one row, by whoever calls: up to 16 sums, with the same bits.
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
