-- Gives a maintenance lock back, if the caller still holds it.
--
-- ARGV[2]  cluster, 4 bytes
-- ARGV[3]  fencing token
-- ARGV[4]  '1' the cluster is not due any more
-- Returns  1

local lock = prefix .. 'lock:' .. number(struct.unpack('>I4', ARGV[2]))
if redis.call('GET', lock) == ARGV[3] then
  redis.call('DEL', lock)
  if ARGV[4] == '1' and served(ARGV[1]) then redis.call('SREM', prefix .. 'due', ARGV[2]) end
end
return 1
