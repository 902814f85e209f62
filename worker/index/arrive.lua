-- One arrival: recognise it, or insert it and read what was there before, in one step.
-- Running it again with the same arguments changes nothing and answers with the same sequence.
-- Work: O(probes + tail budget), whatever the namespace holds.
--
-- ARGV[2]   mode: 'recognise' (no vector yet) or 'place'
-- ARGV[3]   '1' store, '0' check: answer without writing
-- ARGV[4]   image id
-- ARGV[5]   first 16 bytes of the id's SHA-256
-- ARGV[6]   first 16 bytes of the image's SHA-256
-- ARGV[7]   partition
-- ARGV[8]   offset
-- ARGV[9]   vector, 128 x int8                                             (place)
-- ARGV[10]  clusters to store it in, 4 bytes each (BE), one or two         (place)
-- ARGV[11]  probed clusters: 4 bytes id + 12 bytes state the caller holds  (place)
-- ARGV[12]  records a reply may carry
-- ARGV[13]  cluster limit: at it the cluster is due for a split
-- ARGV[14]  hard limit: at it the insert is refused until the split is done
-- Returns   {outcome, log version, sequence, verdict or id, origin sequence, tails}
--   new       unknown id and bytes (recognise only)
--   seen      settled before; verdict holds its bytes
--   conflict  the id is known with other bytes
--   exact     same bytes as the origin, whose id is in verdict's place
--   placed    inserted now (a check: nothing written; origin is the image's own earlier sequence)
--   again     inserted before but never settled
--             both: tails hold cluster, state, first record's index, records, ...
--   moved     a cluster named is retired: follow the log
--   behind    the tails are over the budget: load the clusters, ask again
--   full      a home cluster is at the hard limit: split it, ask again
--   stale     the generation does not answer any more

if not served(ARGV[1]) then return {'stale', 0, 0, '', 0, {}} end
local placing, storing = ARGV[2] == 'place', ARGV[3] == '1'
local id, digest, sha = ARGV[4], ARGV[5], ARGV[6]
local partition, offset = tonumber(ARGV[7]), tonumber(ARGV[8])
local current = version()
local count = sequences()

local function answer(outcome, sequence, verdict, origin, tails)
  return {outcome, current, sequence or 0, verdict or '', origin or 0, tails or {}}
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
  if #names == 0 then return 'placed', found end
  local states = redis.call('HMGET', clusters, unpack(names))
  for i, cluster in ipairs(names) do
    local held = string.sub(probes, i * 16 - 11, i * 16)
    if not states[i] then return 'moved', {} end
    if states[i] ~= held then
      local epoch, length = struct.unpack('>I4I4', states[i])
      local known_epoch, first = struct.unpack('>I4I4', held)
      if known_epoch ~= epoch then first = 0 end
      total = total + length - first
      if total > tonumber(ARGV[12]) then return 'behind', {} end
      found[#found + 1] = cluster
      found[#found + 1] = states[i]
      found[#found + 1] = first
      found[#found + 1] = length > first and read_records(cluster, first, length) or ''
    end
  end
  return 'placed', found
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
    return answer('exact', sequence, image_name(record.origin), record.origin)
  end
  if not placing then return answer('new') end
  local outcome, found = tails(ARGV[11])
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

local function insert(kind, fields)
  local new = next_sequence()
  redis.call('HSET', prefix .. 'id:' .. bucket(digest, new), digest, number(new))
  redis.call('HSET', record_key(new), field(new, 1), id)
  if known then redis.call('HSET', record_key(new), field(new, 3), number(known)) end
  fields.kind, fields.sha, fields.partition, fields.offset = kind, sha, partition, offset
  write_record(new, fields)
  return new
end

local original = same_bytes()
if original then
  local name = image_name(original)
  if not storing then return answer('exact', count + 1, name, original) end
  local new = insert(COPY, {origin = original})
  redis.call('ZADD', copies_key(), new, number(new))
  return answer('exact', new, name, original)
end
if not placing then return answer('new') end

-- Everything is read before anything is written: an error leaves no trace.
local outcome, found = tails(ARGV[11])
if outcome ~= 'placed' then return answer(outcome) end
if not storing then return answer('placed', count + 1, '', known or 0, found) end
local homes = {}
for i = 1, #ARGV[10], 4 do
  local cluster = string.sub(ARGV[10], i, i + 3)
  local state = state_of(cluster)
  if not state then return answer('moved') end
  if state.length >= tonumber(ARGV[14]) then
    redis.call('SADD', prefix .. 'due', cluster)
    return answer('full', 0, cluster)
  end
  homes[#homes + 1] = {cluster, state}
end
local second = homes[2] and struct.unpack('>I4', homes[2][1]) or 0
local new = insert(LIVE, {home = struct.unpack('>I4', homes[1][1]), second = second})
redis.call('HSET', prefix .. 'sha:' .. bucket(sha, new), sha, number(new))
for _, home in ipairs(homes) do
  append(home[1], home[2], struct.pack('<I8', new) .. ARGV[9])
  write_state(home[1], home[2])
  if home[2].length >= tonumber(ARGV[13]) then redis.call('SADD', prefix .. 'due', home[1]) end
end
return answer('placed', new, '', 0, found)
