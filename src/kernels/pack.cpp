// Packed weights: panels of every expert, one block of memory: `up` of all experts, then `down` of all.
#include <cstring>
#include <stdexcept>

#include "driver.h"

namespace turnout::kernels {
namespace {

constexpr int kVersion = 2;  // of the panel layout: a change of it must not read what was packed before

const char* name_of(DType t) { return t == DType::f32 ? "f32" : t == DType::bf16 ? "bf16" : "f64"; }

void check_aligned(const void* data) {
  if (reinterpret_cast<uintptr_t>(data) % kPackedAlignment != 0)
    throw std::invalid_argument("packed experts must be aligned to " + std::to_string(kPackedAlignment) + " bytes");
}

}  // namespace

PackedLayout::PackedLayout(const Implementation& implementation, const ExpertsProblem& q)
    : implementation_(&implementation),
      hidden_(q.hidden),
      ffn_(q.ffn),
      num_experts_(q.num_experts),
      dtype_(q.dtype),
      gated_(is_gated(q.activation)) {
  check_type(implementation, q);
  const Stages* s = implementation.stages;
  const bool bf16 = q.dtype == DType::bf16;
  const int64_t element = static_cast<int64_t>(size_of(q.dtype));
  const int64_t up =
      s ? up_panels(q, s->panel) * words_of(q.hidden, bf16) * s->panel * 4 : q.up_rows() * q.hidden * element;
  const int64_t down =
      s ? div_up(q.hidden, s->panel) * words_of(q.ffn, bf16) * s->panel * 4 : q.hidden * q.ffn * element;
  up_bytes_ = static_cast<size_t>(round_up(up, static_cast<int64_t>(kPackedAlignment)));
  down_bytes_ = static_cast<size_t>(round_up(down, static_cast<int64_t>(kPackedAlignment)));
}

std::string PackedLayout::words() const {
  return std::string(implementation_->name) + " " + name_of(dtype_) + (gated_ ? " gated " : " plain ") +
         std::to_string(num_experts_) + "x" + std::to_string(hidden_) + "x" + std::to_string(ffn_) + " v" +
         std::to_string(kVersion);
}

bool PackedLayout::fits(const ExpertsProblem& q) const {
  return q.hidden == hidden_ && q.ffn == ffn_ && q.num_experts == num_experts_ && q.dtype == dtype_ &&
         is_gated(q.activation) == gated_;
}

PackedExperts::PackedExperts(const PackedLayout& layout, const void* data, size_t bytes)
    : layout_(layout), data_(static_cast<const char*>(data)) {
  check_aligned(data);
  if (bytes != layout.bytes())
    throw std::invalid_argument("packed experts have " + std::to_string(bytes) + " bytes, expected " +
                                std::to_string(layout.bytes()) + " for '" + layout.words() + "'");
}

void pack(const Implementation& implementation, const ExpertsProblem& q, void* packed, const ParallelFor& parallel) {
  const PackedLayout layout(implementation, q);
  check_aligned(packed);
  const Stages* s = implementation.stages;
  const size_t element = size_of(q.dtype);
  parallel(q.num_experts, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      char* up = static_cast<char*>(packed) + layout.up(e);
      char* down = static_cast<char*>(packed) + layout.down(e);
      if (s) {
        s->pack_up(q, e, 0, up_panels(q, s->panel), up);
        s->pack_down(q, e, 0, div_up(q.hidden, s->panel), down);
      } else {
        std::memcpy(up, q.up[e], static_cast<size_t>(q.up_rows() * q.hidden) * element);
        std::memcpy(down, q.down[e], static_cast<size_t>(q.hidden * q.ffn) * element);
      }
    }
  });
}

}  // namespace turnout::kernels
