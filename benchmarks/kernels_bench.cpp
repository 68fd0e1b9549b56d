// The kernels against the machine's own limits: shares of the register peak and of the read bandwidth.
//
// Usage: kernels_bench [filter [threads [seconds a case]]]. One thread is timed by its own CPU time, several by the
// wall clock. Peak and cases alternate in one run; the median of both is shown. The figure is arithmetic only: 2 flops
// a multiply-add of the products; routing is prepared outside, as it is in every peer.
#include <immintrin.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"
#include "experts.h"
#include "machine_limits.h"
#include "routing.h"
#include "scratch.h"
#include "table.h"

namespace {

using namespace turnout::kernels;

int g_threads = 1;

double now() {
  timespec t;
  clock_gettime(g_threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Threads that spin between calls, as an OpenMP pool does.
class Pool {
 public:
  explicit Pool(int n) : n_(n) {
    for (int i = 1; i < n; ++i) threads_.emplace_back([this, i] { loop(i); });
  }
  ~Pool() {
    stop_ = true;
    epoch_.fetch_add(1);
    for (std::thread& t : threads_) t.join();
  }
  ParallelFor parallel() {
    ParallelFor p;
    p.threads = n_;
    p.pool = this;
    if (n_ > 1)
      p.run = [](void* self, int64_t n, void* body, ParallelFor::Body call) {
        static_cast<Pool*>(self)->run(n, body, call);
      };
    return p;
  }

 private:
  void share(int i) { call_(body_, count_ * i / n_, count_ * (i + 1) / n_); }
  void run(int64_t n, void* body, ParallelFor::Body call) {
    count_ = n, body_ = body, call_ = call;
    left_ = n_ - 1;
    epoch_.fetch_add(1);
    share(0);
    while (left_.load() > 0) _mm_pause();
  }
  void loop(int i) {
    for (int64_t seen = 0;;) {
      while (epoch_.load() == seen) _mm_pause();
      ++seen;
      if (stop_) return;
      share(i);
      left_.fetch_sub(1);
    }
  }
  int n_;
  int64_t count_ = 0;
  void* body_ = nullptr;
  ParallelFor::Body call_ = nullptr;
  std::atomic<int64_t> epoch_{0}, left_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

double peak(bool bf16, const ParallelFor& parallel) {
  return turnout::limits::register_peak(bf16, parallel.threads, parallel, now);
}

double bandwidth(const char* p, int64_t bytes, const ParallelFor& parallel) {
  return turnout::limits::read_bandwidth(p, bytes, parallel.threads, parallel, now);
}

struct Shape {
  const char* name;
  int64_t experts, top_k, hidden, ffn, tokens;
  Activation activation;
};

class Bank {
 public:
  Bank(const Shape& s, DType t) : s_(s), type_(t) {
    const int64_t U = is_gated(s.activation) ? 2 * s.ffn : s.ffn;
    x_ = make(s.tokens * s.hidden), y_ = make(s.tokens * s.hidden), g_ = make(s.tokens * s.hidden);
    up_n_ = U * s.hidden, down_n_ = s.hidden * s.ffn;
    up_ = make(s.experts * up_n_), down_ = make(s.experts * down_n_);
    grad_up_ = make(s.experts * up_n_), grad_down_ = make(s.experts * down_n_), grad_x_ = make(s.tokens * s.hidden);
    std::mt19937 random(7);
    std::vector<float> scores(static_cast<size_t>(s.tokens * s.experts));
    for (float& v : scores) v = static_cast<float>(random() % 1000003);
    ids_.resize(static_cast<size_t>(s.tokens * s.top_k));
    topk(scores.data(), s.experts, s.tokens, s.experts, s.top_k, ids_.data(), ParallelFor{});
    weights_.assign(ids_.size(), 1.f / static_cast<float>(s.top_k));
    grad_weights_.resize(ids_.size());
    offsets_.resize(static_cast<size_t>(s.experts) + 1), rows_.resize(ids_.size()), choices_.resize(ids_.size());
    plan(ids_.data(), s.tokens, s.top_k, s.experts, offsets_.data(), rows_.data(), choices_.data(), ParallelFor{});
    saved_ = make(offsets_.back() * U);
    for (int64_t e = 0; e < s.experts; ++e) {
      const size_t size = size_of(t);
      up_p_.push_back(up_.get() + static_cast<size_t>(e * up_n_) * size);
      down_p_.push_back(down_.get() + static_cast<size_t>(e * down_n_) * size);
      grad_up_p_.push_back(grad_up_.get() + static_cast<size_t>(e * up_n_) * size);
      grad_down_p_.push_back(grad_down_.get() + static_cast<size_t>(e * down_n_) * size);
    }
  }
  ExpertsProblem problem() const {
    ExpertsProblem q;
    q.tokens = s_.tokens, q.hidden = s_.hidden, q.ffn = s_.ffn, q.num_experts = s_.experts, q.top_k = s_.top_k;
    q.rows = offsets_.back(), q.dtype = type_, q.activation = s_.activation;
    q.x = x_.get(), q.x_stride = s_.hidden, q.up = up_p_.data(), q.down = down_p_.data();
    q.expert_offsets = offsets_.data(), q.token_of_row = rows_.data(), q.row_of_choice = choices_.data();
    q.topk_weights = weights_.data();
    return q;
  }
  void forward(const Implementation& i, const PackedExperts* packed, bool save, const ParallelFor& p) {
    turnout::kernels::forward(i, problem(), packed, y_.get(), save ? saved_.get() : nullptr, p);
  }
  void backward(const Implementation& i, bool recompute, const ParallelFor& p) {
    ExpertsGradients g;
    g.x = grad_x_.get(), g.topk_weights = grad_weights_.data(), g.up = grad_up_p_.data(), g.down = grad_down_p_.data();
    turnout::kernels::backward(i, problem(), recompute ? nullptr : saved_.get(), g_.get(), s_.hidden, g, p);
  }
  /// Gradients in pages never touched, as autograd gives them.
  void fresh_gradients() {
    const auto drop = [&](char* p, int64_t n) {
      madvise(p, static_cast<size_t>(n * s_.experts) * size_of(type_), MADV_DONTNEED);
    };
    drop(grad_up_.get(), up_n_);
    drop(grad_down_.get(), down_n_);
  }
  double flops() const { return 2.0 * static_cast<double>(offsets_.back()) * static_cast<double>(up_n_ + down_n_); }
  double weight_bytes() const {
    double n = 0;
    for (int64_t e = 0; e < s_.experts; ++e)
      if (offsets_[static_cast<size_t>(e)] != offsets_[static_cast<size_t>(e) + 1])
        n += static_cast<double>(up_n_ + down_n_);
    return n * static_cast<double>(size_of(type_));
  }

 private:
  using Memory = std::unique_ptr<char, void (*)(char*)>;
  Memory make(int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * size_of(type_);
    Memory m(huge_alloc(bytes), huge_free);
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      const float f = static_cast<float>(static_cast<int>((i * 2654435761u >> 8) % 201) - 100) / 1000.f;
      uint32_t u;
      std::memcpy(&u, &f, 4);
      if (type_ == DType::f32)
        std::memcpy(m.get() + 4 * i, &u, 4);
      else
        std::memcpy(m.get() + 2 * i, reinterpret_cast<const char*>(&u) + 2, 2);
    }
    return m;
  }
  Shape s_;
  DType type_;
  int64_t up_n_ = 0, down_n_ = 0;
  Memory x_{nullptr, huge_free}, y_{nullptr, huge_free}, g_{nullptr, huge_free}, up_{nullptr, huge_free},
      down_{nullptr, huge_free}, grad_up_{nullptr, huge_free}, grad_down_{nullptr, huge_free},
      grad_x_{nullptr, huge_free}, saved_{nullptr, huge_free};
  std::vector<int64_t> ids_, offsets_, rows_, choices_;
  std::vector<float> weights_, grad_weights_;
  std::vector<const void*> up_p_, down_p_;
  std::vector<void*> grad_up_p_, grad_down_p_;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

/// Median of measure(i) / limit() over alternating rounds.
template <class Limit, class Run>
void show(const std::string& name, double work, const char* unit, double seconds, Limit&& limit, Run&& run) {
  run();
  std::vector<double> shares, rates;
  double spent = 0;
  while (spent < seconds || shares.size() < 5) {
    const double top = limit();
    const double t = now();
    run();
    const double took = now() - t;
    spent += took;
    rates.push_back(work / took / 1e9);
    shares.push_back(work / took / top);
  }
  std::vector<double> sorted = shares;
  std::sort(sorted.begin(), sorted.end());
  const double low = 100 * sorted[sorted.size() / 4], high = 100 * sorted[sorted.size() * 3 / 4];
  std::printf("%-40s %8.1f %s  %5.1f %%  (%.1f to %.1f, %zu runs)\n", name.c_str(), median(rates), unit,
              100 * median(shares), low, high, shares.size());
  std::fflush(stdout);
}

/// What the innermost loop reaches where nothing comes from beyond the L1 cache: one tile of `up`, again and again, in
/// fp32. The rest of what a layer lacks to the register peak is its own.
void show_tile(const std::string& name, const Implementation& impl, double seconds, const ParallelFor& parallel) {
  constexpr int64_t kRows = kMaxTileRows, kWords = 128, kCalls = 2000;  // 32 KB of weights in panels of 64
  const Stages& stages = *impl.stages;
  const Bank bank({"", 1, 1, kWords, stages.panel, kRows, Activation::relu}, DType::f32);
  const ExpertsProblem problem = bank.problem();
  std::vector<float> panel(static_cast<size_t>(stages.panel * kWords));
  const auto* weights = reinterpret_cast<const char*>(panel.data());
  stages.pack_up(problem, 0, 0, 1, reinterpret_cast<char*>(panel.data()));
  const std::vector<float> x(kRows * (kWords + 16), 0.5f);  // rows that share no sets of the cache
  const char* rows[kRows];
  for (int64_t i = 0; i < kRows; ++i) rows[i] = reinterpret_cast<const char*>(x.data() + i * (kWords + 16));
  const int64_t h_stride = 4 * (stages.panel + 16), worker = round_up(kRows * h_stride, 64) + worker_bytes(stages, 0);
  const std::unique_ptr<char, void (*)(char*)> memory(huge_alloc(static_cast<size_t>(worker * parallel.threads)),
                                                      huge_free);
  const double flops = 2.0 * static_cast<double>(kRows * stages.panel * kWords * kCalls * parallel.threads);
  const auto run = [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      char* h = memory.get() + begin * worker;
      for (int64_t n = 0; n < kCalls; ++n)
        stages.up({&problem, 0, {rows, kRows}, weights, 0, 1, h, h_stride, nullptr, nullptr,
                   h + round_up(kRows * h_stride, 64)});
    }
  };
  show(name, flops, "GF/s", seconds, [&] { return peak(false, parallel); }, [&] { parallel(parallel.threads, run); });
}

const Shape kShapes[] = {
    {"E64-T2048", 64, 8, 1024, 512, 2048, Activation::swiglu},
    {"qwen3-T512", 128, 8, 2048, 768, 512, Activation::swiglu},
    {"E32-T256", 32, 4, 1024, 512, 256, Activation::swiglu},
    {"gelu-T4096", 8, 2, 512, 2048, 4096, Activation::gelu},
    {"decode1", 128, 8, 2048, 768, 1, Activation::swiglu},
    {"decode4", 128, 8, 2048, 768, 4, Activation::swiglu},
    {"decode16", 128, 8, 2048, 768, 16, Activation::swiglu},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  g_threads = argc > 2 ? std::atoi(argv[2]) : 1;
  const double seconds = argc > 3 ? std::atof(argv[3]) : 0.5;
  const Implementation& impl = active();
  Pool pool(g_threads);
  const ParallelFor parallel = pool.parallel();
  std::printf("%s, %d threads, peak fp32 %.0f bf16 %.0f GF/s\n", impl.name, g_threads, peak(false, parallel) / 1e9,
              peak(true, parallel) / 1e9);
  const std::string tile = "tile in L1 fp32";
  if (impl.stages && tile.find(filter) != std::string::npos) show_tile(tile, impl, seconds, parallel);
  for (const Shape& s : kShapes)
    for (DType t : {DType::f32, DType::bf16}) {
      const bool bf16 = t == DType::bf16, decode = std::strncmp(s.name, "decode", 6) == 0;
      if (decode && !bf16) continue;
      const std::string base = std::string(s.name) + (bf16 ? " bf16 " : " fp32 ");
      const auto wanted = [&](const std::string& kind) { return (base + kind).find(filter) != std::string::npos; };
      const char* kinds[] = {"forward packed", "forward plain",  "forward save", "backward",
                             "step",           "step recompute", "step fresh"};
      if (std::none_of(std::begin(kinds), std::end(kinds), wanted)) continue;
      Bank bank(s, t);
      const PackedLayout layout(impl, bank.problem());
      const std::unique_ptr<char, void (*)(char*)> memory(huge_alloc(layout.bytes()), huge_free);
      pack(impl, bank.problem(), memory.get(), parallel);
      const PackedExperts packed(layout, memory.get(), layout.bytes());
      if (decode) {
        const auto read = [&] { return bandwidth(memory.get(), int64_t{200} << 20, parallel); };
        for (const bool plain : {false, true})
          if (wanted(kinds[plain]))
            show(base + kinds[plain], bank.weight_bytes(), "GB/s", seconds, read,
                 [&] { bank.forward(impl, plain ? nullptr : &packed, false, parallel); });
        continue;
      }
      const auto top = [&] { return peak(bf16, parallel); };
      const auto step = [&](bool recompute, bool fresh) {
        if (fresh) bank.fresh_gradients();
        bank.forward(impl, nullptr, !recompute, parallel);
        bank.backward(impl, recompute, parallel);
      };
      const auto time = [&](int kind, double forwards, const auto& run) {
        if (wanted(kinds[kind])) show(base + kinds[kind], forwards * bank.flops(), "GF/s", seconds, top, run);
      };
      time(0, 1, [&] { bank.forward(impl, &packed, false, parallel); });
      time(1, 1, [&] { bank.forward(impl, nullptr, false, parallel); });
      time(2, 1, [&] { bank.forward(impl, nullptr, true, parallel); });
      time(3, 2, [&] { bank.backward(impl, false, parallel); });
      time(4, 3, [&] { step(false, false); });
      time(5, 3, [&] { step(true, false); });
      time(6, 3, [&] { step(false, true); });
    }
  return 0;
}
