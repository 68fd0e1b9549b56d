// A linear map of rows by the stages of the experts: the gate. Sums run in one order at any thread count, which a BLAS
// does not promise.
#pragma once

#include "experts.h"

namespace turnout::kernels {

/// y[r] = x[r] · weightᵀ + bias. Nothing is owned.
struct LinearProblem {
  int64_t rows = 0, inputs = 0, outputs = 0;
  DType dtype = DType::f32;
  const void* x = nullptr;  ///< [rows, inputs], contiguous within a row
  int64_t x_stride = 0;     ///< elements from row to row
  const void* weight = nullptr;  ///< [outputs, inputs] contiguous
  const void* bias = nullptr;    ///< null, or [outputs]
};

/// What linear_backward writes, contiguous; null = not wanted.
struct LinearGradients {
  void* x = nullptr;       ///< [rows, inputs]
  void* weight = nullptr;  ///< [outputs, inputs]
  void* bias = nullptr;    ///< [outputs]
};

/// y [rows, outputs] contiguous, in the problem's type; sums are fp32, rounded once.
/// @throws std::invalid_argument for f64, and for `reference`, which has no stages
/// Same bits at any thread count. A NaN or Inf in one row reaches no other row.
void linear(const Implementation& implementation, const LinearProblem& problem, void* y, const ParallelFor& parallel);

/// Gradients for grad_y [rows, outputs] of row stride `grad_y_stride`; with no rows, zeros. As linear().
/// Scratch: a copy of x where grad weight is wanted.
void linear_backward(const Implementation& implementation, const LinearProblem& problem, const void* grad_y,
                     int64_t grad_y_stride, const LinearGradients& grad, const ParallelFor& parallel);

}  // namespace turnout::kernels
