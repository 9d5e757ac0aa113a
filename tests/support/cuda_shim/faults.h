// While a kernel runs, this thread's faults (its stack, undefined behaviour, running too long) end the kernel with a
// message instead of the process. Faults of other threads go where they went before.
#pragma once

#include <signal.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdint>
#include <cstring>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#include "memory.h"

// An instruction as " [library+0x12]", which the Python side turns into a source line.
struct Text { char text[200]; };
inline Text instruction(uintptr_t address) {
  Text out = {""};
  Dl_info found;
  if (dladdr((void*)address, &found) && found.dli_fname)
    snprintf(out.text, sizeof out.text, " [%s+%#zx]", found.dli_fname, (size_t)(address - (uintptr_t)found.dli_fbase));
  return out;
}

class Faults {
 public:
  using Report = void (*)(const char*);

  Faults(double limit_s, Report report_fault) {
    report = report_fault;
    owner = (pid_t)syscall(SYS_gettid);
    static unsigned char* const stack = new unsigned char[STACK];  // a fiber's own stack may be what overflowed
    stack_t const alternate = {stack, 0, STACK};
    sigaltstack(&alternate, &old_stack);
    for (int i = 0; i < N; ++i) {
      struct sigaction action = {};
      action.sa_sigaction = handle;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler never returns: nothing may stay blocked
      sigaction(SIGNALS[i], &action, &before[i]);
    }
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event.sigev_notify_thread_id = owner;
    timed = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    itimerspec when = {};
    when.it_value.tv_sec = (time_t)limit_s;
    when.it_value.tv_nsec = (long)((limit_s - (double)(time_t)limit_s) * 1e9);
    if (timed) timer_settime(timer, 0, &when, nullptr);
  }

  ~Faults() {
    if (timed) timer_delete(timer);
    for (int i = 0; i < N; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }

  Faults(const Faults&) = delete;

 private:
  static constexpr int N = 5;
  static constexpr size_t STACK = 64 << 10;
  static constexpr int SIGNALS[N] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
  static inline Report report;
  static inline pid_t owner;
  static inline struct sigaction before[N];
  stack_t old_stack;
  timer_t timer;
  bool timed;

  static void handle(int signal, siginfo_t* info, void* context) {
    if ((pid_t)syscall(SYS_gettid) != owner) return forward(signal, info, context);
    char text[512], where[256];
    if (signal == SIGSEGV || signal == SIGBUS) {
      cuda_shim_describe(info->si_addr, where, sizeof where);
      if (info->si_code == SI_KERNEL) snprintf(where, sizeof where, "a misaligned or non-canonical address");
      snprintf(text, sizeof text, "illegal memory access: %s%s", where, at(context).text);
    } else if (signal == SIGVTALRM) {
      snprintf(text, sizeof text, "ran longer than the time limit%s", at(context).text);
    } else {
      snprintf(text, sizeof text, "undefined behaviour (misaligned, overflowing or shifted too far)%s", at(context).text);
    }
    report(text);
  }

  static Text at(void* context) {
#if defined(__x86_64__)
    return instruction((uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP]);
#else
    (void)context;
    return {""};
#endif
  }

  static void forward(int signal, siginfo_t* info, void* context) {
    for (int i = 0; i < N; ++i) {
      if (SIGNALS[i] != signal) continue;
      if (before[i].sa_flags & SA_SIGINFO) return before[i].sa_sigaction(signal, info, context);
      if (before[i].sa_handler != SIG_DFL && before[i].sa_handler != SIG_IGN) return before[i].sa_handler(signal);
      sigaction(signal, &before[i], nullptr);  // the default action, when the instruction is tried again
    }
  }
};
