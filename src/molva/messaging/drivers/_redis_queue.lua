-- The functions of queues: what must happen at once or not at all. ``redis.py`` says why
-- they are built this way.
--
-- Every message has an offset, which is never used again: when it was stored, in units of ten
-- microseconds, or the next number where another has that. It stands in ``age``, and in
-- exactly one of ``ready`` (by rank: the smallest is taken first), ``held`` (by the end of its
-- lease) and ``delayed`` (by when it is ready). ``messages`` holds what was sent; ``turns``,
-- for what was ever held or delayed, how often it was handed over, how many attempts that
-- were, and its rank. Times are microseconds of the server's clock. ``wake`` is a list with something in it whenever something is ready: consumers that
-- wait block on it, and whoever takes the last of what is ready empties it.

-- Entries that one step of a loop looks at: few enough for Lua's stack, many enough for speed.
local STEP = 500

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function text(number)
  return string.format('%.0f', number)
end

local function turn_of(turns, offset)
  local found = redis.call('HGET', turns, offset)
  if not found then return 0, 0, nil end
  local turn, attempts, rank = string.match(found, '(%d+):(%-?%d+):(.+)')
  return tonumber(turn), tonumber(attempts), rank
end

local function note_turn(turns, offset, turn, attempts, rank)
  redis.call('HSET', turns, offset, turn .. ':' .. attempts .. ':' .. rank)
end

-- Return the last offset before those of so many new messages, and reserve these. Numbers run
-- ahead of the clock only while more than 100,000 a second are sent.
local function take_offsets(info, now, number)
  local last = tonumber(redis.call('HGET', info, 'last') or 0)
  last = math.max(last, math.floor(now / 10) - number)
  redis.call('HSET', info, 'last', text(last + number))
  return last
end

-- Return what orders a message among those that are ready. Exact: a score has 53 bits, and
-- offsets stay below 2^48 until the year 2059.
local function rank_of(discipline, offset, priority)
  if discipline == 'lifo' then return text(-offset) end
  if discipline == 'priority' then return text((9 - priority) * 281474976710656 + offset) end
  if discipline == 'random' then return text(math.random(0, 2147483646)) end
  return text(offset)
end

-- Redis keeps small sets and hashes in one piece of memory, where inserting walks over all of
-- it, until something long is inserted; and a batch that is taken begins with none. Keep
-- something long in them, which is no offset and is never due: taking is five times as fast.
local FILLER = '----------------------------------------------------------------------'

local function keep_indexed(turns, held)
  if not redis.call('ZSCORE', held, FILLER) then redis.call('ZADD', held, '+inf', FILLER) end
  redis.call('HSETNX', turns, FILLER, FILLER)
end

local function wake_one(wake)
  if redis.call('LLEN', wake) == 0 then redis.call('LPUSH', wake, '') end
end

local function promote(from, ready, turns, now)
  while true do
    local due = redis.call('ZRANGE', from, '-inf', text(now), 'BYSCORE', 'LIMIT', 0, STEP)
    if #due == 0 then return end
    local ranked = {}
    for _, offset in ipairs(due) do
      local _, _, rank = turn_of(turns, offset)
      ranked[#ranked + 1] = rank or offset
      ranked[#ranked + 1] = offset
    end
    redis.call('ZADD', ready, unpack(ranked))
    redis.call('ZREM', from, unpack(due))
  end
end

-- Make what is missing. Returns the discipline; nothing where there is no such queue.
-- keys: info; args: create, discipline
register('open', function(keys, args)
  local info = keys[1]
  if args[1] == '1' and redis.call('EXISTS', info) == 0 then
    redis.call('HSET', info, 'discipline', args[2], 'version', 1)
  end
  return redis.call('HGET', info, 'discipline')
end)

local function drop_oldest(keys, number)
  local info, messages, turns, age, ready, held, delayed = unpack(keys)
  local dropped, from = 0, 0
  while dropped < number do
    local page = redis.call('ZRANGE', age, from, from + STEP - 1)
    if #page == 0 then break end
    for _, offset in ipairs(page) do
      if dropped == number then break end
      if redis.call('ZSCORE', held, offset) then
        from = from + 1
      else
        redis.call('ZREM', age, offset)
        redis.call('ZREM', ready, offset)
        redis.call('ZREM', delayed, offset)
        redis.call('HDEL', messages, offset)
        redis.call('HDEL', turns, offset)
        dropped = dropped + 1
      end
    end
  end
  redis.call('HINCRBY', info, 'dropped', dropped)
  return dropped
end

-- Store messages. Returns how many fitted; -1 where there is no such queue.
-- keys: all; args: seed, capacity, drops oldest, then for each: priority, delay, message
register('send', function(keys, args)
  local info, messages, turns, age, ready, held, delayed, wake = unpack(keys)
  local discipline = redis.call('HGET', info, 'discipline')
  if not discipline then return -1 end
  math.randomseed(tonumber(args[1]))
  local fitting = (#args - 3) / 3
  if args[2] ~= '' then
    local capacity = tonumber(args[2])
    local room = capacity - redis.call('ZCARD', age)
    if args[3] == '1' and room < fitting then
      -- What is held is nobody's to drop, so a message may find no room all the same.
      room = room + drop_oldest(keys, math.min(fitting, capacity) - room)
    end
    fitting = math.max(0, math.min(fitting, room))
  end
  if fitting == 0 then return 0 end
  local now = now_us()
  local last = take_offsets(info, now, fitting)
  for i = 1, fitting do
    local offset = last + i
    local name = text(offset)
    local priority, delay, message = unpack(args, 1 + 3 * i, 3 + 3 * i)
    local rank = rank_of(discipline, offset, priority)
    redis.call('HSET', messages, name, message)
    redis.call('ZADD', age, name, name)
    if delay == '0' then
      redis.call('ZADD', ready, rank, name)
    else
      note_turn(turns, name, 0, 0, rank)
      redis.call('ZADD', delayed, text(now + delay), name)
    end
  end
  wake_one(wake)
  return fitting
end)

-- Take what is ready. Returns microseconds until more is (-1: nothing waits), then offset,
-- turn, attempt and message of each.
-- keys: all; args: limit, lease
register('take', function(keys, args)
  local info, messages, turns, age, ready, held, delayed, wake = unpack(keys)
  local now = now_us()
  promote(held, ready, turns, now)
  promote(delayed, ready, turns, now)
  local reply = {-1}
  local popped = redis.call('ZPOPMIN', ready, args[1])
  if #popped > 0 then
    keep_indexed(turns, held)
    local lease_end = text(now + args[2])
    local offsets, leases, noted, places = {}, {}, {}, {}
    for i = 1, #popped, 2 do offsets[#offsets + 1] = popped[i] end
    local old = redis.call('HMGET', turns, unpack(offsets))
    local found = redis.call('HMGET', messages, unpack(offsets))
    for i, offset in ipairs(offsets) do
      local turn, attempts = 0, 0
      if old[i] then
        turn, attempts = string.match(old[i], '(%d+):(%-?%d+)')
        turn, attempts = tonumber(turn), tonumber(attempts)
      end
      noted[2 * i - 1] = offset
      noted[2 * i] = (turn + 1) .. ':' .. (attempts + 1) .. ':' .. popped[2 * i]
      leases[2 * i - 1] = lease_end
      leases[2 * i] = offset
      reply[#reply + 1] = tonumber(offset)
      reply[#reply + 1] = turn + 1
      reply[#reply + 1] = attempts + 1
      reply[#reply + 1] = found[i]
    end
    redis.call('HSET', turns, unpack(noted))
    redis.call('ZADD', held, unpack(leases))
  end
  if redis.call('ZCARD', ready) > 0 then
    reply[1] = 0
    wake_one(wake)
  else
    redis.call('DEL', wake)
    for _, name in ipairs({held, delayed}) do
      local next = redis.call('ZRANGE', name, 0, 0, 'WITHSCORES')[2]
      if next and next ~= 'inf' then
        local wait = math.max(0, next - now)
        if reply[1] < 0 or wait < reply[1] then reply[1] = wait end
      end
    end
  end
  return reply
end, {'allow-oom'})

-- Tell which of these hand-overs are still held: a list of true and false.
local function still_held(turns, held, args, first, step)
  local offsets, kept = {}, {}
  for i = first, #args, step do offsets[#offsets + 1] = args[i] end
  local found = redis.call('HMGET', turns, unpack(offsets))
  local leases = redis.call('ZMSCORE', held, unpack(offsets))
  for i = 1, #offsets do
    local turn = found[i] and string.match(found[i], '%d+')
    kept[i] = leases[i] and turn == args[first + (i - 1) * step + 1]
  end
  return kept
end

-- Settle as done. Returns the places of those that are not held under this turn.
-- keys: all; args: for each: offset, turn
register('ack', function(keys, args)
  local info, messages, turns, age, ready, held = unpack(keys)
  local ours, lost = {}, {}
  for i, kept in ipairs(still_held(turns, held, args, 1, 2)) do
    if kept then ours[#ours + 1] = args[2 * i - 1] else lost[#lost + 1] = i - 1 end
  end
  if #ours > 0 then
    redis.call('HDEL', messages, unpack(ours))
    redis.call('HDEL', turns, unpack(ours))
    redis.call('ZREM', held, unpack(ours))
    redis.call('ZREM', age, unpack(ours))
  end
  return lost
end, {'allow-oom'})

-- Settle in any way. Returns the places of those that are not held under this turn.
-- keys: all; args: for each: offset, turn, action (back, done, dead), delay, attempts, reason
register('settle', function(keys, args)
  local info, messages, turns, age, ready, held, delayed, wake, dead, letters = unpack(keys)
  local now, lost = now_us(), {}
  for i = 1, #args, 6 do
    local offset, turn, action, delay, attempts, reason = unpack(args, i, i + 5)
    local found, _, rank = turn_of(turns, offset)
    if found ~= tonumber(turn) or not redis.call('ZSCORE', held, offset) then
      lost[#lost + 1] = (i - 1) / 6
    elseif action == 'back' then
      note_turn(turns, offset, found, attempts, rank)
      redis.call('ZREM', held, offset)
      if delay == '0' then
        redis.call('ZADD', ready, rank, offset)
      else
        redis.call('ZADD', delayed, text(now + delay), offset)
      end
      wake_one(wake)
    else
      if action == 'dead' then
        local message = redis.call('HGET', messages, offset)
        local letter = cmsgpack.pack(tonumber(attempts), text(now), reason, message)
        redis.call('HSET', letters, offset, letter)
        redis.call('ZADD', dead, redis.call('HINCRBY', info, 'died', 1), offset)
      end
      redis.call('HDEL', messages, offset)
      redis.call('HDEL', turns, offset)
      redis.call('ZREM', held, offset)
      redis.call('ZREM', age, offset)
    end
  end
  return lost
end, {'allow-oom'})

-- Hold for some microseconds from now. Returns the places of those that are lost.
-- keys: all; args: microseconds, then for each: offset, turn
register('extend', function(keys, args)
  local info, messages, turns, age, ready, held = unpack(keys)
  local lease_end, lost = text(now_us() + args[1]), {}
  for i, kept in ipairs(still_held(turns, held, args, 2, 2)) do
    if kept then
      redis.call('ZADD', held, lease_end, args[2 * i])
    else
      lost[#lost + 1] = i - 1
    end
  end
  return lost
end, {'allow-oom'})

-- Return pending, held, delayed, dead, dropped, microseconds since the oldest was stored.
-- keys: all
register('stat', function(keys)
  local info, messages, turns, age, ready, held, delayed, wake, dead = unpack(keys)
  local now = now_us()
  local oldest = redis.call('ZRANGE', age, 0, 0)[1]
  return {
    redis.call('ZCARD', age),
    redis.call('ZCOUNT', held, '(' .. text(now), '(+inf'),
    redis.call('ZCOUNT', delayed, '(' .. text(now), '(+inf'),
    redis.call('ZCARD', dead),
    tonumber(redis.call('HGET', info, 'dropped') or 0),
    oldest and math.max(0, now - 10 * oldest) or -1,
  }
end, {'no-writes'})

-- Return state, attempts, offset and message of what waits: what is ready in its order, then what is
-- not, by when it will be.
-- keys: all; args: limit
register('peek', function(keys, args)
  local info, messages, turns, age, ready, held, delayed = unpack(keys)
  local limit, now = tonumber(args[1]), now_us()
  local reply, waiting = {}, {}
  local function add(state, offset)
    local message = redis.call('HGET', messages, offset)
    local _, attempts = turn_of(turns, offset)
    if message then
      reply[#reply + 1] = state
      reply[#reply + 1] = attempts
      reply[#reply + 1] = tonumber(offset)
      reply[#reply + 1] = message
    end
  end
  for _, offset in ipairs(redis.call('ZRANGE', ready, 0, limit - 1)) do add('ready', offset) end
  for state, name in pairs({held = held, delayed = delayed}) do
    local page = redis.call('ZRANGE', name, 0, limit - 1, 'WITHSCORES')
    for i = 1, #page, 2 do
      waiting[#waiting + 1] = {tonumber(page[i + 1]), page[i], state}
    end
  end
  table.sort(waiting, function(a, b) return a[1] < b[1] end)
  for _, one in ipairs(waiting) do
    if #reply >= 4 * limit then break end
    add(one[1] <= now and 'ready' or one[3], one[2])
  end
  return reply
end, {'no-writes'})

-- Remove all that waits, whoever holds it. Returns how many.
-- keys: all
register('purge', function(keys)
  local info, messages, turns, age, ready, held, delayed, wake = unpack(keys)
  local number = redis.call('ZCARD', age)
  redis.call('UNLINK', messages, turns, age, ready, held, delayed, wake)
  return number
end, {'allow-oom'})

-- Return up to so many dead letters, oldest first: each packed.
-- keys: all; args: limit
register('dead', function(keys, args)
  local dead, letters = keys[9], keys[10]
  local offsets = redis.call('ZRANGE', dead, 0, args[1] - 1)
  local reply = {}
  for i, offset in ipairs(offsets) do
    local attempts, died, reason, message = cmsgpack.unpack(redis.call('HGET', letters, offset))
    reply[i] = {attempts, died, reason, tonumber(offset), message}
  end
  return reply
end, {'no-writes'})

-- Remove all dead letters. Returns how many.
-- keys: all
register('bury', function(keys)
  local number = redis.call('ZCARD', keys[9])
  redis.call('UNLINK', keys[9], keys[10])
  return number
end, {'allow-oom'})

-- Send dead letters back: each is one or the other at every moment. Returns how many were,
-- and where to go on ('' at the end).
-- keys: all; args: seed, limit, from, then the ids that are meant (none: any)
register('replay', function(keys, args)
  local info, messages, turns, age, ready, held, delayed, wake, dead, letters = unpack(keys)
  math.randomseed(tonumber(args[1]))
  local limit = tonumber(args[2])
  local wanted = #args == 3
  local meant = {}
  for i = 4, #args do meant[args[i]] = true end
  local discipline = redis.call('HGET', info, 'discipline')
  local now, number = now_us(), 0
  local page = redis.call('ZRANGE', dead, args[3], '+inf', 'BYSCORE', 'LIMIT', 0, STEP, 'WITHSCORES')
  for i = 1, #page, 2 do
    if number == limit then return {number, ''} end
    local _, _, _, message = cmsgpack.unpack(redis.call('HGET', letters, page[i]))
    -- It begins with the priority's digit and the id.
    if wanted or meant[string.sub(message, 2, 17)] then
      local offset = take_offsets(info, now, 1) + 1
      local name = text(offset)
      redis.call('HSET', messages, name, message)
      redis.call('ZADD', age, name, name)
      redis.call('ZADD', ready, rank_of(discipline, offset, string.sub(message, 1, 1)), name)
      redis.call('ZREM', dead, page[i])
      redis.call('HDEL', letters, page[i])
      number = number + 1
    end
  end
  if number > 0 then wake_one(wake) end
  return {number, #page == 2 * STEP and '(' .. page[2 * STEP] or ''}
end)
