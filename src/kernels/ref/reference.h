// The scalar truth: what every implementation must compute, in loops to be read.
#pragma once

#include "../experts.h"

namespace turnout::kernels::ref {

/// As kernels::forward, for float (double sums), bf16 (double sums, h rounded to bf16) and double.
void forward(const ExpertsProblem& problem, const PackedExperts* packed, void* y, void* saved_up);

/// As kernels::backward.
void backward(const ExpertsProblem& problem, const void* saved_up, const void* grad_y, int64_t grad_y_stride,
              const ExpertsGradients& grad);

}  // namespace turnout::kernels::ref
