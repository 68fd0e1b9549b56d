// The kernels against the machine's own limits: shares of the register peak and of the read bandwidth.
//
// Usage: kernels_bench [filter [threads [seconds a case]]]. One thread is timed by its own CPU time, several by the
// wall clock. Limits and cases alternate in one run; medians are shown, and the quarters around them. The figure is
// arithmetic only: 2 flops a multiply-add of the products; routing is prepared outside, as it is in every peer. "Of the
// tile" is the share of what a bare tile gets in the same moments: what the layer itself loses.
#include <immintrin.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
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

/// What a case is held against, measured anew before each of its runs: work a second.
struct Limit {
  const char* name;
  std::function<double()> rate;
};

/// Medians of the rate of `run`, in 10⁹ of work a second, and of its shares of each limit, over alternating rounds.
void show(const std::string& name, double work, const char* unit, double seconds, const std::vector<Limit>& limits,
          const std::function<void()>& run) {
  run();
  std::vector<double> rates;
  std::vector<std::vector<double>> shares(limits.size());
  double spent = 0;
  while (spent < seconds || rates.size() < 5) {
    for (size_t i = 0; i < limits.size(); ++i) shares[i].push_back(1 / limits[i].rate());
    const double t = now();
    run();
    const double took = now() - t;
    spent += took;
    rates.push_back(work / took);
    for (std::vector<double>& share : shares) share.back() *= rates.back();
  }
  std::printf("%-32s %6.1f %s", name.c_str(), median(rates) / 1e9, unit);
  for (size_t i = 0; i < limits.size(); ++i) {
    std::sort(shares[i].begin(), shares[i].end());
    const auto percent = [&](size_t quarter) { return 100 * shares[i][shares[i].size() * quarter / 4]; };
    std::printf("  %s %5.1f %% (%.0f to %.0f)", limits[i].name, percent(2), percent(1), percent(3));
  }
  std::printf("  %zu runs\n", rates.size());
  std::fflush(stdout);
}

/// What the innermost loop reaches where nothing comes from beyond the L1 cache: one tile of `up`, again and again.
class TileInL1 {
 public:
  TileInL1(const Stages& stages, bool bf16, ParallelFor parallel)
      : stages_(stages),
        parallel_(parallel),
        pairs_(bf16 && !stages.wide_rows),
        bank_({"", 1, 1, pairs_ ? 2 * kWords : kWords, stages.panel, kRows, Activation::relu},
              pairs_ ? DType::bf16 : DType::f32),
        problem_(bank_.problem()),
        panel_(static_cast<size_t>(stages.panel * kWords)),
        x_(static_cast<size_t>(kRows * (kWords + 16)), 0.5f),
        h_stride_(4 * (stages.panel + 16)),
        h_bytes_(round_up(kRows * h_stride_, 64)),
        worker_(h_bytes_ + worker_bytes(stages, 0)),
        memory_(huge_alloc(static_cast<size_t>(worker_ * parallel.threads)), huge_free) {
    stages.pack_up(problem_, 0, 0, 1, reinterpret_cast<char*>(panel_.data()));
    for (int64_t i = 0; i < kRows; ++i) rows_[i] = reinterpret_cast<const char*>(x_.data() + i * (kWords + 16));
  }
  /// Flops a second, of a run of a few milliseconds.
  double rate() const {
    const double t = now();
    parallel_(parallel_.threads, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        char* h = memory_.get() + begin * worker_;
        for (int64_t n = 0; n < kCalls; ++n)
          stages_.up({&problem_,
                      0,
                      {rows_, kRows},
                      reinterpret_cast<const char*>(panel_.data()),
                      0,
                      1,
                      h,
                      h_stride_,
                      nullptr,
                      nullptr,
                      h + h_bytes_});
      }
    });
    return bank_.flops() / 2 * kCalls * parallel_.threads / (now() - t);  // `up` alone, as large as `down`
  }

 private:
  static constexpr int64_t kRows = kMaxTileRows, kWords = 128, kCalls = 4000;  // 32 KB of weights in panels of 64
  const Stages& stages_;
  const ParallelFor parallel_;
  const bool pairs_;  ///< bf16 rows that are fp32 numbers have the tile of fp32
  const Bank bank_;
  const ExpertsProblem problem_;
  std::vector<float> panel_;
  const std::vector<float> x_;  // rows that share no sets of the cache
  const int64_t h_stride_, h_bytes_, worker_;
  const std::unique_ptr<char, void (*)(char*)> memory_;
  const char* rows_[kRows];
};

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
        const std::vector<Limit> read = {
            {"of reading", [&] { return bandwidth(memory.get(), int64_t{200} << 20, parallel); }}};
        for (const bool plain : {false, true})
          if (wanted(kinds[plain]))
            show(base + kinds[plain], bank.weight_bytes(), "GB/s", seconds, read,
                 [&] { bank.forward(impl, plain ? nullptr : &packed, false, parallel); });
        continue;
      }
      std::vector<Limit> tops = {{"of the peak", [&] { return peak(bf16, parallel); }}};
      std::unique_ptr<TileInL1> tile;
      if (impl.stages) {
        tile = std::make_unique<TileInL1>(*impl.stages, bf16, parallel);
        tops.push_back({"of the tile", [&] { return tile->rate(); }});
      }
      const auto step = [&](bool recompute, bool fresh) {
        if (fresh) bank.fresh_gradients();
        bank.forward(impl, nullptr, !recompute, parallel);
        bank.backward(impl, recompute, parallel);
      };
      const auto time = [&](int kind, double forwards, const auto& run) {
        if (wanted(kinds[kind])) show(base + kinds[kind], forwards * bank.flops(), "GF/s", seconds, tops, run);
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
