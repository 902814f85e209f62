-- The records of some clusters, of each from an index on, as they are at one instant.
--
-- ARGV[2…] cluster, 4 bytes; state the caller holds, 12 bytes; ...
-- Returns  state, index of the first record answered, records, of each cluster in turn; '', 0, ''
--          for a retired one; {} when the generation is gone or the server's history is another

if not served(ARGV[1]) then return {} end
local found = {}
for at = 2, #ARGV, 2 do
  local state, first, records = redis.call('HGET', clusters, ARGV[at]), 0, ''
  if state then
    local epoch, length = struct.unpack('>I4I4', state)
    local known_epoch, held = struct.unpack('>I4I4', ARGV[at + 1])
    if known_epoch == epoch then first = held end
    if length > first then records = read_records(ARGV[at], first, length) end
  end
  found[#found + 1], found[#found + 2], found[#found + 3] = state or '', first, records
end
return found
