#include "msdd_fast/detail/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace msdd_fast {
namespace {

// Helpers sleep until there is a task. The caller also takes tasks, so it never waits for one that has not started: on
// a busy machine, where helpers wake late, it does all the work itself.
class Pool {
  public:
    void run(std::int64_t count, const std::function<void(std::int64_t)>& task) {
        const std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
        if (!caller) {
            for (std::int64_t i = 0; i < count; ++i) task(i);
            return;
        }
        std::unique_lock<std::mutex> lock(state_);
        start_helpers(count - 1);
        task_ = &task;
        next_ = 0;
        count_ = count;
        lock.unlock();
        for (std::int64_t i = 1; i < count; ++i) wake_.notify_one();
        lock.lock();
        work(lock);
        done_.wait(lock, [this] { return running_ == 0; });
    }

  private:
    void start_helpers(std::int64_t wanted) {
        try {
            for (; helpers_ < wanted; ++helpers_) std::thread(&Pool::help, this).detach();
        } catch (const std::system_error&) {
            // Out of threads: continue with those already running.
        }
    }

    void help() {
        std::unique_lock<std::mutex> lock(state_);
        while (true) {
            wake_.wait(lock, [this] { return next_ < count_; });
            work(lock);
            if (running_ == 0) done_.notify_one();
        }
    }

    // Takes tasks until none is left. The lock is held on entry and on return, not while a task runs.
    void work(std::unique_lock<std::mutex>& lock) {
        while (next_ < count_) {
            const std::int64_t mine = next_++;
            ++running_;
            lock.unlock();
            (*task_)(mine);
            lock.lock();
            --running_;
        }
    }

    std::mutex callers_;  // held by the one caller whose tasks these are
    std::mutex state_;    // guards all below
    std::condition_variable wake_, done_;
    const std::function<void(std::int64_t)>* task_ = nullptr;
    std::int64_t next_ = 0, count_ = 0, running_ = 0, helpers_ = 0;
};

// Never destroyed: helpers sleep in it until the process ends.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* found = current.load();
    if (found == nullptr) {
        auto* fresh = new Pool;
        if (current.compare_exchange_strong(found, fresh))
            found = fresh;
        else
            delete fresh;  // another thread won the race; this pool has no helpers yet
    }
    return *found;
}

// The OpenMP team that PyTorch's own operators run on, if the process has one. Its threads spin for a while after each
// operator, so they are ready at once, while threads of our own would compete with them for the same cores.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

Parallel find_team() {
#if defined(__unix__) || defined(__APPLE__)
    return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

struct Shared {
    const std::function<void(std::int64_t)>& task;
    std::int64_t count;
    std::atomic<std::int64_t> next{0};
};

void take_tasks(void* data) {
    auto& shared = *static_cast<Shared*>(data);
    for (std::int64_t i; (i = shared.next++) < shared.count;) shared.task(i);
}

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
// After fork() the child has no helper threads, and mutexes may be locked. It leaks the old pool and creates a new one
// on demand. The OpenMP team does not survive a fork either and cannot be restarted.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr);
    forked.store(true);
});
#endif

}  // namespace

void run_tasks(std::int64_t count, const std::function<void(std::int64_t)>& task) {
    static const Parallel team = find_team();
    if (team == nullptr || forked) return pool().run(count, task);
    Shared shared{task, count};
    team(take_tasks, &shared, static_cast<unsigned>(count), 0);
}

}  // namespace msdd_fast
