-- Close open tasks that nobody has settled long after their deadline: their message was lost, or nobody pops its queue.
-- Any number of processes may call this at once: only who removes a task from the open tasks answers. A message that is
-- still there is answered uncomputed by the worker that pops it; a body that travels by key has a time to live.
-- KEYS: 1 open tasks.
-- ARGV: 1 most tasks, 2 seconds a score must lie back, 3 prefix of task records, 4 prefix of result keys, 5 state,
--       6 seconds a result is kept, 7.. the result in three parts: between the first two stands the task id, between
--       the last two the model, both as msgpack.
-- Returns how many tasks were closed.
local now = tonumber(redis.call('TIME')[1])
local overdue = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]), 'LIMIT', 0, ARGV[1])
for _, id in ipairs(overdue) do
  redis.call('ZREM', KEYS[1], id)
  local record, result_key = ARGV[3] .. id, ARGV[4] .. id
  if redis.call('EXISTS', record) == 1 then
    local model = redis.call('HGET', record, 'model') or ''
    local result = ARGV[7] .. cmsgpack.pack(id) .. ARGV[8] .. cmsgpack.pack(model) .. ARGV[9]
    redis.call('HSET', record, 'state', ARGV[5])
    redis.call('EXPIRE', record, ARGV[6])
    redis.call('SETEX', result_key, ARGV[6], result)
    redis.call('PUBLISH', result_key, result)
  end
end
return #overdue
