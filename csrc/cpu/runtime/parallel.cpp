#include "msdd_fast/detail/parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace msdd_fast {
namespace {

// The first exception of a loop's tasks, which must not leave the thread that it was thrown on.
class FirstFailure {
  public:
    template <class Body>
    void guard(const Body& body) {
        try {
            body();
        } catch (...) {
            if (!taken_.exchange(true)) first_ = std::current_exception();
        }
    }

    // Once all tasks are done, and their threads' work is visible.
    void rethrow() const {
        if (first_) std::rethrow_exception(first_);
    }

  private:
    std::atomic<bool> taken_{false};
    std::exception_ptr first_;
};

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

Parallel openmp_team() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto team = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return team;
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

// --- A team that stands by: its helpers spin, so that they see new tasks at once. ---

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for about 20 us, then lets other threads have the core, as they must where there are more threads than cores.
class Patience {
  public:
    void wait() {
        if (++spins_ < SPINS)
            pause();
        else
            std::this_thread::yield();
    }

  private:
    static constexpr int SPINS = 500;
    int spins_ = 0;
};

class Team {
  public:
    // The leader's: all tasks, by it and by the helpers that come in time.
    void run(std::int64_t count, const std::function<void(std::int64_t)>& task) {
        task_.store(&task, std::memory_order_relaxed);
        count_.store(count, std::memory_order_relaxed);
        finished_.store(0, std::memory_order_relaxed);
        const std::uint64_t round = (ticket_.load(std::memory_order_relaxed) >> LEFT_BITS) + 1;
        ticket_.store(round << LEFT_BITS | static_cast<std::uint64_t>(count), std::memory_order_release);
        work(round);
        Patience patience;
        while (finished_.load(std::memory_order_acquire) != count) patience.wait();
    }

    void dismiss() { dismissed_.store(true, std::memory_order_release); }

    void help() {
        std::uint64_t seen = 0;
        Patience patience;
        while (!dismissed_.load(std::memory_order_acquire)) {
            const std::uint64_t round = ticket_.load(std::memory_order_acquire) >> LEFT_BITS;
            if (round == seen) {
                patience.wait();
                continue;
            }
            seen = round;
            work(round);
            patience = Patience();
        }
    }

  private:
    static constexpr int LEFT_BITS = 32;
    static constexpr std::uint64_t LEFT_MASK = (std::uint64_t{1} << LEFT_BITS) - 1;

    // Takes tasks of one round until none is left. The ticket holds the round and how many tasks are left, so a helper
    // that is late takes none of another round. Task and count are read only after a ticket is taken: until that task
    // has finished, the leader changes neither.
    void work(std::uint64_t round) {
        std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (ticket >> LEFT_BITS == round && (ticket & LEFT_MASK) != 0) {
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            const std::int64_t left = static_cast<std::int64_t>(ticket & LEFT_MASK);
            (*task_.load(std::memory_order_relaxed))(count_.load(std::memory_order_relaxed) - left);
            finished_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    alignas(64) std::atomic<std::uint64_t> ticket_{0};
    alignas(64) std::atomic<std::int64_t> finished_{0};
    alignas(64) std::atomic<const std::function<void(std::int64_t)>*> task_{nullptr};
    std::atomic<std::int64_t> count_{0};
    std::atomic<bool> dismissed_{false};
};

// The team that the code of this thread leads, if any.
thread_local Team* led = nullptr;

// One leader and its helpers: whoever comes first leads.
struct Session {
    explicit Session(const std::function<void()>& todo) : body(todo) {}

    void enter() {
        if (taken.exchange(true)) return team.help();
        led = &team;
        failure.guard(body);
        led = nullptr;
        team.dismiss();
    }

    const std::function<void()>& body;
    Team team;
    std::atomic<bool> taken{false};
    FirstFailure failure;
};

}  // namespace

bool leads_a_team() { return led != nullptr; }

void run_on_team(int threads, const std::function<void()>& body) {
    if (led != nullptr) return body();
    Session session(body);
    if (threads <= 1)
        session.enter();
    else
        run_tasks(threads, [&session](std::int64_t) { session.enter(); });
    session.failure.rethrow();
}

void run_tasks(std::int64_t count, const std::function<void(std::int64_t)>& task) {
    FirstFailure failure;
    const std::function<void(std::int64_t)> guarded = [&](std::int64_t i) { failure.guard([&] { task(i); }); };
    if (led != nullptr) {
        led->run(count, guarded);
    } else if (const Parallel team = forked ? nullptr : openmp_team()) {
        Shared shared{guarded, count};
        team(take_tasks, &shared, static_cast<unsigned>(count), 0);
    } else {
        pool().run(count, guarded);
    }
    failure.rethrow();
}

}  // namespace msdd_fast
