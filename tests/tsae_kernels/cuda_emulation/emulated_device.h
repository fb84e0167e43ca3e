// Replaces csrc/cuda/device.cuh to run the kernels of csrc/cuda on the host, compiled by a C++ compiler.
//
// A block's threads are fibers. Each runs until a barrier, then the next one does. The order is fixed;
// TSAE_EMULATION_ORDER=reverse reverses it, to detect kernels whose result depends on it. Undefined behaviour on a GPU
// becomes visible: shared memory is filled with NaN and exactly as large as the launch requested (so that
// AddressSanitizer detects accesses beyond it), the target of an asynchronous copy is NaN until the copy is awaited, and
// threads that diverge at a barrier abort.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __constant__ const

namespace tsae::cuda {

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

constexpr size_t kStack = 256 << 10;

// Fibers are switched by swapcontext under the sanitizer, else by longjmp, which saves two system calls per switch.
struct Context {
  ucontext_t whole;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
#else
  jmp_buf jump;
  bool entered = false;
#endif
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::vector<Copy> copies;               // started since the last commit
  std::deque<std::vector<Copy>> groups;  // committed but not awaited
  bool finished = false;
};

struct Block {
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned current = 0;
  unsigned char* shared = nullptr;
  int gathered = 0, result = 0;  // of __syncthreads_or
  void (*body)(void*) = nullptr;
  void* argument = nullptr;

  Fiber& fiber() { return *fibers[current]; }
};
inline Block block;
inline std::mutex mutex;

inline void pass_control(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
  swapcontext(&from.whole, &to.whole);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  if (_setjmp(from.jump)) return;
  if (to.entered) _longjmp(to.jump, 1);
  to.entered = true;
  setcontext(&to.whole);
#endif
}

// Fibers are reused from block to block.
inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.stack, &block.scheduler.stack_size);
#endif
  for (;;) {
    block.body(block.argument);
    Fiber& fiber = block.fiber();
    for (const std::vector<Copy>& group : fiber.groups) {
      if (!group.empty()) fail("a thread ended with pending copies");
    }
    if (!fiber.copies.empty()) fail("a thread ended with pending copies");
    fiber.groups.clear();
    fiber.finished = true;
    pass_control(fiber.context, block.scheduler);
  }
}

inline void add_fiber() {
  block.fibers.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *block.fibers.back();
  getcontext(&fiber.context.whole);
  fiber.context.whole.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.whole.uc_stack.ss_size = kStack;
#if defined(__SANITIZE_ADDRESS__)
  fiber.context.stack = fiber.stack.get();
  fiber.context.stack_size = kStack;
#endif
  makecontext(&fiber.context.whole, entry, 0);
}

inline void run_block(unsigned index, unsigned threads, bool reversed) {
#if !defined(__SANITIZE_ADDRESS__)
  block.scheduler.entered = true;
#endif
  blockIdx.x = index;
  while (block.fibers.size() < threads) add_fiber();
  for (unsigned i = 0; i < threads; ++i) block.fibers[i]->finished = false;
  for (unsigned finished = 0; finished < threads;) {
    block.gathered = 0;
    finished = 0;
    for (unsigned i = 0; i < threads; ++i) {
      block.current = threadIdx.x = reversed ? threads - 1 - i : i;
      pass_control(block.scheduler, block.fiber().context);
      finished += block.fiber().finished;
    }
    block.result = block.gathered;
    if (finished != 0 && finished != threads) fail("threads of a block diverge at a barrier");
  }
}

}  // namespace emulation

inline unsigned char* shared_memory() { return emulation::block.shared; }

inline void __syncthreads() { emulation::pass_control(emulation::block.fiber().context, emulation::block.scheduler); }
inline int __syncthreads_or(int predicate) {
  emulation::block.gathered |= predicate != 0;
  __syncthreads();
  return emulation::block.result;
}

// Barriers of a warp: the kernels that use them have blocks of one.
inline int of_warp(int x) { return x; }
inline void __syncwarp() { __syncthreads(); }
template <class X>
inline X __ldg(const X* from) {
  return *from;
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulation::fail("a copy's address is not a multiple of 16");
  if (bytes < 0 || bytes > 16) emulation::fail("a copy must have 0 to 16 bytes");
  std::memset(to, 0xff, 16);
  emulation::block.fiber().copies.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes});
}
inline void copy_async(void* to, const void* from) { copy_async(to, from, 16); }
inline void complete(std::vector<emulation::Copy>& copies) {
  for (const emulation::Copy& copy : copies) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
  }
  copies.clear();
}
inline void commit_copies() {
  emulation::Fiber& fiber = emulation::block.fiber();
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int but>
inline void await_copies_but() {
  std::deque<std::vector<emulation::Copy>>& groups = emulation::block.fiber().groups;
  for (; groups.size() > but; groups.pop_front()) complete(groups.front());
}
inline void await_copies() {
  await_copies_but<0>();
  complete(emulation::block.fiber().copies);
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* at) { return reinterpret_cast<SharedAddress>(at); }
template <class X>
inline X load_shared(SharedAddress at) {
  return *reinterpret_cast<const X*>(at);
}
template <class X>
inline X opaque(X x) {
  return x;
}

inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }
inline float fast_exponential(float x) { return std::exp(x); }
inline float fast_reciprocal(float x) { return 1.f / x; }

inline int count_ones(uint32_t word) { return __builtin_popcount(word); }

template <class To, class From>
inline To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}
inline void widen_bfloat16(uint32_t word, float& first, float& second) {
  first = bits_as<float>(word << 16);
  second = bits_as<float>(word & 0xffff0000u);
}
inline uint32_t bfloat16_bits(float x) {
  if (x != x) return 0x7fffu;
  const uint32_t bits = bits_as<uint32_t>(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
}
inline uint32_t narrow_bfloat16(float first, float second) { return bfloat16_bits(first) | bfloat16_bits(second) << 16; }
inline void widen_half(uint32_t word, float& first, float& second) {
  first = bits_as<_Float16>(uint16_t(word));
  second = bits_as<_Float16>(uint16_t(word >> 16));
}
inline uint32_t narrow_half(float first, float second) {
  return bits_as<uint16_t>(_Float16(first)) | uint32_t(bits_as<uint16_t>(_Float16(second))) << 16;
}

template <class Argument>
const char* launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared_bytes, void*,
                   const Argument& argument) {
  static const bool reversed = [] {
    const char* order = std::getenv("TSAE_EMULATION_ORDER");
    return order && std::strcmp(order, "reverse") == 0;
  }();
  struct Call {
    void (*kernel)(Argument);
    const Argument* argument;
  } call{kernel, &argument};
  const std::lock_guard<std::mutex> alone(emulation::mutex);
  emulation::block.body = [](void* at) {
    const Call* call = static_cast<const Call*>(at);
    call->kernel(*call->argument);
  };
  emulation::block.argument = &call;
  for (int64_t i = 0; i < blocks; ++i) {
    void* shared = nullptr;
    if (shared_bytes > 0) {
      if (posix_memalign(&shared, 16, shared_bytes)) emulation::fail("no memory");
      std::memset(shared, 0xff, shared_bytes);
    }
    emulation::block.shared = static_cast<unsigned char*>(shared);
    emulation::run_block(unsigned(i), unsigned(threads), reversed);
    std::free(shared);
  }
  return nullptr;
}

}  // namespace tsae::cuda
