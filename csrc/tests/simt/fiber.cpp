#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the harness switches stacks on x86-64 only"
#endif

// void effkern_simt_switch(void** save, void* to): System V ABI, callee-saved registers on the stack.
asm(R"(
.text
.globl effkern_simt_switch
.type effkern_simt_switch, @function
effkern_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effkern_simt_switch, .-effkern_simt_switch
)");
extern "C" void effkern_simt_switch(void** save, void* to);

namespace effkern::test::simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
const void** host_bottom = nullptr;
size_t* host_size = nullptr;
#else
constexpr size_t kStack = 128 << 10;
#endif

void (*first)() = nullptr;

// A new fiber begins here: the sanitizer must hear of the switch before anything else runs on the stack.
void begin() {
#if defined(__SANITIZE_ADDRESS__)
  const void* from = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &size);
  if (host_bottom != nullptr && *host_bottom == nullptr) *host_bottom = from, *host_size = size;
#endif
  first();
  std::abort();
}

}  // namespace

Fiber::Fiber() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  memory_ = static_cast<char*>(
      mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory_ == MAP_FAILED || mprotect(memory_, page, PROT_NONE) != 0) {
    std::perror("stack of a fiber");
    std::abort();
  }
  bottom_ = memory_ + page;
  size_ = kStack;
}

Fiber::~Fiber() {
  if (memory_ != nullptr) munmap(memory_, kStack + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
}

void Fiber::start(void (*entry)()) {
  first = entry;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);  // a fault leaves frames behind
#endif
  fake_stack_ = nullptr;
  auto* top = reinterpret_cast<uint64_t*>(memory_ + (static_cast<const char*>(bottom_) - memory_) + size_);
  *--top = 0;  // keeps the stack 16-byte aligned at begin, and ends a debugger's walk
  *--top = reinterpret_cast<uint64_t>(&begin);
  for (int i = 0; i < 6; ++i) *--top = 0;
  sp_ = top;
}

void Fiber::change(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  if (from.memory_ == nullptr && from.bottom_ == nullptr) host_bottom = &from.bottom_, host_size = &from.size_;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.bottom_, to.size_);
#endif
  effkern_simt_switch(&from.sp_, to.sp_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace effkern::test::simt
