// What the machine can do at most: arithmetic that stays in registers, and reading of memory.
#pragma once

#include <cstdint>

namespace turnout::limits {

/// Vector instructions that set the arithmetic limit. A bf16 product is bound by its own instruction where there is
/// one, else by fp32, which on Intel does as many flops a cycle from numbers split into two registers, and twice as many
/// as the instruction. AMX tiles are not counted: they would need another loop.
enum class Instruction { none, avx2_fma, avx512_fma, avx512_bf16 };

#if defined(__x86_64__)

inline Instruction best_instruction(bool bf16) {
  if (bf16 && __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel")) return Instruction::avx512_bf16;
  if (__builtin_cpu_supports("avx512f")) return Instruction::avx512_fma;
  return __builtin_cpu_supports("fma") ? Instruction::avx2_fma : Instruction::none;
}

// Registers are named, so that nothing is spilled; 2 ports × 4 cycles of latency need 8 chains at least.
#define TURNOUT_CHAIN4(op, from, a, b, c, d) \
  op " " from #a "\n" op " " from #b "\n" op " " from #c "\n" op " " from #d "\n"
#define TURNOUT_CHAIN12(op, from) \
  TURNOUT_CHAIN4(op, from, 0, 1, 2, 3) TURNOUT_CHAIN4(op, from, 4, 5, 6, 7) TURNOUT_CHAIN4(op, from, 8, 9, 10, 11)
#define TURNOUT_CHAIN24(op, from)          \
  TURNOUT_CHAIN12(op, from)                \
  TURNOUT_CHAIN4(op, from, 12, 13, 14, 15) \
  TURNOUT_CHAIN4(op, from, 16, 17, 18, 19) TURNOUT_CHAIN4(op, from, 20, 21, 22, 23)
#define TURNOUT_CLOBBERS                                                                                              \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"

/// Runs the chains `n` times. @return flops of it
inline double spin(Instruction instruction, int64_t n) {
  const auto rounds = static_cast<double>(n);
  // registers start at zero, so that no denormal or NaN slows the loop
  asm volatile("vzeroall" ::: TURNOUT_CLOBBERS);
  if (instruction == Instruction::avx2_fma) {
    for (int64_t i = 0; i < n; ++i)
      asm volatile(TURNOUT_CHAIN12("vfmadd231ps", "%%ymm15, %%ymm14, %%ymm")::: TURNOUT_CLOBBERS);
    return 12 * 16 * rounds;
  }
  asm volatile(
      "vpxord %%zmm30,%%zmm30,%%zmm30\nvpxord %%zmm31,%%zmm31,%%zmm31\n"
      "vpxord %%zmm16,%%zmm16,%%zmm16\nvpxord %%zmm17,%%zmm17,%%zmm17\nvpxord %%zmm18,%%zmm18,%%zmm18\n"
      "vpxord %%zmm19,%%zmm19,%%zmm19\nvpxord %%zmm20,%%zmm20,%%zmm20\nvpxord %%zmm21,%%zmm21,%%zmm21\n"
      "vpxord %%zmm22,%%zmm22,%%zmm22\nvpxord %%zmm23,%%zmm23,%%zmm23\n" ::
          : TURNOUT_CLOBBERS);
  if (instruction == Instruction::avx512_bf16) {
    for (int64_t i = 0; i < n; ++i)
      asm volatile(TURNOUT_CHAIN24("vdpbf16ps", "%%zmm31, %%zmm30, %%zmm")::: TURNOUT_CLOBBERS);
    return 24 * 64 * rounds;
  }
  for (int64_t i = 0; i < n; ++i)
    asm volatile(TURNOUT_CHAIN24("vfmadd231ps", "%%zmm31, %%zmm30, %%zmm")::: TURNOUT_CLOBBERS);
  return 24 * 32 * rounds;
}

#else

inline Instruction best_instruction(bool) { return Instruction::none; }
inline double spin(Instruction, int64_t) { return 0; }

#endif

/// Flops a second of the registers of all threads, over about 5 ms; 0 where this processor has no loop here.
///
/// @param threads how many bodies run at once
/// @param parallel called as parallel(threads, body(begin, end)): runs [0, threads), one index a thread
/// @param now seconds of the clock that the measured work is timed by
template <class Parallel, class Clock>
double register_peak(bool bf16, int threads, Parallel&& parallel, Clock&& now) {
  constexpr int64_t kRounds = 1000000;
  const Instruction instruction = best_instruction(bf16);
  if (instruction == Instruction::none) return 0;
  const double flops = spin(instruction, 1);
  const double start = now();
  parallel(threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) spin(instruction, kRounds);
  });
  return flops * kRounds * threads / (now() - start);
}

/// Bytes a second of plain reading of `bytes` at `memory` (64-byte aligned), shared out to the threads.
template <class Parallel, class Clock>
double read_bandwidth(const char* memory, int64_t bytes, int threads, Parallel&& parallel, Clock&& now) {
  using Line = int64_t __attribute__((vector_size(64)));
  constexpr int64_t kAhead = 8192;  // the hardware's own prefetch stops at each 4 KB page
  const int64_t share = bytes / threads / 256 * 256;
  const double start = now();
  parallel(threads, [&](int64_t begin, int64_t end) {
    Line sum{};
    for (const char *p = memory + share * begin, *last = memory + share * end; p < last; p += 256)
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(p + kAhead + 64 * i);
        sum ^= *reinterpret_cast<const Line*>(p + 64 * i);
      }
    asm volatile("" ::"m"(sum));  // the sum counts as used: the reads stay
  });
  return static_cast<double>(share * threads) / (now() - start);
}

}  // namespace turnout::limits
