// Work that is shared out among threads, and where those wait for each other.
//
// Not OpenMP's, which sleep as soon as the process has more threads than processors, as it has once two Python threads have
// computed: waking one takes as long as a product.

#pragma once
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
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

// Work that is done in parts, and how many of them others have not done yet.
struct Job {
    void (*run)(const void* work, int part);
    const void* work;
    std::atomic<int> left;
};

// A thread that does its part of a job when it is called. After that it stays awake for some milliseconds: the next is often near.
class Helper {
public:
    Helper() : thread_([this] { live(); }) {}
    ~Helper() {
        call(nullptr, 0);
        thread_.join();
    }
    void call(Job* job, int part) {
        job_ = job, part_ = part;
        turn_++;
        if (!asleep_) return;  // who falls asleep from now on looks at turn_ first
        std::lock_guard<std::mutex> held(lock_);
        called_.notify_one();
    }

private:
    static constexpr long STAY = 5000;  // turns
    Job* job_ = nullptr;
    int part_ = 0;
    std::atomic<long> turn_{0};
    std::atomic<bool> asleep_{false};
    std::mutex lock_;
    std::condition_variable called_;
    std::thread thread_;  // the last to be made, since it uses the others

    void live() {
        for (long seen = 0;; seen++) {
            const auto called = [&] { return turn_ != seen; };
            if (!wait_awake(called, STAY)) {
                std::unique_lock<std::mutex> held(lock_);
                asleep_ = true;
                called_.wait(held, called);
                asleep_ = false;
            }
            if (!job_) return;
            job_->run(job_->work, part_);
            job_->left.fetch_sub(1, std::memory_order_release);  // from here on it may be gone
        }
    }
};

// The helpers of one thread, which end with it. A process that was forked has none of the threads that stand here: there is
// nothing to be ended then.
class Mine {
public:
    std::vector<std::unique_ptr<Helper>>& helpers() {
        if (process_ != getpid()) found_ = new std::vector<std::unique_ptr<Helper>>, process_ = getpid();
        return *found_;
    }
    ~Mine() {
        if (process_ == getpid()) delete found_;
    }

private:
    std::vector<std::unique_ptr<Helper>>* found_ = nullptr;
    pid_t process_ = 0;
};

inline Mine& mine() {
    thread_local Mine found;
    return found;
}

// work(part) for each part from 0 to parts - 1, all at once.
template <class Work>
void in_parallel(int parts, const Work& work) {
    if (parts <= 1) return work(0);
    std::vector<std::unique_ptr<Helper>>& helpers = mine().helpers();
    while (int(helpers.size()) < parts - 1) helpers.push_back(std::make_unique<Helper>());
    Job job = {[](const void* given, int part) { (*static_cast<const Work*>(given))(part); }, &work, {parts - 1}};
    for (int part = 1; part < parts; part++) helpers[part - 1]->call(&job, part);
    work(0);
    wait_awake([&] { return job.left.load(std::memory_order_acquire) == 0; });
}

}  // namespace
