-- Take up to ARGV[2] messages over the worker's queues and record each as unacknowledged in the same step.
-- A message is never parsed here: its headers may be hostile.
-- KEYS: 1 heartbeat, 2 closing mark, 3 unacknowledged records, 4 lost counts, 5 cancelled ids, 6.. queues, most urgent lane first.
-- ARGV: 1 number of queues of the first lane, 2 messages wanted, 3 first tag, 4 messages popped so far,
--       5 which lower queue has its turn, 6 prefix of bells, 7.. room of each queue.
-- Returns: {'gone'}: the heartbeat has expired; {'closing'}; else {'ok', cancelled ids known, next turn, tag, queue index, lost, raw, ...}.
if redis.call('EXISTS', KEYS[1]) == 0 then return {'gone'} end
if redis.call('EXISTS', KEYS[2]) == 1 then return {'closing'} end

local FIRST_QUEUE = 6
local queues = #KEYS - FIRST_QUEUE + 1
local tops, wanted, tag = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local popped, turn = tonumber(ARGV[4]), tonumber(ARGV[5])
local room, asked, empty, taken, count = {}, {}, {}, {}, 0
for i = 1, queues do
  room[i] = tonumber(ARGV[6 + i])
  asked[i] = room[i] > 0
end

local function take(i, most)
  most = math.min(most, room[i], wanted - count)
  if most <= 0 or empty[i] then return 0 end
  local raws = redis.call('RPOP', KEYS[FIRST_QUEUE + i - 1], most)
  local got = raws and #raws or 0
  for k = 1, got do
    count = count + 1
    taken[count] = {i, raws[k]}
  end
  room[i] = room[i] - got
  empty[i] = got < most
  return got
end

-- Of every eight messages, counted over pops, one comes from the lower lanes in turn.
local lower = queues - tops
if lower > 0 then
  local share = math.floor((popped + wanted) / 8) - math.floor(popped / 8)
  for _ = 1, share do
    for _ = 1, lower do
      turn = turn % lower + 1
      if take(tops + turn, 1) == 1 then break end
    end
  end
end
-- The rest, an unused share included, in the order of lanes.
for i = 1, queues do take(i, wanted) end

local bells = {}
for i = 1, queues do
  local bell = ARGV[6] .. KEYS[FIRST_QUEUE + i - 1]
  if not asked[i] then
    -- no room for this queue: its bell is others'
  elseif empty[i] then
    bells[#bells + 1] = bell
  elseif redis.call('EXISTS', KEYS[FIRST_QUEUE + i - 1]) == 0 then
    bells[#bells + 1] = bell
  elseif redis.call('EXISTS', bell) == 0 then
    redis.call('RPUSH', bell, '1')
  end
end
if #bells > 0 then redis.call('DEL', unpack(bells)) end

local reply = {'ok', 0, turn}
if count == 0 then return reply end
local counted = redis.call('EXISTS', KEYS[4]) == 1
local records = {}
for k = 1, count do
  local i, raw = taken[k][1], taken[k][2]
  local lost = 0
  if counted then lost = tonumber(redis.call('HGET', KEYS[4], redis.sha1hex(raw)) or 0) end
  records[#records + 1] = tag
  records[#records + 1] = KEYS[FIRST_QUEUE + i - 1] .. '\n' .. raw
  reply[#reply + 1] = tag
  reply[#reply + 1] = i
  reply[#reply + 1] = lost
  reply[#reply + 1] = raw
  tag = tag + 1
end
redis.call('HSET', KEYS[3], unpack(records))
reply[2] = redis.call('ZCARD', KEYS[5])
return reply
