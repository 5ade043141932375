// Stacks to run many threads of a kernel on one: a switch saves the callee-saved registers and nothing else, since the
// C library's swapcontext makes a system call for the signal mask each time.
#pragma once

#include <cstddef>

namespace effkern::test::simt {

class Fiber {
 public:
  Fiber();  // a stack with an untouchable page below it
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)());  // runs at the next switch to this fiber; entry must not return

  // The place a switch from `from` continues when someone switches back; `last` says that no one ever will.
  static void change(Fiber& from, Fiber& to, bool last = false);

 private:
  friend class HostFiber;
  struct OnHost {};
  explicit Fiber(OnHost) {}
  void* sp_ = nullptr;
  char* memory_ = nullptr;  // the guard page, then the stack
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;  // of the address sanitizer
};

// The stack the program itself runs on.
class HostFiber : public Fiber {
 public:
  HostFiber() : Fiber(OnHost{}) {}
};

}  // namespace effkern::test::simt
