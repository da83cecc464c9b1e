-- Count the open tasks of some sets. What is overdue counts no more, on Redis' own clock, as at admission.
-- KEYS: the sets. Returns a number for each.
local time = redis.call('TIME')
local now = string.format('%.6f', tonumber(time[1]) + tonumber(time[2]) / 1000000)
local counts = {}
for i, set in ipairs(KEYS) do counts[i] = redis.call('ZCOUNT', set, now, '+inf') end
return counts
