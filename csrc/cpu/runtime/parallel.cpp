#include "msdd_fast/detail/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

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

// One leader, who is member 0, and its helpers. Task i is member i's, as long as that one comes in time: what it wrote
// in the last call lies in its core's cache.
class Team {
  public:
    explicit Team(int size) : claims_(static_cast<std::size_t>(size)) {}

    // The leader's: all tasks, by it and by the helpers that come in time.
    void run(std::int64_t count, const std::function<void(std::int64_t)>& task) {
        const auto most = static_cast<std::int64_t>(claims_.size());
        for (std::int64_t first = 0; first < count; first += most)
            run_round(first, std::min(most, count - first), task);
    }

    void dismiss() { dismissed_.store(true, std::memory_order_release); }

    void help() {
        const std::int64_t me = members_.fetch_add(1, std::memory_order_relaxed);
        std::uint64_t seen = 0;
        Patience patience;
        while (!dismissed_.load(std::memory_order_acquire)) {
            const std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
            if (ticket == seen) {
                patience.wait();
                continue;
            }
            seen = ticket;
            work(ticket, me);
            patience = Patience();
        }
    }

  private:
    // The number of the round and, in the lower half, of its tasks: read together, so that a helper that is late never
    // takes a task of one round by the count of another.
    static constexpr int COUNT_BITS = 32;
    static constexpr std::uint64_t COUNT_MASK = (std::uint64_t{1} << COUNT_BITS) - 1;

    // The last round in which a task of this place was taken.
    struct alignas(64) Claim {
        std::atomic<std::uint64_t> round{0};
    };

    void run_round(std::int64_t first, std::int64_t count, const std::function<void(std::int64_t)>& task) {
        task_.store(&task, std::memory_order_relaxed);
        first_.store(first, std::memory_order_relaxed);
        finished_.store(0, std::memory_order_relaxed);
        const std::uint64_t round = (ticket_.load(std::memory_order_relaxed) >> COUNT_BITS) + 1;
        const std::uint64_t ticket = round << COUNT_BITS | static_cast<std::uint64_t>(count);
        ticket_.store(ticket, std::memory_order_release);
        work(ticket, 0);
        Patience patience;
        while (finished_.load(std::memory_order_acquire) != count) patience.wait();
    }

    // Takes the member's own task of the round and then what nobody has taken. Task and first are read only after a
    // claim: until that task has finished, the leader changes neither.
    void work(std::uint64_t ticket, std::int64_t me) {
        const std::uint64_t round = ticket >> COUNT_BITS;
        const auto count = static_cast<std::int64_t>(ticket & COUNT_MASK);
        for (std::int64_t k = 0; k < count; ++k) {
            const std::int64_t i = (me + k) % count;
            std::atomic<std::uint64_t>& claim = claims_[static_cast<std::size_t>(i)].round;
            std::uint64_t last = claim.load(std::memory_order_relaxed);
            if (last >= round || !claim.compare_exchange_strong(last, round, std::memory_order_acq_rel)) continue;
            (*task_.load(std::memory_order_relaxed))(first_.load(std::memory_order_relaxed) + i);
            finished_.fetch_add(1, std::memory_order_release);
        }
    }

    std::vector<Claim> claims_;
    std::atomic<std::int64_t> members_{1};
    alignas(64) std::atomic<std::uint64_t> ticket_{0};
    alignas(64) std::atomic<std::int64_t> finished_{0};
    alignas(64) std::atomic<const std::function<void(std::int64_t)>*> task_{nullptr};
    std::atomic<std::int64_t> first_{0};
    std::atomic<bool> dismissed_{false};
};

// The team that the code of this thread leads, if any.
thread_local Team* led = nullptr;

// A body, its leader and its helpers: whoever comes first leads.
struct Session {
    Session(int threads, const std::function<void()>& todo) : body(todo), team(threads) {}

    void lead() {
        if (taken.exchange(true)) return;
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

void run_on_teams(int threads, const std::vector<std::function<void()>>& bodies) {
    if (led != nullptr) {
        for (const auto& body : bodies) body();
        return;
    }
    threads = std::max(threads, 1);
    std::deque<Session> sessions;
    for (const auto& body : bodies) sessions.emplace_back(threads, body);
    // Each thread leads what nobody leads yet, beginning with its own, and then helps those that are not done.
    const auto take_part = [&sessions](std::int64_t thread) {
        const auto count = static_cast<std::int64_t>(sessions.size());
        for (std::int64_t i = 0; i < count; ++i) sessions[static_cast<std::size_t>((thread + i) % count)].lead();
        for (Session& session : sessions) session.team.help();
    };
    if (threads == 1)
        take_part(0);
    else
        run_tasks(threads, take_part);
    for (const auto& session : sessions) session.failure.rethrow();
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
