#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "block.h"

namespace effkern::test::simt {
namespace {

constexpr size_t kAlign = 256;  // what cudaMalloc promises

std::string thread_name(uint32_t global_id) {
  const uint32_t id = global_id - 1;
  return "block " + std::to_string(id / 1024) + " thread " + std::to_string(id % 1024);
}

}  // namespace

Memory::Memory(std::string name, size_t bytes, uint8_t permissions, size_t granule)
    : name_(std::move(name)),
      size_(bytes),
      granule_(granule),
      data_(static_cast<char*>(std::aligned_alloc(kAlign, (bytes + 2 * kAlign - 1) / kAlign * kAlign))),
      flags_(bytes),
      stores_(bytes) {
  permit(0, bytes, permissions);
  std::memset(data_, 0xff, bytes);
}

Memory::Memory(std::string name, char* data, size_t bytes, size_t granule)
    : name_(std::move(name)), size_(bytes), granule_(granule), own_(false), data_(data), flags_(bytes), stores_(bytes) {
  permit(0, bytes, kReadable | kWritable | kDefined);
}

Memory::~Memory() {
  if (own_) std::free(data_);
}

void Memory::permit(size_t offset, size_t bytes, uint8_t permissions) {
  std::fill_n(flags_.begin() + static_cast<int64_t>(offset), bytes, permissions);
  writable_ |= (permissions & kWritable) != 0;
}

void Memory::poison() {
  std::memset(data_, 0xff, size_);
  for (uint8_t& flag : flags_) flag &= static_cast<uint8_t>(~kDefined);
  std::fill(stores_.begin(), stores_.end(), 0);
  cells_.clear();
}

std::string Memory::where(int64_t offset, size_t bytes) const {
  return name_ + "[" + std::to_string(offset) + ", +" + std::to_string(bytes) + ") of " + std::to_string(size_) +
         " bytes";
}

void Memory::probe(int64_t offset, size_t bytes, size_t align, const Site& site, uint8_t permission) const {
  if (reinterpret_cast<uintptr_t>(data_ + offset) % align != 0)
    fault(Fault::Misaligned, where(offset, bytes) + " at " + place(site));
  if (bytes == 0) return;
  if (offset < 0 || offset > static_cast<int64_t>(size_) - static_cast<int64_t>(bytes))
    fault(Fault::OutOfBounds, where(offset, bytes) + " at " + place(site));
  if (bytes < granule_) fault(Fault::Misaligned, where(offset, bytes) + " is below the granule, at " + place(site));
  for (size_t i = 0; i < bytes; ++i) {
    const uint8_t flags = flags_[static_cast<size_t>(offset) + i];
    if ((flags & permission) == 0)
      fault(Fault::Forbidden,
            where(offset, bytes) + (permission == kReadable ? " read at " : " written at ") + place(site));
    if (permission == kReadable && (flags & kDefined) == 0)
      fault(Fault::Uninitialized, where(offset, bytes) + " read at " + place(site));
  }
}

void Memory::refresh() {
  if (launch_ == current_launch() && !cells_.empty()) return;
  launch_ = current_launch();
  cells_.clear();
  cells_.resize((size_ + granule_ - 1) / granule_);
}

bool Memory::before(const Access& access, const Thread& thread) const {
  if (access.thread == 0) return true;
  const uint32_t block = (access.thread - 1) / 1024, id = (access.thread - 1) % 1024;
  if (block != thread.block->index) return false;
  if (static_cast<int>(id) == thread.id) return access.epoch != kInFlightEpoch;
  return access.epoch <= (*thread.known)[id];
}

void Memory::conflict(const char* now, const char* then, const Access& access, size_t offset, const Site& site) const {
  const bool in_flight = access.epoch == kInFlightEpoch;
  fault(in_flight ? Fault::InFlight : Fault::Race,
        where(static_cast<int64_t>(offset), granule_) + ": " + now + " at " + place(site) + " and " +
            (in_flight ? "an asynchronous copy not waited for" : then) + " at " + place(access.site) + " by " +
            thread_name(access.thread));
}

void Memory::note_read(size_t offset, size_t bytes, const Site& site) {
  if (!writable_) return;
  refresh();
  const Thread& thread = *self;
  const Access now{thread.global_id(), thread.epoch, site, false};
  for (size_t i = offset / granule_; i <= (offset + bytes - 1) / granule_; ++i) {
    Cell& cell = cells_[i];
    if (!before(cell.write, thread)) conflict("read", "write", cell.write, i * granule_, site);
    // A read that happens before this one needs no keeping: what is ordered after this one is ordered after it too.
    if (before(cell.read, thread)) {
      cell.read = now;
    } else {
      if (!cell.more) cell.more = std::make_unique<std::vector<Access>>();
      const auto old =
          std::find_if(cell.more->begin(), cell.more->end(), [&](const Access& a) { return before(a, thread); });
      if (old != cell.more->end())
        *old = now;
      else
        cell.more->push_back(now);
    }
  }
}

void Memory::note_write(size_t offset, size_t bytes, const Site& site, bool atomic, bool in_flight) {
  refresh();
  const Thread& thread = *self;
  const Access now{thread.global_id(), in_flight ? kInFlightEpoch : thread.epoch, site, atomic};
  for (size_t i = offset / granule_; i <= (offset + bytes - 1) / granule_; ++i) {
    Cell& cell = cells_[i];
    if (!(atomic && cell.write.atomic) && !before(cell.write, thread))
      conflict("write", "write", cell.write, i * granule_, site);
    if (!before(cell.read, thread)) conflict("write", "read", cell.read, i * granule_, site);
    if (cell.more) {
      for (const Access& read : *cell.more)
        if (!before(read, thread)) conflict("write", "read", read, i * granule_, site);
      cell.more.reset();
    }
    cell.read = {};
    cell.write = now;
  }
}

void Memory::read(int64_t offset, size_t bytes, void* to, const Site& site) {
  probe(offset, bytes, bytes, site);
  note_read(static_cast<size_t>(offset), bytes, site);
  std::memcpy(to, data_ + offset, bytes);
}

void Memory::write(int64_t offset, size_t bytes, const void* from, const Site& site) {
  probe(offset, bytes, bytes, site, kWritable);
  note_write(static_cast<size_t>(offset), bytes, site, false, false);
  std::memcpy(data_ + offset, from, bytes);
  for (size_t i = static_cast<size_t>(offset); i < static_cast<size_t>(offset) + bytes; ++i) {
    flags_[i] |= kDefined;
    stores_[i] = static_cast<uint8_t>(std::min(255, stores_[i] + 1));
  }
}

int32_t Memory::add(int64_t offset, int32_t value, const Site& site) {
  probe(offset, 4, 4, site);
  probe(offset, 4, 4, site, kWritable);
  note_write(static_cast<size_t>(offset), 4, site, true, false);
  int32_t old = 0;
  std::memcpy(&old, data_ + offset, 4);
  const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(old) + static_cast<uint32_t>(value));
  std::memcpy(data_ + offset, &sum, 4);
  return old;
}

void Memory::issue(int64_t offset, const Site& site) {
  probe(offset, 16, 16, site, kWritable);
  note_write(static_cast<size_t>(offset), 16, site, false, true);
  // From now on the old bytes may be gone and the new ones not there yet: whoever looks must not like what it sees.
  std::memset(data_ + offset, 0xff, 16);
  for (size_t i = static_cast<size_t>(offset); i < static_cast<size_t>(offset) + 16; ++i) flags_[i] |= kDefined;
}

void Memory::land(int64_t offset, const Memory* source, int64_t from, size_t bytes, const Site& site) {
  if (bytes != 0) source->probe(from, bytes, 1, site);
  std::memset(data_ + offset, 0, 16);
  if (bytes != 0) std::memcpy(data_ + offset, source->data_ + from, bytes);
  for (size_t i = static_cast<size_t>(offset) / granule_; i < (static_cast<size_t>(offset) + 16) / granule_; ++i)
    if (cells_[i].write.thread == self->global_id()) cells_[i].write.epoch = self->epoch;
}

}  // namespace effkern::test::simt
