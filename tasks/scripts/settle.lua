-- Close one open task from outside the worker that may hold it: cancelled by its caller, or overdue.
-- Only who removes it from the open tasks answers. The message itself may still be queued: its id is left among the
-- cancelled ones, so that a worker drops it uncomputed.
-- KEYS: 1 open tasks, 2 cancelled ids, 3 task record, 4 result key, 5 body key, 6.. the sets in which it is counted.
-- ARGV: 1 task id, 2 state, 3 result ('' if nobody will read one), 4 seconds the result is kept,
--       5 seconds the id stays among the cancelled ones, 6 the score of a task that has not started, if none that has
--       shall be closed.
-- The cancelled ids go one by one as others come, and all at once when the last of them has stayed its time.
-- Returns 1 if this call settled the task, 0 if somebody else has, or will as it has started.
if ARGV[6] and tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0) ~= tonumber(ARGV[6]) then return 0 end
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
for i = 6, #KEYS do redis.call('ZREM', KEYS[i], ARGV[1]) end
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[5]), ARGV[1])
local furthest = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
redis.call('EXPIREAT', KEYS[2], math.ceil(tonumber(furthest)))
if ARGV[3] ~= '' then
  redis.call('SETEX', KEYS[4], ARGV[4], ARGV[3])
  redis.call('PUBLISH', KEYS[4], ARGV[3])
end
if redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HSET', KEYS[3], 'state', ARGV[2])
  redis.call('EXPIRE', KEYS[3], ARGV[4])
end
redis.call('DEL', KEYS[5])
return 1
