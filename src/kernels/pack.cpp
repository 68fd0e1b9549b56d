// Packed weights: panels of every expert, one block of memory.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "driver.h"

namespace turnout::kernels {

void PackedExperts::Free::operator()(char* p) const { huge_free(p); }

PackedExperts::PackedExperts(const Implementation& implementation, const ExpertsProblem& q, const ParallelFor& parallel)
    : implementation_(&implementation),
      hidden_(q.hidden),
      ffn_(q.ffn),
      num_experts_(q.num_experts),
      dtype_(q.dtype),
      activation_(q.activation) {
  check_type(implementation, q);
  const Stages* s = implementation.stages;
  const bool bf16 = q.dtype == DType::bf16;
  const int64_t element = static_cast<int64_t>(size_of(q.dtype));
  const int64_t up_n = s ? up_panels(q, s->lanes) : 1, down_n = s ? div_up(q.hidden, s->panel) : 1;
  const int64_t up = s ? up_n * words_of(q.hidden, bf16) * s->panel * 4 : q.up_rows() * q.hidden * element;
  const int64_t down = s ? down_n * words_of(q.ffn, bf16) * s->panel * 4 : q.hidden * q.ffn * element;
  up_bytes_ = static_cast<size_t>(round_up(up, 64));
  down_bytes_ = static_cast<size_t>(round_up(down, 64));
  down_offset_ = up_bytes_ * static_cast<size_t>(num_experts_);
  bytes_ = (up_bytes_ + down_bytes_) * static_cast<size_t>(num_experts_);
  data_.reset(huge_alloc(bytes_));

  parallel(num_experts_, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      char* u = data_.get() + static_cast<size_t>(e) * up_bytes_;
      char* d = data_.get() + down_offset_ + static_cast<size_t>(e) * down_bytes_;
      if (s) {
        s->pack_up(q, e, 0, up_n, u);
        s->pack_down(q, e, 0, down_n, d);
      } else {
        std::memcpy(u, q.up[e], static_cast<size_t>(up));
        std::memcpy(d, q.down[e], static_cast<size_t>(down));
      }
    }
  });
}

bool PackedExperts::fits(const ExpertsProblem& q) const {
  return q.hidden == hidden_ && q.ffn == ffn_ && q.num_experts == num_experts_ && q.dtype == dtype_ &&
         is_gated(q.activation) == is_gated(activation_);
}

}  // namespace turnout::kernels
