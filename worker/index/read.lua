-- The records of one cluster from an index on, as they are at one instant.
--
-- ARGV[2]  cluster, 4 bytes
-- ARGV[3]  state the caller holds, 12 bytes
-- Returns  {state, index of the first record answered, records}, or {} when the cluster is retired

if not served(ARGV[1]) then return {} end
local packed = redis.call('HGET', clusters, ARGV[2])
if not packed then return {} end
local epoch, length = struct.unpack('>I4I4', packed)
local known_epoch, first = struct.unpack('>I4I4', ARGV[3])
if known_epoch ~= epoch then first = 0 end
return {packed, first, length > first and read_records(ARGV[2], first, length) or ''}
