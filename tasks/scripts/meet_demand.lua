-- A worker is ready at a place: its demand is met, and how long that took is what the next callers are told.
-- With a demand that is the time since its first request, which counts the machine's start, too. Without one it is the
-- worker's own start, and only where nothing was measured before.
-- KEYS: 1 index of demands, 2 the place's demand, 3 start times.
-- ARGV: 1 place, 2 seconds the worker took to start.
-- Returns 1 if there was a demand.
redis.call('ZREM', KEYS[1], ARGV[1])
local since = redis.call('HGET', KEYS[2], 'since')
redis.call('DEL', KEYS[2])
if since then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[3], ARGV[1], string.format('%.3f', time[1] + time[2] / 1e6 - since))
  return 1
end
redis.call('HSETNX', KEYS[3], ARGV[1], ARGV[2])
return 0
