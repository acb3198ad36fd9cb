#include "team.h"

#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace qtool {
namespace {

constexpr int kSpins = 4000;  // of a pause each, some tens to hundreds of microseconds

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

class Pool {
 public:
  void run(int threads, void (*job)(void*, const Crew&), void* context) {
    const std::lock_guard<std::mutex> turn(turn_);
    Barrier barrier;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = job, context_ = context, size_ = threads, barrier_ = &barrier;
      running_ = threads - 1;
      ++call_;
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int index = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, index, before = call_ - 1] { work(index, before); });
        workers_.back().detach();  // a process may end while they sleep
      }
    }
    wake_.notify_all();
    job(context, Crew{0, threads, &barrier});
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void work(int index, std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return call_ != seen; });
      seen = call_;
      if (index >= size_) continue;
      const Crew crew{index, size_, barrier_};
      const auto job = job_;
      void* context = context_;
      lock.unlock();
      job(context, crew);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  void (*job_)(void*, const Crew&) = nullptr;
  void* context_ = nullptr;
  Barrier* barrier_ = nullptr;
  int size_ = 0, running_ = 0;
  std::uint64_t call_ = 0;
};

std::atomic<Pool*> current{nullptr};
std::atomic<bool> forked{false};

#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, &after_fork);
#endif

// Never destroyed: workers sleep in it until the process ends.
Pool& pool() {
  Pool* found = current.load();
  if (found == nullptr) {
    auto* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

// OpenMP's threads, where a runtime with GNU's interface is loaded: torch's. Its workers are then ours as well, so that
// the two never compete for a core, and they are still awake when a call follows an operation of torch.
class OpenMp {
 public:
  static const OpenMp& get() {
    static const OpenMp found;
    return found;
  }
  // GNU's runtime hangs in a child of fork whose parent used it, as torch may have.
  bool usable() const { return parallel_ != nullptr && thread_ != nullptr && size_ != nullptr && !forked.load(); }
  void run(int threads, void (*job)(void*, const Crew&), void* context) const {
    Barrier barrier;
    Call call{this, job, context, &barrier};
    parallel_(&enter, &call, static_cast<unsigned>(threads), 0);
  }

 private:
  struct Call {
    const OpenMp* runtime;
    void (*job)(void*, const Crew&);
    void* context;
    Barrier* barrier;
  };

  OpenMp() {
#if !defined(_WIN32)
    parallel_ = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_ = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    size_ = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }
  // The runtime may give fewer threads than were asked for.
  static void enter(void* data) {
    const Call& call = *static_cast<Call*>(data);
    call.job(call.context, Crew{call.runtime->thread_(), call.runtime->size_(), call.barrier});
  }

  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();
  Parallel parallel_ = nullptr;
  Number thread_ = nullptr, size_ = nullptr;
};

}  // namespace

// Only the forking thread lives on in the child: the parent's workers are gone, and what they held stays locked.
void after_fork() {
  forked.store(true);
  current.store(nullptr);
}

void Barrier::wait(int size) {
  const std::uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      round_.store(round + 1, std::memory_order_release);
    }
    changed_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (round_.load(std::memory_order_acquire) != round) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != round; });
}

void run_together(int threads, void (*job)(void*, const Crew&), void* context) {
  if (threads <= 1) {
    job(context, Crew{});
  } else if (OpenMp::get().usable()) {
    OpenMp::get().run(threads, job, context);
  } else {
    pool().run(threads, job, context);
  }
}

}  // namespace qtool
