// Kernels broken on purpose, to see what finds it: one synchronisation of the source is left out, or a wait looks for the
// wrong parity.
#include <string.h>

#include <map>

#include "machine.h"

namespace emulator {
namespace {

struct Fault {
  std::string file;
  int line = 0;  // 0: none
  bool inverts = false;
} fault;
std::map<std::pair<std::string, int>, std::string> seen;  // places of synchronisation -> operation

bool is_here(Place place) { return fault.line == place.line && fault.file == file_name(place); }

}  // namespace

const char* file_name(Place place) {
  const char* slash = strrchr(place.file, '/');
  return slash ? slash + 1 : place.file;
}

bool dropped(const char* operation, Place place) {
  static thread_local Place last = {"", 0};
  if (last.line != place.line || last.file != place.file) {
    seen.emplace(std::make_pair(file_name(place), place.line), operation);
    last = place;
  }
  return !fault.inverts && is_here(place);
}

bool inverted(Place place) { return fault.inverts && is_here(place); }

}  // namespace emulator

// For ctypes. `place` is "file:line" of what to leave out, "!file:line" of a wait whose parity to invert, or empty.
extern "C" void emulator_break(const char* place) {
  emulator::fault = {};
  emulator::fault.inverts = place[0] == '!';
  const std::string text = place + emulator::fault.inverts;
  const size_t colon = text.find(':');
  if (colon == std::string::npos) return;
  emulator::fault.file = text.substr(0, colon);
  emulator::fault.line = std::stoi(text.substr(colon + 1));
}

// The synchronisations that runs have come by since the last call, as lines "file:line operation".
extern "C" const char* emulator_synchronisations() {
  static std::string text;
  text.clear();
  for (const auto& [place, operation] : emulator::seen) {
    text += place.first + ":" + std::to_string(place.second) + " " + operation + "\n";
  }
  emulator::seen.clear();
  return text.c_str();
}
