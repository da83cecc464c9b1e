-- Move what waits in queues of pools that are no more to the shared queue of the same machine profile and lane, behind
-- what waits there. Any number of processes may call this at once: a message is in one list or in the other.
-- A pool's queues are known from the first time anybody says that the pool is there; one of which nobody has said so
-- for some time is gone, so that a process that has yet to hear of a new pool takes nothing from it.
-- KEYS: 1 known queues of pools, as '<pool>.<machine profile>', scored by when they were last said to be there.
-- ARGV: 1 prefix of queues, 2 shared pool, 3 seconds after which one is gone, 4 seconds one stays known, 5 most messages,
--       6 prefix of bells, 7 number of lanes, then the lanes, then the queues that the caller knows to be there.
-- Returns how many messages were moved.
local now = tonumber(redis.call('TIME')[1])
local most, lanes = tonumber(ARGV[5]), tonumber(ARGV[7])
local standing, moved = {}, 0
for at = 8 + lanes, #ARGV do standing[ARGV[at]] = true end
for _, known in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[3]))) do
  if not standing[known] then
    local profile = string.match(known, '[^.]*$')
    for lane = 8, 7 + lanes do
      local from = ARGV[1] .. known .. '.' .. ARGV[lane]
      local to = ARGV[1] .. ARGV[2] .. '.' .. profile .. '.' .. ARGV[lane]
      local came = moved
      while moved < most do
        local raw = redis.call('RPOP', from)
        if not raw then break end
        redis.call('LPUSH', to, raw)
        moved = moved + 1
      end
      if moved > came and redis.call('EXISTS', ARGV[6] .. to) == 0 then redis.call('RPUSH', ARGV[6] .. to, '1') end
    end
    if moved < most and tonumber(redis.call('ZSCORE', KEYS[1], known)) < now - tonumber(ARGV[4]) then
      redis.call('ZREM', KEYS[1], known)
    end
  end
end
for queue in pairs(standing) do redis.call('ZADD', KEYS[1], now, queue) end
return moved
