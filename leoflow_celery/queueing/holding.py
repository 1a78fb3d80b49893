"""How a worker takes messages from Redis: what Redis accepted is in a queue or held, at every moment.

A message that a worker took is an entry of kombu's own hash ``unacked`` and of its index ``unacked_index``, so tools
that know kombu read them. What is ours is how it comes there and back (ADR 23):

- **Taking** is one script, which moves messages from the queues into ``unacked``, several at once, and acknowledges
  those that are done.
- **Waiting** on an empty queue is BLMOVE into a list of the worker's own, a *landing*: Redis has no command that blocks
  on a queue and leaves the message there. The next script moves it on into ``unacked``.
- **Holding** is a lease by Redis's clock: the score of a held message lies so far back that it comes due when its
  worker has not renewed it for ``hold_seconds``. The scores mean to a kombu worker what they always meant.
- **Putting back** what came due takes no lock: who finds it pushes its score some seconds ahead, and puts it back if
  the score is still the same. A process that dies in between costs those seconds.

Each script begins with a write that changes nothing. Redis checks its memory before the first write of a script only,
and what follows frees as much as it takes: a full Redis still hands out messages.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: A lease has three renewals.
RENEWALS_PER_LEASE = 3
#: How long a landing whose worker was silent is still looked into: it may have been stopped while a BLMOVE ran.
_ABANDONED_SECONDS = 3_600
#: Who puts a message back has so long until somebody else does.
_PUT_BACK_SECONDS = 10
#: Of one take: a worker that holds many large messages is slower than one that comes again.
_MAX_BYTES_AT_ONCE = 1_048_576

UNACKED, INDEX = "unacked", "unacked_index"
LANDINGS, ABANDONED = "landings", "landings.abandoned"

_NOW = """
redis.call('HDEL', KEYS[1], '')
local time = redis.call('TIME')
local now = tonumber(time[1]) + math.floor(tonumber(time[2]) / 1000) / 1000
"""

#: KEYS: unacked, index, landings, the queues, the landings of each.
#: ARGV: the member of ``landings``, seconds of a lease, visibility timeout, register, renew, wanted, tag base, max
#: bytes, number of queues, the ends of the queues' entries; then counted lists: done, landed (place, tag), held.
#: Answers: lapsed, empty, wrong keys, then tag, place and message of each one taken.
SYNC = (
    _NOW
    + """
local n = tonumber(ARGV[9])
local score = now + tonumber(ARGV[2]) - tonumber(ARGV[3])
local at = 10 + n
local function list()
  local count = tonumber(ARGV[at])
  local found = {}
  for i = 1, count do found[i] = ARGV[at + i] end
  at = at + count + 1
  return found
end
local done, landed, held = list(), list(), list()
local function forget()
  for _, tag in ipairs(done) do
    redis.call('HDEL', KEYS[1], tag)
    redis.call('ZREM', KEYS[2], tag)
  end
end
if ARGV[4] == '0' and not redis.call('ZSCORE', KEYS[3], ARGV[1]) then
  forget()
  return {1, 0, {}}
end
local function hold(tag, place, raw)
  redis.call('HSET', KEYS[1], tag, '[' .. raw .. ARGV[9 + place])
  redis.call('ZADD', KEYS[2], score, tag)
end
for i = 1, #landed, 2 do
  local place = tonumber(landed[i])
  local raw = redis.call('RPOP', KEYS[3 + n + place])
  if raw then
    if landed[i + 1] == '' then redis.call('RPUSH', KEYS[3 + place], raw) else hold(landed[i + 1], place, raw) end
  end
end
forget() -- after what landed: it may be done already
if ARGV[5] == '1' then
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[2]), ARGV[1])
  for _, tag in ipairs(held) do redis.call('ZADD', KEYS[2], 'XX', score, tag) end
end
local answer, wanted, bytes, wrong, taken = {0, 0, {}}, tonumber(ARGV[6]), 0, {}, 0
for place = 1, n do
  while taken < wanted and bytes < tonumber(ARGV[8]) do
    local raw = redis.pcall('RPOP', KEYS[3 + place])
    if type(raw) == 'table' then
      wrong[#wrong + 1] = place
      break
    end
    if not raw then break end
    taken = taken + 1
    local tag = ARGV[7] .. taken
    hold(tag, place, raw)
    bytes = bytes + #raw
    answer[#answer + 1] = tag
    answer[#answer + 1] = place
    answer[#answer + 1] = raw
  end
end
if taken < wanted and bytes < tonumber(ARGV[8]) then answer[2] = 1 end
answer[3] = wrong
return answer
"""
)

#: KEYS: unacked, index, landings, abandoned landings. ARGV: visibility timeout, seconds to put one back, how many at
#: once, seconds that an abandoned landing is looked into. Answers tag, score and entry of each message that is due.
DUE = (
    _NOW
    + """
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 20)) do
  redis.call('ZREM', KEYS[3], member)
  redis.call('ZADD', KEYS[4], now + tonumber(ARGV[4]), member)
end
for _, member in ipairs(redis.call('ZRANGE', KEYS[4], 0, 49)) do
  local landing = nil
  for part in string.gmatch(member, '[^\\n]+') do
    if not landing then landing = part else
      while true do
        local raw = redis.pcall('RPOP', landing .. ':' .. part)
        if type(raw) ~= 'string' then break end
        redis.call('RPUSH', part, raw)
      end
    end
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now)
local ceiling, answer = now - tonumber(ARGV[1]), {}
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ceiling, 'LIMIT', 0, ARGV[3])) do
  local entry = redis.call('HGET', KEYS[1], tag)
  if entry then
    redis.call('ZADD', KEYS[2], ceiling + tonumber(ARGV[2]), tag)
    answer[#answer + 1] = tag
    answer[#answer + 1] = redis.call('ZSCORE', KEYS[2], tag)
    answer[#answer + 1] = entry
  else
    redis.call('ZREM', KEYS[2], tag)
  end
end
return answer
"""
)

#: KEYS: unacked, index, and the queue unless the message is only to go. ARGV: tag, score that it must have ('': any),
#: message. Answers whether this call did it.
PUT_BACK = """
if ARGV[2] ~= '' and redis.call('ZSCORE', KEYS[2], ARGV[1]) ~= ARGV[2] then return 0 end
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
if KEYS[3] then redis.call('RPUSH', KEYS[3], ARGV[3]) end
return 1
"""

#: KEYS as of SYNC. ARGV: the member of ``landings``, seconds. The worker ends: its landings go back to their queues.
LEAVE = (
    _NOW
    + """
local n = (#KEYS - 4) / 2
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[#KEYS], now + tonumber(ARGV[2]), ARGV[1])
for place = 1, n do
  while true do
    local raw = redis.pcall('RPOP', KEYS[3 + n + place])
    if type(raw) ~= 'string' then break end
    redis.call('RPUSH', KEYS[3 + place], raw)
  end
end
return 1
"""
)


@dataclass(frozen=True)
class Landing:
    """Where the messages of some queues land that come while a worker waits. Every name is a whole key."""

    prefix: str
    queues: tuple[str, ...]
    keys: tuple[str, ...]
    endings: tuple[str, ...]

    @classmethod
    def of(cls, prefix: str, places: Sequence[tuple[str, str, str]]) -> Landing:
        """``places`` are the lists of queues, first served first: key, name and the end of an entry of ``unacked``."""
        name = f"{prefix}landing.{uuid.uuid4().hex}"
        queues = tuple(f"{prefix}{key}" for key, _, _ in places)
        return cls(prefix, queues, tuple(f"{name}:{queue}" for queue in queues), tuple(end for _, _, end in places))

    @property
    def member(self) -> str:
        """What ``landings`` calls it: whoever reads that can empty it."""
        name = self.keys[0].removesuffix(f":{self.queues[0]}")
        return "\n".join((name, *self.queues))

    def sync(
        self,
        *,
        lease_seconds: float,
        visibility_seconds: float,
        register: bool,
        wanted: int,
        tag_base: str,
        done: Sequence[str],
        landed: Iterable[tuple[int, str]],
        renewed: Sequence[str] | None,
    ) -> list[Any]:
        """The command that does all of it."""
        pairs = [text for place, tag in landed for text in (place, tag)]
        held = renewed or ()
        keys = [f"{self.prefix}{key}" for key in (UNACKED, INDEX, LANDINGS)]
        return [
            *(3 + 2 * len(self.queues), *keys, *self.queues, *self.keys),
            *(self.member, lease_seconds, visibility_seconds, int(register), int(renewed is not None), wanted),
            *(tag_base, _MAX_BYTES_AT_ONCE, len(self.queues), *self.endings),
            *(len(done), *done, len(pairs), *pairs, len(held), *held),
        ]

    def leave(self) -> list[Any]:
        """The command of a worker that ends."""
        keys = [f"{self.prefix}{key}" for key in (UNACKED, INDEX, LANDINGS)]
        all_keys = [*keys, *self.queues, *self.keys, f"{self.prefix}{ABANDONED}"]
        return [len(all_keys), *all_keys, self.member, _ABANDONED_SECONDS]


def due(prefix: str, visibility_seconds: float, limit: int) -> list[Any]:
    """The command that finds what came due."""
    keys = [f"{prefix}{key}" for key in (UNACKED, INDEX, LANDINGS, ABANDONED)]
    return [4, *keys, visibility_seconds, _PUT_BACK_SECONDS, limit, _ABANDONED_SECONDS]
