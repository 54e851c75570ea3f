// Work that is shared out among threads, and where those wait for each other.
//
// Not OpenMP's, which sleep as soon as the process has more threads than processors, as it has once two Python threads have
// computed: waking one takes as long as a product.

#pragma once
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// Waits until `over()`, for as long as that may take or so many turns: awake, but it gives way to who needs the processor.
template <class Over>
bool wait_awake(Over over, long turns = -1) {
    constexpr int PATIENCE = 20000;  // tens of microseconds
    for (int i = 0; i < PATIENCE; i++)
        if (over()) return true;
    for (; turns != 0; turns--) {
        if (over()) return true;
        std::this_thread::yield();
    }
    return false;
}

class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const int phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
        } else {
            wait_awake([&] { return phase_.load(std::memory_order_acquire) != phase; });
        }
    }

private:
    const int threads_;
    std::atomic<int> arrived_{0}, phase_{0};
};

// The threads that help one other. After a piece of work they stay awake for some milliseconds: the next is often near.
class Helpers {
public:
    ~Helpers() {
        {
            std::lock_guard<std::mutex> held(lock_);
            ended_ = true;
        }
        call();
        for (std::thread& each : threads_) each.join();
    }

    // work(part) for each part from 0 to parts - 1, all at once; part 0 by who calls.
    template <class Work>
    void share(int parts, const Work& work) {
        while (int(threads_.size()) < parts - 1) threads_.emplace_back([this, part = int(threads_.size()) + 1, seen = turn_.load()] { help(part, seen); });
        work_ = &work, parts_ = parts;
        run_ = [](const void* given, int part) { (*static_cast<const Work*>(given))(part); };
        left_.store(threads_.size(), std::memory_order_relaxed);
        call();
        work(0);
        wait_awake([&] { return left_.load(std::memory_order_acquire) == 0; });
    }

private:
    static constexpr long STAY = 5000;  // turns that a helper waits awake
    std::vector<std::thread> threads_;
    std::atomic<long> turn_{0};
    std::atomic<int> left_{0}, asleep_{0};
    std::mutex lock_;
    std::condition_variable called_;
    bool ended_ = false;
    const void* work_ = nullptr;
    void (*run_)(const void*, int) = nullptr;
    int parts_ = 0;

    void call() {
        turn_++;
        if (asleep_ == 0) return;  // who falls asleep from now on looks at turn_ first
        std::lock_guard<std::mutex> held(lock_);
        called_.notify_all();
    }

    void help(int part, long seen) {
        for (;; seen++) {
            if (!wait_awake([&] { return turn_ != seen; }, STAY)) {
                std::unique_lock<std::mutex> held(lock_);
                asleep_++;
                called_.wait(held, [&] { return turn_ != seen; });
                asleep_--;
            }
            if (ended_) return;
            if (part < parts_) run_(work_, part);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }
};

// The helpers of one thread, which end with it. A process that was forked has none of the threads that stand here: there is
// nothing to be ended then.
struct Mine {
    Helpers* helpers = nullptr;
    pid_t process = 0;
    Helpers& get() {
        if (process != getpid()) helpers = new Helpers, process = getpid();
        return *helpers;
    }
    ~Mine() {
        if (process == getpid()) delete helpers;
    }
};

// work(part) for each part from 0 to parts - 1, all at once.
template <class Work>
void in_parallel(int parts, const Work& work) {
    thread_local Mine mine;
    if (parts <= 1) work(0);
    else mine.get().share(parts, work);
}

}  // namespace
