-- Outcome and acknowledgement in one step, for up to 64 messages. Repeating the call is harmless.
-- Removes the incarnation's unacknowledged record and, only if it was there and the task was still open, writes the
-- reply or result, releases admission and books usage. The open task is the right to answer.
-- KEYS: 1 unacknowledged records, 2 started marks, 3 open tasks, 4 lost counts, 5 dead letters, 6 usage of the day,
--       7 index of kombu's own unacknowledged records ('' with our transport).
-- ARGV: 1 seconds a result is kept, 2 seconds a reply is kept, then 19 fields a message:
--   tag, task id, admitted (1/0), kind (reply, result, none), where (reply list or result key), blob,
--   staged (key of a large blob written before, or ''; the blob given here then stands in should it have gone), task record ('' if none), state, body key ('' if none),
--   lost (digest under which losses are counted, or ''), dead letter ('' if none), usage field, tokens,
--   the sets of its model, of its tenant in its lane and of its queue, in which it was counted at admission,
--   its tenant's token clock ('' if none), seconds by which that is wrong.
-- Returns one number a message: 1 answered, 0 somebody else had answered, -1 the record was not ours any more.
local FIELDS = 19
local result_s, reply_s = ARGV[1], ARGV[2]
local answers, usage, order = {}, {}, {}
for at = 3, #ARGV, FIELDS do
  local tag, id, admitted, kind, where, blob = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local staged, record, state, body = ARGV[at + 6], ARGV[at + 7], ARGV[at + 8], ARGV[at + 9]
  local lost, dead, field, tokens = ARGV[at + 10], ARGV[at + 11], ARGV[at + 12], tonumber(ARGV[at + 13])
  local answer = -1
  if redis.call('HDEL', KEYS[1], tag) == 1 then
    redis.call('HDEL', KEYS[2], tag)
    if KEYS[7] ~= '' then redis.call('ZREM', KEYS[7], tag) end
    if lost ~= '' then redis.call('HDEL', KEYS[4], lost) end
    answer = 0
    if admitted == '0' or redis.call('ZREM', KEYS[3], id) == 1 then
      answer = 1
      if admitted == '1' then
        for i = 14, 16 do redis.call('ZREM', ARGV[at + i], id) end
        local clock = ARGV[at + 17]
        local paid = clock ~= '' and redis.call('GET', clock)
        -- not by INCRBYFLOAT: from a script it corrupts the memory of Redis 6.2
        if paid then redis.call('SET', clock, string.format('%.6f', paid + ARGV[at + 18]), 'KEEPTTL') end
      end
      if kind == 'reply' then
        redis.call('RPUSH', where, blob)
        redis.call('EXPIRE', where, reply_s)
      elseif kind == 'result' then
        if staged == '' then
          redis.call('SETEX', where, result_s, blob)
          redis.call('PUBLISH', where, blob)
        elseif redis.call('EXISTS', staged) == 1 then
          redis.call('RENAME', staged, where)
          redis.call('EXPIRE', where, result_s)
          redis.call('PUBLISH', where, redis.call('GET', where))
        else
          redis.call('SETEX', where, result_s, blob)
        end
      end
      if record ~= '' and redis.call('EXISTS', record) == 1 then
        redis.call('HSET', record, 'state', state)
        redis.call('EXPIRE', record, result_s)
      end
      if dead ~= '' then redis.call('LPUSH', KEYS[5], dead) end
      if field ~= '' then
        if not usage[field] then
          usage[field] = {0, 0}
          order[#order + 1] = field
        end
        usage[field][1] = usage[field][1] + 1
        usage[field][2] = usage[field][2] + tokens
      end
    end
    if body ~= '' then redis.call('DEL', body) end
    if answer == 0 and staged ~= '' then redis.call('DEL', staged) end
  end
  answers[#answers + 1] = answer
end
for i = 1, #order do
  redis.call('HINCRBY', KEYS[6], order[i] .. '|requests', usage[order[i]][1])
  redis.call('HINCRBY', KEYS[6], order[i] .. '|tokens', usage[order[i]][2])
end
if #order > 0 then redis.call('EXPIRE', KEYS[6], 3456000) end
return answers
