-- Tells the number of a topic in a namespace: topics count from 0, as their first event comes.
-- Kept for all generations, because what one says of an event is compared with what another does.
--
-- ARGV[2]  topic id
-- Returns  the number, or -1 stale

if not served(ARGV[1]) then return -1 end
local known = redis.call('HGET', KEYS[1], 'topic:' .. ARGV[2])
if known then return tonumber(known) end
local new = redis.call('HINCRBY', KEYS[1], 'topics', 1) - 1
redis.call('HSET', KEYS[1], 'topic:' .. ARGV[2], new)
return new
