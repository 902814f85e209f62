-- Names images, deleted ones too.
--
-- ARGV[2…] sequences
-- Returns  the image id of each, nothing in the place of one that is unknown; {} when the generation
--          is gone or the server's history is another

if not served(ARGV[1]) then return {} end
local names = {}
for at = 2, #ARGV do
  local sequence = tonumber(ARGV[at])
  names[at - 1] = redis.call('HGET', record_key(sequence), field(sequence, 1))
end
return names
