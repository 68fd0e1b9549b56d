// The problem of a bank of feed-forward experts, as pointers, sizes and strides: what every implementation solves.
//
// Shapes: T tokens, D hidden, F ffn, U up_rows (2·F where gated, else F), E experts, K top_k, R rows.
//     u[r] = x[token_of_row[r]] · up[e]ᵀ + up_bias[e]          [R, U]
//     h[r] = act(u[r])                                        [R, F]   gated: act(u[:F]) ⊙ u[F:]
//     a[r] = h[r] · down[e]ᵀ + down_bias[e]                    [R, D]
//     y[t] = Σ_k topk_weights[t, k] · a[row_of_choice[t, k]]   [T, D]   k ascending, skipped where -1
// With weight_before_down, h and down_bias are multiplied by the row's weight instead, and y adds up the a.
// Rounding in bf16: u, a and every sum live in fp32; h (weighted or not) is rounded to bf16 before `down`; y is rounded
// once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace turnout::kernels {

enum class DType { f32, bf16, f64 };  // f64 is served by the reference alone
/// gelu and geglu: exact (erf). swiglu_clamped, of GPT-OSS: g·σ(1.702·g)·(v + 1), g = min(gate, 7), v = up within ±7.
enum class Activation { relu, gelu, gelu_tanh, silu, swiglu, geglu, swiglu_clamped };
constexpr double kClamp = 7, kClampedSlope = 1.702;

/// True where `up` holds 2·ffn rows, the gate's first.
constexpr bool is_gated(Activation a) {
  return a == Activation::swiglu || a == Activation::geglu || a == Activation::swiglu_clamped;
}

constexpr size_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

/// Runs a body over [0, n) on the caller's thread pool, so that kernels own no threads.
///
/// `run` may call the body on any threads, in any split, even all on one thread: no kernel waits for a thread to start.
struct ParallelFor {
  using Body = void (*)(void* body, int64_t begin, int64_t end);
  void (*run)(void* pool, int64_t n, void* body, Body call) = nullptr;
  void* pool = nullptr;
  int threads = 1;  ///< how many workers to prepare for; results never depend on it

  template <class F>
  void operator()(int64_t n, F&& f) const {
    using Fn = std::remove_reference_t<F>;
    if (run == nullptr) return f(int64_t{0}, n);
    run(pool, n, const_cast<void*>(static_cast<const void*>(&f)),
        [](void* body, int64_t begin, int64_t end) { (*static_cast<Fn*>(body))(begin, end); });
  }
};

/// One call's input. Nothing is owned; every pointer outlives the call.
struct ExpertsProblem {
  int64_t tokens = 0, hidden = 0, ffn = 0, num_experts = 0, top_k = 0, rows = 0;
  DType dtype = DType::f32;
  Activation activation = Activation::gelu;
  bool weight_before_down = false;  ///< the routing weight multiplies h, not a; gradients are the same

  const void* x = nullptr;  ///< [tokens, hidden], contiguous within a row
  int64_t x_stride = 0;     ///< elements from row to row

  const void* const* up = nullptr;         ///< [experts] → [up_rows, hidden] contiguous; unused with packed weights
  const void* const* down = nullptr;       ///< [experts] → [hidden, ffn] contiguous; unused with packed weights
  const void* const* up_bias = nullptr;    ///< null, or [experts] → [up_rows]
  const void* const* down_bias = nullptr;  ///< null, or [experts] → [hidden]

  const int64_t* expert_offsets = nullptr;  ///< [experts + 1]; rows of expert e are [offsets[e], offsets[e + 1])
  const int64_t* token_of_row = nullptr;    ///< [rows]
  const int64_t* row_of_choice = nullptr;   ///< [tokens, top_k], -1 = not sent
  const void* topk_weights = nullptr;       ///< [tokens, top_k] float; double for f64

  int64_t up_rows() const { return is_gated(activation) ? 2 * ffn : ffn; }
};

/// What backward writes; null = not wanted. An expert without rows gets zeros, a token not sent a zero grad_x.
struct ExpertsGradients {
  void* x = nullptr;             ///< [tokens, hidden] contiguous
  void* topk_weights = nullptr;  ///< [tokens, top_k] float (double for f64); 0 where not sent
  void* const* up = nullptr;     ///< [experts] → as the weight
  void* const* down = nullptr;
  void* const* up_bias = nullptr;
  void* const* down_bias = nullptr;
};

struct Implementation;  // table.h

/// How the weights of a bank lie in one block of memory, packed into the panels of one implementation, for inference.
class PackedLayout {
 public:
  /// Of problem.{hidden, ffn, num_experts, dtype, activation}; no pointer is read.
  /// @throws std::invalid_argument for f64 on any implementation but `reference`
  PackedLayout(const Implementation& implementation, const ExpertsProblem& problem);

  const Implementation& implementation() const { return *implementation_; }
  /// Those of the weights, with outputs padded to a panel (32 on AVX-512) and odd bf16 reductions to a pair.
  size_t bytes() const { return (up_bytes_ + down_bytes_) * static_cast<size_t>(num_experts_); }
  size_t up(int64_t expert) const { return static_cast<size_t>(expert) * up_bytes_; }
  size_t down(int64_t expert) const {
    return static_cast<size_t>(num_experts_) * up_bytes_ + static_cast<size_t>(expert) * down_bytes_;
  }

  /// Implementation, type, form of `up` and sizes in words, such as "avx512_bf16 bf16 gated 64x1024x512 v2": equal
  /// words mean equal layouts, also from one process to another.
  std::string words() const;

  /// True where weights so packed have the sizes, type and form of `problem`.
  bool fits(const ExpertsProblem& problem) const;

 private:
  const Implementation* implementation_;
  int64_t hidden_, ffn_, num_experts_;
  DType dtype_;
  bool gated_;
  size_t up_bytes_ = 0, down_bytes_ = 0;  // of an expert, multiples of a cache line
};

/// Alignment of packed weights: the panels are read by whole cache lines.
constexpr size_t kPackedAlignment = 64;

/// Writes problem.{up, down} to `packed`, PackedLayout(implementation, problem).bytes() long and aligned to
/// kPackedAlignment; the routing fields may be empty.
///
/// @throws std::invalid_argument as PackedLayout, or for a misaligned `packed`
/// Reads and writes the weights once; parallel over experts.
void pack(const Implementation& implementation, const ExpertsProblem& problem, void* packed,
          const ParallelFor& parallel);

/// Weights that pack() wrote, in memory that the caller keeps: a view.
class PackedExperts {
 public:
  /// @throws std::invalid_argument where `bytes` is not what the layout takes, or `data` is misaligned
  PackedExperts(const PackedLayout& layout, const void* data, size_t bytes);

  const PackedLayout& layout() const { return layout_; }
  const void* up(int64_t expert) const { return data_ + layout_.up(expert); }
  const void* down(int64_t expert) const { return data_ + layout_.down(expert); }

 private:
  PackedLayout layout_;
  const char* data_;
};

/// y [tokens, hidden] of the bank, by `implementation`.
///
/// @param packed   null, or weights packed by the same implementation: then problem.up and problem.down are not read
/// @param saved_up null, or [rows, up_rows] in the problem's type: u, kept for backward
/// @throws std::invalid_argument for f64 on any implementation but `reference`, or packed weights that do not fit
/// Same bits at any thread count. A NaN or Inf in one token's row reaches no other token.
/// bf16 denormals count as zero where the CPU's bf16 dot product does so (`avx512_bf16`).
void forward(const Implementation& implementation, const ExpertsProblem& problem, const PackedExperts* packed, void* y,
             void* saved_up, const ParallelFor& parallel);

/// Gradients of forward() for grad_y [tokens, hidden] of row stride `grad_y_stride` (0 = one row for all tokens).
///
/// @param saved_up as forward() left it, or null: recomputed, an expert at a time
/// Rounding in bf16: u, du and topk_weight·h are rounded to bf16 before the products that read them, whatever
/// weight_before_down; sums are fp32 and rounded once. Scratch: that of a few experts at a time, and [rows, hidden] fp32 where grad x is wanted.
/// Same bits at any thread count.
void backward(const Implementation& implementation, const ExpertsProblem& problem, const void* saved_up,
              const void* grad_y, int64_t grad_y_stride, const ExpertsGradients& grad, const ParallelFor& parallel);

/// Frees the scratch memory kept between calls (at most 256 MB; what is in use stays).
void release_scratch();

/// Memory in whole pages of 2 MB, aligned to them and advised to be huge; contents are arbitrary. @throws std::bad_alloc
char* huge_alloc(size_t bytes);
void huge_free(char* p);

}  // namespace turnout::kernels
