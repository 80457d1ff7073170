// Runs a grid on one CPU thread: its blocks one after the other, and the threads of a block as fibers, which a
// scheduler resumes in a chosen order. A fiber leaves the CPU at barriers and shuffles only.
//
// What a GPU leaves undefined is an error here, which cudaGetLastError returns: threads that wait at different barriers
// or shuffles or for threads that have ended, shuffles of part of a warp, and more shared memory than a block has.
// Shared memory is filled with 0xFF before each block. A stack overflow hits a guard page.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

// ThreadSanitizer sees each fiber as a thread: an access that no barrier orders is a data race. This file is compiled
// without it, because all threads share the scheduler.
#if defined(FIND_RACES)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

// Saves the registers that a call preserves and the stack pointer, and continues where `load` was saved.
extern "C" void simulator_switch(void** save, void* load);
asm(R"(
.text
.globl simulator_switch
.type simulator_switch,@function
simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simulator_switch,.-simulator_switch
)");

namespace simulator {

Thread* running;

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr size_t kShared = 48 << 10;  // bytes of static shared memory that a block may have
constexpr size_t kGap = 32;           // between two variables, where ASan finds what runs over
constexpr size_t kArena = kShared + 32 * kGap;
constexpr int64_t kMostBlocks = 2147483647, kMostThreads = 1024;

struct Fiber {
  Thread thread;
  void* stack_pointer;
  void* tsan;
  bool ended;
  const uint64_t* waits;  // until this counter is `until`; null: it can run
  uint64_t until;
  Site site;          // where it waits
  uint64_t shuffles;  // so far
};

// Words of two shuffles: a lane may start the next one before another lane has read the last.
struct Warp {
  uint64_t words[2][32];
  uint64_t shuffles;  // complete
  int arrived;
  Site site;
  char order;  // for TSan
};

struct Variable {
  const void* variable;
  char* memory;
};

enum class Order { forward, reverse, shuffled };
Order order = Order::forward;
std::mt19937 random_order;

std::mutex one_grid;
std::string error;  // of the first launch that failed since cudaGetLastError
const char* kernel_name;
void (*kernel_body)(const void*);
const void* kernel_context;

// Of the block that runs.
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current;
void* scheduler;  // its stack pointer
void* scheduler_tsan;
uint64_t barriers;  // that opened
int arrived, alive;
Site barrier_site;
char* arena;
size_t arena_used;
std::vector<Variable> variables;
char started, synchronised[2], done;  // for TSan; barriers take turns, as a thread may be at the next one already

std::string words(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

void leave() {
  Fiber* self = current;
  __tsan_switch_to_fiber(scheduler_tsan, 1);
  simulator_switch(&self->stack_pointer, scheduler);
}

void wait(const uint64_t* counter, uint64_t until, Site site) {
  current->waits = counter;
  current->until = until;
  current->site = site;
  leave();
  current->waits = nullptr;
}

void fiber_main() {
  __tsan_acquire(&started);
  kernel_body(kernel_context);
  current->ended = true;
  --alive;
  __tsan_release(&done);
  leave();
  abort();
}

char* stack_of(size_t fiber) {
  static std::vector<char*> stacks;
  while (stacks.size() <= fiber) {
    void* mapped =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED || mprotect(mapped, kGuard, PROT_NONE)) abort();
    stacks.push_back(static_cast<char*>(mapped) + kGuard);
  }
  return stacks[fiber];
}

void* tsan_fiber(size_t fiber, int64_t block) {
  static std::vector<void*> pool[2];  // neighbouring blocks share none: nothing orders their threads
  auto& made = pool[block % 2];
  while (made.size() <= fiber) made.push_back(__tsan_create_fiber(0));
  return made[fiber];
}

// A fiber that will call fiber_main.
Fiber fiber_of(unsigned thread, int64_t block, unsigned blocks, unsigned threads) {
  Fiber fiber{};
  fiber.thread = {{thread, 0, 0}, {unsigned(block), 0, 0}, {blocks, 1, 1}, {threads, 1, 1}};
  fiber.tsan = tsan_fiber(thread, block);
  void** top = reinterpret_cast<void**>(stack_of(thread) + kStack - 64);
  *--top = nullptr;  // where fiber_main would return to, so the stack is aligned as if called
  *--top = reinterpret_cast<void*>(&fiber_main);  // where the switch returns to
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
  return fiber;
}

void reserve_shared_memory(std::vector<char*>& kept) {
  // TSan takes the memory of another block for other memory only if its address differs.
  const bool fresh = !arena || scheduler_tsan;
  if (fresh) arena = static_cast<char*>(aligned_alloc(128, kArena));
  if (fresh && scheduler_tsan) kept.push_back(arena);
  ASAN_UNPOISON_MEMORY_REGION(arena, kArena);
  std::memset(arena, 0xff, kArena);
  ASAN_POISON_MEMORY_REGION(arena, kArena);
  arena_used = 0;
  variables.clear();
}

template <class T>
std::vector<T> in_order(T count) {
  std::vector<T> found(count);
  std::iota(found.begin(), found.end(), T(0));
  if (order == Order::reverse) std::reverse(found.begin(), found.end());
  if (order == Order::shuffled) std::shuffle(found.begin(), found.end(), random_order);
  return found;
}

bool can_run(const Fiber& fiber) { return !fiber.ended && (!fiber.waits || *fiber.waits >= fiber.until); }

void run_block(int64_t block, int64_t blocks, int64_t threads) {
  barriers = 0;
  arrived = 0;
  alive = int(threads);
  warps.assign((threads + 31) / 32, {});
  fibers.clear();
  for (unsigned thread = 0; thread < threads; ++thread)
    fibers.push_back(fiber_of(thread, block, unsigned(blocks), unsigned(threads)));
  __tsan_release(&started);
  auto turns = in_order(unsigned(threads));
  while (alive) {
    bool progress = false;
    for (unsigned thread : turns) {
      if (!can_run(fibers[thread])) continue;
      progress = true;
      current = &fibers[thread];
      running = &current->thread;
      __tsan_switch_to_fiber(current->tsan, 1);
      simulator_switch(&scheduler, current->stack_pointer);
      if (!error.empty()) return;
      if (arrived && arrived == alive) {  // a thread that ended is not waited for
        arrived = 0;
        ++barriers;
      }
    }
    if (!progress) {
      const auto stuck = std::find_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.ended; });
      error = std::string(kernel_name) + ": deadlock in block " + std::to_string(block) + ": a thread waits at " +
              words(stuck->site) + " for threads that do not come";
      return;
    }
    if (order == Order::shuffled) turns = in_order(unsigned(threads));
  }
}

}  // namespace

void fail(const std::string& what) {
  error = std::string(kernel_name) + ": " + what;
  leave();
  abort();
}
void fail(const std::string& what, Site site) { fail(what + ": " + words(site)); }

void barrier(Site site) {
  if (arrived == 0) barrier_site = site;
  if (!same(site, barrier_site))
    fail("threads of a block wait at different barriers: " + words(barrier_site) + " and " + words(site));
  ++arrived;
  char* turn = &synchronised[barriers % 2];
  __tsan_release(turn);
  wait(&barriers, barriers + 1, site);
  __tsan_acquire(turn);
}

const uint64_t* exchange(unsigned mask, uint64_t word, Site site) {
  Fiber* self = current;
  Warp& warp = warps[self->thread.thread.x / 32];
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp", site);
  if (fibers.size() % 32) fail("a shuffle in a block that is not whole warps", site);
  if (warp.arrived == 0) warp.site = site;
  if (!same(site, warp.site))
    fail("lanes of a warp shuffle at different places: " + words(warp.site) + " and " + words(site));
  uint64_t* given = warp.words[self->shuffles++ % 2];
  given[self->thread.thread.x % 32] = word;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.shuffles;
  } else {
    wait(&warp.shuffles, warp.shuffles + 1, site);
  }
  return given;  // a shuffle orders the words and no other memory
}

void* shared(const void* variable, size_t bytes, size_t alignment) {
  for (const Variable& known : variables)
    if (known.variable == variable) return known.memory;
  arena_used = (arena_used + (variables.empty() ? 0 : kGap) + alignment - 1) / alignment * alignment;
  if (arena_used + bytes > kShared + kGap * variables.size()) fail("more than 48 KiB of shared memory");
  char* memory = arena + arena_used;
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
  arena_used += bytes;
  variables.push_back({variable, memory});
  return memory;
}

void run(const char* kernel, int64_t blocks, int64_t threads, void (*body)(const void*), const void* context) {
  const std::lock_guard<std::mutex> lock(one_grid);
  if (!error.empty()) return;
  if (blocks < 1 || blocks > kMostBlocks || threads < 1 || threads > kMostThreads) {
    error = std::string(kernel) + ": invalid configuration: " + std::to_string(blocks) + " blocks of " +
            std::to_string(threads) + " threads";
    return;
  }
  kernel_name = kernel;
  kernel_body = body;
  kernel_context = context;
  scheduler_tsan = __tsan_get_current_fiber();
  std::vector<char*> kept;
  for (int64_t block : in_order(blocks)) {
    reserve_shared_memory(kept);
    run_block(block, blocks, threads);
    if (!error.empty()) break;
  }
  __tsan_acquire(&done);
  for (char* memory : kept) std::free(memory);
}

}  // namespace simulator

// 0: forward, 1: reverse, 2: shuffled, which draws a new order at every barrier.
extern "C" __attribute__((visibility("default"))) void simulator_order(int order, unsigned seed) {
  simulator::order = simulator::Order(order);
  simulator::random_order.seed(seed);
}

static std::string last_error;
extern "C" cudaError_t cudaGetLastError() {
  last_error.swap(simulator::error);
  simulator::error.clear();
  if (last_error.empty()) return cudaSuccess;
  const bool configuration = last_error.find("invalid configuration") != std::string::npos;
  return configuration ? cudaErrorInvalidConfiguration : cudaErrorLaunchFailure;
}
extern "C" const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }
