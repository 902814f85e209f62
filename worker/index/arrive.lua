-- One arrival: recognise it, or insert it and read what was there before, in one step.
-- Running it again with the same arguments changes nothing and answers with the same sequence.
-- Work: O(probes + tail budget), whatever the namespace holds.
--
-- ARGV[2]  image id
-- ARGV[3]  what does not vary in size, packed (BE): u8 placing, else only recognising; u8 storing,
--          else a check that writes nothing; 16 bytes SHA-256 of the id; 16 bytes SHA-256 of the
--          image; u32 partition; u48 offset; u32 records a reply may carry; u32 cluster limit, at
--          which a cluster is due; u32 hard limit, at which an insert is refused
-- ARGV[4]  vector, 128 x int8                                                   (placing)
-- ARGV[5]  probed clusters, home first: 4 bytes id + 12 bytes state the caller holds  (placing)
-- Returns  {outcome, log version, sequence, verdict or id, origin sequence, tails}
--   new       unknown id and bytes (recognise only)
--   seen      settled before; verdict holds its bytes
--   conflict  the id is known with other bytes
--   exact     same bytes as the origin, whose id is in verdict's place
--   placed    inserted now (a check: nothing written; origin is the image's own earlier sequence)
--   again     inserted before but never settled
--             both: tails hold 4 bytes cluster, 12 bytes state, u32 index of the first record,
--             u32 how many, the records; ...
--   moved     a cluster named is retired: follow the log
--   behind    the tails are over the budget: load the clusters, ask again
--   full      a home cluster is at the hard limit: split it, ask again
--   stale     the generation does not answer any more, or the server's history is another

if not served(ARGV[1]) then return {'stale', 0, 0, '', 0, ''} end
local id = ARGV[2]
local placing, storing, digest, sha, partition, high, low, budget, limit, hard_limit =
  struct.unpack('>BBc16c16I4I2I4I4I4I4', ARGV[3])
placing, storing = placing == 1, storing == 1
local offset = high * 4294967296 + low
local counters = redis.call('HMGET', meta, 'version', 'sequence')
local current, count = tonumber(counters[1]), tonumber(counters[2])

local function answer(outcome, sequence, verdict, origin, tails)
  return {outcome, current, sequence or 0, verdict or '', origin or 0, tails or ''}
end

-- The sequence this event was given earlier, or nil when it is to be inserted.
-- An id may live more than once (add, delete, add): an older event finds its own life.
local function earlier_life(sequence)
  for _ = 1, 16 do
    local record = read_record(sequence)
    local before = redis.call('HGET', record_key(sequence), field(sequence, 3))
    local older = partition == record.partition and offset < record.offset
    if not (older and before and read_record(tonumber(before)).sha == sha) then
      if record.kind ~= DELETED then return sequence, record end
      local replayed = partition == record.deleted_partition and offset < record.deleted_offset
      if replayed then return sequence, record end
      return nil, nil
    end
    sequence = tonumber(before)
  end
  return nil, nil
end

local function tails(probes)
  local names, found, total = {}, {}, 0
  for i = 1, #probes, 16 do names[#names + 1] = string.sub(probes, i, i + 3) end
  if #names == 0 then return 'placed', '' end
  local states = redis.call('HMGET', clusters, unpack(names))
  for i, cluster in ipairs(names) do
    local held = string.sub(probes, i * 16 - 11, i * 16)
    if not states[i] then return 'moved', '' end
    if states[i] ~= held then
      local epoch, length = struct.unpack('>I4I4', states[i])
      local known_epoch, first = struct.unpack('>I4I4', held)
      if known_epoch ~= epoch then first = 0 end
      total = total + length - first
      if total > budget then return 'behind', '' end
      found[#found + 1] = cluster .. states[i] .. struct.pack('>I4I4', first, length - first)
      if length > first then found[#found + 1] = read_records(cluster, first, length) end
    end
  end
  return 'placed', table.concat(found)
end

local known = redis.call('HGET', prefix .. 'id:' .. bucket(digest, count), digest)
local sequence, record
if known then
  known = tonumber(known)
  if storing then sequence, record = earlier_life(known) end
end

if sequence then
  if record.sha ~= sha then return answer('conflict', sequence) end
  local verdict = redis.call('HGET', record_key(sequence), field(sequence, 2))
  if verdict then return answer('seen', sequence, verdict) end
  if record.kind == COPY then
    return answer('exact', sequence, image_name(record.where), record.where)
  end
  if not placing then return answer('new') end
  local outcome, found = tails(ARGV[5])
  return answer(outcome == 'placed' and 'again' or outcome, sequence, '', 0, found)
end

local function copies_key() return prefix .. 'copies:' .. sha end

-- The earliest living image with these bytes that is not the image itself.
local function same_bytes()
  local head = redis.call('HGET', prefix .. 'sha:' .. bucket(sha, count), sha)
  if not head then return nil end
  head = tonumber(head)
  if head ~= known then return head end
  local copy = redis.call('ZRANGE', copies_key(), 0, 0)[1]
  return copy and tonumber(copy)
end

local function insert(kind, where)
  local new = next_sequence()
  redis.call('HSET', prefix .. 'id:' .. bucket(digest, new), digest, number(new))
  write_record(new, {
    kind = kind, sha = sha, partition = partition, offset = offset, where = where,
  }, id)
  if known then redis.call('HSET', record_key(new), field(new, 3), number(known)) end
  return new
end

local original = same_bytes()
if original then
  local name = image_name(original)
  if not storing then return answer('exact', count + 1, name, original) end
  local new = insert(COPY, original)
  redis.call('ZADD', copies_key(), new, number(new))
  return answer('exact', new, name, original)
end
if not placing then return answer('new') end

-- Everything is read before anything is written: an error leaves no trace.
local outcome, found = tails(ARGV[5])
if outcome ~= 'placed' then return answer(outcome) end
if not storing then return answer('placed', count + 1, '', known or 0, found) end
local home = string.sub(ARGV[5], 1, 4)
local state = state_of(home)
if state.length >= hard_limit then
  redis.call('SADD', prefix .. 'due', home)
  return answer('full', 0, home)
end
local new = insert(LIVE, struct.unpack('>I4', home))
redis.call('HSET', prefix .. 'sha:' .. bucket(sha, new), sha, number(new))
append(home, state, struct.pack('<I8', new) .. ARGV[4])
write_state(home, state)
if state.length >= limit then redis.call('SADD', prefix .. 'due', home) end
return answer('placed', new, '', 0, found)
