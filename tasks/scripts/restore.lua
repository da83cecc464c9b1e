-- Return messages of a dead incarnation to their queues: test and move in one step, newest first so that the oldest
-- ends where it is popped next. A message that was running is counted as lost once more.
-- KEYS: 1 heartbeat, 2 unacknowledged records, 3 started marks, 4 lost counts, 5 dead letters, 6 incarnations.
-- ARGV: 1 incarnation, 2 most messages, 3 most bytes, 4 prefix of bells.
-- Returns {-1, 0} if the incarnation lives, else {moved, left}.
if redis.call('EXISTS', KEYS[1]) == 1 then return {-1, 0} end
local tags = redis.call('HKEYS', KEYS[2])
table.sort(tags, function(a, b) return tonumber(a) > tonumber(b) end)
local moved, bytes = 0, 0
for _, tag in ipairs(tags) do
  if moved >= tonumber(ARGV[2]) or bytes >= tonumber(ARGV[3]) then break end
  local record = redis.call('HGET', KEYS[2], tag)
  local running = redis.call('HEXISTS', KEYS[3], tag)
  redis.call('HDEL', KEYS[2], tag)
  local cut = string.find(record, '\n', 1, true)
  if cut then
    local queue, raw = string.sub(record, 1, cut - 1), string.sub(record, cut + 1)
    redis.call('RPUSH', queue, raw)
    if running == 1 then redis.call('HINCRBY', KEYS[4], redis.sha1hex(raw), 1) end
    if redis.call('EXISTS', ARGV[4] .. queue) == 0 then redis.call('RPUSH', ARGV[4] .. queue, '1') end
  else
    redis.call('LPUSH', KEYS[5], cjson.encode({queue = '', raw = record, reason = 'unreadable record'}))
  end
  moved = moved + 1
  bytes = bytes + #record
end
local left = #tags - moved
if left == 0 then
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('HDEL', KEYS[6], ARGV[1])
end
return {moved, left}
