// Memory of the simulated device. Every access goes through Memory::read or ::write, since the kernels' pointer types
// (device.h) cannot be dereferenced: so bounds, alignment, permissions, initialization and races are checked at every
// access, by construction and not by instrumentation.
//
// Races: happens-before with vector clocks, as in FastTrack (Flanagan and Freund, PLDI 2009). A thread's epoch grows at
// every synchronization; a byte remembers the epoch of its last write and of the reads since; an access that does not
// happen after those it conflicts with is a race, whatever the schedule did. Against the thread sanitizer with a fiber
// a thread this (a) forgets no access (the sanitizer keeps four a word), (b) knows asynchronous copies: the destination
// belongs to the copy from issue to wait, also for the thread that issued it, (c) knows that shuffles, votes, ldmatrix
// and mma order no memory, and (d) is cheap enough to be on in every run under every schedule. Accesses that bypass the
// vocabulary would escape it, but do not compile. Only one launch at a time is in the clocks: launches of a stream are
// ordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "report.h"

namespace effkern::test::simt {

struct Thread;

enum Permission : uint8_t { kReadable = 1, kWritable = 2, kDefined = 4 };

class Memory {
 public:
  // `granule`: the smallest access a kernel may make, and what races are told apart by.
  Memory(std::string name, size_t bytes, uint8_t permissions, size_t granule = 2);
  // Memory of someone else, all of it defined and permitted.
  Memory(std::string name, char* data, size_t bytes, size_t granule);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  void permit(size_t offset, size_t bytes, uint8_t permissions);
  void poison();  // all bits one: a NaN in every floating type; nothing is defined any more
  int stores(size_t offset) const { return stores_[offset]; }  // to this byte since the last poison, at most 255

  void read(int64_t offset, size_t bytes, void* to, const Site& site);
  void write(int64_t offset, size_t bytes, const void* from, const Site& site);
  int32_t add(int64_t offset, int32_t value, const Site& site);  // relaxed atomic; returns what was there

  // An asynchronous copy of 16 bytes to here: issued, then landed by the wait.
  void issue(int64_t offset, const Site& site);
  void land(int64_t offset, const Memory* source, int64_t from, size_t bytes, const Site& site);
  // Checks a read without making it, with nothing recorded.
  void probe(int64_t offset, size_t bytes, size_t align, const Site& site, uint8_t permission = kReadable) const;

 private:
  struct Access {
    uint32_t thread = 0;  // block * 1024 + thread + 1; 0: none yet
    uint32_t epoch = 0;
    Site site;
    bool atomic = false;
  };
  struct Cell {
    Access write, read;
    std::unique_ptr<std::vector<Access>> more;  // concurrent reads besides `read`
  };

  bool before(const Access& access, const Thread& thread) const;
  void note_read(size_t offset, size_t bytes, const Site& site);
  void note_write(size_t offset, size_t bytes, const Site& site, bool atomic, bool in_flight);
  [[noreturn]] void conflict(const char* now, const char* then, const Access& access, size_t offset,
                             const Site& site) const;
  void refresh();
  std::string where(int64_t offset, size_t bytes) const;

  std::string name_;
  size_t size_, granule_;
  bool own_ = true;
  char* data_;
  std::vector<uint8_t> flags_, stores_;
  std::vector<Cell> cells_;
  uint64_t launch_ = 0;
  bool writable_ = false;  // memory no one may write has no races
};

// What a pointer points into; defined where there is a runtime (csrc/tests/runtime).
Memory* memory_at(const void* data);

}  // namespace effkern::test::simt
