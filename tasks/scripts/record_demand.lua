-- Record that a request has found no worker at a place: a pool's machine profile. Any number of processes may.
-- KEYS: 1 index of demands, 2 this one, 3 start times.
-- ARGV: 1 place, 2 seconds without a request after which a demand is over, 3 pool, 4 machine profile, 5 model.
-- Returns {seconds since the demand began, seconds the last start at this place took, or '' if none was measured}.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('HSETNX', KEYS[2], 'since', string.format('%.6f', now))
redis.call('HINCRBY', KEYS[2], 'asked', 1)
redis.call('HSET', KEYS[2], 'pool', ARGV[3], 'machine_profile', ARGV[4], 'model', ARGV[5],
  'last', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[1], now, ARGV[1])
local waited = now - redis.call('HGET', KEYS[2], 'since')
return {string.format('%.3f', waited), redis.call('HGET', KEYS[3], ARGV[1]) or ''}
