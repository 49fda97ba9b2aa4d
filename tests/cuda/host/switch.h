// A fiber's stack and the switch between two of them.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__) || defined(FLOWDPPO_HOST_UCONTEXT)
#include <ucontext.h>
#define FLOWDPPO_HOST_UCONTEXT_SWITCH
#endif

namespace flowdppo::host {

#if defined(FLOWDPPO_HOST_UCONTEXT_SWITCH)

struct Context {
  ucontext_t saved;
};

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#else

// swapcontext() asks the kernel for the signal mask each time, which takes longer than what runs between two switches.
struct Context {
  void* stack_pointer;
};

extern "C" void flowdppo_host_switch(void** from, void* to);

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  // popped: six registers, then the address that the switch returns to; above it no caller
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 8;
}

inline void switch_context(Context& from, Context& to) { flowdppo_host_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace flowdppo::host
