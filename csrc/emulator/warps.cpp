// SPDX-License-Identifier: Apache-2.0
// Warp intrinsics: threads of a warp meet, and the last to come computes for all.
#include <algorithm>

#include "fibres.h"

namespace sparsebwd::cuda::emulator {

namespace {

// The lane whose value a shuffle returns.
int source_lane(WarpCall call, int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  switch (call) {
    case WarpCall::kShuffle: return first + (argument & (width - 1));
    case WarpCall::kShuffleUp: {
      const auto delta = static_cast<unsigned>(argument);
      return delta > static_cast<unsigned>(lane - first) ? lane : lane - argument;
    }
    case WarpCall::kShuffleDown: {
      const auto delta = static_cast<unsigned>(argument);
      return delta > static_cast<unsigned>(last - lane) ? lane : lane + argument;
    }
    default: {
      const int other = lane ^ argument;
      return other > last || other < 0 ? lane : other;
    }
  }
}

void shuffle(Warp& warp, uint32_t mask, WarpCall call) {
  uint64_t values[32];
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) values[lane] = warp.lanes[lane]->exchange.value;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Lane& mine = warp.lanes[lane]->exchange;
    const int source = source_lane(call, lane, mine.argument, mine.width);
    if (!(mask >> source & 1)) {
      activate(warp.lanes[lane]);
      fail("%s with mask %s at %s reads lane %d, which is not in the mask", name_of(call),
           hex(mask).c_str(), where(warp.lanes[lane]->site).c_str(), source);
    }
    mine.value = values[source];
  }
}

uint64_t reduce(WarpCall call, uint64_t a, uint64_t b) {
  const auto x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
  const auto sx = static_cast<int32_t>(x), sy = static_cast<int32_t>(y);
  switch (call) {
    case WarpCall::kAddUnsigned: return x + y;
    case WarpCall::kMinUnsigned: return std::min(x, y);
    case WarpCall::kMaxUnsigned: return std::max(x, y);
    case WarpCall::kMinSigned: return static_cast<uint32_t>(std::min(sx, sy));
    case WarpCall::kMaxSigned: return static_cast<uint32_t>(std::max(sx, sy));
    case WarpCall::kAnd: return x & y;
    case WarpCall::kOr: return x | y;
    default: return x ^ y;
  }
}

void finish(Warp& warp, uint32_t mask, WarpCall call) {
  const auto each = [&](auto&& f) {
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) f(warp.lanes[lane]->exchange, lane);
  };
  switch (call) {
    case WarpCall::kSync: break;
    case WarpCall::kShuffle:
    case WarpCall::kShuffleUp:
    case WarpCall::kShuffleDown:
    case WarpCall::kShuffleXor: shuffle(warp, mask, call); break;
    case WarpCall::kBallot: {
      uint32_t votes = 0;
      each([&](Lane& lane, int i) { votes |= (lane.value ? 1u : 0u) << i; });
      each([&](Lane& lane, int) { lane.value = votes; });
      break;
    }
    case WarpCall::kMatchAny:
    case WarpCall::kMatchAll: {
      uint64_t values[32];
      each([&](Lane& lane, int i) { values[i] = lane.value; });
      each([&](Lane& lane, int i) {
        uint32_t same = 0;
        each([&](Lane&, int j) { same |= (values[i] == values[j] ? 1u : 0u) << j; });
        lane.value = call == WarpCall::kMatchAny || same == mask ? same : 0;
      });
      break;
    }
    default: {
      const uint64_t* first = nullptr;
      uint64_t total = 0;
      each([&](Lane& lane, int) {
        total = first ? reduce(call, total, lane.value) : lane.value;
        first = &lane.value;
      });
      each([&](Lane& lane, int) { lane.value = total; });
    }
  }
}

}  // namespace

uint64_t warp_call(WarpCall call, uint32_t mask, Lane lane, Site site) {
  Fibre* self = state.current;
  Warp& warp = *self->warp;
  const auto complain = [&](const char* what) {
    fail("%s with mask %s at %s: %s", name_of(call), hex(mask).c_str(), where(site).c_str(), what);
  };
  if (!(mask >> self->lane & 1)) complain("the mask lacks the lane that calls");
  if (mask & ~warp.alive)
    complain("the mask names lanes that have returned or that the block does not have");
  if (lane.width < 1 || lane.width > 32 || (lane.width & (lane.width - 1)) != 0)
    complain("the width is not a power of two up to 32");

  Warp::Meeting* meeting = nullptr;
  for (int i = 0; i < warp.open; ++i) {
    Warp::Meeting& other = warp.meetings[i];
    if (other.mask == mask && other.call == call) {
      meeting = &other;
    } else if ((other.mask >> self->lane & 1) && (other.arrived & mask)) {
      complain(("waits for lanes that wait for it in " + std::string(name_of(other.call)) +
                " with mask " + hex(other.mask))
                   .c_str());
    }
  }
  if (!meeting) {
    meeting = &warp.meetings[warp.open++];
    *meeting = {mask, 0, call};
  }
  meeting->arrived |= 1u << self->lane;
  self->call = call;
  self->mask = mask;
  self->exchange = lane;
  self->site = site;
  if (meeting->arrived == mask) {
    *meeting = warp.meetings[--warp.open];
    finish(warp, mask, call);
    static std::vector<Fibre*>
        members;  // not of a frame, which a failure would leave without return
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) members.push_back(warp.lanes[i]);
    make_ready(members);
  }
  wait_for(Wait::kWarp, site);
  return self->exchange.value;
}

}  // namespace sparsebwd::cuda::emulator
