// What a thread knows of others: how far each had come when this one last synchronised with it, directly or through
// third ones (vector clocks; an access that the other's clock does not cover is a race).
#ifndef EMULATOR_CLOCKS_H_
#define EMULATOR_CLOCKS_H_

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace emulator {

// Of the agents of one CTA: its threads, a tensor core for each warp, and copies in flight.
using Epochs = std::vector<uint32_t>;

inline void join(Epochs& mine, const Epochs& other) {
  if (mine.size() < other.size()) mine.resize(other.size());
  uint32_t* to = mine.data();
  const uint32_t* from = other.data();
  for (size_t i = 0; i < other.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// Own CTA first; others only once something was heard of them.
struct Clock {
  Epochs own;
  std::vector<std::shared_ptr<const Epochs>> others;  // by CTA; nullptr: nothing

  void join_other(size_t cta, const std::shared_ptr<const Epochs>& epochs) {
    if (epochs == nullptr) return;
    if (others.size() <= cta) others.resize(cta + 1);
    auto& mine = others[cta];
    if (mine == epochs) return;
    if (mine == nullptr) {
      mine = epochs;
      return;
    }
    auto both = std::make_shared<Epochs>(*mine);
    join(*both, *epochs);
    mine = both;
  }
  void join_with(const Clock& other) {
    join(own, other.own);
    for (size_t cta = 0; cta < other.others.size(); ++cta) join_other(cta, other.others[cta]);
  }
  void clear() {
    own.clear();
    others.clear();
  }
};

// One access: by whom, when, and the line of the source it followed.
struct Access {
  uint32_t epoch = 0;  // 0: none
  uint16_t agent = 0;
  uint16_t place = 0;
};

}  // namespace emulator

#endif  // EMULATOR_CLOCKS_H_
