// Forward: segments of an expert's rows go through `up` and `down`, batch after batch; then tokens are combined.
//
// `up` of one batch runs beside `down` of the batch before it, so no thread waits while work is left; h of three
// batches is alive at a time.
#include <stdexcept>

#include "driver.h"
#include "ref/reference.h"

namespace turnout::kernels {
namespace {

enum Stage { kUp, kDown, kCombine };
constexpr size_t kRing = 3;          // batches whose h is alive
constexpr int64_t kBatchRows = 512;  // rows of a batch of small segments
constexpr int64_t kCombineTokens = 32;

struct Segment {
  int64_t expert, row, rows;
  int64_t h_row = 0;  ///< its first row within the ring of h
};

std::vector<Segment> segments_of(const ExpertsProblem& q) {
  std::vector<Segment> segments;
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const int64_t begin = q.expert_offsets[e], rows = q.expert_offsets[e + 1] - begin;
    const int64_t n = div_up(rows, kSegmentRows);
    for (int64_t i = 0; i < n; ++i) segments.push_back({e, begin + rows * i / n, rows * (i + 1) / n - rows * i / n});
  }
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.rows > b.rows; });
  return segments;
}

struct Memory {
  const char** x_rows;
  const char** h_rows;
  float* weight;  ///< of each row, where it is applied before down
  char* copies;
  char* h;
  float* slots;
  char* workers;
};

void forward_stages(const Stages& s, const ExpertsProblem& q, const PackedExperts* packed, void* y, void* saved_up,
                    const ParallelFor& parallel) {
  const bool bf16 = q.dtype == DType::bf16;
  const size_t element = size_of(q.dtype);
  const int threads = std::max(parallel.threads, 1);
  std::vector<Segment> segments = segments_of(q);
  const int64_t most = segments.empty() ? 0 : segments.front().rows;
  const std::vector<Batch> batches = batches_of(segments, std::max(most, kBatchRows));

  int64_t ring_rows = 0;
  for (const Batch& b : batches) ring_rows = std::max(ring_rows, b.rows);
  const size_t ring = std::min(kRing, batches.size());
  for (size_t b = 0; b < batches.size(); ++b) {
    int64_t at = static_cast<int64_t>(b % kRing) * ring_rows;
    for (size_t i = batches[b].first; i < batches[b].last; ++i) {
      segments[i].h_row = at;
      at += segments[i].rows;
    }
  }

  const int64_t h_stride = padded_row(q.ffn, s.panel, static_cast<size_t>(row_element(s, bf16)));
  const int64_t slot_stride = padded_row(q.hidden, s.panel, 4) / 4;
  const int64_t worker = worker_bytes(s, 0);
  const int64_t h_rows = static_cast<int64_t>(ring) * ring_rows;
  Memory m{};
  const auto scratch = Scratch::of([&](Arena& a) {
    m.x_rows = a.take<const char*>(q.rows);
    m.h_rows = a.take<const char*>(h_rows);
    m.weight = a.take<float>(q.weight_before_down ? q.rows : 0);
    m.copies = a.take<char>(TokenRows::copied_bytes(s, q));
    m.h = a.take<char>(h_rows * h_stride);
    m.slots = a.take<float>(q.rows * slot_stride);
    m.workers = a.take<char>(worker * threads);
  });

  const TokenRows x(s, q, q.x, q.x_stride, m.copies, parallel);
  for (int64_t r = 0; r < q.rows; ++r) m.x_rows[r] = x.base + q.token_of_row[r] * x.stride;
  for (int64_t r = 0; r < h_rows; ++r) m.h_rows[r] = m.h + r * h_stride;
  if (q.weight_before_down) weights_of_rows(q, m.weight);

  const int64_t up_n = up_panels(q, s.panel), down_n = div_up(q.hidden, s.panel);
  const int64_t up_span = span_of(up_n, words_of(q.hidden, bf16), static_cast<int64_t>(segments.size()), threads);
  const int64_t down_span = span_of(down_n, words_of(q.ffn, bf16), static_cast<int64_t>(segments.size()), threads);

  Schedule schedule;
  std::vector<int> up_group(segments.size()), down_group(batches.size());
  const int all_down = schedule.new_group();
  for (size_t b = 0; b <= batches.size(); ++b) {
    if (b < batches.size()) {
      down_group[b] = schedule.new_group();
      const int reuse = b >= kRing ? down_group[b - kRing] : -1;
      for (size_t i = batches[b].first; i < batches[b].last; ++i) {
        up_group[i] = schedule.new_group();
        schedule.add_split(up_group[i], kUp, static_cast<int64_t>(i), up_n, up_span, reuse);
      }
    }
    if (b == 0) continue;
    for (size_t i = batches[b - 1].first; i < batches[b - 1].last; ++i)
      schedule.add_split(down_group[b - 1], kDown, static_cast<int64_t>(i), down_n, down_span, up_group[i]);
  }
  // combine waits for every batch: groups close in any order, so each is waited for in turn by an empty task
  int before = -1;
  for (size_t b = 0; b < batches.size(); ++b) {
    const int closed = b + 1 == batches.size() ? all_down : schedule.new_group();
    schedule.add(closed, kCombine, 0, 0, 0, down_group[b], before);
    before = closed;
  }
  schedule.add_split(schedule.new_group(), kCombine, 0, q.tokens, kCombineTokens, before);

  schedule.run(parallel, [&](const Task& t, int w) {
    char* memory = m.workers + w * worker;
    if (t.stage == kCombine)
      return s.combine({&q, m.slots, slot_stride, !q.weight_before_down, static_cast<char*>(y), t.begin, t.end});
    const Segment& g = segments[static_cast<size_t>(t.item)];
    const float* weight = q.weight_before_down ? m.weight + g.row : nullptr;
    if (t.stage == kUp) {
      char* saved = static_cast<char*>(saved_up);
      if (saved) saved += g.row * q.up_rows() * static_cast<int64_t>(element);
      const char* weights = packed ? static_cast<const char*>(packed->up(g.expert)) : nullptr;
      s.up({&q,
            g.expert,
            {m.x_rows + g.row, g.rows},
            weights,
            t.begin,
            t.end,
            m.h + g.h_row * h_stride,
            h_stride,
            saved,
            weight,
            memory});
    } else {
      const char* weights = packed ? static_cast<const char*>(packed->down(g.expert)) : nullptr;
      s.down({&q,
              g.expert,
              {m.h_rows + g.h_row, g.rows},
              weights,
              t.begin,
              t.end,
              weight,
              m.slots + g.row * slot_stride,
              slot_stride,
              memory});
    }
  });
}

}  // namespace

void check_type(const Implementation& implementation, const ExpertsProblem& problem) {
  if (problem.dtype == DType::f64 && implementation.stages != nullptr)
    throw std::invalid_argument(std::string("float64 is served by 'reference' alone, not by '") + implementation.name +
                                "'");
}

void forward(const Implementation& implementation, const ExpertsProblem& problem, const PackedExperts* packed, void* y,
             void* saved_up, const ParallelFor& parallel) {
  check_type(implementation, problem);
  if (packed && (&packed->layout().implementation() != &implementation || !packed->layout().fits(problem)))
    throw std::invalid_argument("packed experts are '" + packed->layout().words() + "', expected '" +
                                PackedLayout(implementation, problem).words() + "'");
  if (implementation.stages == nullptr) return ref::forward(problem, packed, y, saved_up);
  forward_stages(*implementation.stages, problem, packed, y, saved_up, parallel);
}

}  // namespace turnout::kernels
