// The heartbeat's thread, and what silence, leaves and findings of other ranks tell.
#include "distributed/heartbeat.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace turnout::distributed {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int64_t kSilentBeats = 6;           // a rank that missed so many is lost
constexpr milliseconds kUrgent{20};           // between beats of a rank that waits for news of the others
constexpr char kSeparator = '\x1f';
constexpr const char* kNothing = "nothing between ranks";

std::string key_of(int64_t rank) { return "beat/" + std::to_string(rank); }

std::string rank_text(int64_t rank) { return "rank " + std::to_string(rank); }

std::string seconds_text(Clock::duration time) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", std::chrono::duration<double>(time).count());
  return text;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts{""};
  for (const char c : text) {
    if (c == kSeparator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

struct Peer {
  int64_t rank = 0;
  std::string beat{};
  int64_t unchanged = 0;  // beats of ours since the last one of theirs
  Clock::time_point heard = Clock::now();
  bool left = false;
  bool ended = false;  // and reads nothing more
  std::string operation = kNothing;
  std::string operations = "0";
  std::string finding{};

  // By time and by beats of ours: a process that was starved or stopped itself has not listened.
  bool silent(milliseconds limit) const {
    return !left && unchanged >= kSilentBeats && Clock::now() - heard > limit;
  }

  void hear(const std::string& text) {
    if (text == beat) {
      ++unchanged;
      return;
    }
    beat = text;
    unchanged = 0;
    heard = Clock::now();
    const auto parts = split(text);
    if (parts.size() != 5) return;  // written by the meeting, before the first beat
    ended = parts[1] == "ended";
    left = ended || parts[1] == "left";
    operation = parts[2];
    operations = parts[3];
    finding = parts[4];
  }
};

}  // namespace

struct Heartbeat::Shared {
  std::mutex mutex;
  std::condition_variable changed;  // both ways: a beat was made, or one is wanted at once
  int64_t rank = 0;
  milliseconds timeout{}, interval{};
  std::string holder;
  std::function<bool()> over;

  const char* operation = nullptr;
  int64_t operations = 0;
  std::string finding;
  bool failed = false, leaving = false, hurry = false, stop = false;
  bool told_leaving = false;  // the others can read it

  int64_t beats = 0;
  Clock::time_point last_beat = Clock::now();
  std::vector<Peer> peers;
  std::string store_error;
  bool ended = false;

  std::string own_beat() const {
    std::string text = std::to_string(beats);
    for (const std::string& part : {std::string(stop ? "ended" : leaving ? "left" : "here"),
                                    std::string(operation ? operation : kNothing),
                                    std::to_string(operations), finding}) {
      text += kSeparator;
      text += part;
    }
    return text;
  }

  milliseconds silence() const { return interval * kSilentBeats; }

  // What is known of the cause; empty while nothing is. The mutex is held.
  std::string cause(bool may_have_left) const {
    for (const Peer& peer : peers)
      if (!peer.finding.empty()) return peer.finding;
    std::string silent, gone;
    for (const Peer& peer : peers) {
      const std::string during = peer.beat.empty() ? " (last sign: none yet)"
                                                   : " (last sign " + seconds_text(Clock::now() - peer.heard) +
                                                         " ago, during: " + peer.operation + ")";
      if (peer.silent(silence())) silent.append(silent.empty() ? "" : ", ").append(rank_text(peer.rank)).append(during);
      if (peer.left) gone.append(gone.empty() ? "" : ", ").append(rank_text(peer.rank));
    }
    if (!silent.empty()) return silent + " no longer answers";
    if (!store_error.empty()) return holder_lost();
    if (Clock::now() - last_beat > silence()) return holder + " no longer answers";
    if (!gone.empty() && may_have_left) return gone + " left the run";
    return "";
  }

  std::string holder_lost() const { return holder + " is lost"; }

  std::string no_cause() const {
    std::string text = "every rank still answers: this one did its operation " + std::to_string(operations);
    for (const Peer& peer : peers)
      text.append(", rank ").append(std::to_string(peer.rank)).append(" is at ").append(peer.operations);
    return text + "; ranks whose operations differ wait for each other";
  }
};

namespace {

// A connection of the thread's own. Every rank's key is there from now on: reading one that is not would wait for it.
c10::intrusive_ptr<c10d::Store> connect(const c10::intrusive_ptr<c10d::Store>& store,
                                        const std::vector<std::string>& keys) {
  auto own = store->clone();
  for (const auto& key : keys) own->compareSet(key, std::string(), std::string());
  return own;
}

template <class Shared>
void beat_until_stopped(const std::shared_ptr<Shared>& shared, c10::intrusive_ptr<c10d::Store> given) {
  sigset_t pipe;  // writing to a store that is gone must not end the process
  sigemptyset(&pipe);
  sigaddset(&pipe, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
  std::vector<std::string> keys;
  for (const Peer& peer : shared->peers) keys.push_back(key_of(peer.rank));
  c10::intrusive_ptr<c10d::Store> store;
  std::unique_lock lock(shared->mutex);
  while (!shared->over || !(shared->stop || shared->over())) {
    const std::string own = shared->own_beat();
    shared->hurry = false;
    const bool last = shared->stop, leaving = shared->leaving;
    lock.unlock();
    std::vector<std::vector<uint8_t>> heard;
    std::string error;
    try {
      if (given) store = connect(std::exchange(given, {}), keys);
      store->set(key_of(shared->rank), own);
      if (!last && !keys.empty()) heard = store->multiGet(keys);
    } catch (const std::exception& problem) {
      error = problem.what();
    }
    lock.lock();
    if (!error.empty()) shared->store_error = error;
    for (size_t i = 0; i < heard.size(); ++i) shared->peers[i].hear({heard[i].begin(), heard[i].end()});
    ++shared->beats;
    shared->told_leaving = leaving;
    shared->last_beat = Clock::now();
    shared->changed.notify_all();
    if (last || !error.empty()) break;
    const bool urgent = shared->failed || shared->leaving;
    shared->changed.wait_for(lock, urgent ? std::min(kUrgent, shared->interval) : shared->interval,
                             [&] { return shared->stop || shared->hurry; });
  }
  shared->ended = true;
  shared->changed.notify_all();
}

}  // namespace

Heartbeat::Heartbeat(c10::intrusive_ptr<c10d::Store> store, int64_t rank, const std::vector<int64_t>& ranks,
                     milliseconds timeout, std::string holder, std::function<bool()> over)
    : shared_(std::make_shared<Shared>()) {
  shared_->rank = rank;
  shared_->timeout = timeout;
  shared_->interval = std::clamp(timeout / 40, milliseconds(50), milliseconds(1000));
  shared_->holder = std::move(holder);
  shared_->over = std::move(over);
  for (const int64_t peer : ranks)
    if (peer != rank) shared_->peers.push_back({peer});
  thread_ = std::thread([shared = shared_, given = std::move(store)]() mutable {
    beat_until_stopped(shared, std::move(given));
  });
}

Heartbeat::~Heartbeat() {
  std::unique_lock lock(shared_->mutex);
  shared_->stop = true;
  shared_->changed.notify_all();
  const bool ended = shared_->changed.wait_for(lock, std::chrono::seconds(1), [&] { return shared_->ended; });
  lock.unlock();
  if (ended)
    thread_.join();
  else
    thread_.detach();  // a store that hangs holds it
}

void Heartbeat::doing(const char* operation) {
  const std::lock_guard lock(shared_->mutex);
  shared_->operation = operation;
  if (operation != nullptr) ++shared_->operations;
}

std::string Heartbeat::find_culprit() {
  Shared& s = *shared_;
  std::unique_lock lock(s.mutex);
  s.failed = s.hurry = true;
  s.changed.notify_all();
  const int64_t first = s.beats;
  const auto deadline = Clock::now() + s.silence() + 4 * s.interval + std::chrono::seconds(1);
  std::string found;
  while (true) {
    found = s.cause(/*may_have_left=*/s.beats >= first + 2);
    if (!found.empty() || Clock::now() > deadline) break;
    s.changed.wait_for(lock, s.interval);
  }
  if (found.empty()) return s.no_cause();
  lock.unlock();
  report(found);
  return found;
}

std::string Heartbeat::lost() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->cause(/*may_have_left=*/true);
}

std::string Heartbeat::holder_lost() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->over || shared_->store_error.empty() ? "" : shared_->holder_lost();
}

void Heartbeat::report(const std::string& finding) {
  std::unique_lock lock(shared_->mutex);
  shared_->failed = true;
  if (shared_->finding.empty()) shared_->finding = finding;
  shared_->hurry = true;
  const int64_t before = shared_->beats;
  shared_->changed.notify_all();
  shared_->changed.wait_for(lock, 2 * shared_->interval,
                            [&] { return shared_->beats >= before + 2 || shared_->ended; });
}

void Heartbeat::leave(bool holds_store, bool unwinding) {
  Shared& s = *shared_;
  std::unique_lock lock(s.mutex);
  const bool failed = s.failed || unwinding;
  s.leaving = s.hurry = true;
  s.operation = nullptr;
  s.changed.notify_all();
  const auto limit = failed ? std::min(s.timeout, 2 * s.silence()) : s.timeout;
  s.changed.wait_for(lock, limit, [&] {
    if (s.ended || Clock::now() - s.last_beat > s.silence()) return true;
    return s.told_leaving &&
           ((failed && !holds_store) ||
            std::all_of(s.peers.begin(), s.peers.end(), [&](const Peer& p) {
              return p.silent(s.silence()) || (holds_store ? p.ended : p.left);  // nobody may miss the store
            }));
  });
}

}  // namespace turnout::distributed
