// SPDX-License-Identifier: Apache-2.0
// The thread pool as kernels see it: who owns the threads is the caller's business.
#pragma once

#include <stdint.h>

namespace sparsebwd {

// Runs task numbers 0 .. tasks - 1. Which thread runs a task, and in which order, is not
// specified, so a task must not depend on another. `worker` < threads is unique among the tasks
// that run at the same time: it picks a private workspace.
using TaskBody = void (*)(void* context, int64_t task, int worker);

struct TaskPool {
  int threads;
  void (*run)(int threads, int64_t tasks, TaskBody body, void* context);
};

// pool.run for a callable (int64_t task, int worker); it must not throw.
template <class Body>
static inline void parallel_tasks(const TaskPool& pool, int64_t tasks, Body&& body) {
  pool.run(
      pool.threads, tasks,
      [](void* context, int64_t task, int worker) {
        (*static_cast<decltype(&body)>(context))(task, worker);
      },
      &body);
}

}  // namespace sparsebwd
