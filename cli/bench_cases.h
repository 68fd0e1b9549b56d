// What is measured of a shape: forward, training step, decoding, each with memory of its own.
#pragma once

#include "bench_limits.h"
#include "bench_shapes.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace turnout::cli {

enum class BenchCase {
  forward,         ///< plain weights, no gradient
  forward_packed,  ///< weights from prepack()
  step,            ///< forward and backward through autograd, gradients fresh each time
  decode,          ///< few tokens from packed weights, more of them than caches hold
  decode_plain,    ///< the same from plain weights
};

inline constexpr std::array<const char*, 5> kBenchCases = {"forward", "forward-packed", "step", "decode",
                                                           "decode-plain"};
const char* to_string(BenchCase which);
/// @throws c10::ValueError naming the word and what was expected
BenchCase parse_bench_case(const std::string& name);
/// Bound by the reading of weights rather than by arithmetic.
bool is_decode(BenchCase which);

/// One thing to measure.
struct BenchJob {
  BenchShape shape;
  BenchCase which;
  std::string type;  ///< bf16, fp32
};

/// What was measured of it, for one number of tokens.
struct BenchResult {
  int64_t tokens = 0;
  double flops = 0;           ///< of the products of a run: 2 a multiply-add, a step being three forwards
  double weight_bytes = 0;    ///< of the experts that a run uses, mean over rounds
  double moved_bytes = 0;     ///< the same; for a step thrice, since it reads weights twice and writes their gradients
  double resident_bytes = 0;  ///< of the weights that rounds move through
  std::string skipped{};      ///< why it was not run; empty where it was
  Measured measured{};
};

/// The weights of one job, made when a run first needs them.
class BenchBank {
 public:
  /// @param memory bytes that it may use
  BenchBank(BenchJob job, double memory);
  /// Skips what needs more memory, with the reason. Decoding moves through copies of the weights until they exceed
  /// 600 MB, or as many as fit.
  /// @throws Interrupted after Ctrl-C
  BenchResult run(int64_t tokens, double seconds);

 private:
  double working_bytes(int64_t tokens) const;
  void make_weights(int64_t copies);
  void run_inference(BenchResult& result, double seconds) const;
  void run_step(BenchResult& result, double seconds);

  BenchJob job_;
  double memory_;
  double bank_bytes_;
  std::vector<ExpertWeights> plain_{};
  std::vector<PackedExperts> packed_{};
};

}  // namespace turnout::cli
